/* The mma family's kernels as the scheduler sees them. Each table is a file of its own, so that they compile side by
 * side. */
#ifndef FAD_CUDA_MMA_KERNEL_CUH
#define FAD_CUDA_MMA_KERNEL_CUH

#include "work.cuh"

constexpr int DECODE_ROWS = 16; /* of a tile of the kernels for few rows */

struct MmaKernel {
    int rows, dims; /* rows of its tile; largest D and Dv */
    int threads;
    bool persistent;     /* its thread blocks take items one after the other */
    size_t shared_bytes, /* of a thread block, */
        rest_bytes;      /* and where its running O rests, in the workspace */
    void (*run)(fad_attn_problem, Work);
    int ranks = 1;      /* thread blocks of a cluster that share an item; */
    bool pages = false; /* such a cluster serves keys in pages, or else in one buffer; */
    int splits = 0;     /* it has all splits of a tile, at most so many, and folds them; 0: it has one split */
};

/* By rows, then by dims, ascending. */
struct MmaKernels {
    const MmaKernel *begin, *end;
};
template <int N> static MmaKernels list_kernels(const MmaKernel (&table)[N]) { return {table, table + N}; }
MmaKernels mma_decode_bf16(), mma_decode_fp16(), mma_tile_bf16(), mma_tile_fp16();

/* Kernels whose clusters share splits: what a split and a cluster may have. Of each head dim those of most ranks first. */
constexpr int CLUSTER_KEY_BLOCKS = 8, CLUSTER_KEYS = CLUSTER_KEY_BLOCKS * FAD_MMA_BLOCK_KV, CLUSTER_THREAD_BLOCKS = 8;
MmaKernels hopper_cluster_bf16(), hopper_cluster_fp16(), hopper_cluster_fold_bf16(), hopper_cluster_fold_fp16();

#endif
