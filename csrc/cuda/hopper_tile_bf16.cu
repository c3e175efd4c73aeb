#include "hopper_tile.cuh"

HopperKernels hopper_tile_bf16() {
    static const HopperKernel kernels[] = {
        hopper_kernel_of<HopperShape<FAD_BFLOAT16, 64, 3, 4, 80, 144>>(),
        hopper_kernel_of<HopperShape<FAD_BFLOAT16, 128, 2, 4, 88, 208>>(),
        hopper_kernel_of<HopperShape<FAD_BFLOAT16, 256, 2, 2, 88, 208>>(),
    };
    return {kernels, kernels + sizeof kernels / sizeof *kernels};
}
