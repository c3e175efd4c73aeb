/* The generic tile kernel of the mma family: mma.sync and cp.async, for compute capability 8.0 and above.
 *
 * A thread block takes a tile of ROWS packed query rows; each of its warps owns 16 of them and walks the blocks of keys
 * that some row sees. K and V have one buffer each: while the scores are computed V is on its way, and K of the next
 * block during softmax and values. */
#ifndef FAD_CUDA_MMA_TILE_CUH
#define FAD_CUDA_MMA_TILE_CUH

#include "mma_kernel.cuh"
#include "mma_output.cuh"
#include "mma_values.cuh"
#include "work.cuh"

template <fad_dtype T_, int D_, int WARPS_, int RESIDENT_> struct MmaTileShape {
    static constexpr fad_dtype T = T_;
    static constexpr int D = D_; /* of q, k and v, zero-padded */
    static constexpr int WARPS = WARPS_, RESIDENT = RESIDENT_;
    static constexpr int THREADS = WARPS * 32, ROWS = WARPS * 16;
    static constexpr int CHUNKS = D / 8; /* of 16 bytes, in a row */
    static constexpr int N = D / 8;      /* n8 tiles of O */
};

template <class S> struct MmaTileShared {
    alignas(128) char q[S::ROWS * S::D * 2]; /* and out, staged */
    char k[BLOCK_KEYS * S::D * 2], v[BLOCK_KEYS * S::D * 2];
    RowTable<S::ROWS> rows;
    float total_m[S::ROWS], total_l[S::ROWS]; /* the state of the splits before */
    Tile t;
    KeyRange range;
    int64_t number;
};

/* The part of a warp: 16 rows, from row `first` of the tile. */
template <class S> struct MmaWarp {
    const fad_attn_problem &p;
    MmaTileShared<S> &sm;
    const ScoreRule rule;
    const int first;
    References references;
    float l[2]; /* this lane's l_t of rows g and g + 8 */
    float o[S::N][4];

    __device__ MmaWarp(const fad_attn_problem &problem, MmaTileShared<S> &shared)
        : p(problem), sm(shared), rule(problem), first(threadIdx.x / 32 * 16) {}

    __device__ __forceinline__ void clear() {
        references.clear();
        l[0] = l[1] = 0;
#pragma unroll
        for (int n = 0; n < S::N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                o[n][e] = 0;
    }

    /* N7: S = Q K^T, chains of steps over d. */
    __device__ __forceinline__ void scores(ScoreTile &s) const {
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                s[n][e] = 0;
#pragma unroll
        for (int k = 0; k < S::D / 16; k++) {
            unsigned a[4];
            load_fragment<S::CHUNKS>(a, sm.q, first, k);
#pragma unroll
            for (int n = 0; n < KEY_TILES / 2; n++) {
                unsigned b[4];
                load_key_fragment<S::CHUNKS>(b, sm.k, 16 * n, k);
                mma_step<S::T>(s[2 * n], a, b[0], b[1]);
                mma_step<S::T>(s[2 * n + 1], a, b[2], b[3]);
            }
        }
    }

    /* N4 to N7: from scores to the a operands of the values step; O and l meet the references' move. */
    __device__ __forceinline__ void softmax(ScoreTile &s, int block, bool partial, ProbabilityFragments &a) {
        float x_max[2], alpha[2], sum[2];
        if (!rule.plain)
            sm.rows.apply_options(s, rule, first, block);
        if (partial)
            sm.rows.mask(s, first, block);
        row_maxima(s, x_max);
        if (references.advance(x_max, rule.c, alpha))
            rescale(o, alpha);
        references.apply<S::T>(s, rule.c, sum);
        round_probabilities<S::T>(a, s);
#pragma unroll
        for (int half = 0; half < 2; half++)
            l[half] = fad_f32_add(fad_f32_mul(l[half], alpha[half]), sum[half]);
    }

    /* N7: O += P V, chains of steps over keys. */
    __device__ __forceinline__ void values(const ProbabilityFragments &a, int block, bool partial) {
        if (partial && values_not_finite<S::T, S::CHUNKS>(sm.v)) {
            add_values_guarded<S::T, S::CHUNKS>(o, a, sm.v, [&](int r) { return sm.rows.seen(first + r, block); });
            return;
        }
#pragma unroll
        for (int k = 0; k < BLOCK_KEYS / 16; k++)
#pragma unroll
            for (int n = 0; n < S::N / 2; n++) {
                unsigned b[4];
                load_value_fragment<S::CHUNKS>(b, sm.v, 16 * k, n);
                mma_step<S::T>(o[2 * n], a[k], b[0], b[1]);
                mma_step<S::T>(o[2 * n + 1], a[k], b[2], b[3]);
            }
    }

    /* The end of a split: o and the shared totals become those of all splits so far. rest: where the O of the splits
     * before rests, if there are any. */
    __device__ __forceinline__ void close_split(bool fold, const float4 *rest) {
        const int lane = threadIdx.x % 32, r = first + lane / 4;
        RowPair part;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            part.m[half] = references.reference(half);
            part.l[half] = sum_lanes(l[half]);
        }
        if (fold)
            fold_into<8>(total(), [&](int n) { return rest[n * S::THREADS]; }, part, o);
        __syncwarp(); /* totals may be overwritten */
        if (lane % 4 == 0) {
            sm.total_m[r] = part.m[0], sm.total_m[r + 8] = part.m[1];
            sm.total_l[r] = part.l[0], sm.total_l[r + 8] = part.l[1];
        }
        __syncwarp(); /* totals may be read */
    }
    __device__ __forceinline__ RowPair total() const {
        const int r = first + threadIdx.x % 32 / 4;
        return {{sm.total_m[r], sm.total_m[r + 8]}, {sm.total_l[r], sm.total_l[r + 8]}};
    }
};

/* Every block of the range: scores, softmax, values; splits are folded as they
 * end, or spilled. Returns how many they were. */
template <class S>
static __device__ __forceinline__ int mma_tile_blocks(const fad_attn_problem &p, const fad_partials &partials,
                                                      MmaWarp<S> &warp, float4 *rest) {
    MmaTileShared<S> &sm = warp.sm;
    const KeyRange &range = sm.range;
    const Keys keys(p.k, sm.t.seq.k, sm.t, range.first, p.D), values(p.v, sm.t.seq.v, sm.t, range.first, p.Dv);
    auto load = [&](const Keys &from, char *to, int block) {
        from.template load<BLOCK_KEYS, S::CHUNKS, S::THREADS>(to, block * BLOCK_KEYS, range.lo, range.hi, 0,
                                                              threadIdx.x);
        cp_async_commit();
    };
    int to_split_end = range.to_split_end, splits = 0;
    bool resting = false;
    load(keys, sm.k, 0);
    for (int block = 0; block < range.blocks; block++) {
        const bool partial = range.partial(block), last = block + 1 == range.blocks;
        ScoreTile s;
        ProbabilityFragments a;
        cp_async_wait<0>();
        __syncthreads(); /* k may be read, v overwritten */
        load(values, sm.v, block);
        warp.scores(s);
        cp_async_wait<0>();
        __syncthreads(); /* v may be read, k overwritten */
        if (!last)
            load(keys, sm.k, block + 1);
        warp.softmax(s, block, partial, a);
        warp.values(a, block, partial);
        if (--to_split_end == 0 || last) {
            warp.close_split(resting && !partials.o, rest);
            if (partials.o)
                spill_rows(p, sm.t, partials, range.split + splits, warp.first, warp.total(), warp.o, 0);
            splits++;
            if (!last) {
                if (!partials.o)
                    rest_state(rest, S::THREADS, warp.o);
                warp.clear();
                resting = true;
                to_split_end = range.split_blocks;
            }
        }
    }
    return splits;
}

/* One item of work: every split of a tile folded as it comes, or a run of
 * splits as partial states. */
template <class S>
static __device__ __forceinline__ void mma_tile_item(const fad_attn_problem &p, const Work &work,
                                                     MmaTileShared<S> &sm) {
    const KeyRange &range = sm.range;
    MmaWarp<S> warp(p, sm);
    load_queries<S::ROWS, S::CHUNKS, S::THREADS>(sm.q, p, sm.t, threadIdx.x);
    sm.rows.fill(p, sm.t, sm.range, threadIdx.x, S::THREADS);
    for (int r = threadIdx.x; r < S::ROWS; r += S::THREADS)
        sm.total_m[r] = FAD_F32_SENTINEL, sm.total_l[r] = 0;
    warp.clear();
    int splits = 0;
    if (range.blocks > 0)
        splits = mma_tile_blocks(p, work.partials, warp,
                                 (float4 *)work.rest + (int64_t)blockIdx.x * S::N * S::THREADS + threadIdx.x);
    cp_async_wait<0>(); /* q is on its way where there is no block */
    __syncthreads();    /* totals may be read, q overwritten */
    if (work.partials.o) {
        spill_empty(p, sm.t, work.partials, range.from, range.split, threadIdx.x, S::THREADS);
        spill_empty(p, sm.t, work.partials, range.split + splits, range.to, threadIdx.x, S::THREADS);
        return;
    }
    char *const staged = sm.q + warp.first * S::D * 2; /* where the warp's q was */
    finish_rows<S::T>(p, sm.t, warp.first, warp.total(), warp.o, staged);
    __syncwarp(); /* out is staged */
    store_staged<S::N>(p, sm.t, warp.first, staged);
}

template <class S>
__global__ void __launch_bounds__(S::THREADS, S::RESIDENT)
    mma_tile_kernel(const __grid_constant__ fad_attn_problem p, const __grid_constant__ Work work) {
    extern __shared__ __align__(128) char shared_memory[];
    MmaTileShared<S> &sm = *(MmaTileShared<S> *)shared_memory;
    for (int64_t number = blockIdx.x; number < work.n_items; number = next_item(work, &sm.number)) {
        if (share_item(p, work, S::ROWS, number, sm.t, sm.range))
            mma_tile_item<S>(p, work, sm);
    }
}

template <class S> static MmaKernel mma_tile_of() {
    return {S::ROWS,           S::D, S::THREADS, true, sizeof(MmaTileShared<S>), S::N * S::THREADS * sizeof(float4),
            mma_tile_kernel<S>};
}

#endif
