#include "mma_backward_keys.cuh"

BackwardKernels<KeyTiles> mma_backward_keys_fp16() {
    static const BackwardKernel<KeyTiles> kernels[] = {
        mma_backward_keys_of<KeyGradientShape<FAD_FLOAT16, 64, 4, 32, 2>>(),
        mma_backward_keys_of<KeyGradientShape<FAD_FLOAT16, 128, 4, 64, 1>>(),
        mma_backward_keys_of<KeyGradientShape<FAD_FLOAT16, 128, 2, 64, 1>>(),
        mma_backward_keys_of<KeyGradientShape<FAD_FLOAT16, 256, 2, 64, 1>>(),
    };
    return list_kernels(kernels);
}
