/* What both Hopper kernels of the mma family's backward are made of (N13). Each consuming warpgroup owns 64 rows of one
 * tensor core tile (keys where dk and dv are summed, query rows where dq is), of which its warps have 16 each; what the
 * tile meets comes block by block through a ring in shared memory. Matrices lie there in pieces of 64 dims, rows of 128
 * bytes, swizzled as the copy engine does. Fragments are those of mma.sync (mma_backward_tile.cuh). */
#ifndef FAD_CUDA_HOPPER_BACKWARD_TILE_CUH
#define FAD_CUDA_HOPPER_BACKWARD_TILE_CUH

#include "hopper_backward_kernel.cuh"
#include "hopper_copy.cuh"
#include "hopper_group.cuh"
#include "mma_backward_tile.cuh"

/* Who does what in a thread block. The producer gives registers to the consumers, which hold sums, scores and gradients
 * of scores. */
template <int CONSUMERS_> struct BackwardRoles {
    static constexpr int CONSUMERS = CONSUMERS_, CONSUMER_THREADS = CONSUMERS * GROUP_THREADS;
    static constexpr int THREADS = CONSUMER_THREADS + GROUP_THREADS, CONSUMING_WARPS = CONSUMERS * GROUP_WARPS;
    static constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = CONSUMERS == 2 ? 240 : 160;
    static_assert(PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS <= (CONSUMERS + 1) * (65536 / THREADS / 8 * 8),
                  "a warpgroup would wait for registers for ever");
};

/* ROWS rows of D dims. */
template <int ROWS, int D> struct Matrix {
    static constexpr int PIECES = D / 64, PIECE = ROWS * 128, CHUNKS = D / 8;
    alignas(1024) char piece[PIECES][PIECE];

    __device__ __forceinline__ uint4 *chunk(int row, int chunk) {
        return (uint4 *)(piece[chunk / 8] + swizzled<8>(row, chunk % 8));
    }
};
/* Its descriptors: of an operand whose rows are rows (a) or columns (b) of the product, and, made from that, of one whose
 * rows are summed over. */
template <int ROWS, int D> static __device__ __forceinline__ uint64_t rows_of(const Matrix<ROWS, D> &x) {
    return matrix_descriptor(&x, 16);
}
template <int ROWS, int D> static __device__ __forceinline__ uint64_t steps_of(uint64_t rows) {
    return matrix_at(rows, (Matrix<ROWS, D>::PIECE - 16) << 16);
}

/* N7: starts x = A B^T: 64 rows of a by 8 N rows of b. */
template <fad_dtype T, int D, int N>
static __device__ __forceinline__ void start_product(Fragments<1, N> &x, uint64_t a, uint64_t b) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < D / 16; k++)
        wgmma_scores<T>(x[0], matrix_at(a, k / 4 * Matrix<GROUP_ROWS, D>::PIECE + k % 4 * 32),
                        matrix_at(b, k / 4 * Matrix<8 * N, D>::PIECE + k % 4 * 32), k > 0);
    wgmma_commit();
}

/* N13: starts sum += A B, in steps of 16 rows of b, 128 dims or fewer at a time. */
template <fad_dtype T, int STEPS, int N>
static __device__ __forceinline__ void start_sum(Fragments<1, N> &sum, const unsigned (&a)[STEPS][4], uint64_t b) {
    constexpr int PART = N < 16 ? N : 16, PIECE = STEPS * 16 * 128;
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
        for (int first = 0; first < N; first += PART)
            wgmma_values<T>(*(float (*)[PART][4]) & sum[0][first], a[step],
                            matrix_at(b, first / 8 * PIECE + step * 16 * 128));
    wgmma_commit();
}

/* N13, plain: s becomes p. */
template <int N, class Of>
static __device__ __forceinline__ void find_probabilities(Fragments<1, N> &s, float c, const Of &of) {
#pragma unroll
    for (int n = 0; n < N; n++) {
        const auto at = of.at(0, n);
#pragma unroll
        for (int e = 0; e < 4; e++)
            s[0][n][e] = ex2(fad_f32_fma(s[0][n][e], c, -at.log2_sum(e)));
    }
}
/* N13: dp becomes ds. */
template <int N, class Of>
static __device__ __forceinline__ void find_gradients(const Fragments<1, N> &p, Fragments<1, N> &dp, const Of &of) {
#pragma unroll
    for (int n = 0; n < N; n++) {
        const auto at = of.at(0, n);
#pragma unroll
        for (int e = 0; e < 4; e++)
            dp[0][n][e] = fad_f32_score_gradient(p[0][n][e], dp[0][n][e], at.delta(e));
    }
}
/* N13 where scores are not plain (N5): both, in memory as above. */
template <int N, class Of>
static __device__ __forceinline__ void find_with_options(Fragments<1, N> &s, Fragments<1, N> &dp, const ScoreRule &rule,
                                                         const Of &of) {
    Fragments<1, 1> s_apart[N], dp_apart[N];
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            s_apart[n][0][0][e] = s[0][n][e], dp_apart[n][0][0][e] = dp[0][n][e];
#pragma unroll 1
    for (int n = 0; n < N; n++) {
        auto here = of;
        here.move(n);
        score_gradients_with_options<1, 1>(s_apart[n], dp_apart[n], rule, here);
    }
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            s[0][n][e] = s_apart[n][0][0][e], dp[0][n][e] = dp_apart[n][0][0][e];
}
/* N13: rounded to the input type, as the a operands of all steps. */
template <fad_dtype T, int N>
static __device__ __forceinline__ void round_fragments(unsigned (&a)[N / 2][4], const Fragments<1, N> &x) {
#pragma unroll
    for (int step = 0; step < N / 2; step++)
        round_fragment<T>(a[step], x[0], step);
}

/* N11: whether a matrix has Inf or NaN. Every consumer gets the same answer. */
template <fad_dtype T, int ROWS, int D> static __device__ bool has_not_finite(const Matrix<ROWS, D> &x, int group) {
    unsigned full = 0;
#pragma unroll 1
    for (int at = opaque((int)(threadIdx.x % GROUP_THREADS)); at < (int)sizeof x / 16; at += GROUP_THREADS) {
        const uint4 values = ((const uint4 *)&x)[at];
        full |= exponents_full<T>(values.x) | exponents_full<T>(values.y) | exponents_full<T>(values.z) |
                exponents_full<T>(values.w);
    }
    return __any_sync(~0u, named_barrier_or(1 + group, GROUP_THREADS, full != 0));
}

/* a operands in memory: what works on them goes round in little code, as registers cannot be indexed. */
template <fad_dtype T, int STEPS> struct FragmentsApart {
    unsigned a[STEPS][4];

    __device__ __forceinline__ explicit FragmentsApart(const Fragments<1, 2 * STEPS> &x) {
#pragma unroll
        for (int step = 0; step < STEPS; step++)
            round_fragment<T>(a[step], x[0], step);
    }
    /* N11: sum += A B by mma.sync where B has Inf or NaN in rows that are no terms for some row of A. */
    template <int N, int ROWS, int D, class Term>
    __device__ __forceinline__ void add_to(Fragments<1, N> &sum, const Matrix<ROWS, D> &b, Term term) const {
#pragma unroll 1
        for (int step = 0; step < STEPS; step++) {
            const unsigned of_step[1][4] = {{a[step][0], a[step][1], a[step][2], a[step][3]}};
#pragma unroll
            for (int piece = 0; piece < b.PIECES; piece++)
                add_step_guarded<T, 8, 1, 8>(*(Fragments<1, 8> *)&sum[0][piece * 8], of_step, b.piece[piece], 16 * step,
                                             0, term);
        }
    }
};
/* Zeros in B's place, with which the usual way then changes nothing. By all consumers. */
template <class Roles, int ROWS, int D> static __device__ __forceinline__ void zero_matrix(Matrix<ROWS, D> &x) {
    named_barrier_sync(ALL_CONSUMERS, Roles::CONSUMER_THREADS); /* x may be overwritten */
#pragma unroll 1
    for (int at = opaque((int)(threadIdx.x - GROUP_THREADS)); at < (int)sizeof x / 16; at += Roles::CONSUMER_THREADS)
        ((uint4 *)&x)[at] = make_uint4(0, 0, 0, 0);
    fence_async_proxy();
    named_barrier_sync(ALL_CONSUMERS, Roles::CONSUMER_THREADS); /* the zeros may be read */
}

/* Rows first .. first + 15 of a group's gradients, staged, as stage_gradients does. */
template <fad_dtype T, int N, int D, class Wanted>
static __device__ __forceinline__ bool stage(Matrix<GROUP_ROWS, D> &to, int first, const Fragments<1, N> &sum,
                                             float factor, Wanted wanted) {
    bool not_finite = false;
#pragma unroll
    for (int piece = 0; piece < to.PIECES; piece++)
        not_finite |= stage_gradients<T, 8, 1, 8>(to.piece[piece], first, 0,
                                                  *(const Fragments<1, 8> *)&sum[0][piece * 8], factor, wanted);
    return not_finite;
}
/* A group's staged gradients to rows of the buffer. */
template <fad_dtype T, int D, class Walk>
static __device__ __forceinline__ void store(const fad_view &view, const Walk &walk, int n_rows, int64_t dims,
                                             bool not_finite, Matrix<GROUP_ROWS, D> &staged) {
    store_gradients<T, GROUP_ROWS, D / 8, GROUP_THREADS>(view, walk, n_rows, dims, threadIdx.x % GROUP_THREADS,
                                                         not_finite,
                                                         [&](int r, int chunk) { return staged.chunk(r, chunk); });
}

/* One lane for the warp. */
static __device__ __forceinline__ void warp_arrives(MemoryBarrier &barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0)
        barrier_arrive(barrier);
}

#endif
