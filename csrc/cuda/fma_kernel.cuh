/* Kernels over FmaTile: one that folds the splits of a tile as they come, one that spills one split each. */
#ifndef FAD_CUDA_FMA_KERNEL_CUH
#define FAD_CUDA_FMA_KERNEL_CUH

#include "fma_tile.cuh"
#include "output.cuh"

/* N8, N9: every split of a tile, folded as it comes. Between splits the running O rests in memory, where it is touched
 * once a split: registers for it would cost occupancy. running: fp32 [rows of the buffer, Hq, Dv]; null if out is fp32
 * and serves itself. */
template <class S>
__global__ void __launch_bounds__(THREADS, S::RESIDENT)
    fma_prefill(const __grid_constant__ fad_attn_problem p, float *running) {
    extern __shared__ __align__(16) int64_t shared_memory[];
    __shared__ Tile t; /* shared, because registers are scarce */
    if (!share_tile(p, S::ROWS, blockIdx.x, t))
        return;
    FmaTile<S> tile(p, t, shared_memory);
    const bool row_owner = (int)threadIdx.x < S::ROWS;
    const fad_interval seen = seen_positions(t);
    const int64_t first = fad_partition_first(seen.lo, p.split_size), end = fad_partition_end(seen.hi, p.split_size);
    float m = FAD_F32_SENTINEL, l = 0; /* the running state of row threadIdx.x */
    auto rest = [&](int r) { return running_row(p, t, r, running); };
    tile.clear();
    tile.load_queries();
    __syncthreads(); /* lo and hi may be read */
    for (int64_t split = first; split < end; split++) {
        tile.run_split(split, seen);
        if (split > first) {
            if (row_owner) {
                const float now = fad_f32_max(tile.m, m), b = fad_f32_pow2(fad_f32_sub(tile.m, now));
                const float a = fad_f32_pow2(fad_f32_sub(m, now));
                tile.l = fad_f32_fold(l, a, tile.l, b);
                tile.m = now;
                tile.sm.m[threadIdx.x] = a;
                tile.sm.alpha[threadIdx.x] = b;
            }
            __syncthreads(); /* the factors a and b may be read */
            tile.for_each_output(t.n_rows, rest, [&](const float *before, int r, int d, float &o) {
                o = fad_f32_fold(before[d], tile.sm.m[r], o, tile.sm.alpha[r]);
            });
            __syncthreads(); /* the factors may be overwritten */
        }
        m = tile.m, l = tile.l;
        if (split + 1 < end)
            tile.for_each_output(t.n_rows, rest, [](float *to, int, int d, float &o) { to[d] = o; });
    }
    if (row_owner && (int)threadIdx.x < t.n_rows) {
        tile.sm.m[threadIdx.x] = finish_row(p, t, threadIdx.x, tile.m, tile.l);
        tile.sm.alpha[threadIdx.x] = tile.l;
    }
    __syncthreads(); /* sink factor and l may be read */
    auto out = [&](int r) { return out_row(p, t, r); };
    tile.for_each_output(t.n_rows, out, [&](const OutRow &to, int r, int d, float &o) {
        to.store(d, fad_f32_finish_out(fad_f32_mul(o, tile.sm.m[r]), tile.sm.alpha[r]));
    });
}

/* One split of a tile, spilled as a partial state (N9): block number nth * n_tiles + tile, nth counts splits from the
 * sequence's first. */
template <class S>
__global__ void __launch_bounds__(THREADS, S::RESIDENT)
    fma_split(const __grid_constant__ fad_attn_problem p, const fad_partials partials, int64_t n_tiles) {
    extern __shared__ __align__(16) int64_t shared_memory[];
    __shared__ Tile t;
    const int64_t nth = blockIdx.x / n_tiles;
    if (!share_tile(p, S::ROWS, blockIdx.x % n_tiles, t))
        return;
    FmaTile<S> tile(p, t, shared_memory);
    tile.load_queries();
    __syncthreads(); /* lo and hi may be read */
    tile.run_split(fad_partition_first(t.seq.span.k_pos, p.split_size) + nth, seen_positions(t));
    if ((int)threadIdx.x < t.n_rows) {
        const int64_t at = partial_row(p, t, threadIdx.x, nth);
        ((float *)partials.m)[at] = tile.m;
        ((float *)partials.l)[at] = fad_f32_canonical(tile.l);
    }
    auto values = [&](int r) { return (float *)partials.o + partial_values(p, t, r, nth); };
    tile.for_each_output(t.n_rows, values,
                         [](float *to, int, int d, float &o) { to[d] = fad_f32_canonical(fad_f32_add(o, 0.0f)); });
}

#endif
