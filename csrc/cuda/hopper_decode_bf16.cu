#include "hopper_decode.cuh"

HopperKernels hopper_decode_bf16() {
    static const HopperKernel kernels[] = {
        hopper_decode_of<MmaDecodeShape<FAD_BFLOAT16, 64, 7, 2, 0>>(),
        hopper_decode_of<MmaDecodeShape<FAD_BFLOAT16, 128, 5, 2, 0>>(),
        hopper_decode_of<MmaDecodeShape<FAD_BFLOAT16, 256, 5, 1, 0>>(),
    };
    return {kernels, kernels + sizeof kernels / sizeof *kernels};
}
