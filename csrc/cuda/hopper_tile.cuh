/* The tile kernel of the mma family for compute capability 9.0: copy engine (TMA) and wgmma. On this chip wgmma and
 * mma.sync add up alike, so that bits are those of the generic kernels.
 *
 * A thread block stays on its multiprocessor and takes one item after the other. Its first warpgroup produces: a warp
 * finds items, one keeps K and V coming, block by block, and two copy Q. Each further warpgroup consumes:
 * it owns 64 rows, and while it works on the softmax of one block, its values step of the block before and the other
 * warpgroups' steps keep the tensor cores busy. */
#ifndef FAD_CUDA_HOPPER_TILE_CUH
#define FAD_CUDA_HOPPER_TILE_CUH

#include "hopper_copy.cuh"
#include "hopper_group.cuh"
#include "mma_output.cuh"
#include "mma_values.cuh"
#include "work.cuh"

template <fad_dtype T_, int D_, int CONSUMERS_, int SLOTS_, int PRODUCER_REGISTERS_, int CONSUMER_REGISTERS_>
struct HopperShape {
    static constexpr fad_dtype T = T_;
    static constexpr int D = D_; /* of q, k and v, zero-padded */
    static constexpr int CONSUMERS = CONSUMERS_, SLOTS = SLOTS_;
    static constexpr int PRODUCER_REGISTERS = PRODUCER_REGISTERS_, CONSUMER_REGISTERS = CONSUMER_REGISTERS_;
    static_assert(PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS <=
                      (CONSUMERS + 1) * (65536 / (CONSUMERS + 1) / GROUP_THREADS / 8 * 8),
                  "a warpgroup would wait for registers for ever");
    static constexpr int THREADS = (CONSUMERS + 1) * GROUP_THREADS, ROWS = CONSUMERS * GROUP_ROWS;
    static constexpr int N = D / 8;                                   /* n8 tiles of O */
    static constexpr int PARTS = D > 128 ? 2 : 1, PART_N = N / PARTS; /* of a block of K or V: its dims, a slot each */
    static constexpr int PIECES = D / PARTS / 64;                     /* of 64 dims = 128 bytes, the width of a box */
    static constexpr int BOX = BLOCK_KEYS * 128, SLOT = PIECES * BOX; /* bytes: a block's piece; all of a part's */
    static constexpr int Q_BOX = GROUP_ROWS * 128, Q_TILE = D / 64 * Q_BOX;
    /* Where there is room: q in registers once an item has begun, the running O between splits in shared memory, and the
     * scores of the next block besides O and P. */
    static constexpr bool Q_IN_REGISTERS = D == 128, REST_IN_SHARED = D <= 128, OVERLAP = D <= 128;
    static constexpr int Q_BUFFERS = D == 64 ? 2 : 1;
};

/* One item of work, as the producer has found it. */
struct HopperItem {
    Tile t;
    KeyRange range;
    bool exists; /* false: there is no further one */
};

constexpr int ITEMS = 2;       /* the one in work, and the next */
constexpr int QUERY_WARPS = 2; /* of the producer */

template <class S> struct HopperShared {
    alignas(1024) char ring[S::SLOTS][S::SLOT]; /* parts of K and V, in the order in which they are used */
    char q[S::Q_BUFFERS][S::CONSUMERS][S::Q_TILE];
    /* Of each consuming warp: the running O of the splits before; in the end out. */
    float4 rest[S::REST_IN_SHARED ? S::CONSUMERS * GROUP_WARPS : 0][S::N][32];
    float2 l[S::CONSUMERS * GROUP_THREADS]; /* of each consuming thread: its l_t of rows g and g + 8 */
    HopperItem items[ITEMS];
    /* full: the copies have arrived. empty: every consuming warp is done with it. */
    MemoryBarrier full[S::SLOTS], empty[S::SLOTS];
    MemoryBarrier q_full[S::Q_BUFFERS], q_empty[S::Q_BUFFERS], item_full[ITEMS], item_empty[ITEMS];
};

template <class S> static __device__ void init_barriers(HopperShared<S> &sm) {
    constexpr int CONSUMING_WARPS = S::CONSUMERS * GROUP_WARPS;
    for (int i = 0; i < S::SLOTS; i++) {
        barrier_init(sm.full[i], 1);
        barrier_init(sm.empty[i], CONSUMING_WARPS);
    }
    for (int i = 0; i < S::Q_BUFFERS; i++) {
        barrier_init(sm.q_full[i], QUERY_WARPS * 32);
        barrier_init(sm.q_empty[i], CONSUMING_WARPS);
    }
    for (int i = 0; i < ITEMS; i++) {
        barrier_init(sm.item_full[i], 1);
        barrier_init(sm.item_empty[i], CONSUMING_WARPS + QUERY_WARPS + 1);
    }
    fence_barrier_init();
}

/* ---- producer ---- */

/* One warp: K and V of an item's blocks in the order of their use, each as soon as there is room for it. */
template <class S>
static __device__ __forceinline__ void copy_blocks(const fad_attn_problem &p, const HopperItem &item,
                                                   const CUtensorMap &k_map, const CUtensorMap &v_map,
                                                   HopperShared<S> &sm, Ring &ring) {
    /* Other tiles of the head read the same. */
    const KeyCopier<BLOCK_KEYS, S::PIECES> copier(p, item.t, item.range, keep_as_usual());
    copier.run(k_map, v_map, [&](auto copy_k, auto copy_v) {
        auto next = [&](auto &copy, int block) {
#pragma unroll
            for (int part = 0; part < S::PARTS; part++, ring.advance(S::SLOTS)) {
                const int i = ring.index;
                copy(block * BLOCK_KEYS, part * S::PIECES * 64, sm.ring[i], sm.empty[i], ring.round ^ 1, sm.full[i]);
            }
        };
        const int blocks = item.range.blocks;
        if (S::OVERLAP && blocks > 0)
            next(copy_k, 0);
#pragma unroll 1
        for (int block = 0; block < blocks; block++) {
            if (block + S::OVERLAP < blocks)
                next(copy_k, block + S::OVERLAP);
            next(copy_v, block);
        }
    });
}

/* Finds items, always one ahead, so that it costs the consumers no time. The last one does not exist. */
template <class S>
static __device__ __forceinline__ void produce_items(const fad_attn_problem &p, const Work &work, HopperShared<S> &sm) {
    int64_t number = blockIdx.x;
    bool exists = true;
    for (Ring slot; exists; slot.advance(ITEMS)) {
        HopperItem &item = sm.items[slot.index];
        exists = false;
        barrier_wait(sm.item_empty[slot.index], slot.round ^ 1);
        for (; number < work.n_items && !exists; number = take_item(work))
            exists = find_item(p, work, S::ROWS, number, item.t, item.range);
        __syncwarp();
        if (threadIdx.x % 32 == 0) {
            item.exists = exists;
            barrier_arrive(sm.item_full[slot.index]);
        }
    }
}

/* Each item's K and V. */
template <class S>
static __device__ __forceinline__ void produce_keys(const fad_attn_problem &p, const CUtensorMap &k_map,
                                                    const CUtensorMap &v_map, HopperShared<S> &sm) {
    Ring ring;
    for (Ring slot;; slot.advance(ITEMS)) {
        const HopperItem &item = sm.items[slot.index];
        barrier_wait(sm.item_full[slot.index], slot.round);
        if (!item.exists)
            return;
        copy_blocks<S>(p, item, k_map, v_map, sm, ring); /* then all lanes have read the item */
        if (threadIdx.x % 32 == 0)
            barrier_arrive(sm.item_empty[slot.index]);
    }
}

/* Each item's rows of q, as soon as the consumers have read those that lay there before. */
template <class S>
static __device__ __forceinline__ void produce_queries(const fad_attn_problem &p, HopperShared<S> &sm) {
    const int thread = threadIdx.x % (QUERY_WARPS * 32), lane = thread % 32;
    Ring buffer;
    for (Ring slot;; slot.advance(ITEMS), buffer.advance(S::Q_BUFFERS)) {
        const HopperItem &item = sm.items[slot.index];
        barrier_wait(sm.item_full[slot.index], slot.round);
        if (!item.exists)
            return;
        barrier_wait(sm.q_empty[buffer.index], buffer.round ^ 1);
        for (int first = 0; first < S::ROWS; first += 32) {
            /* A lane finds a row, and the lanes that copy its chunks ask that lane. */
            const Row row = row_of(item.t, min(first + lane, max(item.t.n_active, 1) - 1));
            const int64_t place = item.t.seq.q + row.i * p.q.stride_s + row.h * p.q.stride_h;
            char *to = sm.q[buffer.index][first / GROUP_ROWS];
#pragma unroll 4
            for (int at = thread; at < 32 * S::N; at += QUERY_WARPS * 32) {
                const int r = at / S::N, chunk = at % S::N;
                const char *from = (const char *)p.q.data + 2 * __shfl_sync(~0u, place, r) + chunk * 16;
                cp_async16(to + chunk / 8 * S::Q_BOX + swizzled<8>(first % GROUP_ROWS + r, chunk % 8), from,
                           first + r < item.t.n_active && chunk * 8 < p.D ? 16 : 0);
            }
        }
        cp_async_commit();
        cp_async_wait<0>();
        fence_async_proxy();
        barrier_arrive(sm.q_full[buffer.index]);
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
    const ScoreRule &rule;
    const int group = uniform(threadIdx.x / GROUP_THREADS - 1), lane = threadIdx.x % 32;
    const int first = uniform(group * GROUP_ROWS + threadIdx.x % GROUP_THREADS / 32 * 16); /* the warp's, in the tile */
    const uint64_t k_ring = matrix_descriptor(sm.ring, 16), v_ring = matrix_descriptor(sm.ring, S::BOX),
                   q_tiles = matrix_descriptor(sm.q[0][group], 16);
    Ring q_buffer;
    Ring ring;                /* the next part of K or V */
    int whole, n_whole;       /* of the item's range */
    int splits, to_split_end; /* that have ended; blocks up to the end of the current one */
    RowPair total;            /* of the splits that have ended */
    References references;
    unsigned q[S::Q_IN_REGISTERS ? S::D / 16 : 1][4];
    float o[S::N][4];

    __device__ HopperConsumer(const fad_attn_problem &problem, const Work &work, HopperShared<S> &shared)
        : p(problem), sm(shared), rule(work.rule) {}

    __device__ __forceinline__ void arrive(MemoryBarrier &barrier) const {
        __syncwarp();
        if (lane == 0)
            barrier_arrive(barrier);
    }

    __device__ __forceinline__ void load_queries() {
        if constexpr (S::Q_IN_REGISTERS) {
#pragma unroll
            for (int k = 0; k < S::D / 16; k++)
                load_fragment<8>(q[k], sm.q[q_buffer.index][group] + k / 4 * S::Q_BOX, first % GROUP_ROWS, k % 4);
            arrive(sm.q_empty[q_buffer.index]);
        }
    }
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int n = 0; n < S::N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                o[n][e] = 0;
    }

    /* The slots of the ring where the next block of K or V lies; in use until released. */
    struct Slots {
        int part[S::PARTS];
    };
    /* arrived: of the first part, if barrier_test has been asked; asking early hides its latency. */
    __device__ __forceinline__ Slots wait_for_block(bool arrived = false) {
        Slots slots;
#pragma unroll
        for (int i = 0; i < S::PARTS; i++, ring.advance(S::SLOTS)) {
            if (i > 0 || !arrived)
                barrier_wait(sm.full[ring.index], ring.round);
            slots.part[i] = ring.index;
        }
        return slots;
    }
    __device__ __forceinline__ bool block_arrived() const { return barrier_test(sm.full[ring.index], ring.round); }
    __device__ __forceinline__ void release(const Slots &slots) const {
        __syncwarp();
        if (lane == 0)
#pragma unroll
            for (int i = 0; i < S::PARTS; i++)
                barrier_arrive(sm.empty[slots.part[i]]);
    }

    /* N7: starts S = Q K^T for a block of keys. */
    __device__ __forceinline__ void start_scores(ScoreTile &s, const Slots &keys) {
#pragma unroll
        for (int k = 0; k < S::D / 16; k++) {
            const int piece = k / 4 % S::PIECES, dims = k % 4 * 32;
            const uint64_t b = matrix_at(k_ring, keys.part[k / 4 / S::PIECES] * S::SLOT + piece * S::BOX + dims);
            if constexpr (S::Q_IN_REGISTERS)
                wgmma_scores<S::T>(s, q[k], b, k > 0);
            else
                wgmma_scores<S::T>(
                    s, matrix_at(q_tiles, q_buffer.index * (int)sizeof sm.q[0] + k / 4 * S::Q_BOX + dims), b, k > 0);
        }
    }

    __device__ __forceinline__ bool is_partial(int block) const {
        return (unsigned)(block - whole) >= (unsigned)n_whole;
    }

    /* N4 to N7: from scores to probabilities, and this lane's b_t in sum. Returns whether references moved; alpha tells
     * how O and l have to follow. PLAIN: the rule is, and every row sees the whole block. */
    template <bool PLAIN>
    __device__ __forceinline__ bool softmax(ScoreTile &s, const HopperItem &item, int block, float (&sum)[2],
                                            float (&alpha)[2]) {
        const bool partial = !PLAIN && is_partial(block);
        if (!PLAIN && (partial || !rule.plain)) {
            const RowView g(p, item.t, item.range, first + lane / 4), g8(p, item.t, item.range, first + lane / 4 + 8);
            if (!rule.plain)
                apply_options(s, g, g8, rule, block);
            if (partial) {
                g.mask(s, 0, block);
                g8.mask(s, 1, block);
            }
        }
        float x_max[2];
        row_maxima(s, x_max);
        const bool moved = references.advance(x_max, rule.c, alpha);
        references.apply<S::T>(s, rule.c, sum);
        return moved;
    }

    /* N11: whether a block's values have Inf or NaN. Every consumer gets the same answer. */
    __device__ __forceinline__ bool values_not_finite(const Slots &values) const {
        unsigned full = 0;
#pragma unroll
        for (int part = 0; part < S::PARTS; part++) {
            const uint4 *v = (const uint4 *)sm.ring[values.part[part]];
#pragma unroll 4
            for (int at = threadIdx.x % GROUP_THREADS; at < S::SLOT / 16; at += GROUP_THREADS) {
                const uint4 x = v[at];
                full |= exponents_full<S::T>(x.x) | exponents_full<S::T>(x.y) | exponents_full<S::T>(x.z) |
                        exponents_full<S::T>(x.w);
            }
        }
        return __any_sync(~0u, named_barrier_or(1 + group, GROUP_THREADS, full != 0));
    }

    /* N11 where some rows do not see them: the values step by mma.sync, each row with what it sees. Then there are zeros
     * in their place, with which the usual step changes nothing. */
    __device__ __forceinline__ void add_guarded(const ProbabilityFragments &a, const Slots &values,
                                                const HopperItem &item, int block) {
#pragma unroll
        for (int n = 0; n < S::N; n += 8)
            add_values_guarded<S::T, 8>(*(float (*)[8][4]) & o[n], a,
                                        sm.ring[values.part[n / S::PART_N]] + n / 8 % S::PIECES * S::BOX, [&](int r) {
                                            const RowView row(p, item.t, item.range, first + r);
                                            return fad_interval{row.lo - block * BLOCK_KEYS,
                                                                row.hi - block * BLOCK_KEYS};
                                        });
        named_barrier_sync(ALL_CONSUMERS, S::CONSUMERS * GROUP_THREADS); /* v may be overwritten */
#pragma unroll
        for (int part = 0; part < S::PARTS; part++)
            for (int at = threadIdx.x - GROUP_THREADS; at < S::SLOT / 16; at += S::CONSUMERS * GROUP_THREADS)
                ((uint4 *)sm.ring[values.part[part]])[at] = make_uint4(0, 0, 0, 0);
        fence_async_proxy();
        named_barrier_sync(ALL_CONSUMERS, S::CONSUMERS * GROUP_THREADS); /* v may be read */
    }

    /* N7: starts O += P V. */
    __device__ __forceinline__ void start_values(const ProbabilityFragments &a, const Slots &values) {
#pragma unroll
        for (int part = 0; part < S::PARTS; part++)
#pragma unroll
            for (int k = 0; k < BLOCK_KEYS / 16; k++)
                wgmma_values<S::T>(*(float (*)[S::PART_N][4]) & o[part * S::PART_N], a[k],
                                   matrix_at(v_ring, values.part[part] * S::SLOT + k * 16 * 128));
    }

    /* Where the running O rests, this lane's values 32 apart. */
    __device__ __forceinline__ float4 *rest(const Work &work) const {
        if constexpr (S::REST_IN_SHARED)
            return &sm.rest[first / 16][0][lane];
        return (float4 *)work.rest + ((int64_t)blockIdx.x * S::ROWS + first) / 16 * S::N * 32 + lane;
    }

    /* l has its place in shared memory, not only for want of registers: the compiler keeps this store before the wait for
     * the values step, and with it exp2, which it would let wait otherwise. */
    __device__ __forceinline__ float2 &l() const { return sm.l[threadIdx.x - GROUP_THREADS]; }
    __device__ __forceinline__ void add_to_l(const float (&alpha)[2], const float (&sum)[2]) const {
        l() = make_float2(fad_f32_add(fad_f32_mul(l().x, alpha[0]), sum[0]),
                          fad_f32_add(fad_f32_mul(l().y, alpha[1]), sum[1]));
    }

    /* N8, N9: the end of a split whose m and l are `part` and whose O is o. Leaves the state of all so far in total and in o,
     * if it was the item's last, else at rest. FOLD: it is not to be spilled. */
    template <bool FOLD>
    __device__ __forceinline__ void close_split(const Work &work, const HopperItem &item, const RowPair &part,
                                                bool last) {
        RowPair sum = part;
        if (!FOLD && work.partials.o)
            spill_rows(p, item.t, work.partials, item.range.split + splits, first, part, o, 0, true);
        else if (splits > 0)
            fold_into(total, [&](int n) { return rest(work)[n * 32]; }, sum, o);
        total = sum;
        splits++;
        if (last)
            return;
        if (FOLD || !work.partials.o)
            rest_state(rest(work), 32, o);
        clear();
        to_split_end = uniform(item.range.split_blocks);
    }

    /* What a step has to be ready for. PLAIN: this block and the next are plain and in one split. SPLIT: they are plain and
     * in two, which are folded. */
    enum Kind { PLAIN, SPLIT, ANY, LAST };

    /* The end of the steps whose block and the next are plain: they have loops of their own, without the code of all that is
     * rare, which would lie in the way and take registers. */
    __device__ __forceinline__ int plain_end(int last) const { return rule.plain ? min(whole + n_whole - 1, last) : 0; }

    /* Block `block` of an item: s holds its probabilities and, unless it is the last, at the end those of the next. */
    template <Kind KIND>
    __device__ __forceinline__ void step(const Work &work, const HopperItem &item, int block, ScoreTile &s) {
        constexpr bool LAST = KIND == Kind::LAST, PLAIN = KIND == Kind::PLAIN || KIND == Kind::SPLIT;
        ProbabilityFragments a; /* in use until the values step is complete: not written again before */
        RowPair part;
        Slots keys;
        float alpha[2], sum[2];
        bool moved = false;
        const bool split_ends = KIND == Kind::PLAIN ? false : KIND == Kind::ANY ? --to_split_end == 0 : true;
        bool arrived = S::OVERLAP && block_arrived();
        round_probabilities<S::T>(a, s);
        if (S::OVERLAP && !LAST) {
            keys = wait_for_block(arrived);
            arrived = block_arrived();
            wgmma_fence();
            start_scores(s, keys);
            wgmma_commit();
        }
        const Slots values = wait_for_block(arrived);
        if (!PLAIN && is_partial(block) && values_not_finite(values))
            add_guarded(a, values, item, block);
        wgmma_fence();
        start_values(a, values);
        wgmma_commit();
        if (split_ends) {
            part = {{references.reference(0), references.reference(1)}, {sum_lanes(l().x), sum_lanes(l().y)}};
            references.clear();
            l() = make_float2(0, 0);
        }
        if (!LAST) {
            if (!S::OVERLAP) {
                keys = wait_for_block();
                wgmma_wait<0>();
                release(values);
                if (split_ends) /* while there are registers for much of what rests */
                    close_split<PLAIN>(work, item, part, false);
                wgmma_fence();
                start_scores(s, keys);
                wgmma_commit();
                wgmma_wait<0>();
            } else {
                wgmma_wait<1>();
            }
            release(keys);
            moved = softmax<PLAIN>(s, item, block + 1, sum, alpha);
            add_to_l(alpha, sum);
        }
        if (S::OVERLAP || LAST) {
            wgmma_wait<0>();
            release(values);
        }
        if (split_ends && (S::OVERLAP || LAST))
            close_split<PLAIN>(work, item, part, LAST);
        if (!split_ends && moved)
            rescale(o, alpha);
    }

    /* Every block of an item. */
    __device__ __forceinline__ void run_blocks(const Work &work, const HopperItem &item) {
        ScoreTile s;
        float alpha[2], sum[2];
        const int last = uniform(item.range.blocks) - 1;
        to_split_end = uniform(item.range.to_split_end);
        whole = uniform(item.range.whole);
        n_whole = uniform(item.range.n_whole);
        const int end = plain_end(last);
        const Slots keys = wait_for_block();
        wgmma_fence();
        start_scores(s, keys);
        wgmma_commit();
        wgmma_wait<0>();
        release(keys);
        softmax<false>(s, item, 0, sum, alpha);
        l() = make_float2(sum[0], sum[1]);
#pragma unroll 1
        for (int block = 0; block < last;) {
            if (block >= whole && block < end) {
                const int run_end = min(end, block + to_split_end - 1);
                to_split_end -= run_end - block;
#pragma unroll 1
                while (block < run_end)
                    step<PLAIN>(work, item, block++, s);
                if (block < end && !work.partials.o) {
                    step<SPLIT>(work, item, block++, s);
                    continue;
                }
                if (block >= last)
                    break;
            }
            step<ANY>(work, item, block++, s);
        }
        step<LAST>(work, item, last, s);
    }

    /* The item's splits that no row sees. */
    __device__ __forceinline__ void spill_others(const fad_partials &partials, const HopperItem &item) const {
        const int thread = threadIdx.x - GROUP_THREADS, threads = S::CONSUMERS * GROUP_THREADS;
        spill_empty(p, item.t, partials, item.range.from, item.range.split, thread, threads);
        spill_empty(p, item.t, partials, item.range.split + splits, item.range.to, thread, threads);
    }

    /* N9: O to out and lse. */
    __device__ __forceinline__ void finish(const HopperItem &item) {
        char *staged;
        if constexpr (S::REST_IN_SHARED) {
            staged = (char *)sm.rest[first / 16];
            __syncwarp(); /* what rested there has been read */
        } else {
            staged = sm.q[0][0] + first * S::D * 2;
            named_barrier_sync(1 + group, GROUP_THREADS); /* the group's q may be overwritten, a quarter by each warp */
        }
        finish_rows<S::T>(p, item.t, first, total, o, staged,
                          [&](bool x) { return !__any_sync(~0u, named_barrier_or(1 + group, GROUP_THREADS, !x)); });
        __syncwarp(); /* out is staged */
        store_staged<S::N>(p, item.t, first, staged);
        __syncwarp(); /* the place may be overwritten */
    }

    __device__ __forceinline__ void run(const Work &work) {
        for (Ring slot;; slot.advance(ITEMS), q_buffer.advance(S::Q_BUFFERS)) {
            const HopperItem &item = sm.items[slot.index];
            barrier_wait(sm.item_full[slot.index], slot.round);
            if (!uniform(item.exists))
                return;
            barrier_wait(sm.q_full[q_buffer.index], q_buffer.round);
            load_queries();
            references.clear();
            clear();
            splits = 0;
            total = {{FAD_F32_SENTINEL, FAD_F32_SENTINEL}, {0, 0}};
            if (uniform(item.range.blocks) > 0)
                run_blocks(work, item);
            if (work.partials.o)
                spill_others(work.partials, item);
            else
                finish(item);
            if (!S::Q_IN_REGISTERS)
                arrive(sm.q_empty[q_buffer.index]);
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
        if (threadIdx.x < 64)
            produce_queries(p, sm);
        else if (threadIdx.x < 96)
            produce_keys(p, k_map, v_map, sm);
        else
            produce_items(p, work, sm);
    } else {
        take_registers<S::CONSUMER_REGISTERS>();
        HopperConsumer<S>(p, work, sm).run(work);
    }
}

template <class S> static HopperKernel hopper_kernel_of() {
    static_assert(sizeof(HopperShared<S>) <= 227 * 1024, "more shared memory than a thread block can have");
    return {{S::ROWS, S::D, S::THREADS, true, sizeof(HopperShared<S>),
             S::REST_IN_SHARED ? 0 : S::CONSUMERS * S::N * GROUP_THREADS * sizeof(float4), nullptr},
            BLOCK_KEYS,
            hopper_tile_kernel<S>};
}

#endif
