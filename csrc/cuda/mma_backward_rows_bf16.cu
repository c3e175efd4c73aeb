#include "mma_backward_rows.cuh"

BackwardKernels<Work> mma_backward_rows_bf16() {
    static const BackwardKernel<Work> kernels[] = {
        mma_backward_rows_of<RowGradientShape<FAD_BFLOAT16, 64, 2, 4, 32, 2>>(),
        mma_backward_rows_of<RowGradientShape<FAD_BFLOAT16, 128, 2, 4, 32, 2>>(),
        mma_backward_rows_of<RowGradientShape<FAD_BFLOAT16, 256, 1, 8, 32, 1>>(),
        mma_backward_rows_of<RowGradientShape<FAD_BFLOAT16, 256, 1, 4, 32, 1>>(),
    };
    return list_kernels(kernels);
}
