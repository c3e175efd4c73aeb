/* From a warp's rows of O at rest in shared memory to out, lse and partial states. A loop over shared memory, which can be
 * indexed, is less code than registers would take: it runs once a tile or split, and what is not in the instruction cache
 * comes slowly. */
#ifndef FAD_CUDA_HOPPER_TILE_FINISH_CUH
#define FAD_CUDA_HOPPER_TILE_FINISH_CUH

#include "hopper_tile_shared.cuh"
#include "mma_output.cuh"

/* Where lane 4g + t put its values of row g + 8 * half: pairs of float2, those of n8 tile n 64 * n further on. */
struct RestRow {
    const float2 *of_t[4];

    template <int N> __device__ __forceinline__ RestRow(const RestTile<N> &rest, int g, int half) {
#pragma unroll
        for (int t = 0; t < 4; t++)
            of_t[t] = (const float2 *)&rest[0][rest_place(g, t)] + half;
    }
    /* The row's eight values of tile n. */
    __device__ __forceinline__ void read(int n, float (&x)[8]) const {
#pragma unroll
        for (int t = 0; t < 4; t++) {
            const float2 pair = of_t[t][64 * n];
            x[2 * t] = pair.x, x[2 * t + 1] = pair.y;
        }
    }
};

/* What a lane has to know of a row of the tile to finish it; lane i finds it for row i % 16 of a warp's, and tells. */
struct FinishedRow {
    float m, l, inverse, sink; /* inverse: 1 / l; sink: what O is to be multiplied by */
    int64_t place;             /* where it begins in out */

    __device__ __forceinline__ FinishedRow(const fad_attn_problem &p, const Tile &t, int r, float2 state)
        : m(state.x), l(state.y), sink(1) {
        if (r >= t.n_active)
            m = FAD_F32_SENTINEL, l = 0; /* whatever the unused rows of the tile have computed */
        else if (p.sinks)
            sink = fold_sink(p, t, r, m, l);
        inverse = fad_f32_div(1.0f, l);
        const Row row = row_of(t, r);
        place = t.seq.out + row.i * p.out.stride_s + row.h * p.out.stride_h;
    }
};

/* N8 (sink), N9, N10 for the 16 rows from `first` on of a tile, by one warp: dims from first_dim on to out and, with the
 * first of them, lse. state: m and l of row `first` + lane % 16. TOGETHER: chunks that a lane has in work at a time. As in
 * finish_rows, quotients are computed the near way, and afterwards one test tells whether all were in its range. */
template <fad_dtype T, int TOGETHER, int N>
static __device__ __forceinline__ void finish_rest(const fad_attn_problem &p, const Tile &t, int first, int first_dim,
                                                   const RestTile<N> &rest, float2 state) {
    int lane = threadIdx.x % 32;
    asm volatile("" : "+r"(lane)); /* or it is read again and again */
    const int g = lane % 8, own = first + lane % 16;
    const FinishedRow of_own(p, t, own, state);
    if (lane < 16 && own < t.n_rows && first_dim == 0)
        store_lse(p, t, own, of_own.m, of_own.l);
#pragma unroll 1
    for (int half = 0; half < 2; half++) {
        const int r = g + half * 8;
        const float l = __shfl_sync(~0u, of_own.l, r), inverse = __shfl_sync(~0u, of_own.inverse, r),
                    sink = __shfl_sync(~0u, of_own.sink, r);
        uint16_t *const to = (uint16_t *)p.out.data + __shfl_sync(~0u, of_own.place, r) + first_dim;
        const RestRow row(rest, g, half);
        const int n_end = first + r < t.n_rows ? min(N, ((int)p.Dv - first_dim) / 8) : 0;
        QuotientRange range;
#pragma unroll TOGETHER
        for (int i = 0; i < N / 4; i++) {
            const int n = i * 4 + lane / 8;
            float x[8];
            unsigned pairs[4];
            row.read(n, x);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float a = fad_f32_mul(x[2 * j], sink), b = fad_f32_mul(x[2 * j + 1], sink);
                pairs[j] = pack2<T>(near_quotient(a, l, inverse), near_quotient(b, l, inverse));
                range.add_value(a);
                range.add_value(b);
                range.add_result<T>(pairs[j]);
            }
            if (n < n_end)
                *(uint4 *)(to + n * 8) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
        if (n_end == 0 || range.near<T>(l))
            continue;
#pragma unroll 1
        for (int at = 0; at < N; at++) {
            const int n = at / 4 * 4 + lane / 8, j = at % 4;
            const float2 x = *((const float2 *)&rest[n][rest_place(g, j)] + half);
            if (n < n_end)
                *(unsigned *)(to + n * 8 + 2 * j) = round_out<T>(fad_f32_finish_out(fad_f32_mul(x.x, sink), l),
                                                                 fad_f32_finish_out(fad_f32_mul(x.y, sink), l));
        }
    }
}

/* N9: the same rows as partial states of the nth split. */
template <int TOGETHER, int N>
static __device__ __forceinline__ void spill_rest(const fad_attn_problem &p, const Tile &t,
                                                  const fad_partials &partials, int64_t nth, int first, int first_dim,
                                                  const RestTile<N> &rest, float2 state) {
    int lane = threadIdx.x % 32;
    asm volatile("" : "+r"(lane)); /* as above */
    const int g = lane % 8, own = first + lane % 16;
    const int64_t place = partial_row(p, t, own, nth), values = partial_values(p, t, own, nth);
    if (lane < 16 && own < t.n_rows && first_dim == 0) {
        ((float *)partials.m)[place] = own < t.n_active ? state.x : FAD_F32_SENTINEL;
        ((float *)partials.l)[place] = own < t.n_active ? fad_f32_canonical(state.y) : 0;
    }
#pragma unroll 1
    for (int half = 0; half < 2; half++) {
        const int r = g + half * 8;
        float *const to = (float *)partials.o + __shfl_sync(~0u, values, r) + first_dim;
        const RestRow row(rest, g, half);
        const int n_end = first + r < t.n_rows ? min(N, ((int)p.Dv - first_dim) / 8) : 0;
#pragma unroll TOGETHER
        for (int i = 0; i < N / 4; i++) {
            const int n = i * 4 + lane / 8;
            float x[8];
            row.read(n, x);
#pragma unroll
            for (int j = 0; j < 8; j++)
                x[j] = partial_value(x[j], first + r < t.n_active);
            if (n < n_end) {
                *(float4 *)(to + n * 8) = make_float4(x[0], x[1], x[2], x[3]);
                *(float4 *)(to + n * 8 + 4) = make_float4(x[4], x[5], x[6], x[7]);
            }
        }
    }
}

/* N9, N10: the empty state of the nth split, which no row of the tile sees; by one warp. */
static __device__ __forceinline__ void spill_empty(const fad_attn_problem &p, const Tile &t,
                                                   const fad_partials &partials, int64_t nth) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int r = 0; r < t.n_rows; r++) {
        const int64_t at = partial_row(p, t, r, nth), values = partial_values(p, t, r, nth);
        if (lane == 0)
            ((float *)partials.m)[at] = FAD_F32_SENTINEL, ((float *)partials.l)[at] = 0;
        for (int d = lane; d < p.Dv; d += 32)
            ((float *)partials.o)[values + d] = 0;
    }
}

/* N10: a tile that sees no key, to out and lse; by one warp. */
static __device__ __forceinline__ void finish_empty(const fad_attn_problem &p, const Tile &t) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int r = 0; r < t.n_rows; r++) {
        float m = FAD_F32_SENTINEL, l = 0;
        if (p.sinks && r < t.n_active)
            fold_sink(p, t, r, m, l);
        if (lane == 0)
            store_lse(p, t, r, m, l);
        uint16_t *const to = (uint16_t *)out_row(p, t, r).data;
        for (int d = lane; d < p.Dv; d += 32)
            to[d] = 0;
    }
}

#endif
