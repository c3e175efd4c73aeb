/* The forward tile of the fma family (N7) on a GPU: the CPU's arithmetic, one chain per thread and output.
 *
 * 256 threads stand on a tile of ROWS packed query rows as a grid of ROWS / TR row groups by 64 / TK columns. A thread
 * owns the scores of TR rows and TK keys (keys c, c + C, ...) and the values of the same rows and DV / C value dims.
 * Per row, one thread walks the keys in ascending order for the maximum and for l. */
#ifndef FAD_CUDA_FMA_TILE_CUH
#define FAD_CUDA_FMA_TILE_CUH

#include "locate.cuh"
#include "ptx.cuh"

constexpr int BLOCK = FAD_BLOCK_KV;
constexpr int THREADS = 256;

template <int TR_, int TK_, int DV_> struct FmaShape {
    static constexpr int TR = TR_, TK = TK_, DV = DV_; /* rows and keys per thread; value dims of the tile */
    static constexpr int C = BLOCK / TK;               /* columns of threads */
    static constexpr int ROWS = TR * (THREADS / C);
    static constexpr int TV = DV / C;         /* value dims per thread, */
    static constexpr int W = TV < 4 ? TV : 4; /* W side by side, then C * W further on */
    static constexpr int RESIDENT =
        TR * TV <= 32 ? 2 : 1;            /* thread blocks that an SM should hold: registers for so many */
    static constexpr int X_LD = ROWS + 4; /* scores are [key][row]: padded against bank conflicts */
};

/* Shared memory of one thread block, in floats. q and k rows are padded by 4 for the same reason. The scores x lie over
 * k, which is dead once they are computed. */
template <class S> struct FmaShared {
    float *q, *k, *v, *x;     /* [ROWS][d_ld], [BLOCK][d_ld], [BLOCK][DV], [BLOCK][X_LD] */
    float *m, *alpha, *slope; /* [ROWS] reference, rescale factor, -slope */
    int64_t *lo, *hi, *pos;   /* [ROWS] positions seen, and the row's own */
    int d_ld;

    static __host__ __device__ int leading(int64_t D) { return (int)(D + 3) / 4 * 4 + 4; }
    static __host__ __device__ int key_ld(int64_t D) { return leading(D) > S::X_LD ? leading(D) : S::X_LD; }
    static __host__ __device__ size_t bytes(int64_t D) {
        const size_t floats = (size_t)S::ROWS * leading(D) + BLOCK * key_ld(D) + BLOCK * S::DV + 3 * S::ROWS;
        return 3 * S::ROWS * sizeof(int64_t) + floats * sizeof(float);
    }
    __device__ FmaShared(void *memory, int64_t D) : d_ld(leading(D)) {
        lo = (int64_t *)memory, hi = lo + S::ROWS, pos = hi + S::ROWS;
        q = (float *)(pos + S::ROWS), k = x = q + S::ROWS * d_ld, v = k + BLOCK * key_ld(D), m = v + BLOCK * S::DV;
        alpha = m + S::ROWS, slope = alpha + S::ROWS;
    }
};

/* Four values of a row in fp32, from one load: dtype's element times 4 aligned. */
__device__ inline float4 widen4(const char *from, fad_dtype dtype) {
    if (dtype == FAD_FLOAT32)
        return *(const float4 *)from;
    const ushort4 h = *(const ushort4 *)from;
    return dtype == FAD_BFLOAT16
               ? make_float4(fad_bf16_widen(h.x), fad_bf16_widen(h.y), fad_bf16_widen(h.z), fad_bf16_widen(h.w))
               : make_float4(fad_f16_widen(h.x), fad_f16_widen(h.y), fad_f16_widen(h.z), fad_f16_widen(h.w));
}
__device__ inline float widen(const char *from, fad_dtype dtype) {
    return dtype == FAD_FLOAT32    ? *(const float *)from
           : dtype == FAD_BFLOAT16 ? fad_bf16_widen(*(const uint16_t *)from)
                                   : fad_f16_widen(*(const uint16_t *)from);
}

__device__ inline const char *element(const fad_view &view, int64_t bytes, int64_t first, int64_t row, int64_t head) {
    return (const char *)view.data + (first + row * view.stride_s + head * view.stride_h) * bytes;
}

/* Whether every row of a view can be read four values at a time. */
__device__ inline bool rows_aligned(const fad_view &view, int64_t bytes, int64_t D) {
    return ((view.stride_b | view.stride_s | view.stride_h | D) % 4 == 0) && (uintptr_t)view.data % (4 * bytes) == 0;
}

/* to[r][d] = row(r)[d] in fp32, zeros where row(r) is null and for D <= d < WIDTH: a warp a row, four values a lane. */
template <int ROWS, int WIDTH, class RowOf>
__device__ void load_rows(float *to, int ld, int64_t D, fad_dtype dtype, bool aligned, RowOf row) {
    const int bytes = dtype == FAD_FLOAT32 ? 4 : 2;
#pragma unroll 4
    for (int r = threadIdx.x / 32; r < ROWS; r += THREADS / 32) {
        const char *from = row(r);
        for (int d = threadIdx.x % 32 * 4; d < min(WIDTH, ld); d += 128) {
            float4 x = {0, 0, 0, 0};
            if (from && aligned && d < D) {
                x = widen4(from + d * bytes, dtype);
            } else if (from) {
                x.x = d < D ? widen(from + d * bytes, dtype) : 0;
                x.y = d + 1 < D ? widen(from + (d + 1) * bytes, dtype) : 0;
                x.z = d + 2 < D ? widen(from + (d + 2) * bytes, dtype) : 0;
                x.w = d + 3 < D ? widen(from + (d + 3) * bytes, dtype) : 0;
            }
            *(float4 *)(to + r * ld + d) = x;
        }
    }
}

/* The same for aligned fp32 rows, without a detour through registers; cp_async_wait says when it is there. */
template <int ROWS, int WIDTH, class RowOf>
__device__ void copy_rows(float *to, int ld, int64_t D, const void *valid, RowOf row) {
#pragma unroll 4
    for (int r = threadIdx.x / 32; r < ROWS; r += THREADS / 32) {
        const char *from = row(r);
        for (int d = threadIdx.x % 32 * 4; d < min(WIDTH, ld); d += 128) {
            const bool present = from && d < D;
            cp_async16(to + r * ld + d, present ? from + d * 4 : valid, present ? 16 : 0);
        }
    }
    cp_async_commit();
}

/* N values from or to shared memory, with the widest accesses that N allows. */
template <int N> __device__ inline void load_values(float (&to)[N], const float *from) {
    if constexpr (N % 4 == 0)
        *(float4 *)to = *(const float4 *)from;
    else if constexpr (N == 2)
        *(float2 *)to = *(const float2 *)from;
    else
        to[0] = from[0];
}
template <int N> __device__ inline void store_values(float *to, const float (&from)[N]) {
    if constexpr (N % 4 == 0)
        *(float4 *)to = *(const float4 *)from;
    else
        to[0] = from[0];
}

template <class S> struct FmaTile {
    static_assert(S::TR == 1 || S::TR == 4, "rows are read one or four at a time");
    const fad_attn_problem &p;
    const Tile &t;
    FmaShared<S> sm;
    const int column = threadIdx.x % S::C, row = threadIdx.x / S::C * S::TR; /* first of this thread's rows */
    float c, scaled, softcap;
    int plain;
    bool asynchronous;     /* k and v are aligned fp32: copied straight to shared memory */
    float o[S::TR][S::TV]; /* the split's O */
    float m, l;            /* of row threadIdx.x, in threads below ROWS */

    __device__ FmaTile(const fad_attn_problem &problem, const Tile &tile, void *memory)
        : p(problem), t(tile), sm(memory, p.D) {
        c = fad_f32_score_factor(p.scale, p.softcap > 0 || p.alibi_slopes, &plain);
        scaled = (float)(p.softcap > 0 ? p.scale / p.softcap : p.scale);
        softcap = (float)p.softcap;
        asynchronous = p.dtype == FAD_FLOAT32 && rows_aligned(p.k, 4, p.D) && rows_aligned(p.v, 4, p.Dv);
    }

    __device__ int dim(int n) const { return n / S::W * S::C * S::W + column * S::W + n % S::W; } /* of o[][n] */

    __device__ void load_queries() {
        const int64_t bytes = p.dtype == FAD_FLOAT32 ? 4 : 2;
        for (int r = threadIdx.x; r < S::ROWS; r += THREADS) {
            const Row row = row_of(t, r);
            const bool active = r < t.n_active;
            const fad_interval seen = fad_visible(&t.seq.span, row.i);
            sm.pos[r] = active ? fad_query_position(&t.seq.span, row.i) : 0;
            sm.lo[r] = active ? seen.lo : 0;
            sm.hi[r] = active ? seen.hi : 0;
            sm.slope[r] =
                active && p.alibi_slopes ? -((const float *)p.alibi_slopes)[t.seq.index * p.alibi_stride_b + row.h] : 0;
        }
        load_rows<S::ROWS, FAD_MAX_HEAD_DIM>(sm.q, sm.d_ld, p.D, p.dtype, rows_aligned(p.q, bytes, p.D), [&](int r) {
            const Row row = row_of(t, r);
            return r < t.n_active ? element(p.q, bytes, t.seq.q, row.i, row.h) : nullptr;
        });
    }

    /* Keys of the block that some row sees; zeros elsewhere, whatever the bits there (N4, N11). On return this thread's
     * part of k is there, that of v only after finish_values. */
    __device__ void load_block(int64_t block_lo, fad_interval seen) {
        const int64_t bytes = p.dtype == FAD_FLOAT32 ? 4 : 2;
        auto row_of = [&](const fad_view &view, int64_t first, int j) -> const char * {
            const int64_t pos = block_lo + j;
            if (pos < seen.lo || pos >= seen.hi)
                return nullptr;
            const int64_t at = fad_key_offset(&view, first, fad_find_key(&t.seq, pos - t.seq.span.k_pos));
            return (const char *)view.data + (at + t.head_k * view.stride_h) * bytes;
        };
        auto key = [&](int j) { return row_of(p.k, t.seq.k, j); };
        auto value = [&](int j) { return row_of(p.v, t.seq.v, j); };
        if (asynchronous) {
            copy_rows<BLOCK, FAD_MAX_HEAD_DIM>(sm.k, sm.d_ld, p.D, p.k.data, key);
            copy_rows<BLOCK, S::DV>(sm.v, S::DV, p.Dv, p.v.data, value);
            cp_async_wait<1>();
        } else {
            load_rows<BLOCK, FAD_MAX_HEAD_DIM>(sm.k, sm.d_ld, p.D, p.dtype, rows_aligned(p.k, bytes, p.D), key);
            load_rows<BLOCK, S::DV>(sm.v, S::DV, p.Dv, p.dtype, rows_aligned(p.v, bytes, p.Dv), value);
        }
    }
    __device__ void finish_values() {
        if (asynchronous)
            cp_async_wait<0>();
    }

    /* Whether this thread finds Inf or NaN in its share of v. */
    __device__ bool values_not_finite() const {
        bool bad = false;
        for (int at = threadIdx.x; at < BLOCK * S::DV; at += THREADS)
            bad |= !isfinite(sm.v[at]);
        return bad;
    }

    __device__ void clear() {
        m = FAD_F32_SENTINEL, l = 0;
#pragma unroll
        for (int i = 0; i < S::TR; i++)
#pragma unroll
            for (int n = 0; n < S::TV; n++)
                o[i][n] = 0;
    }

    /* N7: s = chain over ascending d; zero padding of d is exact. */
    __device__ void dot(float (&s)[S::TK][S::TR]) const {
#pragma unroll
        for (int i = 0; i < S::TR; i++)
#pragma unroll
            for (int j = 0; j < S::TK; j++)
                s[j][i] = 0;
#pragma unroll 1
        for (int d = 0; d < sm.d_ld - 4; d += 4) {
            float4 k[S::TK];
#pragma unroll
            for (int j = 0; j < S::TK; j++)
                k[j] = *(const float4 *)(sm.k + (column + j * S::C) * sm.d_ld + d);
#pragma unroll
            for (int i = 0; i < S::TR; i++) {
                const float4 q = *(const float4 *)(sm.q + (row + i) * sm.d_ld + d);
#pragma unroll
                for (int j = 0; j < S::TK; j++) {
                    s[j][i] = fad_f32_fma(q.x, k[j].x, s[j][i]);
                    s[j][i] = fad_f32_fma(q.y, k[j].y, s[j][i]);
                    s[j][i] = fad_f32_fma(q.z, k[j].z, s[j][i]);
                    s[j][i] = fad_f32_fma(q.w, k[j].w, s[j][i]);
                }
            }
        }
    }

    /* N4, N5: x from s. */
    __device__ float score(float s, int r, int j, int64_t block_lo, bool partial) const {
        if (!plain) {
            s = fad_f32_scaled_score(s, scaled, softcap);
            if (p.alibi_slopes)
                s = fad_f32_fma(sm.slope[r], fabsf((float)(sm.pos[r] - block_lo - j)), s);
        }
        return partial && (block_lo + j < sm.lo[r] || block_lo + j >= sm.hi[r]) ? -INFINITY : s;
    }

    /* N6 for row threadIdx.x; true if its reference moved. */
    __device__ bool advance_reference() {
        float best[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY}; /* a maximum has no order */
#pragma unroll
        for (int j = 0; j < BLOCK; j++)
            best[j % 4] = fad_f32_max(sm.x[j * S::X_LD + threadIdx.x], best[j % 4]);
        const float x_max = fmaxf(fmaxf(best[0], best[1]), fmaxf(best[2], best[3]));
        const float now = fad_f32_reference(m, x_max, c), alpha = fad_f32_pow2(fad_f32_sub(m, now));
        const bool moved = m < now;
        l = fad_f32_mul(l, alpha);
        m = sm.m[threadIdx.x] = now;
        sm.alpha[threadIdx.x] = alpha;
        return moved;
    }

    /* N7: l = l + p, ascending keys; a masked key adds 0, which is exact. */
    __device__ void sum_row() {
#pragma unroll 16
        for (int j = 0; j < BLOCK; j++)
            l = fad_f32_add(l, sm.x[j * S::X_LD + threadIdx.x]);
    }

    /* N7: O = chain over ascending keys. guarded (N11): skip the keys that a row does not see, V is not finite. */
    template <bool GUARDED> __device__ void add_values(int64_t block_lo) {
#pragma unroll 2
        for (int j = 0; j < BLOCK; j++) {
            float v[S::TV / S::W][S::W], prob[S::TR];
            load_values(prob, sm.x + j * S::X_LD + row);
#pragma unroll
            for (int n = 0; n < S::TV / S::W; n++)
                load_values(v[n], sm.v + j * S::DV + dim(n * S::W));
#pragma unroll
            for (int i = 0; i < S::TR; i++) {
                if (GUARDED && (block_lo + j < sm.lo[row + i] || block_lo + j >= sm.hi[row + i]))
                    continue;
#pragma unroll
                for (int n = 0; n < S::TV; n++)
                    o[i][n] = fad_f32_fma(prob[i], v[n / S::W][n % S::W], o[i][n]);
            }
        }
    }

    /* The scores or probabilities of key column j * C of this thread's rows. */
    __device__ void publish(const float (&x)[S::TK][S::TR]) {
#pragma unroll
        for (int j = 0; j < S::TK; j++)
            store_values(sm.x + (column + j * S::C) * S::X_LD + row, x[j]);
    }

    __device__ void block(int64_t block_lo, fad_interval seen) {
        const bool partial =
            fad_tile_kind(&t.seq.span, t.i0, last_row(t), block_lo, block_lo + BLOCK) != FAD_TILE_FULL ||
            t.n_active < S::ROWS;
        load_block(block_lo, seen);
        __syncthreads(); /* k may be read */
        float x[S::TK][S::TR];
        dot(x);
#pragma unroll
        for (int j = 0; j < S::TK; j++)
#pragma unroll
            for (int i = 0; i < S::TR; i++)
                x[j][i] = score(x[j][i], row + i, column + j * S::C, block_lo, partial);
        __syncthreads(); /* k may be overwritten */
        publish(x);
        __syncthreads(); /* x may be read: all scores */
        const bool moved = __syncthreads_or(threadIdx.x < S::ROWS && advance_reference()); /* m, alpha may be read */
        float reference[S::TR], alpha[S::TR];
        load_values(reference, sm.m + row);
        load_values(alpha, sm.alpha + row);
#pragma unroll
        for (int j = 0; j < S::TK; j++)
#pragma unroll
            for (int i = 0; i < S::TR; i++)
                x[j][i] = fabsf(reference[i]) <= FAD_F32_LIMIT ? fad_f32_probability_near(x[j][i], c, reference[i])
                                                               : fad_f32_probability(x[j][i], c, reference[i]);
        publish(x);
        if (moved) {
#pragma unroll
            for (int i = 0; i < S::TR; i++)
#pragma unroll
                for (int n = 0; n < S::TV; n++)
                    o[i][n] = fad_f32_mul(o[i][n], alpha[i]);
        }
        finish_values();
        __syncthreads(); /* x may be read: all probabilities; v may be read */
        const bool guarded = partial && __syncthreads_or(values_not_finite());
        if (threadIdx.x < S::ROWS)
            sum_row();
        if (guarded)
            add_values<true>(block_lo);
        else
            add_values<false>(block_lo);
        __syncthreads(); /* k, v and x may be overwritten */
    }

    /* f(what(row), row, value dim, O) for this thread's share of the first n_rows rows. */
    template <class What, class F> __device__ void for_each_output(int n_rows, What what, F f) {
#pragma unroll
        for (int i = 0; i < S::TR; i++) {
            if (row + i >= n_rows)
                continue;
            auto it = what(row + i);
#pragma unroll
            for (int n = 0; n < S::TV; n++)
                if (dim(n) < p.Dv)
                    f(it, row + i, dim(n), o[i][n]);
        }
    }

    /* One split, from the empty state (N3). seen: positions that some row sees. */
    __device__ void run_split(int64_t split, fad_interval seen) {
        clear();
        seen.lo = max(seen.lo, split * p.split_size);
        seen.hi = min(seen.hi, (split + 1) * p.split_size);
        for (int64_t lo = seen.lo / BLOCK * BLOCK; lo < seen.hi; lo += BLOCK)
            block(lo, seen);
    }
};

#endif
