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
            Found of_k, of_v;
            find(of_k, k, warp * SLOT_KEYS);
            find(of_v, v, warp * SLOT_KEYS);
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

    /* Where the keys of a slot lie, key + i * 32 + lane in each lane. */
    typedef KeyPlace Found[SLOT_KEYS / 32];
    __device__ __forceinline__ void find(Found &found, const Keys &keys, int key) const {
#pragma unroll
        for (int i = 0; i < SLOT_KEYS / 32; i++)
            found[i] = keys.find(key + i * 32 + (int)threadIdx.x % 32, sm.range.lo, sm.range.hi);
    }
    /* Keys in pages of any size. The pages of the warp's next slot are asked for, because memory is late. */
    __device__ __forceinline__ void copy_pages(char *to, const Keys &from, Found &found, int key) const {
        KeyPlace of_slot[SLOT_KEYS / 32];
#pragma unroll
        for (int i = 0; i < SLOT_KEYS / 32; i++)
            of_slot[i] = found[i];
        find(found, from, key + BLOCK_KEYS);
#pragma unroll
        for (int i = 0; i < SLOT_KEYS / 32; i++)
            from.template copy_found<SLOT_KEYS, S::D / 64, 8>(to, of_slot[i], key + i * 32, sm.range.lo, sm.range.hi,
                                                              i * 32, 0);
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
