#include "hopper_tile.cuh"

HopperKernels hopper_tile_fp16() {
    static const HopperKernel kernels[] = {
        hopper_kernel_of<HopperShape<FAD_FLOAT16, 64, 3, 4, 80, 144>>(),
        hopper_kernel_of<HopperShape<FAD_FLOAT16, 128, 2, 4, 88, 208>>(),
        hopper_kernel_of<HopperShape<FAD_FLOAT16, 256, 2, 2, 88, 208>>(),
    };
    return {kernels, kernels + sizeof kernels / sizeof *kernels};
}
