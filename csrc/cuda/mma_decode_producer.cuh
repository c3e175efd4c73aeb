/* The warp of the split-KV kernel that keeps K and V coming: K of the next block, then V of this one. */
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

    /* Keys outside the range become zeros. */
    __device__ __forceinline__ void copy_by_warp() {
        const Keys k(p.k, sm.t.seq.k, sm.t, sm.range.first, p.D), v(p.v, sm.t.seq.v, sm.t, sm.range.first, p.Dv);
        auto copy = [&](const Keys &from, int key) {
            char *const to = sm.ring[ring.index];
            barrier_wait(sm.empty[ring.index], ring.round ^ 1);
#pragma unroll 1
            for (int piece = 0; piece < S::D / 64; piece++)
                from.template load<SLOT_KEYS, 8, 32>(to + piece * SLOT_KEYS * 128, key, sm.range.lo, sm.range.hi,
                                                     piece * 64, threadIdx.x % 32);
            barrier_arrive_copied(sm.full[ring.index]);
            ring.advance(S::SLOTS);
        };
        run([&](int key) { copy(k, key); }, [&](int key) { copy(v, key); });
        cp_async_wait<0>();
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
