/* One step of the backward of the fma family (N13) on a GPU: BLOCK query rows against BLOCK keys.
 *
 * 256 threads stand on it as a grid of 16 by 16. A thread owns the scores of 4 rows and 4 keys, and of every sum that
 * the step goes into 4 rows or keys and 4 dims at a time: whole chains, so that no sum is ever spread over threads. The
 * sums over blocks rest in shared memory, where they are touched once a step. Matrices come in chunks of BLOCK dims. */
#ifndef FAD_CUDA_FMA_GRADIENT_STEP_CUH
#define FAD_CUDA_FMA_GRADIENT_STEP_CUH

#include "fma_gradient_work.cuh"

constexpr int EDGE = 4;             /* rows, keys or dims that a thread owns side by side */
constexpr int GRID = BLOCK / EDGE;  /* threads along an edge of a block */
constexpr int CHUNK_LD = BLOCK + 4; /* row of a matrix in shared memory: padded against bank conflicts */
constexpr int MATRIX = BLOCK * CHUNK_LD;
static_assert(GRID * GRID == THREADS, "every value of a block has a thread");

static __host__ __device__ inline int chunks_of(int64_t n) { return (int)((n + BLOCK - 1) / BLOCK); }

/* Sums of a tile's rows or keys, [BLOCK][ld] in shared memory: those of chunks first .. end - 1 of their dims. */
struct GradientSums {
    float *data;
    int first, end, ld;

    /* Those that a slice has of n dims. */
    __device__ GradientSums(float *memory, int64_t n, int slice, int slices) : data(memory) {
        const int chunks = chunks_of(n), per_slice = (chunks + slices - 1) / slices;
        first = min(slice * per_slice, chunks), end = min(first + per_slice, chunks);
        ld = per_slice * BLOCK;
    }
    static __host__ __device__ size_t floats(int64_t n, int slices) {
        return (size_t)((chunks_of(n) + slices - 1) / slices) * BLOCK * BLOCK;
    }
    __device__ void clear() {
        for (int at = threadIdx.x; at < BLOCK * ld; at += THREADS)
            data[at] = 0;
    }
    /* f(row or key, dim, sum) for all of them, n dims in all: a warp a row. */
    template <class F> __device__ void for_each(int64_t n, F f) const {
        const int width = (int)min(n, (int64_t)end * BLOCK) - first * BLOCK;
        for (int r = threadIdx.x / 32; r < BLOCK; r += THREADS / 32)
            for (int d = threadIdx.x % 32; d < width; d += 32)
                f(r, first * BLOCK + d, data[r * ld + d]);
    }
};

/* Shared memory of one thread block. x lies over the one of a and b that the step's sums do not read: both are dead once
 * their dot products are there. */
enum class ScoresOver { ROWS, KEYS };
struct GradientShared {
    int64_t *lo, *hi, *pos;            /* [BLOCK] positions that a row sees, and its own */
    float *a, *b, *x;                  /* [BLOCK][CHUNK_LD] rows; keys; probabilities or gradients of scores */
    float *m, *weight, *delta, *slope; /* [BLOCK] reference, weight and delta of a row (N13), -slope of ALiBi */
    int *present;                      /* [BLOCK] whether the row exists and its lse is not -inf */
    float *sums;

    static __host__ __device__ size_t bytes(size_t sum_floats) {
        return 3 * BLOCK * sizeof(int64_t) + (2 * MATRIX + 4 * BLOCK + sum_floats) * sizeof(float) +
               BLOCK * sizeof(int);
    }
    __device__ GradientShared(void *memory, ScoresOver over) {
        lo = (int64_t *)memory, hi = lo + BLOCK, pos = hi + BLOCK;
        a = (float *)(pos + BLOCK), b = a + MATRIX, x = over == ScoresOver::ROWS ? a : b;
        m = b + MATRIX, weight = m + BLOCK, delta = weight + BLOCK, slope = delta + BLOCK;
        present = (int *)(slope + BLOCK);
        sums = (float *)(present + BLOCK);
    }
};

/* Four values of a row in fp32 from dim d on, zeros from dim n on. aligned: as rows_aligned says. */
__device__ inline float4 widen_four(const char *row, int d, int n, fad_dtype dtype, bool aligned) {
    const int bytes = dtype == FAD_FLOAT32 ? 4 : 2;
    if (aligned && d < n)
        return widen4(row + d * bytes, dtype);
    float4 x = {0, 0, 0, 0};
    x.x = d < n ? widen(row + d * bytes, dtype) : 0;
    x.y = d + 1 < n ? widen(row + (d + 1) * bytes, dtype) : 0;
    x.z = d + 2 < n ? widen(row + (d + 2) * bytes, dtype) : 0;
    x.w = d + 3 < n ? widen(row + (d + 3) * bytes, dtype) : 0;
    return x;
}

/* The rows of one sequence and head in a tensor, of which BLOCK are read at a time. */
struct GradientMatrix {
    const char *data; /* row 0 */
    int64_t row_bytes;
    int n; /* dims */
    fad_dtype dtype;
    bool aligned;

    /* to[r][d] = dim chunk * BLOCK + d of row from + r, in fp32; zeros where exists(r) is false, and behind dim n. */
    template <class Exists> __device__ void load(float *to, int chunk, int64_t from, Exists exists) const {
        const int d = threadIdx.x % GRID * EDGE;
#pragma unroll
        for (int r = threadIdx.x / GRID; r < BLOCK; r += GRID) {
            float4 x = {0, 0, 0, 0};
            if (exists(r))
                x = widen_four(data + (from + r) * row_bytes, chunk * BLOCK + d, n, dtype, aligned);
            *(float4 *)(to + r * CHUNK_LD + d) = x;
        }
    }
};

/* first: element where the sequence starts. */
static __device__ GradientMatrix matrix_of(const fad_view &view, fad_dtype dtype, int64_t n, int64_t first,
                                           int64_t head) {
    const int64_t bytes = dtype == FAD_FLOAT32 ? 4 : 2;
    return {element(view, bytes, first, 0, head), view.stride_s * bytes, (int)n, dtype, rows_aligned(view, bytes, n)};
}

struct GradientStep {
    const GradientCall &call;
    const GradientTile &t;
    GradientShared sm;
    const int column = threadIdx.x % GRID, row = threadIdx.x / GRID * EDGE; /* keys column, column + GRID, ...; rows */
    float c, scaled, softcap;
    int plain;
    int64_t first_row = 0, block_lo = 0; /* of the step: its first row, and the position of its first key */
    bool partial = false;                /* whether some pair of the step is no term */

    __device__ GradientStep(const GradientCall &call, const GradientTile &tile, void *memory, ScoresOver over)
        : call(call), t(tile), sm(memory, over) {
        const fad_attn_problem &p = call.p;
        c = fad_f32_score_factor(p.scale, p.softcap > 0 || p.alibi_slopes, &plain);
        scaled = (float)(p.softcap > 0 ? p.scale / p.softcap : p.scale);
        softcap = (float)p.softcap;
    }

    __device__ float saved_lse(int64_t i, int64_t h) const {
        const fad_view &lse = call.p.lse;
        return ((const float *)lse.data)[t.seq.lse + i * lse.stride_s + h * lse.stride_h];
    }

    /* What rows first .. first + BLOCK - 1 of head h are. weighed: their delta and weight are there. A barrier follows. */
    __device__ void set_rows(int64_t first, int64_t h, bool weighed) {
        const fad_attn_problem &p = call.p;
        const int r = threadIdx.x;
        first_row = first;
        if (r >= BLOCK)
            return;
        const int64_t i = first + r, saved = t.saved + h * p.Sq + i;
        const float lse = i < t.seq.span.n_q ? saved_lse(i, h) : -INFINITY;
        const bool present = lse != -INFINITY;
        const fad_interval seen = fad_visible(&t.seq.span, i);
        sm.present[r] = present;
        sm.pos[r] = fad_query_position(&t.seq.span, i);
        sm.lo[r] = present ? seen.lo : 0;
        sm.hi[r] = present ? seen.hi : 0;
        sm.m[r] = present ? fad_f32_saved_reference(lse) : 0;
        sm.weight[r] = present && weighed ? call.weight[saved] : 0;
        sm.delta[r] = present && weighed ? call.delta[saved] : 0;
        sm.slope[r] = p.alibi_slopes ? -((const float *)p.alibi_slopes)[t.seq.index * p.alibi_stride_b + h] : 0;
    }

    /* Turns to the block of keys from position lo on, once the rows are set by the same threads. A barrier. */
    __device__ void set_keys(int64_t lo) {
        const int r = threadIdx.x;
        block_lo = lo;
        partial = __syncthreads_or(r < BLOCK && (sm.lo[r] > lo || sm.hi[r] < lo + BLOCK));
    }

    __device__ bool sees(int r, int j) const { return sm.lo[r] <= block_lo + j && block_lo + j < sm.hi[r]; }

    /* Chunks of the step's rows to a, of its keys to b. A barrier follows, and comes before what overwrites them. */
    __device__ void load_rows_of(const GradientMatrix &rows, int chunk) const {
        rows.load(sm.a, chunk, first_row, [&](int r) { return sm.present[r] != 0; });
    }
    __device__ void load_keys_of(const GradientMatrix &keys, int chunk) const {
        const int64_t from = block_lo - t.seq.span.k_pos, n_k = t.seq.span.n_k;
        keys.load(sm.b, chunk, from, [&](int j) { return from + j >= 0 && from + j < n_k; });
    }

    /* s[j][i] = the dot product of row `row + i` and key `column + j * GRID` (N7). Leaves the last chunks in a and b. */
    __device__ void dot(const GradientMatrix &rows, const GradientMatrix &keys, float (&s)[EDGE][EDGE]) const {
#pragma unroll
        for (int j = 0; j < EDGE; j++)
#pragma unroll
            for (int i = 0; i < EDGE; i++)
                s[j][i] = 0;
        for (int chunk = 0; chunk < chunks_of(rows.n); chunk++) {
            load_rows_of(rows, chunk);
            load_keys_of(keys, chunk);
            __syncthreads();                                     /* a and b may be read */
            const int dims = min(rows.n - chunk * BLOCK, BLOCK); /* behind them are zeros */
#pragma unroll 1
            for (int d = 0; d < dims; d += 4) {
                float4 k[EDGE];
#pragma unroll
                for (int j = 0; j < EDGE; j++)
                    k[j] = *(const float4 *)(sm.b + (column + j * GRID) * CHUNK_LD + d);
#pragma unroll
                for (int i = 0; i < EDGE; i++) {
                    const float4 q = *(const float4 *)(sm.a + (row + i) * CHUNK_LD + d);
#pragma unroll
                    for (int j = 0; j < EDGE; j++) {
                        s[j][i] = fad_f32_fma(q.x, k[j].x, s[j][i]);
                        s[j][i] = fad_f32_fma(q.y, k[j].y, s[j][i]);
                        s[j][i] = fad_f32_fma(q.z, k[j].z, s[j][i]);
                        s[j][i] = fad_f32_fma(q.w, k[j].w, s[j][i]);
                    }
                }
            }
            __syncthreads(); /* a and b may be overwritten */
        }
    }

    /* N5: x of row r and key j from their dot product; tanh: that of softcap. */
    __device__ float score(float s, int r, int j, float &tanh) const {
        if (plain)
            return s;
        float x = fad_f32_mul(s, scaled);
        if (softcap > 0) {
            tanh = fad_f32_tanh(x);
            x = fad_f32_mul(softcap, tanh);
        }
        return call.p.alibi_slopes ? fad_f32_fma(sm.slope[r], fabsf((float)(sm.pos[r] - block_lo - j)), x) : x;
    }

    /* e in place of s; 0 where a row does not see a key. */
    __device__ void exponentials(float (&s)[EDGE][EDGE]) const {
#pragma unroll
        for (int j = 0; j < EDGE; j++)
#pragma unroll
            for (int i = 0; i < EDGE; i++) {
                const int r = row + i, key = column + j * GRID;
                float tanh;
                const float e = fad_f32_saved_exponential(score(s[j][i], r, key, tanh), c, sm.m[r]);
                s[j][i] = partial && !sees(r, key) ? 0 : e;
            }
    }

    /* p and ds in place of s and dp; 0 where a row does not see a key. */
    __device__ void score_gradients(float (&s)[EDGE][EDGE], float (&dp)[EDGE][EDGE]) const {
#pragma unroll
        for (int j = 0; j < EDGE; j++)
#pragma unroll
            for (int i = 0; i < EDGE; i++) {
                const int r = row + i, key = column + j * GRID;
                float tanh = 0;
                const float x = score(s[j][i], r, key, tanh);
                const float p = fad_f32_mul(fad_f32_saved_exponential(x, c, sm.m[r]), sm.weight[r]);
                float ds = fad_f32_score_gradient(p, dp[j][i], sm.delta[r]);
                if (softcap > 0)
                    ds = fad_f32_mul(ds, fad_f32_softcap_slope(tanh));
                const bool hidden = partial && !sees(r, key);
                s[j][i] = hidden ? 0 : p;
                dp[j][i] = hidden ? 0 : ds;
            }
    }

    /* x[key][row] or x[row][key] of the values of this thread's rows and keys. A barrier follows. */
    __device__ void publish_by_key(const float (&values)[EDGE][EDGE]) const {
#pragma unroll
        for (int j = 0; j < EDGE; j++)
            store_values(sm.x + (column + j * GRID) * CHUNK_LD + row, values[j]);
    }
    __device__ void publish_by_row(const float (&values)[EDGE][EDGE]) const {
#pragma unroll
        for (int i = 0; i < EDGE; i++)
#pragma unroll
            for (int j = 0; j < EDGE; j++)
                sm.x[(row + i) * CHUNK_LD + column + j * GRID] = values[j][i];
    }

    __device__ bool not_finite(const float *matrix) const {
        bool bad = false;
        for (int at = threadIdx.x; at < BLOCK * BLOCK; at += THREADS)
            bad |= !isfinite(matrix[at / BLOCK * CHUNK_LD + at % BLOCK]);
        return bad;
    }

    /* N13: to[o][d] += the chain of fma(x[n][o], matrix[n][d]) over ascending n, from 0; `at`: the column of to where
     * the chunk starts. GUARDED (N11): only where is_term(n, o), because 0 times Inf or NaN would not be nothing. */
    template <bool GUARDED, class IsTerm>
    __device__ void add_chains(const GradientSums &to, int at, const float *matrix, IsTerm is_term) const {
        const int d = threadIdx.x % GRID * EDGE, o = threadIdx.x / GRID * EDGE;
        float sum[EDGE][EDGE] = {};
#pragma unroll 4
        for (int n = 0; n < BLOCK; n++) {
            float weights[EDGE], values[EDGE];
            load_values(weights, sm.x + n * CHUNK_LD + o);
            load_values(values, matrix + n * CHUNK_LD + d);
#pragma unroll
            for (int i = 0; i < EDGE; i++) {
                if (GUARDED && !is_term(n, o + i))
                    continue;
#pragma unroll
                for (int k = 0; k < EDGE; k++)
                    sum[i][k] = fad_f32_fma(weights[i], values[k], sum[i][k]);
            }
        }
#pragma unroll
        for (int i = 0; i < EDGE; i++) {
            float *total = to.data + (o + i) * to.ld + at + d, before[EDGE];
            load_values(before, total);
#pragma unroll
            for (int k = 0; k < EDGE; k++)
                before[k] = fad_f32_add(before[k], sum[i][k]);
            store_values(total, before);
        }
    }

    /* The step's part of all sums, from x and the chunks that load(chunk) brings to matrix, which holds chunk `there`
     * already. Ends behind a barrier, but where there are no sums. */
    template <class Load, class IsTerm>
    __device__ void add_sums(const GradientSums &to, const float *matrix, int there, Load load, IsTerm is_term) const {
        for (int chunk = to.end - 1; chunk >= to.first; chunk--) {
            if (chunk != there) {
                load(chunk);
                __syncthreads(); /* matrix may be read */
            }
            const int at = (chunk - to.first) * BLOCK;
            if (partial && __syncthreads_or(not_finite(matrix)))
                add_chains<true>(to, at, matrix, is_term);
            else
                add_chains<false>(to, at, matrix, is_term);
            __syncthreads(); /* matrix and x may be overwritten */
        }
    }
    /* Sums of keys, over the step's rows; sums of rows, over its keys. */
    __device__ void add_to_keys(const GradientSums &to, const GradientMatrix &rows, int there) const {
        add_sums(
            to, sm.a, there, [&](int chunk) { load_rows_of(rows, chunk); }, [&](int r, int j) { return sees(r, j); });
    }
    __device__ void add_to_rows(const GradientSums &to, const GradientMatrix &keys, int there) const {
        add_sums(
            to, sm.b, there, [&](int chunk) { load_keys_of(keys, chunk); }, [&](int j, int r) { return sees(r, j); });
    }
};

#endif
