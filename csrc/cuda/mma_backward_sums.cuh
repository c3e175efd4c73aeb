/* What the backward of the mma family needs of whole rows (N13): L and delta of each, and the gradient of the sinks. */
#ifndef FAD_CUDA_MMA_BACKWARD_SUMS_CUH
#define FAD_CUDA_MMA_BACKWARD_SUMS_CUH

#include "mma_backward_kernel.cuh"
#include "mma_values.cuh"

/* Lanes that share a row, and threads of a thread block. */
constexpr int ROW_LANES = 8, SUM_THREADS = 256, SUM_ROWS = SUM_THREADS / ROW_LANES;

template <fad_dtype T> static __device__ __forceinline__ float add_products(float sum, unsigned a, unsigned b) {
    sum = fad_f32_fma(low_half<T>(a), low_half<T>(b), sum);
    return fad_f32_fma(high_half<T>(a), high_half<T>(b), sum);
}
template <fad_dtype T> static __device__ __forceinline__ unsigned exponents_full(const uint4 &x) {
    return exponents_full<T>(x.x) | exponents_full<T>(x.y) | exponents_full<T>(x.z) | exponents_full<T>(x.w);
}

/* Chunk 0 of a row, 16 bytes aligned. */
static __device__ __forceinline__ const uint4 *row_chunks(const fad_view &view, int64_t first, const Row &row) {
    return (const uint4 *)((const uint16_t *)view.data + first + row.i * view.stride_s + row.h * view.stride_h);
}

/* Zeros where the row has no such chunk. */
static __device__ __forceinline__ uint4 load_chunk(const uint4 *row, int chunk, int64_t dims) {
    return chunk * 8 < dims ? row[chunk] : make_uint4(0, 0, 0, 0);
}

/* SUM_ROWS packed rows of the forward's kind; lane t of a row's eight owns chunks t, t + 8, ... */
template <fad_dtype T>
static __global__ void __launch_bounds__(SUM_THREADS)
    sum_rows(const __grid_constant__ fad_attn_problem p, const __grid_constant__ fad_attn_problem gradient,
             const __grid_constant__ RowSums sums, const __grid_constant__ Work tiles) {
    __shared__ Tile t;
    __shared__ KeyRange range; /* comes with the tile, and is not needed */
    __shared__ fad_sequence of_gradient;
    if (!share_row_tile(p, gradient, tiles, SUM_ROWS, t, range, of_gradient))
        return;
    const int r = threadIdx.x / ROW_LANES, lane = threadIdx.x % ROW_LANES;
    const bool active = r < t.n_active;
    const Row row = row_of(t, active ? r : 0);
    float sum = 0, lse = 0, of_lse = 0; /* sum: N13, the lane's chain */
    unsigned full = 0;
    if (active) {
        const fad_view &dlse = gradient.lse; /* asked for first: memory is late */
        lse = ((const float *)p.lse.data)[t.seq.lse + row.i * p.lse.stride_s + row.h * p.lse.stride_h];
        if (dlse.data)
            of_lse = ((const float *)dlse.data)[of_gradient.lse + row.i * dlse.stride_s + row.h * dlse.stride_h];
        const uint4 *const dout = row_chunks(gradient.out, of_gradient.out, row),
                           *const out = row_chunks(p.out, t.seq.out, row), *const q = row_chunks(p.q, t.seq.q, row);
        for (int first = lane; first * 8 < max(p.D, p.Dv); first += 2 * ROW_LANES) {
            uint4 a[2], b[2], c[2]; /* two chunks of all rows on their way together */
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int chunk = first + i * ROW_LANES;
                a[i] = load_chunk(dout, chunk, p.Dv);
                b[i] = load_chunk(out, chunk, p.Dv);
                c[i] = load_chunk(q, chunk, p.D);
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if ((first + i * ROW_LANES) * 8 < p.Dv) { /* adding nothing could change the sign of a zero */
                    sum = add_products<T>(add_products<T>(sum, a[i].x, b[i].x), a[i].y, b[i].y);
                    sum = add_products<T>(add_products<T>(sum, a[i].z, b[i].z), a[i].w, b[i].w);
                }
                full |= exponents_full<T>(a[i]) | exponents_full<T>(c[i]);
            }
        }
    }
#pragma unroll
    for (int step = 1; step < ROW_LANES; step *= 2) { /* N13: ((l0 + l1) + (l2 + l3)) + ((l4 + l5) + (l6 + l7)) */
        sum = fad_f32_add(sum, __shfl_xor_sync(~0u, sum, step));
        full |= __shfl_xor_sync(~0u, full, step);
    }
    if (!active || lane != 0)
        return;
    if (gradient.lse.data)
        sum = fad_f32_sub(sum, of_lse);
    const int64_t at = first_row_sum(p, t.seq.index, row.h) + row.i;
    sums.log2_sum[at] = fad_f32_mul(lse, (float)FAD_LOG2E);
    sums.delta[at] = sum;
    sums.state[at] = (lse == -INFINITY ? 0 : ROW_HAS_TERMS) | (full ? ROW_NOT_FINITE : 0);
}

/* N13: one block of rows, from row `first` of its sequence on; at: where row 0 is. */
static __device__ float sink_block(const RowSums &sums, int64_t at, int64_t first, int64_t n_q, float z) {
    float part = 0;
    for (int64_t i = first; i < min(first + FAD_BLOCK_KV, n_q); i++)
        if (sums.state[at + i] & ROW_HAS_TERMS) {
            const float e = fad_f32_exp2(fad_f32_fma(z, (float)FAD_LOG2E, -sums.log2_sum[at + i]));
            part = fad_f32_fma(-e, sums.delta[at + i], part);
        }
    return part;
}

/* The gradient of one head's sink: a thread for each block of rows, and one that adds them. */
static __global__ void __launch_bounds__(SUM_THREADS)
    sum_sinks(const __grid_constant__ fad_attn_problem p, const __grid_constant__ RowSums sums, float *d_sinks) {
    __shared__ float parts[SUM_THREADS];
    const int64_t h = blockIdx.x;
    const float z = ((const float *)p.sinks)[h];
    float total = 0;
    for (int64_t b = 0; b < p.B; b++) { /* N13: sequences ascending */
        const int64_t n_q = fad_get_sequence(&p, b).span.n_q, at = first_row_sum(p, b, h);
        float sum = 0;
        for (int64_t first = 0; first < n_q; first += SUM_THREADS * FAD_BLOCK_KV) {
            const int64_t mine = first + (int64_t)threadIdx.x * FAD_BLOCK_KV;
            parts[threadIdx.x] = sink_block(sums, at, mine, n_q, z);
            __syncthreads(); /* the parts may be read */
            if (threadIdx.x == 0)
                for (int i = 0; i < SUM_THREADS && first + i * FAD_BLOCK_KV < n_q; i++)
                    sum = fad_f32_add(sum, parts[i]);
            __syncthreads(); /* the parts may be overwritten */
        }
        total = fad_f32_add(total, sum);
    }
    if (threadIdx.x == 0)
        d_sinks[h] = fad_f32_finish_gradient(total, 1);
}

#endif
