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

/* N8: folds the state before, whose O is rest(n) for n8 tile n, and the split in part and o: m and l are left in part, O goes
 * to to(n, values). The loads of AT_ONCE n8 tiles are on their way together: many where they come from far away, few where
 * registers are. */
template <int AT_ONCE, int N, class Rest, class To>
static __device__ __forceinline__ void fold_states(const RowPair &before, Rest rest, RowPair &part,
                                                   const float (&o)[N][4], To to) {
    static_assert(N % AT_ONCE == 0, "whole turns");
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
    for (int first = 0; first < N; first += AT_ONCE) {
        float4 r[AT_ONCE];
#pragma unroll
        for (int n = 0; n < AT_ONCE; n++)
            r[n] = rest(first + n);
        __syncwarp(); /* or the compiler asks for more at once, and spills */
#pragma unroll
        for (int n = 0; n < AT_ONCE; n++) {
            const float (&x)[4] = o[first + n];
            to(first + n, make_float4(fad_f32_fold(r[n].x, a[0], x[0], b[0]), fad_f32_fold(r[n].y, a[0], x[1], b[0]),
                                      fad_f32_fold(r[n].z, a[1], x[2], b[1]), fad_f32_fold(r[n].w, a[1], x[3], b[1])));
        }
    }
}
/* The same; the sum is left in o. */
template <int AT_ONCE, int N, class Rest>
static __device__ __forceinline__ void fold_into(const RowPair &before, Rest rest, RowPair &part, float (&o)[N][4]) {
    fold_states<AT_ONCE>(before, rest, part, o, [&](int n, const float4 &sum) {
        o[n][0] = sum.x, o[n][1] = sum.y, o[n][2] = sum.z, o[n][3] = sum.w;
    });
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
/* Whether that holds for some values of a row: nothing is so small that it could become subnormal, and no result has
 * overflowed. l of a row is at most about 2^34, a key's p being at most the square root of 2: the quotient of a value from
 * LOW on is then normal, and so is what remains in near_quotient. The bound on l below is there for Inf and NaN. */
struct QuotientRange {
    static constexpr unsigned LOW = (127u - 80) << 24; /* 2^-80 */
    unsigned smallest = ~0u; /* twice a value's bits, its magnitude, less 1: 0 is exact, and counts as large */
    unsigned sum = 0; /* of the rounded results, two by two: not finite if one of them is not, or if it overflows */
    __device__ __forceinline__ void add_value(float x) {
        const unsigned bits = fad_f32_bits(x);
        smallest = min(smallest, bits + bits - 1);
    }
    template <fad_dtype T> __device__ __forceinline__ void add_result(unsigned pair) { sum = add2<T>(sum, pair); }
    template <fad_dtype T> __device__ __forceinline__ bool near(float l) const {
        return l >= 0.5f && l < 0x1p100f && smallest >= LOW && !exponents_full<T>(sum);
    }
};

/* N9: two values of out, rounded, as one word. */
template <fad_dtype T> static __device__ __forceinline__ unsigned round_out(float low, float high) {
    if (low == low && high == high)
        return pack2<T>(low, high);
    return T == FAD_BFLOAT16 ? fad_bf16_round(low) | (unsigned)fad_bf16_round(high) << 16
                             : fad_f16_round(low) | (unsigned)fad_f16_round(high) << 16;
}

/* N9: eight values of a row, rounded; inverse: 1 / l. */
template <fad_dtype T> static __device__ __forceinline__ uint4 divide_chunk(float (&x)[8], float l, float inverse) {
    QuotientRange range;
    unsigned pairs[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        pairs[i] = pack2<T>(near_quotient(x[2 * i], l, inverse), near_quotient(x[2 * i + 1], l, inverse));
        range.add_value(x[2 * i]);
        range.add_value(x[2 * i + 1]);
        range.add_result<T>(pairs[i]);
    }
    if (range.near<T>(l))
        return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
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

/* What has to be known of a row of the tile to finish it: its final state, and factors for its values. */
struct FinishedRow {
    float m, l, inverse, sink; /* inverse: 1 / l; sink: what O is to be multiplied by */

    __device__ __forceinline__ FinishedRow(const fad_attn_problem &p, const Tile &t, int r, float m_, float l_)
        : m(m_), l(l_), sink(1) {
        if (r >= t.n_active)
            m = FAD_F32_SENTINEL, l = 0; /* whatever the unused rows of the tile have computed */
        else if (p.sinks)
            sink = fold_sink(p, t, r, m, l);
        inverse = fad_f32_div(1.0f, l);
    }
};

/* N8 (sink), N9, N10 for a warp's rows first .. first + 15 of the tile: to lse, and rounded to `staged`, 16 rows of N chunks
 * for this warp alone. Lane i finishes row i % 16, and tells those that hold its values. What runs once a tile is fetched
 * slowly, and jumps make that worse: the common way has none, and tells afterwards whether all values were in its range. */
template <fad_dtype T, int N>
static __device__ __forceinline__ void finish_rows(const fad_attn_problem &p, const Tile &t, int first,
                                                   const RowPair &state, float (&o)[N][4], char *staged) {
    int lane = threadIdx.x % 32;
    asm volatile("" : "+r"(lane), "+r"(first), "+l"(staged)); /* as opaque() */
    const int g = lane / 4, own = first + lane % 16;
    float m[2], l[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        m[half] = __shfl_sync(~0u, state.m[half], lane % 8 * 4);
        l[half] = __shfl_sync(~0u, state.l[half], lane % 8 * 4);
    }
    const FinishedRow of_own(p, t, own, lane % 16 < 8 ? m[0] : m[1], lane % 16 < 8 ? l[0] : l[1]);
    if (lane < 16 && own < t.n_rows)
        store_lse(p, t, own, of_own.m, of_own.l);
    __syncwarp(); /* or the compiler takes all that follows for divergent */
    float inverse[2];
    QuotientRange range[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        l[half] = __shfl_sync(~0u, of_own.l, g + half * 8);
        inverse[half] = __shfl_sync(~0u, of_own.inverse, g + half * 8);
    }
    if (p.sinks) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float sink = __shfl_sync(~0u, of_own.sink, g + half * 8);
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; e++)
                    o[n][e] = fad_f32_mul(o[n][e], sink);
        }
    }
#pragma unroll
    for (int n = 0; n < N; n += 2) {
        unsigned pairs[4]; /* of tile n + i / 2, row half i % 2 */
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int half = i % 2;
            const float x = o[n + i / 2][2 * half], y = o[n + i / 2][2 * half + 1];
            pairs[i] = pack2<T>(near_quotient(x, l[half], inverse[half]), near_quotient(y, l[half], inverse[half]));
            range[half].add_value(x);
            range[half].add_value(y);
            range[half].add_result<T>(pairs[i]);
        }
        store_fragment<N>(pairs, staged, 0, n / 2);
    }
    bool near = true;
#pragma unroll
    for (int half = 0; half < 2; half++)
        near &= (first + g + half * 8 >= t.n_rows) | range[half].near<T>(l[half]);
    if (__all_sync(~0u, near))
        return;
    __syncwarp();   /* what other lanes have stored may be overwritten */
    float4 copy[N]; /* in memory, as registers cannot be indexed */
    rest_state(copy, 1, o);
#pragma unroll 1
    for (int n = 0; n < N; n++) {
        const float4 x = copy[n];
        auto to = [&](int half) { return (unsigned *)(staged + swizzled<N>(g + half * 8, n) + lane % 4 * 4); };
        *to(0) = round_out<T>(fad_f32_finish_out(x.x, l[0]), fad_f32_finish_out(x.y, l[0]));
        *to(1) = round_out<T>(fad_f32_finish_out(x.z, l[1]), fad_f32_finish_out(x.w, l[1]));
    }
}

/* A warp's rows first .. first + 15 of the tile to out, from where they were staged. */
template <int N>
static __device__ __forceinline__ void store_staged(const fad_attn_problem &p, const Tile &t, int first,
                                                    const char *staged) {
    int lane = threadIdx.x % 32;
    asm volatile("" : "+r"(lane), "+r"(first), "+l"(staged)); /* as opaque() */
    static_assert(N <= 32, "a lane's chunks are of one column");
    constexpr int STEP = 32 / N; /* a lane stores a chunk of every STEPth row */
    const int chunk = lane % N, n_rows = chunk * 8 < p.Dv ? t.n_rows - first : 0;
    RowWalk<STEP> walk(p.out, t.seq.out + chunk * 8, t, first + lane / N);
#pragma unroll 8
    for (int i = 0; i < 16 / STEP; i++, walk.advance()) {
        const int r = i * STEP + lane / N;
        const uint4 values = *(const uint4 *)(staged + swizzled<N>(r, chunk));
        if (r < n_rows)
            *(uint4 *)((char *)p.out.data + walk.at) = values;
    }
}

static __device__ __forceinline__ float partial_value(float o, bool active) {
    return active ? fad_f32_canonical(fad_f32_add(o, 0.0f)) : 0;
}

/* N9: a split's states of a warp's rows first .. first + 15, spilled; N * 8 values from `first_dim` on, and m and l with the
 * first of them. Lane i finds row i % 16, and tells those that hold its values. */
template <int N>
static __device__ __forceinline__ void spill_rows(const fad_attn_problem &p, const Tile &t,
                                                  const fad_partials &partials, int64_t nth, int first,
                                                  const RowPair &state, const float (&o)[N][4], int first_dim) {
    const int lane = opaque_lane();
    const int own = min(first + lane % 16, t.n_rows - 1);
    const int64_t row = partial_row(p, t, own, nth), values = partial_values(p, t, own, nth);
    const int n_end = ((int)p.Dv - first_dim) / 8; /* Dv is a multiple of 8 */
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int r = first + lane / 4 + half * 8, from = lane / 4 + half * 8;
        const bool exists = r < t.n_rows, active = r < t.n_active;
        const int64_t at = __shfl_sync(~0u, row, from);
        float *const to = (float *)partials.o + __shfl_sync(~0u, values, from) + first_dim + lane % 4 * 2;
        if (first_dim == 0 && exists && lane % 4 == 0) {
            ((float *)partials.m)[at] = active ? state.m[half] : FAD_F32_SENTINEL;
            ((float *)partials.l)[at] = active ? fad_f32_canonical(state.l[half]) : 0;
        }
#pragma unroll
        for (int n = 0; n < N; n++)
            if (exists & (n < n_end))
                *(float2 *)(to + 8 * n) =
                    make_float2(partial_value(o[n][2 * half], active), partial_value(o[n][2 * half + 1], active));
    }
    __syncwarp(); /* or the compiler takes all that follows for divergent */
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
