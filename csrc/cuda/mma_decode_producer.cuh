/* The warp of the split-KV kernel that keeps K and V coming: K of the next block, then V of this one. */
#ifndef FAD_CUDA_MMA_DECODE_PRODUCER_CUH
#define FAD_CUDA_MMA_DECODE_PRODUCER_CUH

#include "mma_decode_shared.cuh"

template <class S> struct MmaDecodeProducer {
    const fad_attn_problem &p;
    MmaDecodeShared<S> &sm;
    Ring ring;

    /* fill(slot, barrier) starts the copies into the next slot as soon as it is empty. By one lane with the copy engine,
     * else by the whole warp. */
    template <class Fill> __device__ __forceinline__ void next(Fill fill) {
        MemoryBarrier &full = sm.full[ring.index];
        barrier_wait(sm.empty[ring.index], ring.round ^ 1);
        fill(sm.ring[ring.index], full);
        ring.advance(S::SLOTS);
    }

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
            next([&](char *to, MemoryBarrier &full) {
#pragma unroll 1
                for (int piece = 0; piece < S::D / 64; piece++)
                    from.template load<SLOT_KEYS, 8, 32>(to + piece * SLOT_KEYS * 128, key, sm.range.lo, sm.range.hi,
                                                         piece * 64, threadIdx.x % 32);
                barrier_arrive_copied(full);
            });
        };
        run([&](int key) { copy(k, key); }, [&](int key) { copy(v, key); });
        cp_async_wait<0>();
    }

    /* One lane. Rows outside the buffer become zeros. */
    __device__ __forceinline__ void copy_by_engine(const CUtensorMap &k_map, const CUtensorMap &v_map) {
        const fad_sequence &seq = sm.t.seq;
        const int row0 = (int)(seq.k_row + sm.range.first - seq.span.k_pos), head = (int)sm.t.head_k,
                  batch = p.cu_seqlens_k ? 0 : (int)seq.index;
        const uint64_t policy = read_once();
        auto copy = [&](const CUtensorMap &from, int key) {
            next([&](char *to, MemoryBarrier &full) {
                barrier_arrive_expect(full, S::SLOT);
#pragma unroll
                for (int piece = 0; piece < S::D / 64; piece++)
                    copy_box(to + piece * SLOT_KEYS * 128, from, full, piece * 64, row0 + key, head, batch, policy);
            });
        };
        run([&](int key) { copy(k_map, key); }, [&](int key) { copy(v_map, key); });
    }
};

#endif
