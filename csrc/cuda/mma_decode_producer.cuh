/* The warps of the split-KV kernel that keep K and V coming: K of the next block, then V of this one. The copy engine needs
 * one of them; without it each copies a slot of every block. */
#ifndef FAD_CUDA_MMA_DECODE_PRODUCER_CUH
#define FAD_CUDA_MMA_DECODE_PRODUCER_CUH

#include "hopper_copy.cuh"
#include "mma_decode_shared.cuh"

template <class S> struct MmaDecodeProducer {
    const fad_attn_problem &p;
    MmaDecodeShared<S> &sm;
    Ring ring;

    /* keys(first), values(first): copy SLOT_KEYS keys from number `first` on. */
    template <class KeysOf, class ValuesOf> __device__ __forceinline__ void run(KeysOf keys, ValuesOf values) {
        const int end = sm.range.blocks * BLOCK_KEYS;
#pragma unroll 1
        for (int block = -BLOCK_KEYS; block < end; block += BLOCK_KEYS) {
            for (int key = block + BLOCK_KEYS; key < min(block + 2 * BLOCK_KEYS, end); key += SLOT_KEYS)
                keys(key);
            for (int key = block; key < block + BLOCK_KEYS && key >= 0; key += SLOT_KEYS)
                values(key);
        }
    }

    /* By this warp, one of PRODUCER_WARPS. Keys outside the range become zeros. */
    __device__ __forceinline__ void copy_by_warp(int warp) {
        static_assert(PRODUCER_WARPS == BLOCK_SLOTS && (S::ENGINE || S::SLOTS % PRODUCER_WARPS == 0),
                      "a warp always has the same slots of the ring, and misses no round of them");
        const Keys k(p.k, sm.t.seq.k, sm.t, sm.range.first, p.D), v(p.v, sm.t.seq.v, sm.t, sm.range.first, p.Dv);
        auto slot = [&](int key, auto copy) {
            if (key / SLOT_KEYS % PRODUCER_WARPS == warp) {
                barrier_wait(sm.empty[ring.index], ring.round ^ 1);
                copy(sm.ring[ring.index]);
                barrier_arrive_copied(sm.full[ring.index]);
            }
            ring.advance(S::SLOTS);
        };
        if (p.block_table) {
            SlotPages of_k, of_v;
            find_pages(of_k, warp * SLOT_KEYS);
            find_pages(of_v, warp * SLOT_KEYS);
            run([&](int key) { slot(key, [&](char *to) { copy_pages(to, k, of_k, key); }); },
                [&](int key) { slot(key, [&](char *to) { copy_pages(to, v, of_v, key); }); });
        } else {
            run([&](int key) { slot(key, [&](char *to) { copy_rows(to, k, key); }); },
                [&](int key) { slot(key, [&](char *to) { copy_rows(to, v, key); }); });
        }
        cp_async_wait<0>();
    }
    __device__ __forceinline__ void copy_rows(char *to, const Keys &from, int key) const {
#pragma unroll 1
        for (int piece = 0; piece < S::D / 64; piece++)
            from.template load<SLOT_KEYS, 8, 32>(to + piece * SLOT_KEYS * 128, key, sm.range.lo, sm.range.hi,
                                                 piece * 64, threadIdx.x % 32);
    }

    /* Where the keys of a slot lie, key + i * 32 + lane in each lane: what the block table says, and the row of the page. */
    struct SlotPages {
        int page[SLOT_KEYS / 32];
        unsigned row[SLOT_KEYS / 32];
    };
    __device__ __forceinline__ void find_pages(SlotPages &pages, int key) const {
        const fad_sequence &seq = sm.t.seq;
        const int first_row = (int)(seq.k_row + sm.range.first - seq.span.k_pos); /* of key 0 of the range */
#pragma unroll
        for (int i = 0; i < SLOT_KEYS / 32; i++) {
            const int number = key + i * 32 + (int)threadIdx.x % 32;
            const unsigned row = (unsigned)(first_row + number);
            pages.row[i] = row % seq.page_size;
            pages.page[i] = number >= sm.range.lo && number < sm.range.hi ? seq.pages[row / seq.page_size] : 0;
        }
    }
    /* Keys in pages of any size. A lane has found where a key lies, and the lanes that copy its chunks ask that lane; the
     * pages of the warp's next slot are asked for, because memory is late. */
    __device__ __forceinline__ void copy_pages(char *to, const Keys &from, SlotPages &pages, int key) const {
        constexpr int CHUNKS = S::D / 8, STEP = 32 / CHUNKS; /* keys at a time */
        const int lane = threadIdx.x % 32, chunk = lane % CHUNKS;
        const SlotPages of_slot = pages;
        find_pages(pages, key + BLOCK_KEYS);
#pragma unroll
        for (int i = 0; i < SLOT_KEYS / 32; i++) {
            const int number = key + i * 32 + lane;
            const int64_t page = fad_clamp(of_slot.page[i], 0, (int64_t)sm.t.seq.n_pages - 1);
            const char *const row = from.data + 2 * fad_key_offset(&from.view, 0, {page, of_slot.row[i]});
            const unsigned seen = __ballot_sync(~0u, number >= sm.range.lo && number < sm.range.hi),
                           exist = chunk * 8 < from.dims ? seen : 0; /* no key where there is no dim */
#pragma unroll 8
            for (int k = 0; k < 32 / STEP; k++) {
                const int at = k * STEP + lane / CHUNKS;
                const char *const data = (const char *)__shfl_sync(~0u, (uint64_t)row, at) + chunk * 16;
                cp_async16(to + chunk / 8 * SLOT_KEYS * 128 + swizzled<8>(i * 32 + at, chunk % 8), data,
                           exist >> at & 1 ? 16 : 0);
            }
        }
    }

    __device__ __forceinline__ void copy_by_engine(const CUtensorMap &k_map, const CUtensorMap &v_map) {
        const KeyCopier<SLOT_KEYS, S::D / 64> copier(p, sm.t, sm.range, read_once());
        copier.run(k_map, v_map, [&](auto copy_k, auto copy_v) {
            auto next = [&](auto &copy, int key) {
                const int i = ring.index;
                copy(key, 0, sm.ring[i], sm.empty[i], ring.round ^ 1, sm.full[i]);
                ring.advance(S::SLOTS);
            };
            run([&](int key) { next(copy_k, key); }, [&](int key) { next(copy_v, key); });
        });
    }
};

#endif
