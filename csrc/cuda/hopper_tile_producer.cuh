/* The producing warps of the Hopper tile kernel: one finds items, one copies Q, and KEY_WARPS keep K and V coming, block by
 * block, and check values. */
#ifndef FAD_CUDA_HOPPER_TILE_PRODUCER_CUH
#define FAD_CUDA_HOPPER_TILE_PRODUCER_CUH

#include "hopper_copy.cuh"
#include "hopper_tile_empty.cuh"
#include "hopper_tile_pages.cuh"

/* Finds items, always one ahead, so that it costs the consumers no time. The last one does not exist. What no row sees
 * anything of is written out here: tiles without a visible key, and splits outside what a tile sees. */
template <class S> struct ItemProducer {
    const fad_attn_problem &p;
    const Work &work;
    HopperShared<S> &sm;

    __device__ __forceinline__ void write_unseen(const HopperItem &item) const {
        const KeyRange &range = item.range;
        if (!work.partials.o) {
            if (range.blocks == 0)
                finish_empty(p, item.t);
            return;
        }
        int64_t seen_end = range.split; /* of the splits of which some row sees something */
        if (range.blocks > 0)
            seen_end += 1 + fad_quotient(max(range.blocks - range.to_split_end, 0) + range.split_blocks - 1,
                                         range.split_blocks);
        for (int64_t nth = range.from; nth < range.to; nth++)
            if (nth < range.split || nth >= seen_end)
                spill_empty(p, item.t, work.partials, nth);
    }

    __device__ __forceinline__ void run() const {
        int64_t number = blockIdx.x;
        bool exists = true;
        for (Ring slot; exists; slot.advance(ITEMS)) {
            HopperItem &item = sm.items[slot.index];
            exists = false;
            barrier_wait(sm.item_empty[slot.index], slot.round ^ 1);
            for (; number < work.n_items && !exists; number = take_item(work)) {
                if (!find_item(p, work, S::ROWS, number, item.t, item.range))
                    continue;
                __syncwarp(); /* the item may be read */
                write_unseen(item);
                exists = item.range.blocks > 0;
                __syncwarp(); /* the item may be overwritten */
            }
            if (threadIdx.x % 32 == 0) {
                if (exists)
                    item.seen = TileSeenKeys(item.t, item.range);
                item.exists = exists;
                barrier_arrive(sm.item_full[slot.index]);
            }
        }
    }
};

/* K and V of all items in the order of their use, each as soon as there is room for it. By KEY_WARPS warps, each of which
 * copies its rows of every block. */
template <class S> struct KeyProducer {
    static constexpr int ROWS = BLOCK_KEYS / KEY_WARPS;
    const fad_attn_problem &p;
    const CUtensorMap &k_map, &v_map;
    HopperShared<S> &sm;
    const int warp; /* of those */
    /* Of the L2 cache: where splits are spilled, there are few rows, which read K and V once or at the same time, and would
     * drive the code of this kernel out of the L2 cache. Otherwise tiles of a head read the same one after the other. */
    const uint64_t policy;
    const bool by_warp;
    PageCopier<ROWS, S::PIECES, BLOCK_KEYS> pages; /* if so */
    Ring ring, check;                              /* the next part of K or V, the next check */

    __device__ __forceinline__ KeyProducer(const fad_attn_problem &problem, const Work &work, const CUtensorMap &of_k,
                                           const CUtensorMap &of_v, HopperShared<S> &shared, int number)
        : p(problem), k_map(of_k), v_map(of_v), sm(shared), warp(number),
          policy(work.partials.o ? read_once() : keep_as_usual()), by_warp(work.keys_by_warp) {}

    /* KeyCopier::run. */
    template <class Each> __device__ __forceinline__ void copy_item(const HopperItem &item, Each each) {
        auto copy = [&](const fad_view &view, int64_t dims, auto &&...slot) {
            pages.copy(Keys(view, 0, item.t, item.range.first, dims), item.range, policy, slot...);
        };
        if (by_warp)
            each([&](auto &&...slot) { copy(p.k, p.D, slot...); }, [&](auto &&...slot) { copy(p.v, p.Dv, slot...); });
        else
            KeyCopier<ROWS, S::PIECES, BLOCK_KEYS>(p, item.t, item.range, policy).run(k_map, v_map, each);
    }
    template <class Copy> __device__ __forceinline__ void next(Copy &copy, int block) {
#pragma unroll
        for (int part = 0; part < S::PARTS; part++, ring.advance(S::SLOTS)) {
            const int i = ring.index;
            copy(block * BLOCK_KEYS + warp * ROWS, part * S::PIECES * 64, sm.ring[i] + warp * ROWS * 128, sm.empty[i],
                 ring.round ^ 1, sm.full[i]);
        }
    }
    /* Anything, in the place of the values that the first step of an item has not. */
    __device__ __forceinline__ void skip() {
#pragma unroll
        for (int part = 0; part < S::PARTS; part++, ring.advance(S::SLOTS)) {
            barrier_wait(sm.empty[ring.index], ring.round ^ 1);
            warp_arrive(sm.full[ring.index]);
        }
    }
    __device__ __forceinline__ const HopperItem *next_item(Ring slot) {
        pages.finish();
        return wait_for_item(sm, slot);
    }
    /* N11: whether there is Inf or NaN among this warp's rows of the values that begin in this slot of the ring. */
    __device__ __forceinline__ void check_values(Ring slot) {
        const int lane = threadIdx.x % 32;
        unsigned sums[4] = {0, 0, 0, 0}; /* of nothing but zeros, or not finite; several, as each waits for itself */
        pages.finish();
#pragma unroll 1
        for (int part = 0; part < S::PARTS; part++, slot.advance(S::SLOTS)) {
            barrier_wait(sm.full[slot.index], slot.round);
#pragma unroll 1
            for (int piece = 0; piece < S::PIECES; piece++) {
                const uint4 *const v = (const uint4 *)(sm.ring[slot.index] + piece * S::BOX + warp * ROWS * 128);
#pragma unroll 4
                for (int at = lane; at < ROWS * 8; at += 32) {
                    const uint4 x = v[at];
                    sums[0] = add_zero_times<S::T>(sums[0], x.x);
                    sums[1] = add_zero_times<S::T>(sums[1], x.y);
                    sums[2] = add_zero_times<S::T>(sums[2], x.z);
                    sums[3] = add_zero_times<S::T>(sums[3], x.w);
                }
            }
        }
        const bool not_finite = __any_sync(~0u, exponents_full<S::T>(sums[0] | sums[1] | sums[2] | sums[3]) != 0);
        if (lane == 0) {
            sm.not_finite[check.index][warp] = not_finite;
            barrier_arrive(sm.check_done[check.index]);
        }
        __syncwarp();
        check.advance(S::SLOTS);
    }

    __device__ __forceinline__ void run() {
        Ring slot;
        const HopperItem *item = next_item(slot);
        while (item) {
            copy_item(*item, [&](auto copy_k, auto copy_v) {
                const int blocks = item->range.blocks;
#pragma unroll 1
                for (int block = -1; block < blocks; block++) { /* the order of HopperShared's ring */
                    const bool more = block + 1 < blocks;
                    if (S::OVERLAP && more)
                        next(copy_k, block + 1);
                    if (block < 0) {
                        skip();
                    } else {
                        const Ring values = ring;
                        next(copy_v, block);
                        if (item->range.partial(block))
                            check_values(values);
                    }
                    if (!S::OVERLAP && more)
                        next(copy_k, block + 1);
                }
            });
            warp_arrive(sm.item_empty[slot.index]); /* all lanes have read the item */
            slot.advance(ITEMS);
            item = next_item(slot);
        }
    }
};

/* Each item's rows of q, as soon as the consumers have read those that lay there before. By one warp: four lanes copy a row,
 * each every fourth chunk of it, because finding where to copy from takes longer than to copy. */
template <class S>
static __device__ __forceinline__ void produce_queries(const fad_attn_problem &p, HopperShared<S> &sm) {
    constexpr int LANES = 4, STEP = 32 / LANES;
    static_assert(STEP == 8, "a lane's rows are swizzled alike");
    const int lane = opaque_lane(), chunk = lane % LANES, first = lane / LANES, column = (chunk ^ first) * 16;
    Ring slot, buffer;
    while (const HopperItem *const item = wait_for_item(sm, slot)) {
        const Tile &t = item->t;
        RowWalk<STEP> walk(p.q, t.seq.q + chunk * 8, t, first);
        const int n_active = t.n_active, dims = (int)p.D - chunk * 8; /* from the lane's first chunk on */
        barrier_wait(sm.q_empty[buffer.index], buffer.round ^ 1);
        char *to = sm.q[buffer.index][0] + first * 128;
#pragma unroll 1
        for (int tile = first; tile < S::ROWS; tile += GROUP_ROWS, to += S::Q_TILE)
#pragma unroll 2
            for (int r = 0; r < GROUP_ROWS; r += STEP, walk.advance()) {
                const char *const from = (const char *)p.q.data + walk.at;
#pragma unroll
                for (int c = 0; c < S::N; c += LANES)
                    cp_async16(to + c / 8 * S::Q_BOX + r * 128 + (column ^ c % 8 * 16), from + c * 16,
                               tile + r < n_active && c * 8 < dims ? 16 : 0);
            }
        cp_async_commit();
        cp_async_wait<0>();
        fence_async_proxy();
        barrier_arrive(sm.q_full[buffer.index]);
        warp_arrive(sm.item_empty[slot.index]); /* all lanes have read the item */
        slot.advance(ITEMS);
        buffer.advance(S::Q_BUFFERS);
    }
}

#endif
