#include "hopper_tile.cuh"

HopperKernels hopper_tile_fp16() {
    static const HopperKernel kernels[] = {
        hopper_kernel_of<HopperShape<FAD_FLOAT16, 64, 3, 6, 24, 160>>(),
        hopper_kernel_of<HopperShape<FAD_FLOAT16, 128, 2, 4, 40, 232>>(),
        hopper_kernel_of<HopperShape<FAD_FLOAT16, 256, 2, 5, 40, 232>>(),
    };
    return {kernels, kernels + sizeof kernels / sizeof *kernels};
}
