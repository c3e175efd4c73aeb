/* The split-KV kernel of the mma family for few query rows: up to 16 packed rows.
 *
 * A thread block walks a range of keys block by block. Score warps compute S, each for some keys, and, as soon as the
 * maxima of all are known, P; value warps compute O, each for some value dims. They meet once a block: between two
 * exchanges O meets one block, P of the next is made, and S of the one after that. Producers keep K and V coming, by the
 * copy engine or without. */
#ifndef FAD_CUDA_MMA_DECODE_CUH
#define FAD_CUDA_MMA_DECODE_CUH

#include "mma_decode_producer.cuh"
#include "mma_decode_scores.cuh"
#include "mma_decode_values.cuh"

template <class S>
static __device__ __forceinline__ void consume(const fad_attn_problem &p, const Work &work, MmaDecodeShared<S> &sm) {
    load_queries<DECODE_ROWS, S::CHUNKS, DECODE_CONSUMERS>(sm.q, p, sm.t, threadIdx.x);
    cp_async_commit();
    sm.rows.fill(p, sm.t, sm.range, threadIdx.x, DECODE_CONSUMERS);
    cp_async_wait<0>();
    named_barrier_sync(1, DECODE_CONSUMERS); /* q and the rows' table may be read */
    if (threadIdx.x >= ROLE_THREADS)
        ValueWarp<S>(p, work.rule, sm).run(work.partials);
    else if (sm.range.blocks > 0)
        ScoreWarp<S>(p, work.rule, sm).run();
}

template <class S> static __device__ __forceinline__ void init_barriers(MmaDecodeShared<S> &sm) {
    for (int i = 0; i < S::SLOTS; i++) {
        barrier_init(sm.full[i], S::SLOT_PRODUCERS * (S::ENGINE ? 1 : 32));
        barrier_init(sm.empty[i], ROLE_WARPS);
    }
    if constexpr (S::ENGINE)
        fence_barrier_init();
}

/* One item of work: a tile with all its splits, or (spill) with a run of them. */
template <class S>
static __device__ __forceinline__ void mma_decode(const fad_attn_problem &p, const Work &work, const CUtensorMap *k_map,
                                                  const CUtensorMap *v_map) {
    extern __shared__ __align__(1024) char shared_memory[];
    MmaDecodeShared<S> &sm = *(MmaDecodeShared<S> *)shared_memory;
    if (threadIdx.x == DECODE_CONSUMERS) {
        init_barriers(sm);
        if constexpr (S::ENGINE)
            prefetch_map(*k_map), prefetch_map(*v_map);
    }
    const int warp = (int)(threadIdx.x - DECODE_CONSUMERS) / 32; /* a producing one's number */
    if constexpr (S::SOURCE == ROWS_BY_ENGINE)
        if (threadIdx.x == DECODE_CONSUMERS + 32)
            prefetch_first_rows<S::D, DECODE_ROWS, S::BOX_KEYS>(p, work, blockIdx.x, *k_map, *v_map);
    BoxCache boxes;
    if constexpr (S::SOURCE == PAGES_BY_ENGINE)
        if (threadIdx.x >= DECODE_CONSUMERS)
            boxes = prefetch_first_pages<S>(p, work, warp, blockIdx.x, *k_map, *v_map);
    if (!share_item(p, work, DECODE_ROWS, blockIdx.x, sm.t, sm.range)) /* and the barriers may be used */
        return;
    if (threadIdx.x < DECODE_CONSUMERS) {
        consume(p, work, sm);
        return;
    }
    if (sm.range.blocks == 0)
        return;
    MmaDecodeProducer<S> producer = {p, sm, {}};
    if constexpr (!S::ENGINE)
        producer.copy_by_warp(warp);
    else
        producer.copy_by_engine(warp, boxes, *k_map, *v_map);
}

template <class S>
__global__ void __launch_bounds__(S::THREADS, S::RESIDENT)
    mma_decode_kernel(const __grid_constant__ fad_attn_problem p, const __grid_constant__ Work work) {
    mma_decode<S>(p, work, nullptr, nullptr);
}

template <class S> static MmaKernel mma_decode_of() {
    return {DECODE_ROWS, S::D, S::THREADS, false, sizeof(MmaDecodeShared<S>), 0, mma_decode_kernel<S>};
}

#endif
