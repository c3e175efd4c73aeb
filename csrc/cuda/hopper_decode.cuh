/* The split-KV kernel (mma_decode.cuh) with what compute capability 9.0 adds: the copy engine. */
#ifndef FAD_CUDA_HOPPER_DECODE_CUH
#define FAD_CUDA_HOPPER_DECODE_CUH

#include "hopper_kernel.cuh"
#include "mma_decode.cuh"

template <class S>
__global__ void __launch_bounds__(S::THREADS, S::RESIDENT)
    hopper_decode_kernel(const __grid_constant__ fad_attn_problem p, const __grid_constant__ Work work,
                         const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map) {
    mma_decode<S>(p, work, &k_map, &v_map);
}

template <class S> static HopperKernel hopper_decode_of() {
    return {{DECODE_ROWS, S::D, S::THREADS, false, sizeof(MmaDecodeShared<S>), 0, nullptr},
            S::SOURCE == ROWS_BY_ENGINE,  /* rows */
            S::SOURCE == PAGES_BY_ENGINE, /* pages */
            S::BOX_KEYS,
            16,
            false,
            hopper_decode_kernel<S>};
}

#endif
