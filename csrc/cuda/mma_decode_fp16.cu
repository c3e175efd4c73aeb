#include "mma_decode.cuh"

MmaKernels mma_decode_fp16() {
    static const MmaKernel kernels[] = {
        mma_decode_of<MmaDecodeShape<FAD_FLOAT16, 64, 1, 2, 8, false>>(),
        mma_decode_of<MmaDecodeShape<FAD_FLOAT16, 128, 1, 1, 4, false>>(),
        mma_decode_of<MmaDecodeShape<FAD_FLOAT16, 256, 1, 1, 4, false>>(),
    };
    return list_kernels(kernels);
}
