/* The consuming warpgroups of the Hopper tile kernel: S, softmax, O, and the fold of splits for 64 rows each. */
#ifndef FAD_CUDA_HOPPER_TILE_CONSUMER_CUH
#define FAD_CUDA_HOPPER_TILE_CONSUMER_CUH

#include "hopper_tile_shared.cuh"
#include "mma_output.cuh"
#include "mma_values.cuh"

/* The 64 rows of a warpgroup; a warp has 16 of them.
 *
 * A step adds the values of one block of keys while it computes the scores and probabilities of the next. The first step of
 * an item has no block: its values are whatever lies in shared memory, and nobody asks for the sum. The last block's values
 * are added where the item ends. So all softmax is done by the code of ordinary steps: what a tile runs once, it fetches
 * slowly. */
template <class S> struct HopperConsumer {
    const fad_attn_problem &p;
    const Work &work;
    HopperShared<S> &sm;
    const int group = uniform(threadIdx.x / GROUP_THREADS - 1), lane = threadIdx.x % 32;
    const int first = uniform(group * GROUP_ROWS + threadIdx.x % GROUP_THREADS / 32 * 16); /* the warp's, in the tile */
    const uint64_t k_ring = matrix_descriptor(sm.ring, 16), v_ring = matrix_descriptor(sm.ring, S::BOX),
                   q_tiles = matrix_descriptor(sm.q[0][group], 16);
    Ring q_buffer, ring, check, slot; /* the next q, part of K or V, check of values, item */
    int current;                      /* the item in work */
    int block, last;                  /* its block whose probabilities are there, -1: none yet; its last one */
    int whole, n_whole;               /* of its range */
    int plain_end;                    /* of the blocks that every row sees all of, and not the last: from `whole` on */
    int splits = 0, to_split_end;     /* that have ended; blocks up to the end of the current one */
    bool first_values = true;         /* of a split: the next ones start a chain */
    float l[2] = {0, 0};              /* this lane's l_t of rows g and g + 8 */
    References references;
    unsigned q[S::Q_IN_REGISTERS ? S::D / 16 : 1][4];
    float o[S::N][4];

    __device__ HopperConsumer(const fad_attn_problem &problem, const Work &what, HopperShared<S> &shared)
        : p(problem), work(what), sm(shared) {}

    __device__ __forceinline__ const HopperItem &item() const { return sm.items[current]; }

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
#pragma unroll
        for (int i = 0; i < S::PARTS; i++)
            release_part(slots, i);
    }
    __device__ __forceinline__ void release_part(const Slots &slots, int i) const {
        __syncwarp();
        if (lane == 0)
            barrier_arrive(sm.empty[slots.part[i]]);
        __syncwarp(); /* or the compiler takes all that follows for divergent: numbers of the warp in a lane's registers */
    }

    /* Waits for the products that were started last, with these slots, and releases them. */
    __device__ __forceinline__ void finish_products(const Slots &slots, bool releases = true) const {
        if constexpr (S::PARTS == 2) { /* its first part is waited for by those who copy: there are few slots */
            wgmma_wait<1>();
            if (releases)
                release_part(slots, 0);
        }
        wgmma_wait<0>();
        if (releases)
            release_part(slots, S::PARTS - 1);
    }

    /* N7: starts S = Q K^T for a block of keys. */
    __device__ __forceinline__ void start_scores(ScoreTile &s, const Slots &keys) {
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < S::D / 16; k++) {
            const int piece = k / 4 % S::PIECES, dims = k % 4 * 32;
            const uint64_t b = matrix_at(k_ring, keys.part[k / 4 / S::PIECES] * S::SLOT + piece * S::BOX + dims);
            if constexpr (S::Q_IN_REGISTERS)
                wgmma_scores<S::T>(s, q[k], b, k > 0);
            else
                wgmma_scores<S::T>(
                    s, matrix_at(q_tiles, q_buffer.index * (int)sizeof sm.q[0] + k / 4 * S::Q_BOX + dims), b, k > 0);
            if ((k + 1) % (S::D / 16 / S::PARTS) == 0)
                wgmma_commit();
        }
    }

    /* What x holds is not needed any more, and need not stay in its registers. */
    template <class X, int N, int M> static __device__ __forceinline__ void forget(X (&x)[N][M]) {
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < M; e++)
                set_to_anything(x[n][e]);
    }

    /* Scores that have been waited for. The compiler must not see that their bits are looked at later: it would copy them to
     * integers where their products are still on their way, which then have to wait for each other. */
    static __device__ __forceinline__ void settle(ScoreTile &s) {
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                s[n][e] = opaque(s[n][e]);
    }

    /* N7: starts O += P V, or O = P V with the first values of a split. */
    __device__ __forceinline__ void start_values(const ProbabilityFragments &a, const Slots &values) {
        wgmma_fence();
#pragma unroll
        for (int part = 0; part < S::PARTS; part++) {
#pragma unroll
            for (int k = 0; k < BLOCK_KEYS / 16; k++)
                wgmma_values<S::T>(*(float (*)[S::PART_N][4]) & o[part * S::PART_N], a[k],
                                   matrix_at(v_ring, values.part[part] * S::SLOT + k * 16 * 128),
                                   k > 0 || !first_values);
            wgmma_commit();
        }
    }

    __device__ __forceinline__ bool is_partial() const { return (unsigned)(block - whole) >= (unsigned)n_whole; }

    /* N4 to N6: options, masks and the references of the present block. Returns whether references moved; alpha tells how O
     * and l have to follow. PLAIN: the rule is. */
    template <bool PLAIN> __device__ __forceinline__ bool advance(ScoreTile &s, float (&alpha)[2]) {
        const ScoreRule &rule = work.rule;
        if (!PLAIN && !rule.plain) {
            const RowView g(p, item().t, item().range, first + lane / 4),
                g8(p, item().t, item().range, first + lane / 4 + 8);
            apply_options(s, g, g8, rule, block);
        }
        if (is_partial())
#pragma unroll
            for (int half = 0; half < 2; half++)
                item().seen[first + lane / 4 + half * 8].mask(s, half, block);
        float x_max[2];
        row_maxima<S::INTEGER_MAXIMA>(s, x_max);
        return references.advance(x_max, rule.c, alpha);
    }

    /* N11: whether the values of the present block, which not every row sees, have Inf or NaN. Once for each such block. */
    __device__ __forceinline__ bool values_not_finite() {
        barrier_wait(sm.check_done[check.index], check.round);
        const bool *const of_warps = sm.not_finite[check.index];
        static_assert(KEY_WARPS == 2, "all of them are asked");
        const bool not_finite = uniform(of_warps[0] || of_warps[1]);
        check.advance(S::SLOTS);
        return not_finite;
    }

    /* N11 where some rows do not see the values of the present block, if they are not all finite: the values step by mma.sync,
     * each row with what it sees. Then there are zeros in their place, with which the usual step changes nothing. */
    __device__ __forceinline__ void guard_values(const ProbabilityFragments &a) {
        if (!values_not_finite())
            return;
        Ring at = ring.after(S::OVERLAP && block < last ? S::PARTS : 0, S::SLOTS); /* behind the next keys? */
        Slots values;
#pragma unroll
        for (int i = 0; i < S::PARTS; i++, at.advance(S::SLOTS)) {
            barrier_wait(sm.full[at.index], at.round);
            values.part[i] = at.index;
        }
        if (first_values)
            clear();
        first_values = false;
#pragma unroll
        for (int n = 0; n < S::N; n += 8)
            add_values_guarded<S::T, 8>(*(float (*)[8][4]) & o[n], a,
                                        sm.ring[values.part[n / S::PART_N]] + n / 8 % S::PIECES * S::BOX, [&](int r) {
                                            const RowView row(p, item().t, item().range, first + r);
                                            return fad_interval{row.lo - block * BLOCK_KEYS,
                                                                row.hi - block * BLOCK_KEYS};
                                        });
        named_barrier_sync(ALL_CONSUMERS, S::CONSUMERS * GROUP_THREADS); /* v may be overwritten */
#pragma unroll
        for (int part = 0; part < S::PARTS; part++)
            for (int i = threadIdx.x - GROUP_THREADS; i < S::SLOT / 16; i += S::CONSUMERS * GROUP_THREADS)
                ((uint4 *)sm.ring[values.part[part]])[i] = make_uint4(0, 0, 0, 0);
        fence_async_proxy();
        named_barrier_sync(ALL_CONSUMERS, S::CONSUMERS * GROUP_THREADS); /* v may be read */
    }

    /* ---- ends of splits and items ---- */

    /* Where O rests between splits, n8 tile n at n * REST_STRIDE. */
    static constexpr int REST_STRIDE = 32;
    __device__ __forceinline__ float4 *rest(int lane) const {
        if constexpr (S::REST_IN_SHARED)
            return &sm.rest[first / 16][0][lane];
        else
            return (float4 *)work.rest + ((int64_t)blockIdx.x * S::ROWS + first) / 16 * S::N * 32 + lane;
    }

    /* K and V pass through the L2 cache between two folds, and may have driven out what rests. */
    __device__ __forceinline__ void prefetch_rest() const {
        constexpr int LINE = 128, LINES = S::N * 32 * (int)sizeof(float4) / LINE; /* of a warp */
        const char *const lines = (const char *)rest(0);
        const int lane = opaque_lane();
#pragma unroll
        for (int i = 0; i < LINES; i += 32)
            prefetch_line(lines + (i + lane) * LINE);
    }

    /* m and l of rows g and g + 8 of the splits that have ended. */
    __device__ __forceinline__ float2 *totals(int lane) const { return &sm.totals[first + lane / 4]; }
    __device__ __forceinline__ RowPair total(int lane) const {
        const float2 g = totals(lane)[0], g8 = totals(lane)[8];
        return {{g.x, g8.x}, {g.y, g8.y}};
    }
    __device__ __forceinline__ void set_total(int lane, const RowPair &part) const {
        __syncwarp(); /* they may be overwritten */
        if (lane % 4 == 0) {
            totals(lane)[0] = make_float2(part.m[0], part.l[0]);
            totals(lane)[8] = make_float2(part.m[1], part.l[1]);
        }
        __syncwarp(); /* they may be read */
    }

    /* N8: folds the split in part and o, which is not the item's last, into those before; the sum is left at rest. O is only
     * read, so that scores can be computed meanwhile. */
    __device__ __forceinline__ void fold_at_rest(RowPair &part) const {
        const int lane = opaque_lane();
        float4 *const before = rest(lane);
        if (splits > 0)
            fold_states<4>(
                total(lane), [&](int n) { return before[n * REST_STRIDE]; }, part, o,
                [&](int n, const float4 &sum) { before[n * REST_STRIDE] = sum; });
        else
            rest_state(before, REST_STRIDE, o);
        set_total(lane, part);
    }
    /* The same for the last; the sum is left in part and o. */
    __device__ __forceinline__ void fold_last(RowPair &part) {
        const int lane = opaque_lane();
        const float4 *const before = rest(lane);
        if (splits > 0)
            fold_into<4>(total(lane), [&](int n) { return before[n * REST_STRIDE]; }, part, o);
    }
    __device__ __forceinline__ void spill(const RowPair &part) const {
        spill_rows(p, item().t, work.partials, item().range.split + splits, first, part, o, 0);
    }

    /* O, with m and l in part, to out and lse, by way of shared memory, which is the warp's own: where O rests, or else the
     * slots of the values that it met last. */
    __device__ __forceinline__ void write_out(const Tile &t, const RowPair &part, const Slots &values) {
        constexpr int STAGED = 16 * S::D * 2; /* bytes of a warp */
        char *staged;
        if constexpr (S::REST_IN_SHARED) {
            static_assert(sizeof(RestTile<S::N>) >= STAGED, "O in the input type takes less than what rests");
            staged = (char *)&sm.rest[first / 16];
        } else {
            static_assert(S::PARTS == S::CONSUMERS && STAGED * GROUP_WARPS <= S::SLOT, "a slot for each group");
            staged = sm.ring[values.part[group]] + first % GROUP_ROWS / 16 * STAGED;
            named_barrier_sync(ALL_CONSUMERS, S::CONSUMERS * GROUP_THREADS); /* the values may be overwritten */
        }
        finish_rows<S::T>(p, t, first, part, o, staged);
        __syncwarp(); /* out is staged */
        store_staged<S::N>(p, t, first, staged);
        __syncwarp(); /* it may be overwritten */
        if (!S::REST_IN_SHARED)
            fence_async_proxy();
    }

    /* m and l of a split all of whose probabilities are there. */
    __device__ __forceinline__ RowPair end_references() {
        const RowPair part = {{references.reference(0), references.reference(1)}, {sum_lanes(l[0]), sum_lanes(l[1])}};
        references.clear();
        l[0] = l[1] = 0;
        return part;
    }

    /* All of the item's q has been read. */
    __device__ __forceinline__ void release_queries() {
        warp_arrive(sm.q_empty[q_buffer.index]);
        q_buffer.advance(S::Q_BUFFERS);
    }
    __device__ __forceinline__ void take_queries() {
        barrier_wait(sm.q_full[q_buffer.index], q_buffer.round);
        if constexpr (S::Q_IN_REGISTERS) {
            const int row = opaque(first % GROUP_ROWS);
#pragma unroll
            for (int k = 0; k < S::D / 16; k++)
                load_fragment<8>(q[k], sm.q[q_buffer.index][group] + k / 4 * S::Q_BOX, row, k % 4);
            release_queries();
        }
    }

    /* ---- steps ---- */

    /* Warpgroups start their products in turn, so that one's softmax falls into the time of the others' products. */
    __device__ __forceinline__ void take_turn() const { named_barrier_sync(FIRST_TURN + group, 2 * GROUP_THREADS); }
    __device__ __forceinline__ void pass_turn() const {
        named_barrier_arrive(FIRST_TURN + (group + 1 < S::CONSUMERS ? group + 1 : 0), 2 * GROUP_THREADS);
    }

    /* What a step has to be ready for. PLAIN: the rule is plain, every row sees all of this block, if there is one, and the
     * next one is in the same split. SPLIT: it is in the next, and splits are folded. These have code of their own, without all
     * that is rare, which would lie in the way and take registers; masks of the next block are not rare, as all causal tiles
     * have them. */
    enum Kind { PLAIN, SPLIT, ANY };

    /* a holds the probabilities of the present block, rounded, and at the end those of the next, which must exist. If not every
     * row sees the present block, its values have been guarded. */
    template <Kind KIND> __device__ __forceinline__ void step(ProbabilityFragments &a) {
        const bool split_ends = KIND == Kind::SPLIT || (KIND == Kind::ANY && --to_split_end == 0),
                   spills = KIND == Kind::ANY && work.partials.o;
        ScoreTile s;
        RowPair part;
        Slots keys, values;
        float alpha[2], sum[2];
        forget(s);
        if (split_ends) {
            to_split_end = uniform(item().range.split_blocks);
            if (!S::REST_IN_SHARED && splits > 0 && !spills)
                prefetch_rest();
        }
        if (S::OVERLAP) {
            const bool keys_arrived = block_arrived();
            take_turn();
            keys = wait_for_block(keys_arrived);
            const bool values_arrived = block_arrived();
            start_scores(s, keys);
            if (KIND == Kind::ANY)
                pass_turn();
            values = wait_for_block(values_arrived);
        } else {
            values = wait_for_block();
            take_turn();
        }
        start_values(a, values);
        first_values = split_ends || block < 0;
        if (S::OVERLAP ? KIND != Kind::ANY : split_ends)
            pass_turn();
        if (split_ends)
            part = end_references();
        auto end_split = [&] {
            if (!split_ends)
                return;
            if (spills)
                spill(part);
            else
                fold_at_rest(part);
            splits++;
        };
        block++;
        if (S::OVERLAP) {
            wgmma_wait<1>();
        } else {
            finish_products(values);
            keys = wait_for_block();
            start_scores(s, keys);
            end_split();
            if (!split_ends)
                pass_turn();
            finish_products(keys);
        }
        settle(s);
        if (S::OVERLAP)
            release(keys);
        const bool moved = advance<KIND != Kind::ANY>(s, alpha);
        if (S::OVERLAP)
            finish_products(values); /* and a may be overwritten */
        references.apply<S::T>(s, work.rule.c, sum);
        round_probabilities<S::T>(a, s);
        l[0] = fad_f32_add(fad_f32_mul(l[0], alpha[0]), sum[0]);
        l[1] = fad_f32_add(fad_f32_mul(l[1], alpha[1]), sum[1]);
        if (S::OVERLAP)
            end_split();
        if (!split_ends && moved)
            rescale(o, alpha);
    }

    /* Goes to the next item, before its first block. Whether there is one. */
    __device__ __forceinline__ bool begin_item() {
        if (!uniform(wait_for_item(sm, slot) != nullptr))
            return false;
        current = slot.index;
        slot.advance(ITEMS);
        const KeyRange &range = item().range;
        block = -1;
        last = uniform(range.blocks) - 1;
        whole = uniform(range.whole);
        n_whole = uniform(range.n_whole);
        to_split_end = uniform(range.to_split_end) + 1; /* the step without a block counts */
        plain_end = work.rule.plain ? min(whole + n_whole, last) : -1;
        take_queries();
        return true;
    }
    /* All blocks but the values of the last. */
    __device__ __forceinline__ void run_steps(ProbabilityFragments &a) {
        for (;;) {
            if (block < plain_end && (block < 0 || block >= whole)) {
                const int end = min(block < 0 && whole > 0 ? 0 : plain_end, block + to_split_end - 1);
                to_split_end -= end - block;
#pragma unroll 1
                while (block < end)
                    step<PLAIN>(a);
                if (block >= whole && block < plain_end && !work.partials.o) {
                    step<SPLIT>(a);
                    continue;
                }
            }
            if (block >= 0 && is_partial())
                guard_values(a);
            if (block == last)
                return;
            step<ANY>(a);
        }
    }
    /* Adds the values of the last block, and finishes the item. */
    __device__ __forceinline__ void end_item(const ProbabilityFragments &a) {
        const bool spills = work.partials.o, staged = !S::REST_IN_SHARED && !spills; /* where the values were */
        if (!S::REST_IN_SHARED && splits > 0 && !spills)
            prefetch_rest();
        if (!S::Q_IN_REGISTERS)
            release_queries();
        const Slots values = wait_for_block();
        take_turn();
        start_values(a, values);
        pass_turn();
        RowPair part = end_references();
        finish_products(values, !staged);
        if (spills) {
            if (!work.counter) /* else further items follow, and the fold would be in their way */
                allow_next_kernel();
            spill(part);
        } else {
            fold_last(part);
            write_out(item().t, part, values);
        }
        if (staged)
            release(values);
        splits = 0;
        first_values = true;
        warp_arrive(sm.item_empty[current]);
        __syncwarp(); /* as in release */
    }

    /* All items. */
    __device__ __forceinline__ void run() {
        if (group == S::CONSUMERS - 1)
            pass_turn(); /* the first one's first */
        references.clear();
        while (begin_item()) {
            ProbabilityFragments a;
            forget(a);
            run_steps(a);
            end_item(a);
        }
    }
};

#endif
