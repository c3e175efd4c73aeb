#include "hopper_decode.cuh"

HopperKernels hopper_decode_fp16() {
    static const HopperKernel kernels[] = {
        hopper_decode_of<MmaDecodeShape<FAD_FLOAT16, 64, 4, 2, ROWS_BY_ENGINE>>(),
        hopper_decode_of<MmaDecodeShape<FAD_FLOAT16, 128, 5, 2, ROWS_BY_ENGINE>>(),
        hopper_decode_of<MmaDecodeShape<FAD_FLOAT16, 256, 5, 1, ROWS_BY_ENGINE>>(),
        hopper_decode_of<MmaDecodeShape<FAD_FLOAT16, 64, 4, 2, PAGES_BY_ENGINE>>(),
        hopper_decode_of<MmaDecodeShape<FAD_FLOAT16, 128, 5, 2, PAGES_BY_ENGINE>>(),
        hopper_decode_of<MmaDecodeShape<FAD_FLOAT16, 256, 5, 1, PAGES_BY_ENGINE>>(),
    };
    return {kernels, kernels + sizeof kernels / sizeof *kernels};
}
