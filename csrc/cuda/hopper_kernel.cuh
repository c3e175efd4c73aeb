/* The Hopper kernels as the scheduler sees them. */
#ifndef FAD_CUDA_HOPPER_KERNEL_CUH
#define FAD_CUDA_HOPPER_KERNEL_CUH

#include "mma_kernel.cuh"

#include <cuda.h>

struct Device; /* host.cuh */

struct HopperKernel {
    MmaKernel shape;  /* without run */
    bool rows, pages; /* whether it serves keys in one buffer, and in pages */
    int box_keys;     /* copied at a time, */
    int least_box;    /* and fewer where pages are small, but no fewer than this: other copies are faster then */
    bool copies;      /* what the copy engine does not, warps of the kernel */
    void (*run)(fad_attn_problem, Work, CUtensorMap k, CUtensorMap v);
};

/* In any order; of each head dim one that serves rows and one that serves pages, or one that serves both. */
struct HopperKernels {
    const HopperKernel *begin, *end;
};
HopperKernels hopper_decode_bf16(), hopper_decode_fp16(), hopper_tile_bf16(), hopper_tile_fp16();

/* Keys of a box, where `rows` are wanted: pages are cut at their borders, and rows at multiples of `rows`. */
FAD_FN int box_rows(const fad_attn_problem &p, int rows) {
    const int64_t aligned = p.page_size & -p.page_size;
    return p.block_table && aligned < rows ? (int)aligned : rows;
}

/* Whether the copy engine serves pages: else its boxes would cross their borders, or be too many. */
FAD_FN bool pages_by_engine(const fad_attn_problem &p, const HopperKernel &kernel) {
    return !p.leftpad_k && !p.k_pos && box_rows(p, kernel.box_keys) >= kernel.least_box;
}

/* The kernel for a call's head dims and this many rows of a sequence. */
const HopperKernel *find_hopper_kernel(const fad_attn_problem *p, int64_t rows);
/* Of few rows: a kernel whose clusters share splits, and how many each cluster has, if that is possible and pays; else both
 * stay as they are. states: of splits are wanted, not out. */
fad_status find_cluster(const fad_attn_problem *p, const Device &device, int64_t n_splits, bool states,
                        const MmaKernel **kernel, int *splits);
/* K and V for the copy engine; false: it cannot address them. */
bool describe_keys(const fad_attn_problem *p, const HopperKernel &kernel, CUtensorMap *k, CUtensorMap *v);

#endif
