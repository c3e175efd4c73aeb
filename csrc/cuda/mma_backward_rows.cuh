/* dq of the mma family: mma.sync and cp.async, for compute capability 8.0 and above.
 *
 * A thread block takes a tile of packed query rows, as the forward does; each of its warps owns 16 M of them and walks the
 * keys that some row sees, KEYS at a time. */
#ifndef FAD_CUDA_MMA_BACKWARD_ROWS_CUH
#define FAD_CUDA_MMA_BACKWARD_ROWS_CUH

#include "mma_backward_tile.cuh"
#include "work.cuh"

template <fad_dtype T_, int D_, int M_, int WARPS_, int KEYS_, int RESIDENT_> struct RowGradientShape {
    static constexpr fad_dtype T = T_;
    static constexpr int D = D_, CHUNKS = D / 8; /* of all four tensors, zero-padded */
    static constexpr int WARPS = WARPS_, RESIDENT = RESIDENT_;
    static constexpr int THREADS = WARPS * 32, ROWS = WARPS * M_ * 16;
    static constexpr int KEYS = KEYS_, STEPS = KEYS / 16;    /* keys at a time */
    static constexpr int M = M_, N = KEYS / 8, DIMS = D / 8; /* m16 and n8 tiles of scores, n8 tiles of sums */
    static_assert(FAD_MMA_BLOCK_KV % KEYS == 0, "a block of keys is whole or partial as one");
};

/* Keys on their way through the pipeline. */
template <class S> struct KeyStage {
    alignas(128) char k[S::KEYS * S::D * 2], v[S::KEYS * S::D * 2];
};

template <class S> struct RowGradientShared {
    alignas(128) char q[S::ROWS * S::D * 2], dout[S::ROWS * S::D * 2]; /* q: and dq, staged */
    RowTable<S::ROWS> rows;
    float log2_sum[S::ROWS], delta[S::ROWS];
    int state[S::ROWS];
    Tile t;
    fad_sequence gradient; /* where the tile's sequence lies in gradients */
    KeyRange range;
    KeyStage<S> stage[2];
};

/* What score_gradients needs of query rows that are rows: `row` is this lane's first in the tile, `key` its column 0. */
template <class Shared> struct QueryRows {
    const Shared &sm;
    int row, key;

    struct At {
        const Shared &sm;
        int row, key;
        __device__ __forceinline__ float log2_sum(int e) const { return sm.log2_sum[row + e / 2 * 8]; }
        __device__ __forceinline__ float delta(int e) const { return sm.delta[row + e / 2 * 8]; }
        __device__ __forceinline__ float slope(int e) const { return sm.rows.slope[row + e / 2 * 8]; }
        __device__ __forceinline__ int distance(int e) const { return sm.rows.pos[row + e / 2 * 8] - key - e % 2; }
    };
    __device__ __forceinline__ void move(int n) { key += 8 * n; } /* n8 tile n becomes the first */
    __device__ __forceinline__ At at(int m, int n) const { return {sm, row + 16 * m, key + 8 * n}; }
};

/* The part of a warp: rows first .. first + 16 M - 1 of the tile. */
template <class S> struct RowGradientWarp {
    RowGradientShared<S> &sm;
    const ScoreRule &rule;
    const int first;
    Fragments<S::M, S::DIMS> dq;

    __device__ RowGradientWarp(const ScoreRule &of_call, RowGradientShared<S> &shared)
        : sm(shared), rule(of_call), first(threadIdx.x / 32 * S::M * 16) {
        clear<S::M, S::DIMS>(dq);
    }

    /* One step of the walk: keys from number `number` on, which are in shared memory. */
    __device__ __forceinline__ void run(const KeyStage<S> &stage, int number, bool partial) {
        const int lane = threadIdx.x % 32, row = first + lane / 4, key = number + lane % 4 * 2;
        Fragments<S::M, S::N> s, ds;
        auto find_s = [&] { multiply_rows<S::T, S::CHUNKS, S::M, S::N>(s, sm.q, first, stage.k, 0, [](int) {}); };
        auto find_dp = [&](auto meanwhile) {
            multiply_rows<S::T, S::CHUNKS, S::M, S::N>(ds, sm.dout, first, stage.v, 0, meanwhile);
        };
        const QueryRows<RowGradientShared<S>> rows = {sm, row, key};
        if (rule.plain) {
            find_s();
            score_gradients<S::CHUNKS / 2, S::M, S::N>(s, ds, rule.c, find_dp, rows);
        } else {
            find_s();
            find_dp([](int) {});
            score_gradients_with_options<S::M, S::N>(s, ds, rule, rows);
        }
        if (partial)
            clear_others<S::M, S::N>(
                s, ds, [&](int m, int n, int e) { return sees(row + 16 * m + e / 2 * 8, key + 8 * n + e % 2); });
        unsigned a[S::STEPS][S::M][4];
#pragma unroll
        for (int step = 0; step < S::STEPS; step++)
#pragma unroll
            for (int m = 0; m < S::M; m++)
                round_fragment<S::T>(a[step][m], ds[m], step);
        const bool guarded = partial && values_not_finite<S::T, S::CHUNKS, S::KEYS>(stage.k);
#pragma unroll
        for (int step = 0; step < S::STEPS; step++) { /* N13: keys ascending */
            if (guarded)
                add_step_guarded<S::T, S::CHUNKS, S::M, S::DIMS>(
                    dq, a[step], stage.k, 16 * step, 0, [&](int r, int j) { return sees(first + r, number + j); });
            else
                add_step<S::T, S::CHUNKS, S::M, S::DIMS>(dq, a[step], stage.k, 16 * step, 0);
        }
    }

    /* N4 */
    __device__ __forceinline__ bool sees(int r, int key) const { return key >= sm.rows.lo[r] && key < sm.rows.hi[r]; }
};

/* Everything about the tile's rows but the walk over keys. */
template <class S>
static __device__ __forceinline__ void load_rows_of_tile(RowGradientShared<S> &sm, const fad_attn_problem &p,
                                                         const fad_attn_problem &gradient, const RowSums &sums) {
    const Tile &t = sm.t;
    load_tile_rows<S::ROWS, S::CHUNKS, S::THREADS>(sm.q, p.q, t.seq.q, p.D, t, threadIdx.x);
    load_tile_rows<S::ROWS, S::CHUNKS, S::THREADS>(sm.dout, gradient.out, sm.gradient.out, p.Dv, t, threadIdx.x);
    cp_async_commit();
    sm.rows.fill(p, t, sm.range, threadIdx.x, S::THREADS);
#pragma unroll 1
    for (int r = threadIdx.x; r < S::ROWS; r += S::THREADS) {
        const bool active = r < t.n_active;
        const Row row = row_of(t, r);
        const int64_t at = active ? first_row_sum(p, t.seq.index, row.h) + row.i : 0;
        sm.log2_sum[r] = active ? sums.log2_sum[at] : 0;
        sm.delta[r] = active ? sums.delta[at] : 0;
        sm.state[r] = active ? sums.state[at] : 0;
    }
}

/* Every key of the range. */
template <class S>
static __device__ __forceinline__ void walk_keys(RowGradientWarp<S> &warp, const fad_attn_problem &p, int stages) {
    RowGradientShared<S> &sm = warp.sm;
    const KeyRange &range = sm.range;
    const fad_sequence &seq = sm.t.seq;
    auto load = [&](KeyStage<S> &to, int number) {
        const int64_t row = range.first - seq.span.k_pos + number; /* may lie before the buffer */
        auto load_keys = [&](char *tile, const fad_view &view, int64_t first, int64_t dims) {
            load_rows<S::KEYS, S::CHUNKS, S::THREADS>(
                tile, (const char *)view.data + 2 * (first + row * view.stride_s + sm.t.head_k * view.stride_h),
                2 * view.stride_s, range.lo - number, range.hi - number, (int)dims, threadIdx.x);
        };
        load_keys(to.k, p.k, seq.k, p.D);
        load_keys(to.v, p.v, seq.v, p.Dv);
        cp_async_commit();
    };
    int number = range.lo / S::KEYS * S::KEYS, at = 0;
    load(sm.stage[0], number);
    while (number < range.hi) {
        const int next = number + S::KEYS;
        cp_async_wait<0>();
        __syncthreads(); /* this stage may be read, the other one overwritten */
        if (stages > 1 && next < range.hi)
            load(sm.stage[at ^ 1], next);
        warp.run(sm.stage[at], number, range.partial(number / FAD_MMA_BLOCK_KV));
        if (stages > 1) {
            at ^= 1;
        } else if (next < range.hi) {
            __syncthreads(); /* the stage may be overwritten */
            load(sm.stage[0], next);
        }
        number = next;
    }
}

template <class S>
static __device__ __forceinline__ void find_row_gradients(const fad_attn_problem &p, const fad_attn_problem &gradient,
                                                          const RowSums &sums, const ScoreRule &rule, int stages,
                                                          RowGradientShared<S> &sm) {
    const Tile &t = sm.t;
    RowGradientWarp<S> warp(rule, sm);
    load_rows_of_tile(sm, p, gradient, sums);
    if (sm.range.blocks > 0)
        walk_keys(warp, p, stages);
    cp_async_wait<0>(); /* q is on its way where there is no key */
    __syncthreads();    /* states may be read, q overwritten */
    const bool of_dq = stage_gradients<S::T, S::CHUNKS, S::M, S::DIMS>(
        sm.q, warp.first, 0, warp.dq, (float)p.scale, [&](int r) { return (sm.state[r] & ROW_HAS_TERMS) != 0; });
    const bool not_finite = __syncthreads_or(of_dq); /* dq is staged */
    store_gradients<S::T, S::ROWS, S::CHUNKS, S::THREADS>(
        gradient.q, RowWalk<S::THREADS / S::CHUNKS>(gradient.q, sm.gradient.q, t, threadIdx.x / S::CHUNKS), t.n_rows,
        p.D, threadIdx.x, not_finite, [&](int r, int chunk) { return sm.q + swizzled<S::CHUNKS>(r, chunk); });
}

template <class S>
__global__ void __launch_bounds__(S::THREADS, S::RESIDENT)
    mma_backward_rows(const __grid_constant__ fad_attn_problem p, const __grid_constant__ fad_attn_problem gradient,
                      const __grid_constant__ RowSums sums, const __grid_constant__ Work tiles, int stages) {
    extern __shared__ __align__(128) char shared_memory[];
    RowGradientShared<S> &sm = *(RowGradientShared<S> *)shared_memory;
    if (share_row_tile(p, gradient, tiles, S::ROWS, sm.t, sm.range, sm.gradient))
        find_row_gradients(p, gradient, sums, tiles.rule, stages, sm);
    end_behind_last_kernel();
}

template <class S> static BackwardKernel<Work> mma_backward_rows_of() {
    constexpr size_t all = sizeof(RowGradientShared<S>);
    return {S::D, S::ROWS, S::THREADS, {all - sizeof(KeyStage<S>), all}, mma_backward_rows<S>};
}

#endif
