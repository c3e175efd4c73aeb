/* What a warp of a split-KV kernel does to some units of 16 keys: S and P, and the guarded step of O. */
#ifndef FAD_CUDA_MMA_DECODE_UNITS_CUH
#define FAD_CUDA_MMA_DECODE_UNITS_CUH

#include "mma_kernel.cuh"
#include "mma_memory.cuh"
#include "mma_softmax.cuh"

constexpr int UNIT_KEYS = 16, BLOCK_UNITS = BLOCK_KEYS / UNIT_KEYS; /* a unit: the keys of one step */

/* Scores of 16 rows and UNITS units that follow each other, of keys with CHUNKS chunks of 16 bytes. */
template <fad_dtype T, int CHUNKS, int UNITS> struct UnitScores {
    float s[UNITS][2][4]; /* [n8 tile][as in mma_step] */

    /* N7: dot products with the keys that are rows from `first` on of K, which lies in pieces of 64 dims. */
    __device__ __forceinline__ void multiply(const char *q, const char *k, int piece_bytes, int first) {
#pragma unroll
        for (int u = 0; u < UNITS; u++)
#pragma unroll
            for (int e = 0; e < 8; e++)
                s[u][e / 4][e % 4] = 0;
        /* As load_fragment and load_key_fragment, but two chunks further on is an exclusive or: no register for each. */
        const int lane = threadIdx.x % 32, q_lane = swizzled<CHUNKS>(lane % 16, lane / 16),
                  k_lane = swizzled<8>(first + lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
        for (int d = 0; d < CHUNKS / 2; d++) {
            unsigned a[4];
            ldmatrix(a, q + (q_lane ^ d * 32));
#pragma unroll
            for (int u = 0; u < UNITS; u++) {
                unsigned b[4];
                ldmatrix(b, k + d / 4 * piece_bytes + u * UNIT_KEYS * 128 + (k_lane ^ d % 4 * 32));
                mma_step<T>(s[u][0], a, b[0], b[1]);
                mma_step<T>(s[u][1], a, b[2], b[3]);
            }
        }
    }

    /* N5, N4: from dot products to scores; key: the first. */
    __device__ __forceinline__ void finish(const RowTable<DECODE_ROWS> &rows, const ScoreRule &rule, int key,
                                           bool partial, int lane) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const RowView row = rows[lane / 4 + half * 8];
#pragma unroll
            for (int u = 0; u < UNITS; u++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int at = key + u * UNIT_KEYS + i / 2 * 8 + lane % 4 * 2 + i % 2;
                    float &y = s[u][i / 2][half * 2 + i % 2];
                    if (!rule.plain)
                        y = score_with_options(y, rule, row, at);
                    if (partial && (at < row.lo || at >= row.hi))
                        y = -INFINITY;
                }
        }
    }

    /* The largest score of row g or g + 8, in all lanes of its quad. */
    __device__ __forceinline__ float maximum(int half) const {
        float best = -INFINITY;
#pragma unroll
        for (int u = 0; u < UNITS; u++)
#pragma unroll
            for (int n = 0; n < 2; n++)
                best = fmaxf(best, fmaxf(s[u][n][half * 2], s[u][n][half * 2 + 1])); /* NaN does not count */
        best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
        return fmaxf(best, __shfl_xor_sync(~0u, best, 2));
    }

    /* N6, N7: P with the references of rows g and g + 8; store(unit, a operand of this lane). */
    template <class Store>
    __device__ __forceinline__ void probabilities(const float (&m)[2], float c, Store store) const {
        const bool far = __any_sync(~0u, (fabsf(m[0]) > FAD_F32_LIMIT) | (fabsf(m[1]) > FAD_F32_LIMIT));
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
            unsigned a[4];
#pragma unroll
            for (int i = 0; i < 4; i++) { /* tile i / 2, row g or g + 8 */
                const float *x = &s[u][i / 2][i % 2 * 2];
                float y[2] = {fad_f32_fma(x[0], c, -m[i % 2]), fad_f32_fma(x[1], c, -m[i % 2])};
                if (far)
                    y[0] = far_argument(x[0], c, m[i % 2]), y[1] = far_argument(x[1], c, m[i % 2]);
                a[i] = pack2<T>(ex2(y[0]), ex2(y[1]));
            }
            store(u, make_uint4(a[0], a[1], a[2], a[3]));
        }
    }
};

/* N7: this lane's b_t goes on over a unit; p: of a row, of the unit's n8 tiles. */
template <fad_dtype T> static __device__ __forceinline__ float add_up(float sum, uint2 p) {
    sum = fad_f32_add(sum, fad_f32_add(low_half<T>(p.x), high_half<T>(p.x)));
    return fad_f32_add(sum, fad_f32_add(low_half<T>(p.y), high_half<T>(p.y)));
}

/* N11 where a value is Inf or NaN: each row meets only the values that it sees. b: 8 dims of a unit; key: its first. */
template <fad_dtype T>
static __device__ __forceinline__ void guarded_step(const RowTable<DECODE_ROWS> &rows, float (&o)[4],
                                                    const unsigned (&a)[4], const unsigned (&b)[2], int key, int lane) {
#pragma unroll 1
    for (int r = 0; r < DECODE_ROWS; r++) {
        const int lo = rows.lo[r] - key - lane % 4 * 2, hi = rows.hi[r] - key - lane % 4 * 2;
        float row[4] = {o[0], o[1], o[2], o[3]};
        unsigned seen[2];
#pragma unroll
        for (int n = 0; n < 2; n++) /* keys n * 8 and + 1, from the lane's first */
            seen[n] = b[n] & ((n * 8 >= lo && n * 8 < hi ? 0xffffu : 0) |
                              (n * 8 + 1 >= lo && n * 8 + 1 < hi ? 0xffff0000u : 0));
        mma_step<T>(row, a, seen[0], seen[1]);
#pragma unroll
        for (int e = 0; e < 4; e++)
            if (lane / 4 + e / 2 * 8 == r)
                o[e] = row[e];
    }
}

#endif
