#include "hopper_decode.cuh"

HopperKernels hopper_decode_bf16() {
    static const HopperKernel kernels[] = {
        hopper_decode_of<MmaDecodeShape<FAD_BFLOAT16, 64, 1, 2, 20, true>>(),
        hopper_decode_of<MmaDecodeShape<FAD_BFLOAT16, 128, 1, 2, 11, true>>(),
        hopper_decode_of<MmaDecodeShape<FAD_BFLOAT16, 256, 1, 1, 5, true>>(),
    };
    return {kernels, kernels + sizeof kernels / sizeof *kernels};
}
