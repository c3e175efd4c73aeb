/* The tile kernel of the mma family for compute capability 9.0: copy engine (TMA) and wgmma. On this chip wgmma and
 * mma.sync add up alike, so that bits are those of the generic kernels.
 *
 * A thread block stays on its multiprocessor and takes one item after the other. Its first warpgroup produces
 * (hopper_tile_producer.cuh). Each further one consumes (hopper_tile_consumer.cuh): it owns 64 rows, and while it works on
 * the softmax of one block, its values step of the block before and the other warpgroups' steps keep the tensor cores
 * busy. */
#ifndef FAD_CUDA_HOPPER_TILE_CUH
#define FAD_CUDA_HOPPER_TILE_CUH

#include "hopper_tile_consumer.cuh"
#include "hopper_tile_producer.cuh"

template <class S>
__global__ void __launch_bounds__(S::THREADS, 1)
    hopper_tile_kernel(const __grid_constant__ fad_attn_problem p, const __grid_constant__ Work work,
                       const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map) {
    extern __shared__ __align__(1024) char shared_memory[];
    HopperShared<S> &sm = *(HopperShared<S> *)shared_memory;
    if (threadIdx.x == 0) {
        init_barriers(sm);
        prefetch_map(k_map), prefetch_map(v_map);
    } else if (threadIdx.x == 32 && !p.block_table) {
        prefetch_first_rows<S::D, S::ROWS, BLOCK_KEYS / KEY_WARPS>(p, work, blockIdx.x, k_map, v_map);
    }
    __syncthreads(); /* barriers may be used */
    if (threadIdx.x < GROUP_THREADS) {
        give_registers<S::PRODUCER_REGISTERS>();
        const int warp = uniform(threadIdx.x / 32);
        if (warp < KEY_WARPS)
            KeyProducer<S>(p, work, k_map, v_map, sm, warp).run();
        else if (warp == KEY_WARPS)
            ItemProducer<S>{p, work, sm}.run();
        else
            produce_queries(p, sm);
    } else {
        take_registers<S::CONSUMER_REGISTERS>();
        HopperConsumer<S>(p, work, sm).run();
    }
}

template <class S> static HopperKernel hopper_kernel_of() {
    constexpr int LEAST_BOX = 8;
    static_assert(sizeof(HopperShared<S>) <= 227 * 1024, "more shared memory than a thread block can have");
    static_assert(2 * BLOCK_KEYS / LEAST_BOX <= FOUND_BOXES, "K of block 1 is found first, and then V of block 0");
    return {{S::ROWS, S::D, S::THREADS, true, sizeof(HopperShared<S>),
             S::REST_IN_SHARED ? 0 : S::CONSUMERS * S::N * GROUP_THREADS * sizeof(float4), nullptr},
            true, /* rows */
            true, /* pages */
            BLOCK_KEYS / KEY_WARPS,
            LEAST_BOX,
            true,
            hopper_tile_kernel<S>};
}

#endif
