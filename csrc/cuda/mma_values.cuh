/* The values step of the mma family: O of a warp's 16 rows += P V for a block of keys, where that is not the plain step. */
#ifndef FAD_CUDA_MMA_VALUES_CUH
#define FAD_CUDA_MMA_VALUES_CUH

#include "mma_memory.cuh"
#include "mma_softmax.cuh"

template <int N> static __device__ __forceinline__ void rescale(float (&o)[N][4], const float (&alpha)[2]) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            o[n][e] = fad_f32_mul(o[n][e], alpha[e / 2]);
}

/* Whether this warp finds Inf or NaN in the values of KEYS keys. */
template <fad_dtype T, int CHUNKS, int KEYS = BLOCK_KEYS> static __device__ bool values_not_finite(const char *v) {
    unsigned full = 0;
#pragma unroll 4
    for (int at = threadIdx.x % 32; at < KEYS * CHUNKS; at += 32) {
        const uint4 x = ((const uint4 *)v)[at];
        full |= exponents_full<T>(x.x) | exponents_full<T>(x.y) | exponents_full<T>(x.z) | exponents_full<T>(x.w);
    }
    return __any_sync(~0u, full != 0);
}

/* N11 where a block has Inf or NaN that some row of the warp does not see: each row meets only the values that it sees.
 * Sixteen times the work, on data that hardly occurs. interval(r): the keys of the block that row r of the warp sees. */
template <fad_dtype T, int CHUNKS, int N, class Interval>
static __device__ __forceinline__ void add_values_guarded(float (&o)[N][4], const ProbabilityFragments &p,
                                                          const char *v, Interval interval) {
#pragma unroll 1
    for (int r = 0; r < 16; r++) {
        const int lane = opaque_lane();
        const fad_interval seen = interval(r);
#pragma unroll
        for (int n = 0; n < N / 2; n++) {
            float row[2][4];
#pragma unroll
            for (int e = 0; e < 8; e++)
                row[e / 4][e % 4] = o[2 * n + e / 4][e % 4];
#pragma unroll
            for (int k = 0; k < BLOCK_KEYS / 16; k++) {
                unsigned b[4];
                ldmatrix_transposed(b, v + swizzled<CHUNKS>(16 * k + lane % 16, 2 * n + lane / 16));
#pragma unroll
                for (int i = 0; i < 4; i++) { /* b[i] holds keys `key` and `key` + 1 */
                    const int key = 16 * k + i % 2 * 8 + lane % 4 * 2;
                    b[i] &= (key >= seen.lo && key < seen.hi ? 0xffffu : 0) |
                            (key + 1 >= seen.lo && key + 1 < seen.hi ? 0xffff0000u : 0);
                }
                mma_step<T>(row[0], p[k], b[0], b[1]);
                mma_step<T>(row[1], p[k], b[2], b[3]);
            }
#pragma unroll
            for (int e = 0; e < 8; e++)
                if (lane / 4 + e % 4 / 2 * 8 == r)
                    o[2 * n + e / 4][e % 4] = row[e / 4][e % 4];
        }
    }
}

#endif
