#include "hopper_decode.cuh"

HopperKernels hopper_decode_bf16() {
    static const HopperKernel kernels[] = {
        hopper_decode_of<MmaDecodeShape<FAD_BFLOAT16, 64, 4, 2, true>>(),
        hopper_decode_of<MmaDecodeShape<FAD_BFLOAT16, 128, 5, 2, true>>(),
        hopper_decode_of<MmaDecodeShape<FAD_BFLOAT16, 256, 5, 1, true>>(),
    };
    return {kernels, kernels + sizeof kernels / sizeof *kernels};
}
