/* What the Hopper tile kernel writes where no row of a tile sees a key; by one producing warp. */
#ifndef FAD_CUDA_HOPPER_TILE_EMPTY_CUH
#define FAD_CUDA_HOPPER_TILE_EMPTY_CUH

#include "hopper_tile_shared.cuh"
#include "mma_output.cuh"

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
