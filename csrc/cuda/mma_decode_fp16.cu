#include "mma_decode.cuh"

MmaKernels mma_decode_fp16() {
    static const MmaKernel kernels[] = {
        mma_decode_of<MmaDecodeShape<FAD_FLOAT16, 64, 4, 8, 2>>(),
        mma_decode_of<MmaDecodeShape<FAD_FLOAT16, 128, 4, 5, 2>>(),
        mma_decode_of<MmaDecodeShape<FAD_FLOAT16, 256, 8, 4, 1>>(),
    };
    return list_kernels(kernels);
}
