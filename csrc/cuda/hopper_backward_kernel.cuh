/* The Hopper kernels of the backward as its scheduler sees them. */
#ifndef FAD_CUDA_HOPPER_BACKWARD_KERNEL_CUH
#define FAD_CUDA_HOPPER_BACKWARD_KERNEL_CUH

#include "mma_backward_kernel.cuh"

#include <cuda.h>

template <class Tiles> struct HopperBackwardKernel {
    int dims, tile;        /* largest D and Dv; keys or rows of its tile */
    int threads, box_rows; /* copied at a time, of what it walks */
    size_t shared_bytes;
    /* a, b: what it walks, for the copy engine: q and dout for dk and dv, k and v for dq. */
    void (*run)(fad_attn_problem p, fad_attn_problem gradient, RowSums sums, Tiles tiles, CUtensorMap a, CUtensorMap b);
};

/* By dims, ascending. */
template <class Tiles> struct HopperBackwardKernels {
    const HopperBackwardKernel<Tiles> *begin, *end;
};
template <class Tiles, int N>
static HopperBackwardKernels<Tiles> list_kernels(const HopperBackwardKernel<Tiles> (&table)[N]) {
    return {table, table + N};
}
HopperBackwardKernels<KeyTiles> hopper_backward_keys_bf16(), hopper_backward_keys_fp16();
HopperBackwardKernels<Work> hopper_backward_rows_bf16(), hopper_backward_rows_fp16();

struct HopperBackwardPlan {
    const HopperBackwardKernel<KeyTiles> *keys;
    const HopperBackwardKernel<Work> *rows;
    CUtensorMap q, dout, k, v;
};

/* False: the kernels cannot serve this call, and the generic ones have to. */
bool plan_hopper_backward(const fad_attn_problem *p, const fad_view &dout, HopperBackwardPlan *plan);

#endif
