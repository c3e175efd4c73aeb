/* The Hopper kernels as the scheduler sees them. */
#ifndef FAD_CUDA_HOPPER_KERNEL_CUH
#define FAD_CUDA_HOPPER_KERNEL_CUH

#include "mma_kernel.cuh"

#include <cuda.h>

struct HopperKernel {
    MmaKernel shape; /* without run */
    void (*run)(fad_attn_problem, Work, CUtensorMap k, CUtensorMap v);
};

struct HopperKernels {
    const HopperKernel *begin, *end;
};
HopperKernels hopper_tile_bf16(), hopper_tile_fp16();

/* The kernel for a call's head dims; null: none. */
const HopperKernel *find_hopper_kernel(const fad_attn_problem *p);
/* K and V for the copy engine; false: it cannot address them, and the generic kernels have to serve. */
bool describe_keys(const fad_attn_problem *p, CUtensorMap *k, CUtensorMap *v);

#endif
