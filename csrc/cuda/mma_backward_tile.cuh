/* The products and the steps between them that both kernels of the mma family's backward are made of (N13). A warp holds
 * fragments of 16 M rows by 8 N columns, of which lane 4g + t has rows g and g + 8 of every 16, and columns 2t and 2t + 1
 * of every eight: rows are keys and columns query rows where dk and dv are summed, and the other way round for dq. */
#ifndef FAD_CUDA_MMA_BACKWARD_TILE_CUH
#define FAD_CUDA_MMA_BACKWARD_TILE_CUH

#include "mma_backward_kernel.cuh"
#include "mma_output.cuh"
#include "mma_values.cuh"

/* At the end of a kernel that does not need the one before it, beside which it may run: who waits for it waits for both. */
static __device__ __forceinline__ void end_behind_last_kernel() {
    if (blockIdx.x + 1 == gridDim.x) /* one thread block is enough, and others make room */
        wait_for_last_kernel();
}

template <int M, int N> using Fragments = float[M][N][4];

template <int M, int N> static __device__ __forceinline__ void clear(Fragments<M, N> &x) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                x[m][n][e] = 0;
}

/* Starts the copy of ROWS rows, stride bytes apart, by THREADS threads. Rows outside lo .. hi - 1 become zeros, and so do
 * dims that do not exist: nothing is read there (N4, N11). */
template <int ROWS, int CHUNKS, int THREADS>
static __device__ __forceinline__ void load_rows(char *to, const char *from, int64_t stride, int lo, int hi, int dims,
                                                 int thread) {
    constexpr int STEP = THREADS / CHUNKS;
    static_assert(THREADS % CHUNKS == 0 && ROWS % STEP == 0, "a thread stays in one column of chunks");
    thread = opaque(thread); /* what follows from it stays out of registers, which products need */
    const int chunk = thread % CHUNKS, r = thread / CHUNKS, below = chunk * 8 < dims ? hi : lo;
    from += r * stride + chunk * 16;
#pragma unroll
    for (int i = 0; i < ROWS / STEP; i++, from += STEP * stride) {
        const int number = r + i * STEP;
        cp_async16(to + swizzled<CHUNKS>(number, chunk), from, number >= lo && number < below ? 16 : 0);
    }
}

/* N7: x = A B^T, chains of steps over dims: of rows a_first .. + 16 M - 1 of tile a, and 8 N rows of tile b.
 * meanwhile(k): something else to compute beside step k. */
template <fad_dtype T, int CHUNKS, int M, int N, class Meanwhile>
static __device__ __forceinline__ void multiply_rows(Fragments<M, N> &x, const char *a_tile, int a_first,
                                                     const char *b_tile, int b_first, Meanwhile meanwhile) {
    clear<M, N>(x);
#pragma unroll
    for (int k = 0; k < CHUNKS / 2; k++) {
        unsigned a[M][4];
#pragma unroll
        for (int m = 0; m < M; m++)
            load_fragment<CHUNKS>(a[m], a_tile, a_first + 16 * m, k);
#pragma unroll
        for (int n = 0; n < N / 2; n++) {
            unsigned b[4];
            load_key_fragment<CHUNKS>(b, b_tile, b_first + 16 * n, k);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_step<T>(x[m][2 * n], a[m], b[0], b[1]);
                mma_step<T>(x[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
        meanwhile(k);
    }
}

/* N13: one step of M chains: sum += A B, B rows first .. first + 15 of a tile, dims 16 first_n .. + 8 N - 1. */
template <fad_dtype T, int CHUNKS, int M, int N>
static __device__ __forceinline__ void add_step(Fragments<M, N> &sum, const unsigned (&a)[M][4], const char *tile,
                                                int first, int first_n) {
#pragma unroll
    for (int n = 0; n < N / 2; n++) {
        unsigned b[4];
        load_value_fragment<CHUNKS>(b, tile, first, first_n + n);
#pragma unroll
        for (int m = 0; m < M; m++) {
            mma_step<T>(sum[m][2 * n], a[m], b[0], b[1]);
            mma_step<T>(sum[m][2 * n + 1], a[m], b[2], b[3]);
        }
    }
}

/* N11: the same where B has Inf or NaN in rows that are no terms for some row of A: each row meets only its terms.
 * term(r, k): whether row k of B is one for row r of A. Sixteen times the work, on data that hardly occurs. */
template <fad_dtype T, int CHUNKS, int M, int N, class Term>
static __device__ __forceinline__ void add_step_guarded(Fragments<M, N> &sum, const unsigned (&a)[M][4],
                                                        const char *tile, int first, int first_n, Term term) {
#pragma unroll 1
    for (int r = 0; r < 16; r++) {
        const int lane = opaque_lane();
#pragma unroll
        for (int m = 0; m < M; m++) {
            unsigned mask[2]; /* of b[i] and b[i + 2], which hold rows 8 i + 2 t and the next */
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int k = first + i * 8 + lane % 4 * 2;
                mask[i] = (term(16 * m + r, k) ? 0xffffu : 0) | (term(16 * m + r, k + 1) ? 0xffff0000u : 0);
            }
#pragma unroll
            for (int n = 0; n < N / 2; n++) {
                unsigned b[4];
                float row[2][4];
                ldmatrix_transposed(b, tile + swizzled<CHUNKS>(first + lane % 16, 2 * (first_n + n) + lane / 16));
#pragma unroll
                for (int i = 0; i < 4; i++)
                    b[i] &= mask[i % 2];
#pragma unroll
                for (int e = 0; e < 8; e++)
                    row[e / 4][e % 4] = sum[m][2 * n + e / 4][e % 4];
                mma_step<T>(row[0], a[m], b[0], b[1]);
                mma_step<T>(row[1], a[m], b[2], b[3]);
#pragma unroll
                for (int e = 0; e < 8; e++)
                    if (lane / 4 + e % 4 / 2 * 8 == r)
                        sum[m][2 * n + e / 4][e % 4] = row[e / 4][e % 4];
            }
        }
    }
}

/* N13: s becomes p, and dp, computed here, becomes ds. The unit that does exp2 takes an instruction every eight cycles, so
 * that is done beside the product. multiply(meanwhile): finds dp in STEPS steps. of.at(m, n): what m16 tile m and n8 tile
 * n need of the query rows. */
template <int STEPS, int M, int N, class Multiply, class Of>
static __device__ __forceinline__ void score_gradients(Fragments<M, N> &s, Fragments<M, N> &dp, float c,
                                                       Multiply multiply, const Of &of) {
    multiply([&](int k) {
#pragma unroll
        for (int i = k * M * N / STEPS; i < (k + 1) * M * N / STEPS; i++) {
            const auto at = of.at(i % M, i / M);
#pragma unroll
            for (int e = 0; e < 4; e++)
                s[i % M][i / M][e] = ex2(fad_f32_fma(s[i % M][i / M][e], c, -at.log2_sum(e)));
        }
    });
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int m = 0; m < M; m++) {
            const auto at = of.at(m, n);
#pragma unroll
            for (int e = 0; e < 4; e++)
                dp[m][n][e] = fad_f32_score_gradient(s[m][n][e], dp[m][n][e], at.delta(e));
        }
}

/* The same of dp that has been found, where scores are not plain (N5). Options are rare and their code is long: it does
 * two scores at a time, and all of them go round, as registers cannot be indexed. */
template <int M, int N, class Of>
static __device__ __forceinline__ void score_gradients_with_options(Fragments<M, N> &s, Fragments<M, N> &dp,
                                                                    const ScoreRule &rule, const Of &of) {
    constexpr int PAIRS = M * N * 2;
#pragma unroll 1
    for (int turn = 0; turn < PAIRS; turn++) {
        const auto at = of.at(turn / 2 / N, turn / 2 % N);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int e = turn % 2 * 2 + i;
            float x = fad_f32_mul(s[0][0][i], rule.scaled), t = 0;
            if (rule.softcap > 0) {
                t = fad_f32_tanh(x);
                x = fad_f32_mul(rule.softcap, t);
            }
            if (rule.alibi)
                x = fad_f32_fma(at.slope(e), fabsf((float)at.distance(e)), x);
            const float p = ex2(fad_f32_fma(x, rule.c, -at.log2_sum(e)));
            float ds = fad_f32_score_gradient(p, dp[0][0][i], at.delta(e));
            if (rule.softcap > 0)
                ds = fad_f32_mul(ds, fad_f32_softcap_slope(t));
#pragma unroll
            for (int pair = 0; pair + 1 < PAIRS; pair++) {
                const int to = pair / 2, from = (pair + 1) / 2;
                s[to / N][to % N][pair % 2 * 2 + i] = s[from / N][from % N][(pair + 1) % 2 * 2 + i];
                dp[to / N][to % N][pair % 2 * 2 + i] = dp[from / N][from % N][(pair + 1) % 2 * 2 + i];
            }
            s[M - 1][N - 1][2 + i] = p;
            dp[M - 1][N - 1][2 + i] = ds;
        }
    }
}

/* N13: what is no term is 0, whatever it was computed from. term(m, n, e): of an element. */
template <int M, int N, class Term>
static __device__ __forceinline__ void clear_others(Fragments<M, N> &p, Fragments<M, N> &ds, Term term) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (!term(m, n, e))
                    p[m][n][e] = ds[m][n][e] = 0;
}

/* N13: rounded to the input type, as the a operand of step `step`: columns 16 step .. + 15. */
template <fad_dtype T, int N>
static __device__ __forceinline__ void round_fragment(unsigned (&a)[4], const float (&x)[N][4], int step) {
#pragma unroll
    for (int i = 0; i < 4; i++)
        a[i] = pack2<T>(x[2 * step + i / 2][i % 2 * 2], x[2 * step + i / 2][i % 2 * 2 + 1]);
}

/* N13, N9: sums to gradients, rounded, in a tile; rows first .. first + 16 M - 1, 8 N dims from chunk first_chunk on.
 * Rows that wanted(r) does not want are zeros. NaN has other bits than the contract's; returns whether there may be one. */
template <fad_dtype T, int CHUNKS, int M, int N, class Wanted>
static __device__ __forceinline__ bool stage_gradients(char *tile, int first, int first_chunk,
                                                       const Fragments<M, N> &sum, float factor, Wanted wanted) {
    const int lane = threadIdx.x % 32;
    unsigned all = 0; /* of all pairs: not finite if one of them is not, or if it overflows */
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int r = first + 16 * m + half * 8 + lane / 4;
            const bool want = wanted(r);
#pragma unroll
            for (int n = 0; n < N; n++) {
                const unsigned pair = pack2<T>(fad_f32_scaled_gradient(sum[m][n][2 * half], factor),
                                               fad_f32_scaled_gradient(sum[m][n][2 * half + 1], factor));
                all = add2<T>(all, pair);
                *(unsigned *)(tile + swizzled<CHUNKS>(r, first_chunk + n) + lane % 4 * 4) = want ? pair : 0;
            }
        }
    return exponents_full<T>(all) != 0;
}

/* Two rounded values: NaN becomes the contract's. */
template <fad_dtype T> static __device__ __forceinline__ unsigned canonical_nans(unsigned pair) {
    constexpr unsigned INFINITE = T == FAD_BFLOAT16 ? 0x7f80 : 0x7c00, CANONICAL = T == FAD_BFLOAT16 ? 0x7fc0 : 0x7e00;
    if ((pair & 0x7fff) > INFINITE)
        pair = (pair & 0xffff0000) | CANONICAL;
    if ((pair >> 16 & 0x7fff) > INFINITE)
        pair = (pair & 0xffff) | CANONICAL << 16;
    return pair;
}

/* Staged gradients to rows of the buffer, ROWS of CHUNKS chunks by THREADS threads; walk: at this thread's first row,
 * thread / CHUNKS. not_finite: there may be NaN. chunk_at(r, chunk): where it is staged. */
template <fad_dtype T, int ROWS, int CHUNKS, int THREADS, class Walk, class ChunkAt>
static __device__ __forceinline__ void store_gradients(const fad_view &view, Walk walk, int n_rows, int64_t dims,
                                                       int thread, bool not_finite, ChunkAt chunk_at) {
    constexpr int STEP = Walk::STEP;
    static_assert(STEP * CHUNKS == THREADS && ROWS % STEP == 0, "a thread stays in one column of chunks");
    const int chunk = thread % CHUNKS, first = thread / CHUNKS, end = chunk * 8 < dims ? n_rows : 0;
    if (not_finite)
#pragma unroll 1
        for (int r = first; r < ROWS; r += STEP) {
            uint4 &x = *(uint4 *)chunk_at(r, chunk);
            x = make_uint4(canonical_nans<T>(x.x), canonical_nans<T>(x.y), canonical_nans<T>(x.z),
                           canonical_nans<T>(x.w));
        }
#pragma unroll 8
    for (int i = 0; i < ROWS / STEP; i++, walk.advance()) {
        const uint4 x = *(const uint4 *)chunk_at(first + i * STEP, chunk);
        if (first + i * STEP < end)
            *(uint4 *)((char *)view.data + walk.at + chunk * 16) = x;
    }
}

#endif
