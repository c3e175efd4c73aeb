/* The warps of the split-KV kernel that keep K and V coming: K of the next block, then V of this one, each some rows of
 * every block. */
#ifndef FAD_CUDA_MMA_DECODE_PRODUCER_CUH
#define FAD_CUDA_MMA_DECODE_PRODUCER_CUH

#include "hopper_copy.cuh"
#include "mma_decode_shared.cuh"

/* prefetch_first_rows() in pages, by the producing warps, of which this is number `warp`: each some of the boxes, because the
 * lanes of one ask for them one after the other. Returns where the boxes lie. */
template <class S>
static __device__ __forceinline__ BoxCache prefetch_first_pages(const fad_attn_problem &p, const Work &work, int warp,
                                                                unsigned number, const CUtensorMap &k_map,
                                                                const CUtensorMap &v_map) {
    BoxCache cache;
    /* with left padding pages are not the engine's: pages_by_engine() */
    const ExpectedKeys keys(p, work.dense, DECODE_ROWS, number);
    if (keys.row < 0)
        return cache;
    const int lane = threadIdx.x % 32, rows = box_rows(p, S::BOX_KEYS), row = keys.row + lane * rows;
    cache.first_row = keys.row;
    cache.first = 0;
    cache.here = keys.find(p, row);
    cache.after = keys.find(p, row + FOUND_BOXES * rows);
    const bool mine = lane % S::PRODUCERS == warp && lane * rows < BLOCK_KEYS;
    if (mine && row < keys.length(p)) /* both are asked for before they are looked at */
        prefetch_boxes<S::D>(k_map, v_map, cache.here.row, keys.head, (int)clamp_page(cache.here.page, (unsigned)p.Bk));
    return cache;
}

template <class S> struct MmaDecodeProducer {
    static constexpr int ROWS = S::BOX_KEYS; /* of a slot, a warp's */
    const fad_attn_problem &p;
    MmaDecodeShared<S> &sm;
    Ring ring;

    /* keys(first), values(first): copy SLOT_KEYS keys from number `first` on. */
    template <class KeysOf, class ValuesOf> __device__ __forceinline__ void run(KeysOf keys, ValuesOf values) {
        const int end = sm.range.blocks * BLOCK_KEYS;
#pragma unroll 1
        for (int block = -BLOCK_KEYS; block < end; block += BLOCK_KEYS) {
            for (int key = block + BLOCK_KEYS; key < min(block + 2 * BLOCK_KEYS, end); key += S::SLOT_KEYS)
                keys(key);
            for (int key = block; key < block + BLOCK_KEYS && key >= 0; key += S::SLOT_KEYS)
                values(key);
        }
    }

    /* By this warp. Keys outside the range become zeros. */
    __device__ __forceinline__ void copy_by_warp(int warp) {
        static_assert(S::PRODUCERS % S::BLOCK_SLOTS == 0 && S::SLOTS % S::BLOCK_SLOTS == 0,
                      "a warp always has the same slots of the ring, and misses no round of them");
        const Keys k(p.k, sm.t.seq.k, sm.t, sm.range.first, p.D), v(p.v, sm.t.seq.v, sm.t, sm.range.first, p.Dv);
        const int nth = warp / S::SLOT_PRODUCERS,
                  first = warp % S::SLOT_PRODUCERS * ROWS; /* slot of a block, row of it */
        auto slot = [&](int key, auto copy) {
            if (key / S::SLOT_KEYS % S::BLOCK_SLOTS == nth) {
                barrier_wait(sm.empty[ring.index], ring.round ^ 1);
                copy(sm.ring[ring.index]);
                barrier_arrive_copied(sm.full[ring.index]);
            }
            ring.advance(S::SLOTS);
        };
        if (p.block_table) {
            Found of_k, of_v;
            find(of_k, k, nth * S::SLOT_KEYS + first);
            find(of_v, v, nth * S::SLOT_KEYS + first);
            run([&](int key) { slot(key, [&](char *to) { copy_pages(to, k, of_k, key, first); }); },
                [&](int key) { slot(key, [&](char *to) { copy_pages(to, v, of_v, key, first); }); });
        } else {
            run([&](int key) { slot(key, [&](char *to) { copy_rows(to, k, key, first); }); },
                [&](int key) { slot(key, [&](char *to) { copy_rows(to, v, key, first); }); });
        }
        cp_async_wait<0>();
    }
    /* Rows `first` on of the slot that begins with this key: */
    __device__ __forceinline__ void copy_rows(char *to, const Keys &from, int key, int first) const {
#pragma unroll 1
        for (int piece = 0; piece < S::D / 64; piece++)
            from.template load_rows<ROWS, 8, 32>(to + (piece * S::SLOT_KEYS + first) * 128, key + first, sm.range.lo,
                                                 sm.range.hi, piece * 64, threadIdx.x % 32);
    }

    /* and in pages of any size; where keys lie, key + i * 32 + lane in each lane. */
    typedef PagePlace Found[ROWS / 32];
    __device__ __forceinline__ void find(Found &found, const Keys &keys, int key) const {
#pragma unroll
        for (int i = 0; i < ROWS / 32; i++)
            found[i] = keys.find(key + i * 32 + (int)threadIdx.x % 32, sm.range.lo, sm.range.hi);
    }
    /* The pages of the warp's next slot are asked for, because memory is late. */
    __device__ __forceinline__ void copy_pages(char *to, const Keys &from, Found &found, int key, int first) const {
        PagePlace of_slot[ROWS / 32];
#pragma unroll
        for (int i = 0; i < ROWS / 32; i++)
            of_slot[i] = found[i];
        find(found, from, key + first + BLOCK_KEYS);
#pragma unroll
        for (int i = 0; i < ROWS / 32; i++)
            from.template copy_found<S::SLOT_KEYS, S::CHUNKS, 8>(to, of_slot[i], key + first + i * 32, sm.range.lo,
                                                                 sm.range.hi, first + i * 32, 0, read_once());
    }

    /* found: what is known of where pages lie. */
    __device__ __forceinline__ void copy_by_engine(int warp, const BoxCache &found, const CUtensorMap &k_map,
                                                   const CUtensorMap &v_map) {
        static_assert(S::PRODUCERS == S::SLOT_PRODUCERS, "a warp misses no round of a slot");
        const int first = warp * ROWS; /* row of every slot */
        const KeyCopier<ROWS, S::D / 64, S::SLOT_KEYS> copier(p, sm.t, sm.range, read_once());
        auto each = [&](auto copy_k, auto copy_v) {
            auto next = [&](auto &copy, int key) {
                const int i = ring.index;
                copy(key + first, 0, sm.ring[i] + first * 128, sm.empty[i], ring.round ^ 1, sm.full[i]);
                ring.advance(S::SLOTS);
            };
            run([&](int key) { next(copy_k, key); }, [&](int key) { next(copy_v, key); });
        };
        if constexpr (S::SOURCE == PAGES_BY_ENGINE)
            copier.run_pages(found, k_map, v_map, each);
        else
            copier.run_rows(k_map, v_map, each);
    }
};

#endif
