/* The split-KV kernel of compute capability 9.0 for calls with too few splits to fill the device: a cluster of thread blocks
 * shares one split of up to 1024 keys, or has all splits of a tile.
 *
 * Each thread block computes S and P of its share of a split's keys, and O of 16 to 64 dims over all of them: O is a chain
 * over the keys, but one for each dim. So nearly all of K and V is asked for at once, and a split has two exchanges, of
 * references and of P, which its thread blocks write into the shared memory of each other. Splits that are folded have a
 * third, of states. */
#ifndef FAD_CUDA_HOPPER_CLUSTER_CUH
#define FAD_CUDA_HOPPER_CLUSTER_CUH

#include "hopper_cluster_shared.cuh"
#include "hopper_ptx.cuh"
#include "mma_output.cuh"

/* A thread of the cluster. */
template <class S> struct ClusterThread {
    const fad_attn_problem &p;
    ClusterShared<S> &sm;
    const ScoreRule &rule;
    const int blocks;        /* of keys */
    const int splits, split; /* that the cluster has; this thread block's */
    /* Numbers: in the cluster, of the split's first thread block; in the split, of this one. */
    const int base = split * S::RANKS, rank = blockIdx.x % S::RANKS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first_dim = rank * S::DIMS + warp * S::TILES * 8; /* of O, a value warp's */
    float m;                                                    /* the last reference of row lane % 16 */

    static __device__ __forceinline__ float of_row(float x, int r) { return __shfl_sync(~0u, x, r); }

    /* ---- what comes from memory ---- */

    /* Where the keys lie that a warp copies from pages, from number `first` on: asked for all at once, as memory is late. */
    template <int N> __device__ __forceinline__ void find(PagePlace (&found)[N], const Keys &keys, int first) const {
#pragma unroll
        for (int i = 0; i < N; i++)
            found[i] = keys.find(first + i * 32 + lane, sm.range.lo, sm.range.hi);
    }
    /* Keys from number `first` on to rows first_row on of ROWS; the rest as in Keys::copy_found. */
    template <int ROWS, int CHUNKS, int LANES, int ROW_CHUNKS, int N>
    __device__ __forceinline__ void copy(char *to, const Keys &keys, const PagePlace (&found)[N], int first,
                                         int first_row, int first_dim) const {
#pragma unroll
        for (int i = 0; i < N; i++)
            keys.copy_found<ROWS, CHUNKS, LANES, ROW_CHUNKS>(to, found[i], first + i * 32, sm.range.lo, sm.range.hi,
                                                             first_row + i * 32, first_dim, AsUsual());
    }

    /* This thread block's share of K. */
    __device__ __forceinline__ void load_keys() const {
        const Keys k(p.k, sm.t.seq.k, sm.t, sm.range.first, p.D);
        if constexpr (S::PAGES) {
            const int row = warp * S::COPY_KEYS, key = rank * S::KEYS + row;
            PagePlace found[S::COPY_KEYS / 32];
            find(found, k, key);
            copy<S::KEYS, S::CHUNKS, 8, 8>(sm.k, k, found, key, row, 0);
        } else {
#pragma unroll 1
            for (int piece = 0; piece < S::D / 64; piece++)
                k.template load_rows<S::KEYS, 8, COPY_THREADS>(sm.k + piece * S::KEYS * 128, rank * S::KEYS,
                                                               sm.range.lo, sm.range.hi, piece * 64, threadIdx.x);
        }
    }

    /* Its dims of half of V; of each, a warp copies these rows. */
    static constexpr int COPY_VALUES = HALF_KEYS / COPY_WARPS;
    typedef PagePlace ValuePlaces[COPY_VALUES / 32];
    __device__ __forceinline__ Keys values() const { return Keys(p.v, sm.t.seq.v, sm.t, sm.range.first, p.Dv); }
    __device__ __forceinline__ int values_row() const { return warp % COPY_WARPS * COPY_VALUES; }
    /* Where they lie, if in pages. */
    __device__ __forceinline__ void find_values(ValuePlaces &found, int half) const {
        if constexpr (S::PAGES)
            find(found, values(), half * HALF_KEYS + values_row());
    }
    __device__ __forceinline__ void load_values(char *to, int half, const ValuePlaces &found) const {
        const int first = half * HALF_KEYS, row = values_row();
        if constexpr (S::PAGES)
            copy<HALF_KEYS, S::DIM_CHUNKS, S::DIM_CHUNKS / 2, S::DIM_CHUNKS>(to, values(), found, first + row, row,
                                                                             rank * S::DIMS);
        else
            values().template load_rows<HALF_KEYS, S::DIM_CHUNKS, COPY_THREADS>(
                to, first, sm.range.lo, sm.range.hi, rank * S::DIMS, threadIdx.x % COPY_THREADS);
        cp_async_commit();
    }

    /* q, K and half of V are asked for, the first two awaited. second: where the other half lies. */
    __device__ __forceinline__ void load(ValuePlaces &second) const {
        if (threadIdx.x < COPY_THREADS) {
            load_keys();
            cp_async_commit();
            sm.rows.fill(p, sm.t, sm.range, threadIdx.x, COPY_THREADS);
            cp_async_wait<0>();
        } else {
            ValuePlaces first;
            find_values(first, 0);
            find_values(second, 1);
            load_queries<DECODE_ROWS, S::CHUNKS, COPY_THREADS>(sm.q, p, sm.t, threadIdx.x % COPY_THREADS);
            cp_async_commit();
            load_values(sm.first, 0, first);
            cp_async_wait<1>();
        }
        __syncthreads(); /* q, K and the rows' table may be read */
    }

    /* ---- S and P ---- */

    /* N6: the reference of row lane % 16 after a block, from the one before. A reference is monotone, so that it may be
     * the largest of those of a block's parts. */
    __device__ __forceinline__ float advance(float before, int block) const {
        const float *parts = &sm.references[lane % DECODE_ROWS][block * S::PARTS];
        float best = before;
#pragma unroll
        for (int i = 0; i < S::PARTS; i++)
            best = fad_f32_max(parts[i], best);
        return best;
    }

    /* References, and this thread block's share of P, to all of the split. */
    __device__ __forceinline__ void share_probabilities(const ValuePlaces &second) {
        const int unit = (rank * CLUSTER_WARPS + warp) * S::UNITS, block = unit / BLOCK_UNITS;
        UnitScores<S::T, S::CHUNKS, S::UNITS> units;
        float reference[2] = {FAD_F32_SENTINEL, FAD_F32_SENTINEL};
        if (block < blocks) {
            const bool partial = sm.range.partial(block);
            units.multiply(sm.q, sm.k, S::KEYS * 128, warp * S::UNITS * UNIT_KEYS);
            if (!rule.plain || partial)
                units.finish(sm.rows, rule, unit * UNIT_KEYS, partial, lane);
            reference[0] = fad_f32_reference(FAD_F32_SENTINEL, units.maximum(0), rule.c);
            reference[1] = fad_f32_reference(FAD_F32_SENTINEL, units.maximum(1), rule.c);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float *to = &sm.references[lane / 4 + half * 8][rank * CLUSTER_WARPS + warp];
#pragma unroll
            for (int i = 0; i < S::RANKS; i += 4) /* the lanes of a quad have the same */
                if (i + lane % 4 < S::RANKS)
                    send(to, reference[half], sm.references_there, base + i + lane % 4);
        }
        __syncthreads(); /* this thread block's K may be overwritten */
        if (threadIdx.x >= COPY_THREADS) {
            load_values(sm.second, 1, second);
            barrier_arrive_copied(sm.second_there);
        }
        /* They may be read, and K of every thread block be overwritten: a reference is computed from all of K that its warp
         * reads, so that whoever has all of them knows that it has been read. */
        barrier_wait_cluster(sm.references_there, 0);
        static_assert(CLUSTER_WARPS == CLUSTER_KEY_BLOCKS, "every warp finds the factors of one block");
        /* mine: the reference of this warp's keys; from, to: those before and after block number `warp` */
        float next = FAD_F32_SENTINEL, mine = 0, from = 0, to = 0;
#pragma unroll
        for (int b = 0; b < CLUSTER_KEY_BLOCKS; b++) {
            m = next;
            next = advance(m, b);
            mine = b == block ? next : mine;
            from = b == warp ? m : from;
            to = b == warp ? next : to;
        }
        m = next;
        if (block < blocks) {
            const float now[2] = {of_row(mine, lane / 4), of_row(mine, lane / 4 + 8)};
            const int n_rows = sm.t.n_rows;
            units.probabilities(now, rule.c, [&](int u, const uint4 &a) {
                if (lane / 4 < n_rows) /* no more than there is: this takes its time */
#pragma unroll
                    for (int i = 0; i < S::RANKS; i++)
                        send(&sm.p[unit + u][lane], a, sm.p_there, base + i);
            });
        }
        if (lane < DECODE_ROWS)
            sm.alpha[warp][lane] = fad_f32_pow2(fad_f32_sub(from, to));
        cp_async_wait<1>();
        __syncthreads(); /* factors and the first half of V may be read */
    }

    /* ---- O and l ---- */

    __device__ __forceinline__ void wait_for_second(int block) const {
        if (block >= CLUSTER_KEY_BLOCKS / 2)
            barrier_wait(sm.second_there, 0);
    }

    /* What a block's steps need of a warp's dims. */
    static constexpr int VALUE_LOADS = BLOCK_UNITS * S::TILES / 2;
    struct Fragments {
        uint4 p[BLOCK_UNITS];
        unsigned v[VALUE_LOADS][4]; /* b operands, two words for each unit and tile of it */
        float alpha[2];             /* of rows g and g + 8 */
    };
    /* Of two units, or of the two tiles of one. */
    __device__ __forceinline__ void fetch_values(unsigned (&v)[4], int block, int nth) const {
        if constexpr (S::TILES == 1)
            ldmatrix_transposed(v, sm.values(block) + swizzled<S::DIM_CHUNKS>(nth * 32 + lane, warp));
        else
            load_value_fragment<S::DIM_CHUNKS>(v, sm.values(block), nth * UNIT_KEYS, warp);
    }
    /* One of BLOCK_UNITS parts of them. */
    __device__ __forceinline__ void fetch(Fragments &f, int block, int unit) const {
        f.p[unit] = load_shared(&sm.p[block * BLOCK_UNITS + unit][lane]);
        if (unit * S::TILES % 2 == 0)
            fetch_values(f.v[unit * S::TILES / 2], block, unit * S::TILES / 2);
        if (unit < 2)
            f.alpha[unit] = sm.alpha[block][lane / 4 + unit * 8];
    }

    /* Whether there are Inf or NaN among the values of blocks that some rows see and others do not. */
    __device__ __forceinline__ bool need_care() const {
        const int whole = sm.range.whole, whole_end = whole + sm.range.n_whole;
        unsigned full = 0;
#pragma unroll 1 /* the blocks before the whole ones, and those behind them */
        for (int b = whole ? 0 : whole_end; b < blocks; b = b + 1 == whole ? whole_end : b + 1) {
            wait_for_second(b);
#pragma unroll
            for (int nth = 0; nth < VALUE_LOADS; nth++) {
                unsigned v[4];
                fetch_values(v, b, nth);
#pragma unroll
                for (int i = 0; i < 4; i++)
                    full |= exponents_full<S::T>(v[i]);
            }
        }
        return __any_sync(~0u, full != 0);
    }

    /* N7: O of this warp's dims. A block's operands are on their way while the one before is multiplied. */
    __device__ __forceinline__ void multiply(float (&o)[S::TILES][4]) const {
        Fragments f[2];
#pragma unroll
        for (int u = 0; u < BLOCK_UNITS; u++)
            fetch(f[0], 0, u);
#pragma unroll
        for (int b = 0; b < CLUSTER_KEY_BLOCKS; b++) {
            if (b >= blocks)
                break;
            if (b + 1 == CLUSTER_KEY_BLOCKS / 2)
                barrier_wait(sm.second_there, 0);
            const Fragments &now = f[b % 2];
#pragma unroll
            for (int e = 0; e < S::TILES * 4 && b > 0; e++)
                o[e / 4][e % 4] = fad_f32_mul(o[e / 4][e % 4], now.alpha[e % 4 / 2]);
#pragma unroll
            for (int u = 0; u < BLOCK_UNITS; u++) {
#pragma unroll
                for (int n = 0; n < S::TILES; n++) {
                    const unsigned *const v = &now.v[(u * S::TILES + n) / 2][(u * S::TILES + n) % 2 * 2];
                    mma_step<S::T>(o[n], {now.p[u].x, now.p[u].y, now.p[u].z, now.p[u].w}, v[0], v[1]);
                }
                if (b + 1 < CLUSTER_KEY_BLOCKS)
                    fetch(f[(b + 1) % 2], b + 1, u); /* past the last: never used */
                __syncwarp();                        /* or the compiler puts it off until its use */
            }
        }
    }

    /* The same where N11 needs care. Rare: little code. */
    __device__ __forceinline__ void multiply_guarded(float (&o)[S::TILES][4]) const {
        float before = FAD_F32_SENTINEL;
#pragma unroll 1
        for (int unit = 0; unit < blocks * BLOCK_UNITS; unit++) {
            const int block = unit / BLOCK_UNITS, key = unit * UNIT_KEYS;
            if (unit % BLOCK_UNITS == 0) {
                wait_for_second(block);
                const float now = advance(before, block), alpha = fad_f32_pow2(fad_f32_sub(before, now));
#pragma unroll
                for (int e = 0; e < S::TILES * 4; e++)
                    o[e / 4][e % 4] = fad_f32_mul(o[e / 4][e % 4], of_row(alpha, lane / 4 + e % 4 / 2 * 8));
                before = now;
            }
            const uint4 x = sm.p[unit][lane];
#pragma unroll
            for (int n = 0; n < S::TILES; n++) {
                unsigned b[4]; /* of the last 16 keys twice */
                ldmatrix_transposed(b, sm.values(block) +
                                           swizzled<S::DIM_CHUNKS>(key % BLOCK_KEYS + lane % 16, warp * S::TILES + n));
                if (sm.range.partial(block))
                    guarded_step<S::T>(sm.rows, o[n], {x.x, x.y, x.z, x.w}, {b[0], b[1]}, key, lane);
                else
                    mma_step<S::T>(o[n], {x.x, x.y, x.z, x.w}, b[0], b[1]);
            }
        }
    }

    /* N7: l of rows g or g + 8. */
    __device__ __forceinline__ void add_up_rows(int half) const {
        const int row = lane / 4 + half * 8;
        float l = 0;
#pragma unroll 1
        for (int block = 0; block < blocks; block++) {
            float sum = 0; /* b_t */
#pragma unroll
            for (int u = 0; u < BLOCK_UNITS; u++) {
                const uint4 x = sm.p[block * BLOCK_UNITS + u][lane];
                sum = add_up<S::T>(sum, half ? make_uint2(x.y, x.w) : make_uint2(x.x, x.z));
            }
            l = fad_f32_add(fad_f32_mul(l, block ? sm.alpha[block][row] : 1), sum);
        }
        l = sum_lanes(l);
        if (lane % 4 == 0)
            sm.l[row] = l;
    }

    /* ---- the split's state ---- */

    /* N8 (sink), N9: to out and lse. Lane i finishes row i % 16 of tile i / 16. */
    __device__ __forceinline__ void finish(const float (&o)[S::TILES][4], float l) const {
#pragma unroll
        for (int n = 0; n < S::TILES; n++)
            sm.o[n][threadIdx.x] = make_float4(o[n][0], o[n][1], o[n][2], o[n][3]);
        __syncwarp(); /* it may be read */
        const int r = lane % DECODE_ROWS, n = lane / DECODE_ROWS, dim = first_dim + n * 8;
        if (r >= sm.t.n_rows || n >= S::TILES)
            return;
        const float2 *from = (const float2 *)&sm.o[n][warp * 32 + r % 8 * 4] + r / 8;
        float x[8];
#pragma unroll
        for (int i = 0; i < 4; i++)
            x[2 * i] = from[2 * i].x, x[2 * i + 1] = from[2 * i].y;
        const uint4 out = finish_chunk<S::T>(p, sm.t, r, m, l, x, dim == 0);
        if (dim < p.Dv)
            *(uint4 *)((uint16_t *)out_row(p, sm.t, r).data + dim) = out;
    }

    __device__ __forceinline__ void spill(const float (&o)[S::TILES][4], const fad_partials &partials) const {
        const int g = lane / 4;
        const RowPair state = {{of_row(m, g), of_row(m, g + 8)}, {sm.l[g], sm.l[g + 8]}};
        spill_rows(p, sm.t, partials, sm.range.split, 0, state, o, first_dim);
    }

    /* What is going to be sent here; by one thread. Bytes that come before they are expected count all the same. */
    __device__ __forceinline__ void expect_states() const {
        if (S::FOLDS && split == 0)
            barrier_arrive_expect(sm.sent_there, (splits - 1) * (int)sizeof sm.sent[0]);
    }
    /* Where the state goes, by the value warps; l: of row lane % 16. */
    __device__ __forceinline__ void close_split(float (&o)[S::TILES][4], float l, const fad_partials &partials) {
        if constexpr (S::FOLDS) {
            if (split > 0) {
                sm.sent[split - 1].send_to(rank, sm.sent_there, o, m, l);
                return;
            }
            barrier_wait_cluster(sm.sent_there, 0);
#pragma unroll 1
            for (int i = 0; i < splits - 1; i++)
                sm.sent[i].fold_onto(o, m, l);
        } else if (partials.o) {
            spill(o, partials);
            return;
        }
        finish(o, l);
    }

    /* From the item to its state. */
    __device__ __forceinline__ void run(const fad_partials &partials) {
        if (threadIdx.x == 0) {
            expect_states();
            barrier_arrive_expect(sm.references_there, DECODE_ROWS * S::ALL_PARTS * 4);
            barrier_arrive_expect(sm.p_there, blocks * BLOCK_UNITS * min(sm.t.n_rows, 8) * 4 * (int)sizeof(uint4));
        }
        ValuePlaces second = {};
        load(second);
        cluster_wait(); /* all thread blocks have begun, and may be written to */
        share_probabilities(second);
        const bool care = warp < S::VALUE_WARPS && need_care();
        if constexpr (!S::FOLDS)
            allow_next_kernel(); /* the fold of spilled splits: K and V are here or asked for, P has been sent */
        barrier_wait_cluster(sm.p_there, 0); /* P may be read */
        float o[S::TILES][4] = {};
        if (warp < S::VALUE_WARPS) {
            if (care)
                multiply_guarded(o);
            else
                multiply(o);
        } else if (warp < S::VALUE_WARPS + SUM_WARPS) {
            add_up_rows(warp - S::VALUE_WARPS);
        }
        cp_async_wait<0>(); /* of few blocks the second half of V has not been waited for */
        __syncthreads();    /* l may be read */
        if (warp < S::VALUE_WARPS)
            close_split(o, sm.l[lane % DECODE_ROWS], partials);
    }

    /* The state of a split of which nothing is seen. */
    __device__ __forceinline__ void run_empty(const fad_partials &partials) {
        if (partials.o) {
            if (rank == 0)
                spill_empty(p, sm.t, partials, sm.range.from, sm.range.to, threadIdx.x, CLUSTER_THREADS);
            return;
        }
        if constexpr (S::FOLDS) {
            if (threadIdx.x == 0)
                expect_states();
            __syncwarp();
            cluster_wait(); /* all thread blocks have begun, and may be written to */
        }
        if (warp < S::VALUE_WARPS) {
            float zeros[S::TILES][4] = {};
            m = FAD_F32_SENTINEL;
            close_split(zeros, 0, partials);
        }
    }
};

/* An item, a split of a tile, for each RANKS thread blocks. */
template <class S> static __device__ __forceinline__ void hopper_cluster(const fad_attn_problem &p, const Work &work) {
    extern __shared__ __align__(1024) char shared_memory[];
    ClusterShared<S> &sm = *(ClusterShared<S> *)shared_memory;
    if (threadIdx.x == 64) {
        barrier_init(sm.references_there, 1);
        barrier_init(sm.p_there, 1);
        barrier_init(sm.second_there, COPY_THREADS);
        if constexpr (S::FOLDS)
            barrier_init(sm.sent_there, 1);
        fence_barrier_init();
    }
    __syncwarp();
    cluster_arrive();
    unsigned item = blockIdx.x / S::RANKS;
    int splits = 1, split = 0;
    if constexpr (S::FOLDS) {
        splits = work.cluster_splits;
        const unsigned tile = work.cluster.quotient(item);
        split = (int)(item - tile * splits);
        item = split * (unsigned)work.n_tiles + tile;
    }
    if (!share_item(p, work, DECODE_ROWS, item, sm.t, sm.range))
        return;
    ClusterThread<S> thread{p, sm, work.rule, sm.range.blocks, splits, split};
    if (sm.range.blocks > 0)
        thread.run(work.partials);
    else
        thread.run_empty(work.partials);
}

/* Clusters of one split, */
template <class S>
__global__ void __cluster_dims__(S::RANKS) __launch_bounds__(CLUSTER_THREADS, S::RESIDENT)
    hopper_cluster_kernel(const __grid_constant__ fad_attn_problem p, const __grid_constant__ Work work) {
    hopper_cluster<S>(p, work);
}
/* and of as many as the launch says: what does not know their size as it is compiled takes 2 to 4 % longer. */
template <class S>
__global__ void __launch_bounds__(CLUSTER_THREADS, S::RESIDENT)
    hopper_cluster_fold_kernel(const __grid_constant__ fad_attn_problem p, const __grid_constant__ Work work) {
    hopper_cluster<S>(p, work);
}

template <class S> static MmaKernel hopper_cluster_of() {
    static_assert(S::RESIDENT * (sizeof(ClusterShared<S>) + 1024) <= 228 * 1024, "they share a multiprocessor");
    MmaKernel kernel = {DECODE_ROWS, S::D,    CLUSTER_THREADS, false,   sizeof(ClusterShared<S>),
                        0,           nullptr, S::RANKS,        S::PAGES};
    if constexpr (S::FOLDS)
        kernel.run = hopper_cluster_fold_kernel<S>, kernel.splits = S::SPLITS;
    else
        kernel.run = hopper_cluster_kernel<S>;
    return kernel;
}

#endif
