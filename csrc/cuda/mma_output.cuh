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
    const bool same = a[0] == 1 && a[1] == 1 && b[0] == 1 && b[1] == 1;
    if (__all_sync(~0u, same)) { /* most often; factors of 1 change nothing */
#pragma unroll
        for (int n = 0; n < N; n++) {
            const float4 r = rest(n);
            o[n][0] = fad_f32_add(r.x, o[n][0]);
            o[n][1] = fad_f32_add(r.y, o[n][1]);
            o[n][2] = fad_f32_add(r.z, o[n][2]);
            o[n][3] = fad_f32_add(r.w, o[n][3]);
        }
        return;
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
    unsigned largest = 0, smallest = ~0u; /* magnitudes as bits; 0 is exact, and does not count as small */
#pragma unroll
    for (int i = 0; i < N; i++) {
        const unsigned magnitude = fad_f32_bits(x[i]) & 0x7fffffffu;
        largest = max(largest, magnitude);
        smallest = min(smallest, magnitude - 1);
    }
    constexpr unsigned LOW = (127u - 80) << 23, HIGH = (127u + 100) << 23; /* 2^-80, 2^100 */
    return l >= 0.5f && l < 0x1p100f && smallest >= LOW && largest < HIGH;
}
/* The same for a lane's values of row g (half 0) or g + 8 (half 1). */
template <int N> static __device__ __forceinline__ bool quotients_near(const float (&o)[N][4], int half, float l) {
    float x[2 * N];
#pragma unroll
    for (int n = 0; n < N; n++)
        x[2 * n] = o[n][2 * half], x[2 * n + 1] = o[n][2 * half + 1];
    return quotients_near(x, l);
}

/* N9: two values of out, rounded, as one word. */
template <fad_dtype T> static __device__ __forceinline__ unsigned round_out(float low, float high) {
    if (low == low && high == high)
        return pack2<T>(low, high);
    return T == FAD_BFLOAT16 ? fad_bf16_round(low) | (unsigned)fad_bf16_round(high) << 16
                             : fad_f16_round(low) | (unsigned)fad_f16_round(high) << 16;
}

/* N8 (sink), N9, N10 for rows first + g and first + g + 8 of the tile: lse to memory, and out, rounded, to `staged`, a
 * tile of CHUNKS chunks a row, N * 8 values of it from `first_dim` on. write_lse: this warp is the one that does. */
template <fad_dtype T, int CHUNKS, int N>
static __device__ __forceinline__ void finish_rows(const fad_attn_problem &p, const Tile &t, int first,
                                                   const RowPair &state, float (&o)[N][4], char *staged, int first_dim,
                                                   bool write_lse) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int r = first + lane / 4 + half * 8;
        float m = state.m[half], l = state.l[half];
        if (r >= t.n_active)
            m = FAD_F32_SENTINEL, l = 0; /* whatever the unused rows of the tile have computed */
        if (p.sinks) {
            const float sink = r < t.n_active ? fold_sink(p, t, r, m, l) : 1;
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; e++)
                    o[n][e] = fad_f32_mul(o[n][e], sink);
        }
        if (write_lse && lane % 4 == 0 && r < t.n_rows)
            store_lse(p, t, r, m, l);
        const bool near = quotients_near(o, half, l);
        const float inverse = fad_f32_div(1.0f, l);
#pragma unroll
        for (int n = 0; n < N; n++) {
            const float x = o[n][2 * half], y = o[n][2 * half + 1];
            unsigned *to = (unsigned *)(staged + swizzled<CHUNKS>(r, first_dim / 8 + n) + lane % 4 * 4);
            if (near)
                *to = pack2<T>(near_quotient(x, l, inverse), near_quotient(y, l, inverse));
            else
                *to = round_out<T>(fad_f32_finish_out(x, l), fad_f32_finish_out(y, l));
        }
    }
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
    if (quotients_near(x, l)) {
        const float inverse = fad_f32_div(1.0f, l);
#pragma unroll
        for (int i = 0; i < 8; i++)
            x[i] = near_quotient(x[i], l, inverse);
    } else {
#pragma unroll 1
        for (int turn = 0; turn < 8; turn++) { /* goes round, as registers cannot be indexed */
            const float last = fad_f32_finish_out(x[0], l);
#pragma unroll
            for (int i = 0; i < 7; i++)
                x[i] = x[i + 1];
            x[7] = last;
        }
    }
    return make_uint4(round_out<T>(x[0], x[1]), round_out<T>(x[2], x[3]), round_out<T>(x[4], x[5]),
                      round_out<T>(x[6], x[7]));
}

/* Rows first .. first + ROWS - 1 of a tile to out, by THREADS threads; `staged` must hold them. */
template <int ROWS, int CHUNKS, int THREADS>
static __device__ __forceinline__ void store_staged(const fad_attn_problem &p, const Tile &t, const char *staged,
                                                    int thread, int first = 0) {
#pragma unroll 2
    for (int at = thread; at < ROWS * CHUNKS; at += THREADS) {
        const int r = first + at / CHUNKS, chunk = at % CHUNKS;
        if (r < t.n_rows && chunk * 8 < p.Dv)
            *(uint4 *)((uint16_t *)out_row(p, t, r).data + chunk * 8) =
                *(const uint4 *)(staged + swizzled<CHUNKS>(r, chunk));
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
