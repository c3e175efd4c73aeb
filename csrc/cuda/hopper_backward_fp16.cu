#include "hopper_backward_keys.cuh"
#include "hopper_backward_rows.cuh"

HopperBackwardKernels hopper_backward_keys_fp16() {
    static const HopperBackwardKernel kernels[] = {
        hopper_backward_keys_of<HopperKeyGradientShape<FAD_FLOAT16, 64, 3, 64, 6>>(),
        hopper_backward_keys_of<HopperKeyGradientShape<FAD_FLOAT16, 128, 2, 64, 4>>(),
    };
    return list_kernels(kernels);
}

HopperBackwardKernels hopper_backward_rows_fp16() {
    static const HopperBackwardKernel kernels[] = {
        hopper_backward_rows_of<HopperRowGradientShape<FAD_FLOAT16, 64, 8>>(),
        hopper_backward_rows_of<HopperRowGradientShape<FAD_FLOAT16, 128, 4>>(),
    };
    return list_kernels(kernels);
}
