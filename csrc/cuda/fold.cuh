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

/* The fold of splits in ascending order, to out and lse. blockDim.x: Dv rounded up to a warp. Every thread walks all
 * splits of its row; states are fetched AHEAD of the fold, because the walk is otherwise as slow as memory is late. */
static __global__ void fold_splits(const __grid_constant__ fad_attn_problem p, const fad_partials partials) {
    constexpr int AHEAD = 16;
    __shared__ Tile shared;
    const Tile &t = share_row(p, shared);
    if (!t.exists)
        return;
    wait_for_last_kernel(); /* the states are there */
    const int d = threadIdx.x < p.Dv ? threadIdx.x : 0;
    const float *part_m = (const float *)partials.m + partial_row(p, t, 0, 0),
                *part_l = (const float *)partials.l + partial_row(p, t, 0, 0),
                *part_o = (const float *)partials.o + partial_values(p, t, 0, 0) + d;
    const int64_t rows = (p.cu_seqlens_q ? 1 : p.B) * p.Hq * p.Sq; /* of a split */
    float m = FAD_F32_SENTINEL, l = 0, o = 0;
    const fad_interval seen = seen_positions(t);
    const int64_t first = fad_partition_first(t.seq.span.k_pos, p.split_size),
                  begin = fad_partition_first(seen.lo, p.split_size) - first,
                  end = seen.hi > seen.lo ? fad_partition_end(seen.hi, p.split_size) - first : begin;
    for (int64_t split = begin; split < end; split += AHEAD) { /* the others are empty */
        float next_m[AHEAD], next_l[AHEAD], next_o[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const bool present = split + i < end;
            next_m[i] = present ? part_m[(split + i) * rows] : FAD_F32_SENTINEL;
            next_l[i] = present ? part_l[(split + i) * rows] : 0;
            next_o[i] = present ? part_o[(split + i) * rows * p.Dv] : 0;
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) { /* folding an empty state changes nothing but -0 */
            const float now = fad_f32_max(next_m[i], m);
            const float a = fad_f32_pow2(fad_f32_sub(m, now)), b = fad_f32_pow2(fad_f32_sub(next_m[i], now));
            l = fad_f32_fold(l, a, next_l[i], b);
            o = fad_f32_fold(o, a, next_o[i], b);
            m = now;
        }
    }
    const float a = p.sinks && t.n_active ? fold_sink(p, t, 0, m, l) : 1;
    if (threadIdx.x == 0)
        store_lse(p, t, 0, m, l);
    if (threadIdx.x < p.Dv)
        out_row(p, t, 0).store(d, fad_f32_finish_out(fad_f32_mul(o, a), l));
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
