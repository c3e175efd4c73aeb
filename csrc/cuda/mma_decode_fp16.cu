#include "mma_decode.cuh"

MmaKernels mma_decode_fp16() {
    static const MmaKernel kernels[] = {
        mma_decode_of<MmaDecodeShape<FAD_FLOAT16, 64, 4, 2, COPIED_BY_WARPS>>(),
        mma_decode_of<MmaDecodeShape<FAD_FLOAT16, 128, 4, 2, COPIED_BY_WARPS>>(),
        mma_decode_of<MmaDecodeShape<FAD_FLOAT16, 256, 4, 1, COPIED_BY_WARPS>>(),
    };
    return list_kernels(kernels);
}
