/* The softmax of the mma family (N4 to N7) on the fragments that matrix instructions leave: a warp holds 16 rows by 64
 * keys, of which lane 4g + t has rows g and g + 8 and, of every eight keys, 2t and 2t + 1. mma.sync and wgmma agree on
 * that, so all kernels share this file. */
#ifndef FAD_CUDA_MMA_SOFTMAX_CUH
#define FAD_CUDA_MMA_SOFTMAX_CUH

#include "ptx.cuh"
#include "work.cuh"

constexpr int BLOCK_KEYS = FAD_BLOCK_KV;
constexpr int KEY_TILES = BLOCK_KEYS / 8; /* n8 tiles of a block */

/* Scores of a warp's 16 rows and one block: [n8 tile][row g: 0, 1; row g + 8: 2, 3]. */
typedef float ScoreTile[KEY_TILES][4];

/* N5: how a score comes from a dot product. */
struct ScoreRule {
    float c, scaled, softcap;
    int plain;
    bool alibi;
    __device__ explicit ScoreRule(const fad_attn_problem &p)
        : scaled((float)(p.softcap > 0 ? p.scale / p.softcap : p.scale)), softcap((float)p.softcap),
          alibi(p.alibi_slopes != nullptr) {
        c = fad_f32_score_factor(p.scale, p.softcap > 0 || alibi, &plain);
    }
};

/* What masks and ALiBi need of a row; keys as in KeyRange. Rows past n_active see nothing. */
struct RowView {
    int lo, hi, pos; /* keys seen, and the row's own */
    float slope;     /* -slope */

    __device__ RowView(const fad_attn_problem &p, const Tile &t, const KeyRange &range, int r)
        : lo(0), hi(0), pos(0), slope(0) {
        if (r >= t.n_active)
            return;
        const Row row = row_of(t, r);
        const fad_interval seen = fad_visible(&t.seq.span, row.i);
        lo = (int)fad_clamp(seen.lo - range.first, 0, INT32_MAX);
        hi = (int)fad_clamp(seen.hi - range.first, 0, INT32_MAX);
        pos = (int)(fad_query_position(&t.seq.span, row.i) - range.first); /* ALiBi's are short */
        if (p.alibi_slopes)
            slope = -((const float *)p.alibi_slopes)[t.seq.index * p.alibi_stride_b + row.h];
    }
    __device__ RowView(int lo_, int hi_, int pos_, float slope_) : lo(lo_), hi(hi_), pos(pos_), slope(slope_) {}

    /* N5: x from s, for this lane's scores of the row, which is g (half 0) or g + 8 (half 1) of the warp. */
    __device__ __forceinline__ void apply_options(ScoreTile &s, int half, const ScoreRule &rule, int block) const {
        const int distance = pos - block * BLOCK_KEYS - threadIdx.x % 4 * 2; /* of the lane's first key */
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float &x = s[n][half * 2 + e];
                x = fad_f32_scaled_score(x, rule.scaled, rule.softcap);
                if (rule.alibi)
                    x = fad_f32_fma(slope, fabsf((float)(distance - n * 8 - e)), x);
            }
    }

    /* N4: -inf where the row does not see a key. */
    __device__ __forceinline__ void mask(ScoreTile &s, int half, int block) const {
        const int here = block * BLOCK_KEYS + threadIdx.x % 4 * 2, from = lo - here, to = hi - here;
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                if (n * 8 + e < from || n * 8 + e >= to)
                    s[n][half * 2 + e] = -INFINITY;
    }
};

/* The rows of a tile in shared memory. */
template <int ROWS> struct RowTable {
    int lo[ROWS], hi[ROWS], pos[ROWS];
    float slope[ROWS];

    __device__ void fill(const fad_attn_problem &p, const Tile &t, const KeyRange &range, int thread, int threads) {
#pragma unroll 1
        for (int r = thread; r < ROWS; r += threads) {
            const RowView row(p, t, range, r);
            lo[r] = row.lo, hi[r] = row.hi, pos[r] = row.pos, slope[r] = row.slope;
        }
    }
    __device__ __forceinline__ RowView operator[](int r) const { return {lo[r], hi[r], pos[r], slope[r]}; }

    /* N5 and N4 for a block of a warp's rows, the first of which is `first`. HALVES is 1 where a warp has only the
     * rows g. */
    template <int HALVES = 2>
    __device__ __forceinline__ void apply_options(ScoreTile &s, const ScoreRule &rule, int first, int block) const {
#pragma unroll
        for (int half = 0; half < HALVES; half++)
            (*this)[first + threadIdx.x % 32 / 4 + half * 8].apply_options(s, half, rule, block);
    }
    template <int HALVES = 2> __device__ __forceinline__ void mask(ScoreTile &s, int first, int block) const {
#pragma unroll
        for (int half = 0; half < HALVES; half++)
            (*this)[first + threadIdx.x % 32 / 4 + half * 8].mask(s, half, block);
    }

    /* The keys of a block that row r sees: what is outside it is not there. */
    __device__ __forceinline__ fad_interval seen(int r, int block) const {
        return {lo[r] - block * BLOCK_KEYS, hi[r] - block * BLOCK_KEYS};
    }
};

/* The largest score of rows g and g + 8; NaN does not count. */
template <int HALVES> static __device__ __forceinline__ void row_maxima(const ScoreTile &s, float (&x_max)[HALVES]) {
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
        float best = fmaxf(s[0][2 * half], s[0][2 * half + 1]);
#pragma unroll
        for (int n = 1; n < KEY_TILES; n++)
            best = fmaxf(best, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
        best = best != best ? -INFINITY : best; /* nothing but NaN */
        best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
        x_max[half] = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
    }
}

/* N6 where |m| > LIMIT, and everywhere. */
static __device__ __forceinline__ float far_argument(float x, float c, float m) {
    return fabsf(m) > FAD_F32_LIMIT ? fad_f32_sub(fad_f32_mul(x, c), m) : fad_f32_fma(x, c, -m);
}

/* P as the a operands of a block's four steps, rounded to the input type (N7). */
typedef unsigned ProbabilityFragments[BLOCK_KEYS / 16][4];

/* N6: p of scores s, in their place. argument(x, half) is what exp2 gets. */
template <int HALVES, class Argument>
static __device__ __forceinline__ void exponentiate(ScoreTile &s, Argument argument) {
#pragma unroll
    for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
        for (int e = 0; e < 2 * HALVES; e++)
            s[n][e] = ex2(argument(s[n][e], e / 2));
}

/* N7: p rounded to the input type. */
template <fad_dtype T, int HALVES = 2>
static __device__ __forceinline__ void round_probabilities(ProbabilityFragments &a, const ScoreTile &p) {
#pragma unroll
    for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
        for (int half = 0; half < HALVES; half++)
            a[n / 2][n % 2 * 2 + half] = pack2<T>(p[n][2 * half], p[n][2 * half + 1]);
}

/* N7: this lane's b_t of row g (half 0) or g + 8 (half 1). */
template <fad_dtype T> static __device__ __forceinline__ float lane_sum(const ProbabilityFragments &a, int half) {
    float sum = 0;
#pragma unroll
    for (int n = 0; n < KEY_TILES; n++) {
        const unsigned pair = a[n / 2][n % 2 * 2 + half];
        const float both = fad_f32_add(low_half<T>(pair), high_half<T>(pair));
        sum = n == 0 ? both : fad_f32_add(sum, both);
    }
    return sum;
}

/* N7, the end of a split: l from the l_t of a row's four lanes; all of them get it. */
static __device__ __forceinline__ float sum_lanes(float l) {
    l = fad_f32_add(l, __shfl_xor_sync(~0u, l, 1));
    return fad_f32_add(l, __shfl_xor_sync(~0u, l, 2));
}

/* The running references of rows g and g + 8.
 *
 * As long as every |t| of the warp stays within LIMIT, references are kept as r = MAGIC + m: one fma rounds a score to
 * its integer, and the difference of two bit patterns is the exponent of the rescale factor. The state that has seen
 * nothing is r = EMPTY there, below any reference. Beyond (`far`, rare), r is m and everything is done as softmax.inc
 * says. */
struct References {
    static constexpr float EMPTY = FAD_F32_MAGIC - FAD_F32_LIMIT;
    static constexpr unsigned LOWEST = 0x4b000001u, SPAN = 0x7ffffeu; /* bits of EMPTY + 1, and up to 2^24 - 1 */
    float r[2];
    bool far; /* of the warp */

    __device__ __forceinline__ void clear() {
        r[0] = r[1] = EMPTY;
        far = false;
    }

    /* N6: moves the references to a block with these maxima. alpha: what O and l are to be multiplied by. Returns
     * whether any row of the warp moved. partial: rows may have seen no key of the block. */
    __device__ __forceinline__ bool advance(const float (&x_max)[2], float c, bool partial, float (&alpha)[2]) {
        float now[2];
        bool near = !far;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const bool none = partial && x_max[i] == -INFINITY;
            now[i] = none ? EMPTY : fad_f32_fma(x_max[i], c, FAD_F32_MAGIC);
            near &= none || fad_f32_bits(now[i]) - LOWEST <= SPAN;
            now[i] = fmaxf(now[i], r[i]);
        }
        if (!__all_sync(~0u, near))
            return advance_far(x_max, c, alpha);
        const bool moved = __any_sync(~0u, (now[0] != r[0]) | (now[1] != r[1]));
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int below = (int)(fad_f32_bits(r[i]) - fad_f32_bits(now[i]));
            alpha[i] = fad_f32_from_bits((unsigned)(max(below, -127) + 127) << 23);
            r[i] = now[i];
        }
        return moved;
    }

    /* m of row half. */
    __device__ __forceinline__ float reference(int half) const {
        if (far)
            return r[half];
        return r[half] == EMPTY ? FAD_F32_SENTINEL : fad_f32_sub(r[half], FAD_F32_MAGIC);
    }

    __device__ __forceinline__ bool advance_far(const float (&x_max)[2], float c, float (&alpha)[2]) {
        r[0] = reference(0);
        r[1] = reference(1);
        far = true;
        bool moved = false;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float now = fad_f32_reference(r[i], x_max[i], c);
            alpha[i] = fad_f32_pow2(fad_f32_sub(r[i], now));
            moved |= now != r[i];
            r[i] = now;
        }
        return __any_sync(~0u, moved);
    }

    /* s becomes p of the references that advance() left. */
    __device__ __forceinline__ void apply(ScoreTile &s, float c) const {
        if (!far) {
            const float m[2] = {fad_f32_sub(r[0], FAD_F32_MAGIC), fad_f32_sub(r[1], FAD_F32_MAGIC)};
            exponentiate<2>(s, [&](float x, int half) { return fad_f32_fma(x, c, -m[half]); });
        } else {
            exponentiate<2>(s, [&](float x, int half) { return far_argument(x, c, r[half]); });
        }
    }
};

#endif
