/* Which part of a backward a thread block works on. Nothing that bits depend on (N14). */
#ifndef FAD_CUDA_FMA_GRADIENT_WORK_CUH
#define FAD_CUDA_FMA_GRADIENT_WORK_CUH

#include "fma_tile.cuh"

/* What the kernels of a backward are given. delta and weight (N13): [B][Hq][Sq], or packed [Hq][Sq]. */
struct GradientCall {
    fad_attn_problem p, g; /* g: the same call, with dq, dk, dv, dout and dlse in the places of q, k, v, out and lse */
    float *delta, *weight;
    float *sinks; /* [sequences][Hq] each sequence's part of a sink's gradient */
    int slices;   /* into which the sums of a tile are cut along their dims, each for a thread block of its own */
};

/* A block of query rows of a head, counted from the sequence's first row, or a block of keys of a kv head, counted from
 * position 0. */
struct GradientTile {
    fad_sequence seq, gradient; /* the sequence in the call's tensors, and in their gradients */
    int64_t head, block;
    int64_t saved; /* where head 0 of its first row lies in delta and weight */
    bool exists;   /* false: the grid's bound was larger than the work */
};

/* Tiles of query rows. The last come first: under a causal mask they are the longest. */
struct ByRows {
    static __host__ __device__ int64_t heads(const fad_attn_problem &p) { return p.Hq; }
    static __host__ __device__ int64_t most(const fad_attn_problem &p) { return (p.Sq + BLOCK - 1) / BLOCK; }
    static __device__ int64_t count(const fad_sequence &s) { return (s.span.n_q + BLOCK - 1) / BLOCK; }
    static __device__ int64_t block(const fad_sequence &s, int64_t nth) { return count(s) - 1 - nth; }
    static int64_t packed(const fad_attn_problem &p) { return p.Sq / BLOCK + p.B; }
};

/* Tiles of keys. An offset start can touch one block more. */
struct ByKeys {
    static __host__ __device__ int64_t heads(const fad_attn_problem &p) { return p.Hk; }
    static __host__ __device__ int64_t most(const fad_attn_problem &p) {
        return (p.Sk + BLOCK - 1) / BLOCK + (p.k_pos != NULL);
    }
    static __device__ int64_t first(const fad_sequence &s) { return fad_partition_first(s.span.k_pos, BLOCK); }
    static __device__ int64_t end(const fad_sequence &s) {
        return s.span.n_k ? fad_partition_end(s.span.k_pos + s.span.n_k, BLOCK) : first(s);
    }
    static __device__ int64_t count(const fad_sequence &s) { return end(s) - first(s); }
    static __device__ int64_t block(const fad_sequence &s, int64_t nth) { return first(s) + nth; }
    static int64_t packed(const fad_attn_problem &p) { return p.Sk / BLOCK + p.B * (1 + (p.k_pos != NULL)); }
};

/* Tiles that a grid must hold: an upper bound, exact for dense calls whose keys and rows are all in use. */
template <class By> int64_t gradient_tiles(const fad_attn_problem &p) {
    return By::heads(p) * (p.cu_seqlens_q ? By::packed(p) : p.B * By::most(p));
}

/* Tile number `number`, for a whole thread block, into shared memory. Returns whether it exists. */
template <class By> __device__ bool share_gradient_tile(const GradientCall &call, int64_t number, GradientTile &t) {
    const fad_attn_problem &p = call.p;
    if (threadIdx.x < 32) {
        const int64_t heads = By::heads(p);
        int b;
        int64_t per_head, first = 0;
        if (!p.cu_seqlens_q) {
            per_head = By::most(p);
            b = (int)fad_quotient(number, heads * per_head);
            number -= b * heads * per_head;
        } else {
            auto tiles = [&](int s) { return heads * By::count(fad_get_sequence(&p, s)); };
            b = find_sequence((int)p.B, number, tiles);
            per_head = b < 0 ? 1 : fad_quotient(tiles(b), heads);
        }
        if (threadIdx.x == 0) {
            t.exists = b >= 0;
            if (b >= 0) {
                t.seq = fad_get_sequence(&p, b);
                t.gradient = fad_get_sequence(&call.g, b);
                t.head = fad_quotient(number, per_head);
                const int64_t nth = number - t.head * per_head;
                t.exists = nth < By::count(t.seq);
                t.block = By::block(t.seq, nth);
                fad_owned_rows(p.cu_seqlens_q, p.B, b, p.Sq, &first);
                t.saved = p.cu_seqlens_q ? first : b * p.Hq * p.Sq;
            }
        }
    }
    __syncthreads(); /* the tile may be read */
    return t.exists;
}

#endif
