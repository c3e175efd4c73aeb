/* The tile kernel of the mma family for compute capability 9.0: copy engine (TMA) and wgmma. On this chip wgmma and
 * mma.sync add up alike, so that bits are those of the generic kernels.
 *
 * A thread block stays on its multiprocessor and takes one item after the other. Its first warpgroup produces: warp 0
 * finds the next item and keeps K and V coming, block by block; the other warps copy Q. Each further warpgroup consumes:
 * it owns 64 rows, and while it works on the softmax of one block, its values step of the block before and the other
 * warpgroups' steps keep the tensor cores busy. */
#ifndef FAD_CUDA_HOPPER_TILE_CUH
#define FAD_CUDA_HOPPER_TILE_CUH

#include "hopper_kernel.cuh"
#include "hopper_ptx.cuh"
#include "mma_output.cuh"
#include "mma_values.cuh"
#include "work.cuh"

constexpr int GROUP_THREADS = 128, GROUP_WARPS = 4, GROUP_ROWS = 64; /* of a warpgroup */

template <fad_dtype T_, int D_, int CONSUMERS_, int STAGES_, int PRODUCER_REGISTERS_, int CONSUMER_REGISTERS_>
struct HopperShape {
    static constexpr fad_dtype T = T_;
    static constexpr int D = D_; /* of q, k and v, zero-padded */
    static constexpr int CONSUMERS = CONSUMERS_, STAGES = STAGES_;
    static constexpr int PRODUCER_REGISTERS = PRODUCER_REGISTERS_, CONSUMER_REGISTERS = CONSUMER_REGISTERS_;
    static_assert(PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS <=
                      (CONSUMERS + 1) * (65536 / (CONSUMERS + 1) / GROUP_THREADS / 8 * 8),
                  "a warpgroup would wait for registers for ever");
    static constexpr int THREADS = (CONSUMERS + 1) * GROUP_THREADS, ROWS = CONSUMERS * GROUP_ROWS;
    static constexpr int PIECES = D / 64;                             /* of 64 dims = 128 bytes, the width of a box */
    static constexpr int N = D / 8;                                   /* n8 tiles of O */
    static constexpr int BOX = BLOCK_KEYS * 128, TILE = PIECES * BOX; /* bytes: 64 rows of a piece; of all pieces */
    /* Where there is room: q in registers once an item has begun, and the running O between splits in shared memory. */
    static constexpr bool Q_IN_REGISTERS = D <= 128, REST_IN_SHARED = D <= 128;
};

/* One item of work, as the producer has found it. */
struct HopperItem {
    Tile t;
    KeyRange range;
    bool exists; /* false: there is no further one */
};

constexpr int ITEMS = 3;         /* the one before, which a consumer may still read, this one, and the next */
constexpr int QUERY_WARPS = 3;   /* of the producer */
constexpr int ALL_CONSUMERS = 8; /* a named barrier; 1 + group is a consumer's own */

template <class S> struct HopperShared {
    alignas(1024) char k[S::STAGES][S::TILE];
    char v[S::STAGES][S::TILE];
    char q[S::CONSUMERS][S::TILE];
    float4 rest[S::REST_IN_SHARED ? S::CONSUMERS : 0][S::N][GROUP_THREADS]; /* the running O of the splits before */
    HopperItem items[ITEMS];
    /* full: the copies have arrived. empty: every consuming warp is done with it. */
    MemoryBarrier k_full[S::STAGES], k_empty[S::STAGES], v_full[S::STAGES], v_empty[S::STAGES];
    MemoryBarrier q_full, q_empty, item_full[ITEMS], item_empty[ITEMS];
};

/* A position in a ring of buffers, and how often it has gone round. */
struct Ring {
    int index = 0;
    unsigned round = 0;
    template <int SIZE> __device__ __forceinline__ void advance() {
        if (++index == SIZE)
            index = 0, round ^= 1;
    }
};

template <class S> static __device__ void init_barriers(HopperShared<S> &sm) {
    constexpr int CONSUMING_WARPS = S::CONSUMERS * GROUP_WARPS;
    for (int i = 0; i < S::STAGES; i++) {
        barrier_init(sm.k_full[i], 1);
        barrier_init(sm.v_full[i], 1);
        barrier_init(sm.k_empty[i], CONSUMING_WARPS);
        barrier_init(sm.v_empty[i], CONSUMING_WARPS);
    }
    barrier_init(sm.q_full, QUERY_WARPS * 32);
    barrier_init(sm.q_empty, CONSUMING_WARPS);
    for (int i = 0; i < ITEMS; i++) {
        barrier_init(sm.item_full[i], 1);
        barrier_init(sm.item_empty[i], CONSUMING_WARPS + QUERY_WARPS);
    }
    fence_barrier_init();
}

/* ---- producer ---- */

/* Lane 0: K and V of an item's blocks, each as soon as there is room for it. Rows outside the buffer become zeros. */
template <class S>
static __device__ __forceinline__ void copy_blocks(const fad_attn_problem &p, const HopperItem &item,
                                                   const CUtensorMap &k_map, const CUtensorMap &v_map,
                                                   HopperShared<S> &sm, Ring &ring) {
    const fad_sequence &seq = item.t.seq;
    const int row0 = (int)(seq.k_row + item.range.first - seq.span.k_pos), head = (int)item.t.head_k,
              batch = p.cu_seqlens_k ? 0 : (int)seq.index, blocks = item.range.blocks;
    for (int block = 0; block < blocks; block++, ring.advance<S::STAGES>()) {
        const int i = ring.index, row = row0 + block * BLOCK_KEYS;
        barrier_wait(sm.k_empty[i], ring.round ^ 1);
        barrier_arrive_expect(sm.k_full[i], S::TILE);
#pragma unroll
        for (int piece = 0; piece < S::PIECES; piece++)
            copy_box(sm.k[i] + piece * S::BOX, k_map, sm.k_full[i], piece * 64, row, head, batch);
        barrier_wait(sm.v_empty[i], ring.round ^ 1);
        barrier_arrive_expect(sm.v_full[i], S::TILE);
#pragma unroll
        for (int piece = 0; piece < S::PIECES; piece++)
            copy_box(sm.v[i] + piece * S::BOX, v_map, sm.v_full[i], piece * 64, row, head, batch);
    }
}

/* Finds the next item that exists, or the end, and publishes it. */
template <class S>
static __device__ __forceinline__ bool publish_item(const fad_attn_problem &p, const Work &work, HopperShared<S> &sm,
                                                    const Ring &slot, int64_t &number) {
    HopperItem &item = sm.items[slot.index];
    bool exists = false;
    barrier_wait(sm.item_empty[slot.index], slot.round ^ 1);
    for (; number < work.n_items && !exists; number = take_item(work))
        exists = find_item(p, work, S::ROWS, number, item.t, item.range);
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
        item.exists = exists;
        barrier_arrive(sm.item_full[slot.index]);
    }
    return exists;
}

/* Warp 0 of the producer. Each item is published before the keys of the one before it are copied, so that finding it and
 * copying its queries cost the consumers no time. */
template <class S>
static __device__ __forceinline__ void produce_keys(const fad_attn_problem &p, const Work &work,
                                                    const CUtensorMap &k_map, const CUtensorMap &v_map,
                                                    HopperShared<S> &sm) {
    Ring before, slot, ring;
    int64_t number = blockIdx.x;
    for (bool first = true, exists = true; exists; first = false) {
        exists = publish_item(p, work, sm, slot, number);
        if (!first && threadIdx.x % 32 == 0)
            copy_blocks<S>(p, sm.items[before.index], k_map, v_map, sm, ring);
        __syncwarp();
        before = slot;
        slot.advance<ITEMS>();
    }
}

/* The other warps of the producer: an item's rows of q, as soon as the consumers have read those of the item before. */
template <class S>
static __device__ __forceinline__ void produce_queries(const fad_attn_problem &p, HopperShared<S> &sm) {
    const int thread = threadIdx.x - 32;
    unsigned q_round = 0;
    for (Ring slot;; slot.advance<ITEMS>(), q_round ^= 1) {
        const HopperItem &item = sm.items[slot.index];
        barrier_wait(sm.item_full[slot.index], slot.round);
        if (!item.exists)
            return;
        barrier_wait(sm.q_empty, q_round ^ 1);
#pragma unroll 2
        for (int at = thread; at < S::ROWS * S::N; at += QUERY_WARPS * 32) {
            const int r = at / S::N, chunk = at % S::N, piece = chunk / 8;
            const Row row = row_of(item.t, r);
            const int64_t first = item.t.seq.q + row.i * p.q.stride_s + row.h * p.q.stride_h;
            cp_async16(sm.q[r / GROUP_ROWS] + piece * S::BOX + swizzled<8>(r % GROUP_ROWS, chunk % 8),
                       (const char *)p.q.data + 2 * (first + chunk * 8),
                       r < item.t.n_active && chunk * 8 < p.D ? 16 : 0);
        }
        cp_async_commit();
        cp_async_wait<0>();
        fence_async_proxy();
        barrier_arrive(sm.q_full);
        __syncwarp(); /* all lanes have read the item */
        if (threadIdx.x % 32 == 0)
            barrier_arrive(sm.item_empty[slot.index]);
    }
}

/* ---- consumers ---- */

/* The 64 rows of a warpgroup; a warp has 16 of them. */
template <class S> struct HopperConsumer {
    const fad_attn_problem &p;
    HopperShared<S> &sm;
    const ScoreRule rule;
    const int group = threadIdx.x / GROUP_THREADS - 1, lane = threadIdx.x % 32;
    const int first = group * GROUP_ROWS + threadIdx.x % GROUP_THREADS / 32 * 16; /* the warp's, in the tile */
    Ring keys, values;
    int splits, to_split_end; /* that have ended; blocks up to the end of the current one */
    RowPair total;            /* of the splits that have ended */
    References references;
    float l[2]; /* this lane's l_t of rows g and g + 8 */
    unsigned q[S::Q_IN_REGISTERS ? S::D / 16 : 1][4];
    float o[S::N][4];

    __device__ HopperConsumer(const fad_attn_problem &problem, HopperShared<S> &shared)
        : p(problem), sm(shared), rule(problem) {}

    __device__ __forceinline__ void arrive(MemoryBarrier &barrier) const {
        __syncwarp();
        if (lane == 0)
            barrier_arrive(barrier);
    }
    __device__ __forceinline__ void sync_group() const { named_barrier_sync(1 + group, GROUP_THREADS); }

    __device__ __forceinline__ void load_queries() {
        if constexpr (S::Q_IN_REGISTERS) {
#pragma unroll
            for (int k = 0; k < S::D / 16; k++)
                load_fragment<8>(q[k], sm.q[group] + k / 4 * S::BOX, first % GROUP_ROWS, k % 4);
            arrive(sm.q_empty);
        }
    }
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int n = 0; n < S::N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                o[n][e] = 0;
        l[0] = l[1] = 0;
    }

    /* N7: starts S = Q K^T for the next block of keys. */
    __device__ __forceinline__ void start_scores(ScoreTile &s) {
        const char *k_tile = sm.k[keys.index];
        barrier_wait(sm.k_full[keys.index], keys.round);
#pragma unroll
        for (int k = 0; k < S::D / 16; k++) {
            const int at = k / 4 * S::BOX + k % 4 * 32;
            const uint64_t b = matrix_descriptor(k_tile + at, 16);
            if constexpr (S::Q_IN_REGISTERS)
                wgmma_scores<S::T>(s, q[k], b, k > 0);
            else
                wgmma_scores<S::T>(s, matrix_descriptor(sm.q[group] + at, 16), b, k > 0);
        }
    }
    __device__ __forceinline__ void release_keys() {
        arrive(sm.k_empty[keys.index]);
        keys.advance<S::STAGES>();
    }

    /* N4 to N6: from scores to probabilities. Returns whether references moved, alpha tells how O has to follow. */
    __device__ __forceinline__ bool softmax(ScoreTile &s, const HopperItem &item, int block, float (&alpha)[2]) {
        const bool partial = item.range.partial(block);
        if (partial || !rule.plain)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const RowView row(p, item.t, item.range, first + lane / 4 + half * 8);
                if (!rule.plain)
                    row.apply_options(s, half, rule, block);
                if (partial)
                    row.mask(s, half, block);
            }
        float x_max[2];
        row_maxima(s, x_max);
        const bool moved = references.advance(x_max, rule.c, partial, alpha);
        references.apply(s, rule.c);
        return moved;
    }

    /* N11: whether a block's values have Inf or NaN. Every consumer gets the same answer. */
    __device__ __forceinline__ bool values_not_finite() const {
        const uint4 *v = (const uint4 *)sm.v[values.index];
        unsigned full = 0;
#pragma unroll 4
        for (int at = threadIdx.x % GROUP_THREADS; at < S::TILE / 16; at += GROUP_THREADS) {
            const uint4 x = v[at];
            full |= exponents_full<S::T>(x.x) | exponents_full<S::T>(x.y) | exponents_full<S::T>(x.z) |
                    exponents_full<S::T>(x.w);
        }
        return named_barrier_or(1 + group, GROUP_THREADS, full != 0);
    }

    /* N11 where some rows do not see them: the values step by mma.sync, each row with what it sees. Then there are zeros
     * in their place, with which the usual step changes nothing. */
    __device__ __forceinline__ void add_guarded(const ProbabilityFragments &a, const HopperItem &item, int block) {
        char *v = sm.v[values.index];
#pragma unroll
        for (int piece = 0; piece < S::PIECES; piece++)
            add_values_guarded<S::T, 8>(*(float (*)[8][4]) & o[8 * piece], a, v + piece * S::BOX, [&](int r) {
                const RowView row(p, item.t, item.range, first + r);
                return fad_interval{row.lo - block * BLOCK_KEYS, row.hi - block * BLOCK_KEYS};
            });
        named_barrier_sync(ALL_CONSUMERS, S::CONSUMERS * GROUP_THREADS); /* v may be overwritten */
        for (int at = threadIdx.x - GROUP_THREADS; at < S::TILE / 16; at += S::CONSUMERS * GROUP_THREADS)
            ((uint4 *)v)[at] = make_uint4(0, 0, 0, 0);
        fence_async_proxy();
        named_barrier_sync(ALL_CONSUMERS, S::CONSUMERS * GROUP_THREADS); /* v may be read */
    }

    /* N7: starts O += P V. */
    __device__ __forceinline__ void start_values(const ProbabilityFragments &a) {
#pragma unroll
        for (int k = 0; k < BLOCK_KEYS / 16; k++)
            wgmma_values<S::T>(o, a[k], matrix_descriptor(sm.v[values.index] + k * 16 * 128, S::BOX));
    }

    /* Where the running O rests, this thread's values GROUP_THREADS apart. */
    __device__ __forceinline__ float4 *rest(const Work &work) const {
        const int thread = threadIdx.x % GROUP_THREADS;
        if constexpr (S::REST_IN_SHARED)
            return &sm.rest[group][0][thread];
        return (float4 *)work.rest + ((int64_t)blockIdx.x * S::CONSUMERS + group) * S::N * GROUP_THREADS + thread;
    }

    /* N8, N9: the end of a split whose m and l are `part` and whose O is o. Leaves in total and o those of all so far. */
    __device__ __forceinline__ void close_split(const Work &work, const HopperItem &item, const RowPair &part) {
        RowPair sum = part;
        if (work.partials.o)
            spill_rows(p, item.t, work.partials, item.range.split + splits, first, part, o, 0, true);
        else if (splits > 0)
            fold_into(total, [&](int n) { return rest(work)[n * GROUP_THREADS]; }, sum, o);
        total = sum;
        splits++;
    }

    /* Block `block` of an item: s holds its probabilities and, unless it is the last, at the end those of the next. */
    template <bool LAST>
    __device__ __forceinline__ void step(const Work &work, const HopperItem &item, int block, ScoreTile &s) {
        ProbabilityFragments a; /* in use until the values step is complete: not written again before */
        RowPair part;
        float alpha[2] = {1, 1};
        bool moved = false;
        const bool split_ends = LAST || --to_split_end == 0;
        round_probabilities<S::T>(a, s);
        barrier_wait(sm.v_full[values.index], values.round);
        if (item.range.partial(block) && values_not_finite())
            add_guarded(a, item, block);
        wgmma_fence();
        if (!LAST) {
            start_scores(s);
            wgmma_commit();
        }
        start_values(a);
        wgmma_commit();
#pragma unroll
        for (int half = 0; half < 2; half++) /* while the tensor cores work */
            l[half] = fad_f32_add(l[half], lane_sum<S::T>(a, half));
        if (split_ends) {
            part.m[0] = references.reference(0);
            part.m[1] = references.reference(1);
            references.clear();
        }
        if (!LAST) {
            wgmma_wait<1>();
            release_keys();
            moved = softmax(s, item, block + 1, alpha);
        }
        wgmma_wait<0>();
        arrive(sm.v_empty[values.index]);
        values.advance<S::STAGES>();
        if (split_ends) {
            part.l[0] = sum_lanes(l[0]);
            part.l[1] = sum_lanes(l[1]);
            close_split(work, item, part);
            if (!LAST) {
                if (!work.partials.o)
                    rest_state(rest(work), GROUP_THREADS, o);
                clear();
                to_split_end = item.range.split_blocks;
            }
        } else if (moved) {
            rescale(o, alpha);
            l[0] = fad_f32_mul(l[0], alpha[0]);
            l[1] = fad_f32_mul(l[1], alpha[1]);
        }
    }

    /* Every block of an item. */
    __device__ __forceinline__ void run_blocks(const Work &work, const HopperItem &item) {
        ScoreTile s;
        float alpha[2];
        const int last = item.range.blocks - 1;
        to_split_end = item.range.to_split_end;
        wgmma_fence();
        start_scores(s);
        wgmma_commit();
        wgmma_wait<0>();
        release_keys();
        softmax(s, item, 0, alpha);
#pragma unroll 1
        for (int block = 0; block < last; block++)
            step<false>(work, item, block, s);
        step<true>(work, item, last, s);
    }

    /* The item's splits that no row sees. */
    __device__ __forceinline__ void spill_others(const fad_partials &partials, const HopperItem &item) const {
        const int thread = threadIdx.x - GROUP_THREADS, threads = S::CONSUMERS * GROUP_THREADS;
        spill_empty(p, item.t, partials, item.range.from, item.range.split, thread, threads);
        spill_empty(p, item.t, partials, item.range.split + splits, item.range.to, thread, threads);
    }

    /* N9: O to out and lse. */
    __device__ __forceinline__ void finish(const HopperItem &item) {
        char *staged = S::REST_IN_SHARED ? (char *)sm.rest[group] : sm.q[group];
        staged -= group * GROUP_ROWS * S::D * 2; /* of the tile's row 0 */
        sync_group();                            /* nobody in the group reads what lies there any more */
        finish_rows<S::T, S::N>(p, item.t, first, total, o, staged, 0, true);
        sync_group(); /* out is staged */
        store_staged<GROUP_ROWS, S::N, GROUP_THREADS>(p, item.t, staged, threadIdx.x % GROUP_THREADS,
                                                      group * GROUP_ROWS);
        sync_group(); /* the place may be overwritten */
    }

    __device__ __forceinline__ void run(const Work &work) {
        unsigned q_round = 0;
        for (Ring slot;; slot.advance<ITEMS>(), q_round ^= 1) {
            const HopperItem &item = sm.items[slot.index];
            barrier_wait(sm.item_full[slot.index], slot.round);
            if (!item.exists)
                return;
            barrier_wait(sm.q_full, q_round);
            load_queries();
            references.clear();
            clear();
            splits = 0;
            total = {{FAD_F32_SENTINEL, FAD_F32_SENTINEL}, {0, 0}};
            if (item.range.blocks > 0)
                run_blocks(work, item);
            if (work.partials.o)
                spill_others(work.partials, item);
            else
                finish(item);
            if (!S::Q_IN_REGISTERS)
                arrive(sm.q_empty);
            arrive(sm.item_empty[slot.index]);
        }
    }
};

template <class S>
__global__ void __launch_bounds__(S::THREADS, 1)
    hopper_tile_kernel(const __grid_constant__ fad_attn_problem p, const __grid_constant__ Work work,
                       const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map) {
    extern __shared__ __align__(1024) char shared_memory[];
    HopperShared<S> &sm = *(HopperShared<S> *)shared_memory;
    if (threadIdx.x == 0)
        init_barriers(sm);
    __syncthreads(); /* barriers may be used */
    if (threadIdx.x < GROUP_THREADS) {
        give_registers<S::PRODUCER_REGISTERS>();
        if (threadIdx.x < 32)
            produce_keys(p, work, k_map, v_map, sm);
        else
            produce_queries(p, sm);
    } else {
        take_registers<S::CONSUMER_REGISTERS>();
        HopperConsumer<S>(p, sm).run(work);
    }
}

template <class S> static HopperKernel hopper_kernel_of() {
    return {{S::ROWS, S::D, S::THREADS, sizeof(HopperShared<S>),
             S::REST_IN_SHARED ? 0 : S::CONSUMERS * S::N * GROUP_THREADS * sizeof(float4), nullptr},
            hopper_tile_kernel<S>};
}

#endif
