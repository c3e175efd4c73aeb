/* N8 on spilled states: one value of out a thread, all of a row in one thread block. */
#ifndef FAD_CUDA_FOLD_CUH
#define FAD_CUDA_FOLD_CUH

#include "output.cuh"
#include "ptx.cuh"

/* The row that a thread block works on: the number of a tile of one row. */
static __device__ const Tile &share_row(const fad_attn_problem &p, Tile &shared) {
    share_tile(p, 1, blockIdx.x, shared);
    return shared;
}

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

/* The fold of splits in ascending order, to out and lse. blockDim.x: Dv rounded up to a warp. Every thread walks all
 * splits of its row. Nothing hides how late memory is but asking for a warp of splits at once, and little code, which
 * comes from memory too; what needs no state is done before they are there. */
static __global__ void fold_splits(const __grid_constant__ fad_attn_problem p, const fad_partials partials) {
    constexpr int AHEAD = 32, TURN = 8;
    __shared__ Tile shared;
    const Tile &t = share_row(p, shared);
    if (!t.exists)
        return;
    const int lane = threadIdx.x % 32, d = threadIdx.x < p.Dv ? threadIdx.x : 0;
    const int64_t rows = (p.cu_seqlens_q ? 1 : p.B) * p.Hq * p.Sq; /* of a split */
    const fad_interval seen = seen_positions(t);
    const int64_t first = fad_partition_first(t.seq.span.k_pos, p.split_size),
                  begin = fad_partition_first(seen.lo, p.split_size) - first;
    int left = seen.hi > seen.lo ? (int)(fad_partition_end(seen.hi, p.split_size) - first - begin) : 0;
    const float *part_m = (const float *)partials.m + partial_row(p, t, 0, begin),
                *part_l = (const float *)partials.l + partial_row(p, t, 0, begin),
                *part_o = (const float *)partials.o + partial_values(p, t, 0, begin) + d;
    const OutRow out = out_row(p, t, 0);
    float m = FAD_F32_SENTINEL, l = 0, o = 0;
    wait_for_last_kernel(); /* the states are there */
    for (; left > 0; left -= AHEAD) {
        float values[AHEAD];
        const float of_m = lane < left ? part_m[lane * rows] : FAD_F32_SENTINEL,
                    of_l = lane < left ? part_l[lane * rows] : 0;
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            values[i] = i < left ? part_o[i * rows * p.Dv] : 0;
        const FoldFactors factors(m, of_m, of_l);
#pragma unroll
        for (int turn = 0; turn < AHEAD; turn += TURN)
            if (turn < left)
#pragma unroll
                for (int i = turn; i < turn + TURN; i++) { /* folding an empty state changes nothing but -0 */
                    const float a = __shfl_sync(~0u, factors.before, i), b = __shfl_sync(~0u, factors.part, i);
                    l = fad_f32_fold(l, a, __shfl_sync(~0u, factors.l, i), b);
                    o = fad_f32_fold(o, a, values[i], b);
                }
        part_m += AHEAD * rows, part_l += AHEAD * rows, part_o += AHEAD * rows * p.Dv;
    }
    const float a = p.sinks && t.n_active ? fold_sink(p, t, 0, m, l) : 1;
    if (threadIdx.x < p.Dv)
        out.store(d, fad_f32_finish_out(fad_f32_mul(o, a), l));
    if (threadIdx.x == 0)
        store_lse(p, t, 0, m, l);
}

/* The sink as one more state, behind the splits; empty for rows past n_q. */
static __global__ void store_sinks(const __grid_constant__ fad_attn_problem p, const fad_partials partials) {
    __shared__ Tile shared;
    const Tile &t = share_row(p, shared);
    if (!t.exists)
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
