/* The producing warps of the Hopper tile kernel: one finds items, one keeps K and V coming, block by block, and two copy
 * Q. */
#ifndef FAD_CUDA_HOPPER_TILE_PRODUCER_CUH
#define FAD_CUDA_HOPPER_TILE_PRODUCER_CUH

#include "hopper_copy.cuh"
#include "hopper_tile_finish.cuh"

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

/* K and V of all items in the order of their use, each as soon as there is room for it. */
template <class S> struct KeyProducer {
    typedef KeyCopier<BLOCK_KEYS, S::PIECES> Copier;
    const fad_attn_problem &p;
    const CUtensorMap &k_map, &v_map;
    HopperShared<S> &sm;
    Ring ring;

    __device__ __forceinline__ Copier copier(const HopperItem &item) const {
        return Copier(p, item.t, item.range, keep_as_usual()); /* other tiles of the head read the same */
    }
    template <class Copy> __device__ __forceinline__ void next(Copy &copy, int block) {
#pragma unroll
        for (int part = 0; part < S::PARTS; part++, ring.advance(S::SLOTS)) {
            const int i = ring.index;
            copy(block * BLOCK_KEYS, part * S::PIECES * 64, sm.ring[i], sm.empty[i], ring.round ^ 1, sm.full[i]);
        }
    }
    /* The first K of an item, which is used before the last V of the one before. */
    __device__ __forceinline__ void first_keys(const HopperItem *item) {
        if (S::OVERLAP && item)
            copier(*item).start(k_map, v_map, [&](auto copy_k, auto) { next(copy_k, 0); });
    }

    __device__ __forceinline__ void run() {
        Ring slot;
        const HopperItem *item = wait_for_item(sm, slot);
        first_keys(item);
        while (item) {
            const Ring next_slot = slot.after(1, ITEMS);
            copier(*item).start(k_map, v_map, [&](auto copy_k, auto copy_v) {
                const int blocks = item->range.blocks;
#pragma unroll 1
                for (int block = 0; block < blocks; block++) {
                    if (!S::OVERLAP)
                        next(copy_k, block);
                    else if (block + 1 < blocks)
                        next(copy_k, block + 1);
                    else
                        first_keys(wait_for_item(sm, next_slot));
                    next(copy_v, block);
                }
            });
            warp_arrive(sm.item_empty[slot.index]); /* all lanes have read the item */
            slot = next_slot;
            item = wait_for_item(sm, slot);
        }
    }
};

/* Each item's rows of q, as soon as the consumers have read those that lay there before. */
template <class S>
static __device__ __forceinline__ void produce_queries(const fad_attn_problem &p, HopperShared<S> &sm) {
    const int thread = threadIdx.x % (QUERY_WARPS * 32), lane = thread % 32;
    Ring slot, buffer;
    while (const HopperItem *const item = wait_for_item(sm, slot)) {
        const Tile &t = item->t;
        barrier_wait(sm.q_empty[buffer.index], buffer.round ^ 1);
        for (int first = 0; first < S::ROWS; first += 32) {
            /* A lane finds a row, and the lanes that copy its chunks ask that lane. */
            const Row row = row_of(t, min(first + lane, max(t.n_active, 1) - 1));
            const int64_t place = t.seq.q + row.i * p.q.stride_s + row.h * p.q.stride_h;
            char *to = sm.q[buffer.index][first / GROUP_ROWS];
#pragma unroll 4
            for (int at = thread; at < 32 * S::N; at += QUERY_WARPS * 32) {
                const int r = at / S::N, chunk = at % S::N;
                const char *from = (const char *)p.q.data + 2 * __shfl_sync(~0u, place, r) + chunk * 16;
                cp_async16(to + chunk / 8 * S::Q_BOX + swizzled<8>(first % GROUP_ROWS + r, chunk % 8), from,
                           first + r < t.n_active && chunk * 8 < p.D ? 16 : 0);
            }
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
