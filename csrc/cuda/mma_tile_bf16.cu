#include "mma_tile.cuh"

MmaKernels mma_tile_bf16() {
    static const MmaKernel kernels[] = {
        mma_tile_of<MmaTileShape<FAD_BFLOAT16, 64, 4, 3>>(),  mma_tile_of<MmaTileShape<FAD_BFLOAT16, 128, 4, 2>>(),
        mma_tile_of<MmaTileShape<FAD_BFLOAT16, 256, 4, 2>>(), mma_tile_of<MmaTileShape<FAD_BFLOAT16, 64, 8, 1>>(),
        mma_tile_of<MmaTileShape<FAD_BFLOAT16, 128, 8, 1>>(), mma_tile_of<MmaTileShape<FAD_BFLOAT16, 256, 8, 1>>(),
    };
    return list_kernels(kernels);
}
