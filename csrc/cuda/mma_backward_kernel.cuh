/* The kernels of the mma family's backward as its scheduler sees them, and what they tell each other. Each table is a file
 * of its own, so that they compile side by side. */
#ifndef FAD_CUDA_MMA_BACKWARD_KERNEL_CUH
#define FAD_CUDA_MMA_BACKWARD_KERNEL_CUH

#include "locate.cuh"

/* Of a query row: whether its pairs are terms (N13), and whether its q or dout holds Inf or NaN (N11). */
enum { ROW_HAS_TERMS = 1, ROW_NOT_FINITE = 2 };

/* What the first kernel finds for each row in use and head, [B, Hq, Sq], or [Hq, Sq] of packed rows. */
struct RowSums {
    float *log2_sum, *delta; /* N13: L and delta */
    int *state;
};

/* Where row 0 of sequence b and head h is in them. */
__device__ inline int64_t first_row_sum(const fad_attn_problem &p, int64_t b, int64_t h) {
    int64_t first;
    fad_owned_rows(p.cu_seqlens_q, p.B, b, p.Sq, &first);
    return ((p.cu_seqlens_q ? 0 : b) * p.Hq + h) * p.Sq + first;
}

/* gradient: the problem with gradients in the places of tensors: dq, dk, dv of q, k, v; dout of out, dlse of lse. */
typedef void (*BackwardKernelFunction)(fad_attn_problem p, fad_attn_problem gradient, RowSums sums, int stages);

struct BackwardKernel {
    int dims, tile; /* largest D and Dv; keys or rows of its tile */
    int threads;
    size_t shared_bytes[2]; /* with one stage of its pipeline, and with two */
    BackwardKernelFunction run;
};

/* By dims, and of the same dims the best first; others need less shared memory. Of dk and dv, and of dq. */
struct BackwardKernels {
    const BackwardKernel *begin, *end;
};
template <int N> static BackwardKernels list_kernels(const BackwardKernel (&table)[N]) { return {table, table + N}; }
BackwardKernels mma_backward_keys_bf16(), mma_backward_keys_fp16(), mma_backward_rows_bf16(), mma_backward_rows_fp16();

#endif
