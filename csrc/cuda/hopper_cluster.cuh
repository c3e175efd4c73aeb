/* The split-KV kernel of compute capability 9.0 for calls that leave most of the device idle: a cluster of thread blocks
 * shares one split of up to 1024 keys.
 *
 * Each thread block computes S and P of its share of the keys, and O of 32 dims over all of them: O is a chain over the
 * keys, but one for each dim. So nearly all of K and V is asked for at once, and a split has two exchanges, of references
 * and of P, which a thread block writes into the shared memory of all. */
#ifndef FAD_CUDA_HOPPER_CLUSTER_CUH
#define FAD_CUDA_HOPPER_CLUSTER_CUH

#include "hopper_ptx.cuh"
#include "mma_decode_units.cuh"
#include "mma_output.cuh"

constexpr int CLUSTER_WARPS = 8, CLUSTER_THREADS = CLUSTER_WARPS * 32; /* of a thread block */
constexpr int CLUSTER_DIMS = 32;                             /* of O, a thread block's; 8 are a value warp's */
constexpr int VALUE_WARPS = CLUSTER_DIMS / 8, SUM_WARPS = 2; /* the next two warps add up l: of rows g, of rows g + 8 */
constexpr int COPY_THREADS = CLUSTER_THREADS / 2;            /* of K; the others copy q and V */

template <fad_dtype T_, int D_> struct ClusterShape {
    static constexpr fad_dtype T = T_;
    static constexpr int D = D_;                                   /* of q, k and v, zero-padded */
    static constexpr int CHUNKS = D / 8;                           /* of 16 bytes, in a row of q */
    static constexpr int RANKS = D / CLUSTER_DIMS;                 /* thread blocks of a cluster */
    static constexpr int KEYS = CLUSTER_KEYS / RANKS;              /* a thread block's share of S */
    static constexpr int UNITS = KEYS / UNIT_KEYS / CLUSTER_WARPS; /* a warp's share of them */
    static constexpr int PARTS = BLOCK_UNITS / UNITS;              /* warps that share a block */
    static constexpr int ALL_PARTS = CLUSTER_BLOCKS * PARTS;       /* warps of the cluster */
};

/* Two thread blocks fit on a multiprocessor. Values are there in two halves, the second of which replaces K: */
constexpr int HALF_KEYS = CLUSTER_KEYS / 2, HALF_BYTES = HALF_KEYS * CLUSTER_DIMS * 2;

template <class S> struct ClusterShared {
    union {
        alignas(1024) char k[S::KEYS * S::D * 2]; /* in pieces of 64 dims; later, */
        struct {
            uint2 p[CLUSTER_KEYS / UNIT_KEYS][2][32]; /* P of all keys as a operands, of rows g and of rows g + 8 */
            char second[HALF_BYTES];
        };
    };
    char first[HALF_BYTES];
    union {
        char q[DECODE_ROWS * S::D * 2];
        float4 o[VALUE_WARPS * 32]; /* to be finished */
    };
    float references[DECODE_ROWS][S::ALL_PARTS + 4]; /* of the largest score, of every warp; rows in different banks */
    float alpha[CLUSTER_BLOCKS][DECODE_ROWS]; /* N6: what O and l are multiplied by before each block but the first */
    float l[DECODE_ROWS];
    RowTable<DECODE_ROWS> rows;
    Tile t;
    KeyRange range;

    /* 32 dims of the values of a block. */
    __device__ __forceinline__ const char *values(int block) const {
        return second + (block ^ CLUSTER_BLOCKS / 2) * BLOCK_KEYS * CLUSTER_DIMS * 2;
    }
};

/* A thread of the cluster. */
template <class S> struct ClusterThread {
    const fad_attn_problem &p;
    ClusterShared<S> &sm;
    const ScoreRule &rule;
    const int blocks; /* of keys */
    const int rank = blockIdx.x % S::RANKS, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first_dim = rank * CLUSTER_DIMS + warp * 8; /* of O, a value warp's */
    float m;                                              /* the last reference of row lane % 16 */

    static __device__ __forceinline__ float of_row(float x, int r) { return __shfl_sync(~0u, x, r); }

    /* ---- what comes from memory ---- */

    __device__ __forceinline__ void load_values(char *to, int first) const {
        const Keys v(p.v, sm.t.seq.v, sm.t, sm.range.first, p.Dv);
        v.template load<HALF_KEYS, CLUSTER_DIMS / 8, COPY_THREADS>(to, first, sm.range.lo, sm.range.hi,
                                                                   rank * CLUSTER_DIMS, threadIdx.x % COPY_THREADS);
        cp_async_commit();
    }

    /* q, K and half of V are asked for, the first two awaited. */
    __device__ __forceinline__ void load() const {
        const int thread = threadIdx.x % COPY_THREADS;
        if (threadIdx.x < COPY_THREADS) {
            const Keys k(p.k, sm.t.seq.k, sm.t, sm.range.first, p.D);
#pragma unroll 1
            for (int piece = 0; piece < S::D / 64; piece++)
                k.template load<S::KEYS, 8, COPY_THREADS>(sm.k + piece * S::KEYS * 128, rank * S::KEYS, sm.range.lo,
                                                          sm.range.hi, piece * 64, thread);
            cp_async_commit();
            cp_async_wait<0>();
        } else {
            load_queries<DECODE_ROWS, S::CHUNKS, COPY_THREADS>(sm.q, p, sm.t, thread);
            cp_async_commit();
            load_values(sm.first, 0);
            sm.rows.fill(p, sm.t, sm.range, thread, COPY_THREADS);
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

    /* References, and this thread block's share of P, to the whole cluster. */
    __device__ __forceinline__ void share_probabilities() {
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
                    store_remote(remote_address(to, i + lane % 4), reference[half]);
        }
        __syncwarp();
        cluster_arrive();
        cluster_wait(); /* references may be read, and K be overwritten */
        if (threadIdx.x >= COPY_THREADS)
            load_values(sm.second, HALF_KEYS);
        float mine = 0, next = FAD_F32_SENTINEL;
#pragma unroll
        for (int b = 0; b < CLUSTER_BLOCKS; b++) {
            m = next;
            next = advance(m, b);
            mine = b == block ? next : mine;
            if (b == warp && lane < DECODE_ROWS) /* every warp finds the factors of one block */
                sm.alpha[b][lane] = fad_f32_pow2(fad_f32_sub(m, next));
        }
        m = next;
        if (block < blocks) {
            const float now[2] = {of_row(mine, lane / 4), of_row(mine, lane / 4 + 8)};
            units.probabilities(now, rule.c, [&](int u, const uint4 &a) {
#pragma unroll
                for (int i = 0; i < S::RANKS; i++) { /* no more than the rows that there are: this takes its time */
                    const unsigned to = remote_address(&sm.p[unit + u][0][lane], i);
                    if (lane / 4 < sm.t.n_rows)
                        store_remote(to, make_uint2(a.x, a.z));
                    if (lane / 4 + 8 < sm.t.n_rows)
                        store_remote(to + (int)sizeof sm.p[0][0], make_uint2(a.y, a.w));
                }
            });
        }
        cp_async_wait<0>();
        __syncwarp();
        cluster_arrive();
        cluster_wait(); /* P, factors and V may be read */
    }

    /* ---- O and l ---- */

    /* What a block's steps need of a warp's eight dims. */
    struct Fragments {
        uint2 p[BLOCK_UNITS], p8[BLOCK_UNITS];
        unsigned v[BLOCK_UNITS / 2][4];
    };
    __device__ __forceinline__ void fetch_values(unsigned (&v)[BLOCK_UNITS / 2][4], int block) const {
#pragma unroll
        for (int i = 0; i < BLOCK_UNITS / 2; i++) /* two units */
            ldmatrix_transposed(v[i], sm.values(block) + swizzled<CLUSTER_DIMS / 8>(i * 32 + lane, warp));
    }
    __device__ __forceinline__ void fetch(Fragments &f, int block) const {
        fetch_values(f.v, block);
#pragma unroll
        for (int u = 0; u < BLOCK_UNITS; u++)
            f.p[u] = sm.p[block * BLOCK_UNITS + u][0][lane], f.p8[u] = sm.p[block * BLOCK_UNITS + u][1][lane];
    }

    /* Whether there are Inf or NaN among the values of blocks that some rows see and others do not. */
    __device__ __forceinline__ bool need_care() const {
        unsigned full = 0;
#pragma unroll 1
        for (int b = 0; b < blocks; b++) {
            if (!sm.range.partial(b))
                continue;
            unsigned v[BLOCK_UNITS / 2][4];
            fetch_values(v, b);
#pragma unroll
            for (int i = 0; i < BLOCK_UNITS * 2; i++)
                full |= exponents_full<S::T>(v[i / 4][i % 4]);
        }
        return __any_sync(~0u, full != 0);
    }

    /* N7: O of this warp's dims. A block's operands are on their way while the one before is multiplied. */
    __device__ __forceinline__ void multiply(float (&o)[4]) const {
        Fragments f[2];
        fetch(f[0], 0);
#pragma unroll
        for (int b = 0; b < CLUSTER_BLOCKS; b++) {
            if (b >= blocks)
                break;
            if (b + 1 < CLUSTER_BLOCKS)
                fetch(f[(b + 1) % 2], b + 1); /* past the last: never used */
            const Fragments &now = f[b % 2];
#pragma unroll
            for (int e = 0; e < 4 && b > 0; e++)
                o[e] = fad_f32_mul(o[e], sm.alpha[b][lane / 4 + e / 2 * 8]);
#pragma unroll
            for (int u = 0; u < BLOCK_UNITS; u++)
                mma_step<S::T>(o, {now.p[u].x, now.p8[u].x, now.p[u].y, now.p8[u].y}, now.v[u / 2][u % 2 * 2],
                               now.v[u / 2][u % 2 * 2 + 1]);
        }
    }

    /* The same where N11 needs care. Rare: little code. */
    __device__ __forceinline__ void multiply_guarded(float (&o)[4]) const {
        float before = FAD_F32_SENTINEL;
#pragma unroll 1
        for (int unit = 0; unit < blocks * BLOCK_UNITS; unit++) {
            const int block = unit / BLOCK_UNITS, key = unit * UNIT_KEYS;
            if (unit % BLOCK_UNITS == 0) {
                const float now = advance(before, block), alpha = fad_f32_pow2(fad_f32_sub(before, now));
#pragma unroll
                for (int e = 0; e < 4; e++)
                    o[e] = fad_f32_mul(o[e], of_row(alpha, lane / 4 + e / 2 * 8));
                before = now;
            }
            const uint2 x = sm.p[unit][0][lane], x8 = sm.p[unit][1][lane];
            unsigned b[4]; /* of the last 16 keys twice */
            ldmatrix_transposed(b, sm.values(block) + swizzled<CLUSTER_DIMS / 8>(key % BLOCK_KEYS + lane % 16, warp));
            if (sm.range.partial(block)) {
                guarded_step<S::T>(sm.rows, o, {x.x, x8.x, x.y, x8.y}, {b[0], b[1]}, key, lane);
            } else {
                mma_step<S::T>(o, {x.x, x8.x, x.y, x8.y}, b[0], b[1]);
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
            for (int u = 0; u < BLOCK_UNITS; u++)
                sum = add_up<S::T>(sum, sm.p[block * BLOCK_UNITS + u][half][lane]);
            l = fad_f32_add(fad_f32_mul(l, block ? sm.alpha[block][row] : 1), sum);
        }
        l = sum_lanes(l);
        if (lane % 4 == 0)
            sm.l[row] = l;
    }

    /* ---- the split's state ---- */

    /* N8 (sink), N9: to out and lse. */
    __device__ __forceinline__ void finish(const float (&o)[4], float l) const {
        sm.o[threadIdx.x] = make_float4(o[0], o[1], o[2], o[3]);
        __syncwarp(); /* it may be read */
        const int r = lane;
        if (r >= sm.t.n_rows)
            return;
        const float2 *from = (const float2 *)&sm.o[warp * 32 + r % 8 * 4] + r / 8;
        float x[8];
#pragma unroll
        for (int i = 0; i < 4; i++)
            x[2 * i] = from[2 * i].x, x[2 * i + 1] = from[2 * i].y;
        const uint4 out = finish_chunk<S::T>(p, sm.t, r, m, l, x, first_dim == 0);
        if (first_dim < p.Dv)
            *(uint4 *)((uint16_t *)out_row(p, sm.t, r).data + first_dim) = out;
    }

    __device__ __forceinline__ void spill(const float (&o)[4], const fad_partials &partials) const {
        const int g = lane / 4;
        const float of_tile[1][4] = {{o[0], o[1], o[2], o[3]}};
        const RowPair state = {{of_row(m, g), of_row(m, g + 8)}, {sm.l[g], sm.l[g + 8]}};
        spill_rows(p, sm.t, partials, sm.range.split, 0, state, of_tile, first_dim);
    }

    /* From the item to its state. */
    __device__ __forceinline__ void run(const fad_partials &partials) {
        load();
        cluster_wait(); /* all thread blocks have begun, and may be written to */
        share_probabilities();
        float o[4] = {0, 0, 0, 0};
        if (warp < VALUE_WARPS) {
            if (need_care())
                multiply_guarded(o);
            else
                multiply(o);
        } else if (warp < VALUE_WARPS + SUM_WARPS) {
            add_up_rows(warp - VALUE_WARPS);
        }
        __syncthreads(); /* l may be read */
        if (warp >= VALUE_WARPS)
            return;
        if (partials.o)
            spill(o, partials);
        else
            finish(o, sm.l[lane % DECODE_ROWS]);
    }

    /* The state of a split of which nothing is seen. */
    __device__ __forceinline__ void run_empty(const fad_partials &partials) {
        m = FAD_F32_SENTINEL;
        if (partials.o) {
            if (rank == 0)
                spill_empty(p, sm.t, partials, sm.range.from, sm.range.to, threadIdx.x, CLUSTER_THREADS);
        } else if (warp < VALUE_WARPS) {
            finish({0, 0, 0, 0}, 0);
        }
    }
};

/* An item, a tile with one split, for each cluster. */
template <class S>
__global__ void __cluster_dims__(S::RANKS) __launch_bounds__(CLUSTER_THREADS, 2)
    hopper_cluster_kernel(const __grid_constant__ fad_attn_problem p, const __grid_constant__ Work work) {
    extern __shared__ __align__(1024) char shared_memory[];
    ClusterShared<S> &sm = *(ClusterShared<S> *)shared_memory;
    allow_next_kernel();
    cluster_arrive();
    if (!share_item(p, work, DECODE_ROWS, blockIdx.x / S::RANKS, sm.t, sm.range))
        return;
    ClusterThread<S> thread{p, sm, work.rule, sm.range.blocks};
    if (sm.range.blocks > 0)
        thread.run(work.partials);
    else
        thread.run_empty(work.partials);
}

template <class S> static MmaKernel hopper_cluster_of() {
    static_assert(2 * sizeof(ClusterShared<S>) <= 226 * 1024, "two thread blocks share a multiprocessor");
    return {DECODE_ROWS, S::D, CLUSTER_THREADS, false, sizeof(ClusterShared<S>), 0, hopper_cluster_kernel<S>, S::RANKS};
}

#endif
