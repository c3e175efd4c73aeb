/* N8 on spilled states: a warp folds some dims of a row of out. */
#ifndef FAD_CUDA_FOLD_CUH
#define FAD_CUDA_FOLD_CUH

#include "fold_row.cuh"
#include "output.cuh"
#include "ptx.cuh"

/* A row's running state, and what the 32 splits after it do to it: lane i holds what split i does. Maxima are exact in any
 * order, so that all of them can be found at once. */
struct FoldFactors {
    float before, part, l; /* of the state before, of the split's; the split's own l */

    /* running: m before; becomes m after. part_m: SENTINEL where there is no split. */
    __device__ FoldFactors(float &running, float part_m, float part_l) : l(part_l) {
        const int lane = threadIdx.x % 32;
        float now = part_m;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const float below = __shfl_up_sync(~0u, now, step);
            now = lane >= step ? fad_f32_max(now, below) : now;
        }
        now = fad_f32_max(now, running);
        const float last = __shfl_up_sync(~0u, now, 1);
        before = fad_f32_pow2(fad_f32_sub(lane ? last : running, now));
        part = fad_f32_pow2(fad_f32_sub(part_m, now));
        running = __shfl_sync(~0u, now, 31);
    }
};

constexpr int FOLD_WARPS = 4; /* of a thread block */

/* The fold of splits in ascending order, to out and lse, by a warp for 32 times VALUES dims of a row: 1, where there are so
 * few rows that time is all latency, or 4, where rows begin at multiples of four. Nothing hides how late memory is but
 * asking for many splits at once, and little code, which comes from memory too; what needs no state is done before they
 * are there. */
template <int VALUES>
static __global__ void __launch_bounds__(FOLD_WARPS * 32, 4)
    fold_splits(const __grid_constant__ fad_attn_problem p, const fad_partials partials,
                const __grid_constant__ FoldWork work) {
    constexpr int DIMS = 32 * VALUES, TURN = 8, TURNS = VALUES == 1 ? 4 : 2; /* TURNS of TURN splits are on their way */
    __shared__ Tile tiles[FOLD_WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_dims = (int)p.Dv;
    const FoldedRow row(p, work, (int64_t)blockIdx.x * FOLD_WARPS + warp, tiles[warp]);
    const Tile &t = row.t;
    if (!t.exists)
        return;
    const int d = row.part * DIMS + lane * VALUES, n = row.n;      /* the lane's first dim; splits */
    const int64_t rows = (p.cu_seqlens_q ? 1 : p.B) * p.Hq * p.Sq; /* of a split */
    const float *part_m = (const float *)partials.m + partial_row(p, t, 0, row.begin),
                *part_l = (const float *)partials.l + partial_row(p, t, 0, row.begin),
                *part_o = (const float *)partials.o + partial_values(p, t, 0, row.begin);
    const OutRow out = out_row(p, t, 0);
    float m = FAD_F32_SENTINEL, l = 0, o[VALUES] = {};
    alignas(16) float values[TURNS][TURN][VALUES];
    auto load = [&](float (&turn)[TURN][VALUES], int from) {
#pragma unroll
        for (int i = 0; i < TURN; i++) {
            const float *x = part_o + (from + i) * rows * n_dims + d;
            const bool exists = from + i < n && d < n_dims;
            if constexpr (VALUES == 1)
                turn[i][0] = exists ? *x : 0;
            else
                *(float4 *)turn[i] = exists ? *(const float4 *)x : make_float4(0, 0, 0, 0);
        }
    };
    wait_for_last_kernel(); /* the states are there */
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++)
        load(values[turn], turn * TURN);
#pragma unroll 1
    for (int base = 0; base < n; base += 32) {
        const int own = base + lane;
        const float of_m = own < n ? part_m[own * rows] : FAD_F32_SENTINEL, of_l = own < n ? part_l[own * rows] : 0;
        const FoldFactors factors(m, of_m, of_l);
#pragma unroll
        for (int at = 0; at < 32; at += TURN) {
            if (base + at >= n)
                break;
            float (&turn)[TURN][VALUES] = values[at / TURN % TURNS];
#pragma unroll
            for (int i = 0; i < TURN; i++) { /* folding an empty state changes nothing but -0 */
                const float a = __shfl_sync(~0u, factors.before, at + i), b = __shfl_sync(~0u, factors.part, at + i);
                l = fad_f32_fold(l, a, __shfl_sync(~0u, factors.l, at + i), b);
#pragma unroll
                for (int e = 0; e < VALUES; e++)
                    o[e] = fad_f32_fold(o[e], a, turn[i][e], b);
            }
            load(turn, base + at + TURNS * TURN);
        }
    }
    const float a = p.sinks && t.n_active ? fold_sink(p, t, 0, m, l) : 1;
#pragma unroll
    for (int e = 0; e < VALUES; e++)
        if (d < n_dims)
            out.store(d + e, fad_f32_finish_out(fad_f32_mul(o[e], a), l));
    if (d == 0)
        store_lse(p, t, 0, m, l);
}

/* The sink as one more state, behind the splits; empty for rows past n_q. */
static __global__ void store_sinks(const __grid_constant__ fad_attn_problem p, const fad_partials partials) {
    __shared__ Tile t; /* one row */
    if (!share_tile(p, 1, blockIdx.x, t))
        return;
    const int64_t split = partials.n_splits - 1, at = partial_row(p, t, 0, split);
    float l, m = fad_f32_sink_state(((const float *)p.sinks)[row_of(t, 0).h], &l);
    if (threadIdx.x == 0) {
        ((float *)partials.m)[at] = t.n_active ? m : FAD_F32_SENTINEL;
        ((float *)partials.l)[at] = t.n_active ? fad_f32_canonical(l) : 0;
    }
    if (threadIdx.x < p.Dv)
        ((float *)partials.o)[partial_values(p, t, 0, split) + threadIdx.x] = 0;
}

#endif
