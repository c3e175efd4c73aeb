#include "hopper_backward_keys.cuh"
#include "hopper_backward_rows.cuh"

HopperBackwardKernels<KeyTiles> hopper_backward_keys_fp16() {
    static const HopperBackwardKernel<KeyTiles> kernels[] = {
        hopper_backward_keys_of<HopperKeyGradientShape<FAD_FLOAT16, 64, 3, 64, 6>>(),
        hopper_backward_keys_of<HopperKeyGradientShape<FAD_FLOAT16, 128, 2, 64, 4>>(),
        hopper_backward_keys_of<HopperKeyGradientShape<FAD_FLOAT16, 256, 2, 64, 2>>(),
    };
    return list_kernels(kernels);
}

HopperBackwardKernels<Work> hopper_backward_rows_fp16() {
    static const HopperBackwardKernel<Work> kernels[] = {
        hopper_backward_rows_of<HopperRowGradientShape<FAD_FLOAT16, 64, 128, 4, 4>>(),
        hopper_backward_rows_of<HopperRowGradientShape<FAD_FLOAT16, 128, 128, 2, 2>>(),
        hopper_backward_rows_of<HopperRowGradientShape<FAD_FLOAT16, 256, 64, 2, 1>>(),
    };
    return list_kernels(kernels);
}
