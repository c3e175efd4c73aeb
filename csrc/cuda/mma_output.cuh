/* From a warp's 16 rows of O to the fold of splits (N8), partial states (N9) and out. Lane 4g + t holds, of each n8
 * tile, values 2t and 2t + 1 of rows g (elements 0, 1) and g + 8 (2, 3). */
#ifndef FAD_CUDA_MMA_OUTPUT_CUH
#define FAD_CUDA_MMA_OUTPUT_CUH

#include "mma_memory.cuh"
#include "mma_softmax.cuh"
#include "output.cuh"

/* Final or running states of rows g and g + 8. */
struct RowPair {
    float m[2], l[2];
};

/* N8: folds the state before, whose O is rest(n) for n8 tile n, and the split in part and o; the sum is left there. */
template <int N, class Rest>
static __device__ __forceinline__ void fold_into(const RowPair &before, Rest rest, RowPair &part, float (&o)[N][4]) {
    float a[2], b[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float now = fad_f32_max(part.m[i], before.m[i]);
        a[i] = fad_f32_pow2(fad_f32_sub(before.m[i], now));
        b[i] = fad_f32_pow2(fad_f32_sub(part.m[i], now));
        part.l[i] = fad_f32_fold(before.l[i], a[i], part.l[i], b[i]);
        part.m[i] = now;
    }
#pragma unroll
    for (int n = 0; n < N; n++) {
        const float4 r = rest(n);
        o[n][0] = fad_f32_fold(r.x, a[0], o[n][0], b[0]);
        o[n][1] = fad_f32_fold(r.y, a[0], o[n][1], b[0]);
        o[n][2] = fad_f32_fold(r.z, a[1], o[n][2], b[1]);
        o[n][3] = fad_f32_fold(r.w, a[1], o[n][3], b[1]);
    }
}
template <int N> static __device__ __forceinline__ void rest_state(float4 *rest, int stride, const float (&o)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++)
        rest[n * stride] = make_float4(o[n][0], o[n][1], o[n][2], o[n][3]);
}

/* N9: o / l where `inverse` is 1 / l, rounded: two fused steps (Markstein) give the correctly rounded quotient as long as
 * nothing in them is subnormal or overflows; no difference in 1e10 pairs, constructed hard ones among them. -0 becomes
 * +0. */
static __device__ __forceinline__ float near_quotient(float o, float l, float inverse) {
    const float q = fad_f32_mul(o, inverse);
    return fad_f32_fma(fad_f32_fma(-q, l, o), inverse, q);
}
/* Whether that holds for some values of a row. */
template <int N> static __device__ __forceinline__ bool quotients_near(const float (&x)[N], float l) {
    unsigned largest = 0, smallest = ~0u; /* twice a value's bits: its magnitude; 0 is exact, and one less is large */
#pragma unroll
    for (int i = 0; i < N; i++) {
        const unsigned bits = fad_f32_bits(x[i]);
        largest = max(largest, bits + bits);
        smallest = min(smallest, bits + bits - 1);
    }
    constexpr unsigned LOW = (127u - 80) << 24, HIGH = (127u + 100) << 24; /* 2^-80, 2^100 */
    return l >= 0.5f && l < 0x1p100f && smallest >= LOW && largest < HIGH;
}

/* N9: two values of out, rounded, as one word. */
template <fad_dtype T> static __device__ __forceinline__ unsigned round_out(float low, float high) {
    if (low == low && high == high)
        return pack2<T>(low, high);
    return T == FAD_BFLOAT16 ? fad_bf16_round(low) | (unsigned)fad_bf16_round(high) << 16
                             : fad_f16_round(low) | (unsigned)fad_f16_round(high) << 16;
}

/* N9: eight values of a row whose l and 1 / l these are, rounded; the first if they are in the range for it. */
template <fad_dtype T>
static __device__ __forceinline__ uint4 near_chunk(const float (&x)[8], float l, float inverse) {
    auto pair = [&](int i) { return pack2<T>(near_quotient(x[i], l, inverse), near_quotient(x[i + 1], l, inverse)); };
    return make_uint4(pair(0), pair(2), pair(4), pair(6));
}
template <fad_dtype T> static __device__ __forceinline__ uint4 divide_chunk(float (&x)[8], float l, float inverse) {
    if (quotients_near(x, l))
        return near_chunk<T>(x, l, inverse);
#pragma unroll 1
    for (int turn = 0; turn < 8; turn++) { /* goes round, as registers cannot be indexed */
        const float last = fad_f32_finish_out(x[0], l);
#pragma unroll
        for (int i = 0; i < 7; i++)
            x[i] = x[i + 1];
        x[7] = last;
    }
    return make_uint4(round_out<T>(x[0], x[1]), round_out<T>(x[2], x[3]), round_out<T>(x[4], x[5]),
                      round_out<T>(x[6], x[7]));
}

/* N8 (sink), N9, N10 for eight values of row r: those of out, rounded; and lse, if that is this lane's to write. */
template <fad_dtype T>
static __device__ __forceinline__ uint4 finish_chunk(const fad_attn_problem &p, const Tile &t, int r, float m, float l,
                                                     float (&x)[8], bool write_lse) {
    if (r >= t.n_active)
        m = FAD_F32_SENTINEL, l = 0; /* whatever the unused rows of the tile have computed */
    if (p.sinks && r < t.n_active) {
        const float sink = fold_sink(p, t, r, m, l);
#pragma unroll
        for (int i = 0; i < 8; i++)
            x[i] = fad_f32_mul(x[i], sink);
    }
    if (write_lse)
        store_lse(p, t, r, m, l);
    return divide_chunk<T>(x, l, fad_f32_div(1.0f, l));
}

/* N8 (sink), N9, N10 for a warp's rows first .. first + 15 of the tile, all of them. By way of `staged`, 16 rows of
 * 8 * STAGED values for this warp alone. What runs once a tile is fetched slowly, and jumps make that worse: the common way
 * is a short loop without any, and says afterwards whether everything was in its range. */
template <fad_dtype T, int STAGED, int N>
static __device__ __forceinline__ void finish_rows(const fad_attn_problem &p, const Tile &t, int first, RowPair state,
                                                   const float (&o)[N][4], float *staged) {
    constexpr int MASK = STAGED < 8 ? STAGED - 1 : 7; /* against bank conflicts */
    int lane = threadIdx.x % 32;
    /* The compiler must not know that these are the same for every tile: it would compute addresses before the loop over
     * tiles, and spill what the loop over blocks keeps in registers. */
    asm volatile("" : "+r"(lane), "+r"(first), "+l"(staged));
    const int g = lane / 4;
    float sink[2] = {1, 1}, inverse[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int r = first + g + half * 8;
        float &m = state.m[half], &l = state.l[half];
        if (r >= t.n_active)
            m = FAD_F32_SENTINEL, l = 0; /* whatever the unused rows of the tile have computed */
        else if (p.sinks)
            sink[half] = fold_sink(p, t, r, m, l);
        if (lane % 4 == 0 && r < t.n_rows)
            store_lse(p, t, r, m, l);
        inverse[half] = fad_f32_div(1.0f, l);
    }
    /* Where row first + lane % 16 of out begins: the lanes that store its chunks ask this one. */
    const Row row = row_of(t, min(first + lane % 16, t.n_rows - 1));
    const int64_t place = t.seq.out + row.i * p.out.stride_s + row.h * p.out.stride_h;
    /* finish: eight values of a row, its l, 1 / l, and whether they exist, become their chunk of out. */
    auto each_chunk = [&](int from, auto finish) {
#pragma unroll 4
        for (int at = lane; at < 16 * STAGED; at += 32) {
            const int r = at / STAGED, n = at % STAGED, of = r % 8 * 4, d = (from + n) * 8;
            const float4 *values = (const float4 *)(staged + (r * STAGED + (n ^ r & MASK)) * 8);
            const float4 low = values[0], high = values[1];
            float x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
            const float l[2] = {__shfl_sync(~0u, state.l[0], of), __shfl_sync(~0u, state.l[1], of)};
            const float one_over[2] = {__shfl_sync(~0u, inverse[0], of), __shfl_sync(~0u, inverse[1], of)};
            uint16_t *to = (uint16_t *)p.out.data + __shfl_sync(~0u, place, r) + d;
            const bool exists = first + r < t.n_rows && d < p.Dv;
            const uint4 out = finish(x, r < 8 ? l[0] : l[1], r < 8 ? one_over[0] : one_over[1], exists);
            if (exists)
                *(uint4 *)to = out;
        }
    };
#pragma unroll
    for (int from = 0; from < N; from += STAGED) {
        bool near = true;
        __syncwarp(); /* nobody reads what was staged */
#pragma unroll
        for (int n = 0; n < STAGED; n++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                *(float2 *)(staged + ((g + half * 8) * STAGED + (n ^ g & MASK)) * 8 + lane % 4 * 2) =
                    make_float2(fad_f32_mul(o[from + n][2 * half], sink[half]),
                                fad_f32_mul(o[from + n][2 * half + 1], sink[half]));
        __syncwarp(); /* the values are staged */
        each_chunk(from, [&](float(&x)[8], float l, float one_over, bool exists) {
            near &= quotients_near(x, l) || !exists;
            return near_chunk<T>(x, l, one_over);
        });
        if (!__all_sync(~0u, near))
            each_chunk(from, [&](float(&x)[8], float l, float one_over, bool) { return divide_chunk<T>(x, l, one_over); });
    }
}

static __device__ __forceinline__ float partial_value(float o, bool active) {
    return active ? fad_f32_canonical(fad_f32_add(o, 0.0f)) : 0;
}

/* N9: a split's states of rows first + g and first + g + 8, spilled; N * 8 values from `first_dim` on. */
template <int N>
static __device__ __forceinline__ void
spill_rows(const fad_attn_problem &p, const Tile &t, const fad_partials &partials, int64_t nth, int first,
           const RowPair &state, const float (&o)[N][4], int first_dim, bool write_ml) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int r = first + lane / 4 + half * 8;
        if (r >= t.n_rows)
            continue;
        const bool active = r < t.n_active;
        if (write_ml && lane % 4 == 0) {
            const int64_t at = partial_row(p, t, r, nth);
            ((float *)partials.m)[at] = active ? state.m[half] : FAD_F32_SENTINEL;
            ((float *)partials.l)[at] = active ? fad_f32_canonical(state.l[half]) : 0;
        }
        float *to = (float *)partials.o + partial_values(p, t, r, nth);
#pragma unroll
        for (int n = 0; n < N; n++) {
            const int d = first_dim + 8 * n + lane % 4 * 2;
            if (d < p.Dv) /* Dv is even */
                *(float2 *)(to + d) =
                    make_float2(partial_value(o[n][2 * half], active), partial_value(o[n][2 * half + 1], active));
        }
    }
}

/* N9, N10: the empty states of splits from .. to - 1, which no row of the tile sees. All threads. */
static __device__ __noinline__ void spill_empty(const fad_attn_problem &p, const Tile &t, const fad_partials &partials,
                                                int64_t from, int64_t to, int thread, int threads) {
    for (int64_t nth = from; nth < to; nth++)
        for (int r = 0; r < t.n_rows; r++) {
            const int64_t at = partial_row(p, t, r, nth), values = partial_values(p, t, r, nth);
            if (thread == 0)
                ((float *)partials.m)[at] = FAD_F32_SENTINEL, ((float *)partials.l)[at] = 0;
            for (int d = thread; d < p.Dv; d += threads)
                ((float *)partials.o)[values + d] = 0;
        }
}

#endif
