#include "hopper_decode.cuh"

HopperKernels hopper_decode_bf16() {
    static const HopperKernel kernels[] = {
        hopper_decode_of<MmaDecodeShape<FAD_BFLOAT16, 64, 1, 4, 16, true>>(),
        hopper_decode_of<MmaDecodeShape<FAD_BFLOAT16, 128, 1, 4, 10, true>>(),
        hopper_decode_of<MmaDecodeShape<FAD_BFLOAT16, 256, 1, 2, 5, true>>(),
        hopper_decode_of<MmaDecodeShape<FAD_BFLOAT16, 64, 4, 2, 12, true>>(),
        hopper_decode_of<MmaDecodeShape<FAD_BFLOAT16, 128, 4, 2, 8, true>>(),
        hopper_decode_of<MmaDecodeShape<FAD_BFLOAT16, 256, 2, 2, 4, true>>(),
    };
    return {kernels, kernels + sizeof kernels / sizeof *kernels};
}
