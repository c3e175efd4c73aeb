/* The kernels of the mma family's backward as its scheduler sees them, and what they tell each other. Each table is a file
 * of its own, so that they compile side by side. */
#ifndef FAD_CUDA_MMA_BACKWARD_KERNEL_CUH
#define FAD_CUDA_MMA_BACKWARD_KERNEL_CUH

#include "work.cuh"

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

/* Whose tiles take turns, at most. Thread blocks have one tile each here, and more of the same length at a time slow each
 * other down: 32 heads of 8 tiles took 2 to 3 % longer than 16. */
constexpr int BACKWARD_HEADS_IN_TURN = 16;

/* What a thread block needs to find its tile of keys, as DenseWork, and of the whole call. */
struct KeyTiles {
    bool valid;              /* is_dense(), and 32 bits hold all numbers */
    int n_heads, group_size; /* kv heads of a sequence, query heads of each */
    HeadTiles order;
    Divisor heads;
    ScoreRule rule;

    __host__ KeyTiles(const fad_attn_problem &p, int keys)
        : valid(is_dense(p) && max(p.B, (int64_t)1) * p.Hk * ((p.Sk + keys - 1) / keys) < DenseWork::MOST),
          n_heads(valid ? (int)p.Hk : 1), group_size((int)fad_group(&p)),
          order(p, valid ? (int)(p.B * p.Hk) : 0, valid ? (int)((p.Sk + keys - 1) / keys) : 0, BACKWARD_HEADS_IN_TURN),
          heads(n_heads), rule(p) {}

    /* If valid: the sequence and kv head of a tile, and which of the head's it is. */
    __device__ __forceinline__ void find(int number, int &b, int &head_k, int &nth) const {
        int of_batch;
        order.find(number, of_batch, nth);
        b = heads.quotient(of_batch);
        head_k = of_batch - b * n_heads;
    }
};

/* A tile of query rows is an item of the forward's kind with all of its splits. share_item(), and where the tile's sequence
 * lies in gradients. */
static __device__ bool share_row_tile(const fad_attn_problem &p, const fad_attn_problem &gradient, const Work &tiles,
                                      int rows, Tile &t, KeyRange &range, fad_sequence &of_gradient) {
    if (tiles.dense.valid) {
        if (threadIdx.x == 64)
            of_gradient = dense_sequence(gradient, DenseItem(tiles.dense, rows, blockIdx.x).b);
        return share_item(p, tiles, rows, blockIdx.x, t, range);
    }
    if (!share_item(p, tiles, rows, blockIdx.x, t, range))
        return false;
    if (threadIdx.x == 0)
        of_gradient = fad_get_sequence(&gradient, t.seq.index);
    __syncthreads(); /* it may be read */
    return true;
}

/* gradient: the problem with gradients in the places of tensors: dq, dk, dv of q, k, v; dout of out, dlse of lse. */
template <class Tiles> struct BackwardKernel {
    int dims, tile; /* largest D and Dv; keys or rows of its tile */
    int threads;
    size_t shared_bytes[2]; /* with one stage of its pipeline, and with two */
    void (*run)(fad_attn_problem p, fad_attn_problem gradient, RowSums sums, Tiles tiles, int stages);
};

/* By dims, and of the same dims the best first; others need less shared memory. Of dk and dv, and of dq. */
template <class Tiles> struct BackwardKernels {
    const BackwardKernel<Tiles> *begin, *end;
};
template <class Tiles, int N> static BackwardKernels<Tiles> list_kernels(const BackwardKernel<Tiles> (&table)[N]) {
    return {table, table + N};
}
BackwardKernels<KeyTiles> mma_backward_keys_bf16(), mma_backward_keys_fp16();
BackwardKernels<Work> mma_backward_rows_bf16(), mma_backward_rows_fp16();

#endif
