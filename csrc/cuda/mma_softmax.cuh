/* The softmax of the mma family (N4 to N7) on the fragments that matrix instructions leave: a warp holds 16 rows by a
 * block of keys, of which lane 4g + t has rows g and g + 8 and, of every eight keys, 2t and 2t + 1. mma.sync and wgmma
 * agree on that, so all kernels share this file. */
#ifndef FAD_CUDA_MMA_SOFTMAX_CUH
#define FAD_CUDA_MMA_SOFTMAX_CUH

#include "ptx.cuh"
#include "score_rule.cuh"
#include "work.cuh"

constexpr int BLOCK_KEYS = FAD_MMA_BLOCK_KV;
constexpr int KEY_TILES = BLOCK_KEYS / 8; /* n8 tiles of a block */

/* Scores of a warp's 16 rows and one block: [n8 tile][row g: 0, 1; row g + 8: 2, 3]. */
typedef float ScoreTile[KEY_TILES][4];

/* The keys that a row sees; numbered as in KeyRange. */
struct SeenKeys {
    int lo, hi;

    /* Of this lane's keys of a block, two in each n8 tile, how many come before key `end`. */
    static __device__ __forceinline__ int keys_before(int end, int block) {
        const int left = min(max(end - block * BLOCK_KEYS - (int)threadIdx.x % 4 * 2, 0), BLOCK_KEYS);
        return left / 8 * 2 + min(left % 8, 2);
    }
    /* N4: -inf where the row does not see a key. The lane's 32 keys are bits of a word. */
    __device__ __forceinline__ void mask(ScoreTile &s, int half, int block) const {
        static_assert(KEY_TILES * 2 == 32, "a bit for each key");
        const unsigned seen =
            (unsigned)(((UINT64_C(1) << keys_before(hi, block)) - 1) & ~((UINT64_C(1) << keys_before(lo, block)) - 1));
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                if (!(seen >> (n * 2 + e) & 1))
                    s[n][half * 2 + e] = -INFINITY;
    }
};

/* The same for every row of a tile, in a few numbers: as fad_visible says, a row's bounds are those of the row before it
 * plus one, within those of all keys. */
struct TileSeenKeys {
    int from, to; /* all keys */
    int lo, hi;   /* bounds of the sequence's row i0 */
    unsigned g0, group, n_active;

    __device__ TileSeenKeys(const Tile &t, const KeyRange &range) : g0(t.g0), group(t.group), n_active(t.n_active) {
        constexpr int64_t FAR = 1024; /* more than a tile has rows; copies end before INT32_MAX - FAR */
        const fad_span &span = t.seq.span;
        const int64_t position = fad_query_position(&span, t.i0) - range.first, begin = span.k_pos - range.first;
        from = (int)max(begin, (int64_t)0);
        to = (int)(begin + span.n_k);
        lo = span.left < 0 ? -(int)FAR : (int)fad_clamp(position - span.left, -FAR, INT32_MAX - FAR);
        hi = span.right < 0 ? to : (int)fad_clamp(position + span.right + 1, -FAR, INT32_MAX - FAR);
    }
    __device__ __forceinline__ SeenKeys operator[](unsigned r) const {
        const int rows = (int)(group == 1 ? g0 + r : (g0 + r) / group); /* from row i0 on */
        return r < n_active ? SeenKeys{max(lo + rows, from), max(min(hi + rows, to), 0)} : SeenKeys{0, 0};
    }
};

/* What masks and ALiBi need of a row. Rows past n_active see nothing. */
struct RowView : SeenKeys {
    int pos;     /* the row's own, numbered as keys are */
    float slope; /* -slope */

    __device__ RowView(const fad_attn_problem &p, const Tile &t, const KeyRange &range, int r)
        : SeenKeys{0, 0}, pos(0), slope(0) {
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
    __device__ RowView(int lo_, int hi_, int pos_, float slope_) : SeenKeys{lo_, hi_}, pos(pos_), slope(slope_) {}
};

/* N5: x from s for a warp's rows g and g8 (g + 8). Options are rare and their code is long: it does a quarter of the tile
 * at a time, which goes round, as registers cannot be indexed. */
static __device__ __forceinline__ void apply_options(ScoreTile &s, const RowView &g, const RowView &g8,
                                                     const ScoreRule &rule, int block) {
    constexpr int TURN = KEY_TILES / 4;
    const int key = block * BLOCK_KEYS + threadIdx.x % 4 * 2; /* the lane's first */
    int distance[2] = {g.pos - key, g8.pos - key};
#pragma unroll 1
    for (int turn = 0; turn < 4; turn++) {
        float x[TURN][4];
#pragma unroll
        for (int n = 0; n < TURN; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                x[n][e] = fad_f32_scaled_score(s[n][e], rule.scaled, rule.softcap);
                if (rule.alibi)
                    x[n][e] = fad_f32_fma(e < 2 ? g.slope : g8.slope, fabsf((float)(distance[e / 2] - n * 8 - e % 2)),
                                          x[n][e]);
            }
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                s[n][e] = n < KEY_TILES - TURN ? s[n + TURN][e] : x[n % TURN][e];
        distance[0] -= TURN * 8;
        distance[1] -= TURN * 8;
    }
}

/* N5 for one score: the same where there are too many to turn. */
static __device__ __noinline__ float score_with_options(float s, float scaled, float softcap, float slope, int distance,
                                                        bool alibi) {
    const float x = fad_f32_scaled_score(s, scaled, softcap);
    return alibi ? fad_f32_fma(slope, fabsf((float)distance), x) : x;
}
static __device__ __forceinline__ float score_with_options(float s, const ScoreRule &rule, const RowView &row,
                                                           int key) {
    return score_with_options(s, rule.scaled, rule.softcap, row.slope, row.pos - key, rule.alibi);
}

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

    /* N5 and N4 for a block of a warp's rows, the first of which is `first`. */
    __device__ __forceinline__ void apply_options(ScoreTile &s, const ScoreRule &rule, int first, int block) const {
        const int g = first + threadIdx.x % 32 / 4;
        ::apply_options(s, (*this)[g], (*this)[g + 8], rule, block);
    }
    __device__ __forceinline__ void mask(ScoreTile &s, int first, int block) const {
#pragma unroll
        for (int half = 0; half < 2; half++)
            (*this)[first + threadIdx.x % 32 / 4 + half * 8].mask(s, half, block);
    }

    /* The keys of a block that row r sees: what is outside it is not there. */
    __device__ __forceinline__ fad_interval seen(int r, int block) const {
        return {lo[r] - block * BLOCK_KEYS, hi[r] - block * BLOCK_KEYS};
    }
};

/* The largest of this lane's scores of row g (half 0) or g + 8; NaN does not count: -inf if there is nothing else. */
static __device__ __forceinline__ float lane_maximum(const ScoreTile &s, int half) {
    float of[4]; /* so that they do not wait for each other */
#pragma unroll
    for (int n = 0; n < KEY_TILES; n++) {
        const float both = fmaxf(s[n][2 * half], s[n][2 * half + 1]);
        of[n % 4] = n < 4 ? both : fmaxf(of[n % 4], both);
    }
    const float best = fmaxf(fmaxf(of[0], of[1]), fmaxf(of[2], of[3]));
    return best != best ? -INFINITY : best; /* nothing but NaN */
}

/* The largest score of rows g and g + 8; NaN does not count. INTEGERS: bits of numbers from 0 on are ordered as integers,
 * of which one instruction of compute capability 9.0 compares three. */
template <bool INTEGERS = false>
static __device__ __forceinline__ void row_maxima(const ScoreTile &s, float (&x_max)[2]) {
    constexpr unsigned INFINITE = 0x7f800000u;
    int top[2] = {-1, -1};
    if constexpr (INTEGERS)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int of[4];
#pragma unroll
            for (int n = 0; n < KEY_TILES; n++) {
                const int x = (int)fad_f32_bits(s[n][2 * half]), y = (int)fad_f32_bits(s[n][2 * half + 1]);
                of[n % 4] = n < 4 ? max(x, y) : __vimax3_s32(of[n % 4], x, y);
            }
            top[half] = max(__vimax3_s32(of[0], of[1], of[2]), of[3]);
        }
    if (INTEGERS && !__any_sync(~0u, ((unsigned)top[0] > INFINITE) | ((unsigned)top[1] > INFINITE))) {
        x_max[0] = fad_f32_from_bits((unsigned)top[0]);
        x_max[1] = fad_f32_from_bits((unsigned)top[1]);
    } else { /* NaN, or nothing but numbers below 0 */
        x_max[0] = lane_maximum(s, 0);
        x_max[1] = lane_maximum(s, 1);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        x_max[half] = fmaxf(x_max[half], __shfl_xor_sync(~0u, x_max[half], 1));
        x_max[half] = fmaxf(x_max[half], __shfl_xor_sync(~0u, x_max[half], 2));
    }
}

/* Something rare to do to every score of a tile: a copy in memory goes round in little code, as registers cannot be
 * indexed. change(x, half): of row g or g + 8. */
template <class Change> static __device__ __forceinline__ void change_apart(ScoreTile &s, Change change) {
    float4 copy[KEY_TILES];
#pragma unroll
    for (int n = 0; n < KEY_TILES; n++)
        copy[n] = make_float4(s[n][0], s[n][1], s[n][2], s[n][3]);
#pragma unroll 1
    for (int n = 0; n < KEY_TILES; n++) {
        const float4 x = copy[n];
        copy[n] = make_float4(change(x.x, 0), change(x.y, 0), change(x.z, 1), change(x.w, 1));
    }
#pragma unroll
    for (int n = 0; n < KEY_TILES; n++)
        s[n][0] = copy[n].x, s[n][1] = copy[n].y, s[n][2] = copy[n].z, s[n][3] = copy[n].w;
}

/* N6 where |m| > LIMIT, and everywhere. */
static __device__ __forceinline__ float far_argument(float x, float c, float m) {
    return fabsf(m) > FAD_F32_LIMIT ? fad_f32_sub(fad_f32_mul(x, c), m) : fad_f32_fma(x, c, -m);
}

/* P as the a operands of a block's four steps, rounded to the input type (N7). */
typedef unsigned ProbabilityFragments[BLOCK_KEYS / 16][4];

/* N7: p rounded to the input type. */
template <fad_dtype T>
static __device__ __forceinline__ void round_probabilities(ProbabilityFragments &a, const ScoreTile &p) {
#pragma unroll
    for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            a[n / 2][n % 2 * 2 + half] = pack2<T>(p[n][2 * half], p[n][2 * half + 1]);
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
    static constexpr unsigned HIGHEST = 0x4b7fffffu; /* bits of 2^24 - 1 */
    float r[2];
    bool far; /* of the warp */

    __device__ __forceinline__ void clear() {
        r[0] = r[1] = EMPTY;
        far = false;
    }

    /* N6: moves the references to a block with these maxima, -inf where a row has seen no key of it. alpha: what O and l
     * are to be multiplied by. Returns whether any row of the warp moved. */
    __device__ __forceinline__ bool advance(const float (&x_max)[2], float c, float (&alpha)[2]) {
        float now[2] = {fad_f32_fma(x_max[0], c, FAD_F32_MAGIC), fad_f32_fma(x_max[1], c, FAD_F32_MAGIC)};
        /* A state that has seen something is above EMPTY, and so is every reference that can move it. One that has not is
         * below all: if its first scores are that low, only the far form can tell. */
        bool moved = far, near = !far;
#pragma unroll
        for (int i = 0; i < 2; i++) { /* | and &, because && would be a branch */
            moved |= (now[i] > r[i]) | ((r[i] == EMPTY) & (x_max[i] != -INFINITY));
            near &= (now[i] > EMPTY) | (r[i] != EMPTY) | (x_max[i] == -INFINITY);
            now[i] = fmaxf(now[i], r[i]);
            near &= fad_f32_bits(now[i]) <= HIGHEST;
        }
        if (!__any_sync(~0u, moved)) {
            alpha[0] = alpha[1] = 1;
            return false;
        }
        if (!__all_sync(~0u, near))
            return advance_far(x_max, c, alpha);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int below = (int)(fad_f32_bits(r[i]) - fad_f32_bits(now[i]));
            alpha[i] = fad_f32_from_bits((unsigned)(max(below, -127) + 127) << 23);
            r[i] = now[i];
        }
        return true;
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

    /* N6, N7: scores become p of the references that advance() left; sum: this lane's b_t, of p rounded to the input type.
     * What is added up is rounded here already, where the unit that does exp2 leaves time: an instruction every eight
     * cycles. */
    template <fad_dtype T> __device__ __forceinline__ void apply(ScoreTile &s, float c, float (&sum)[2]) const {
        float m[2] = {fad_f32_sub(r[0], FAD_F32_MAGIC), fad_f32_sub(r[1], FAD_F32_MAGIC)};
        if (far) {
            change_apart(s, [&](float x, int half) { return far_argument(x, c, half == 0 ? r[0] : r[1]); });
            c = 1, m[0] = m[1] = 0; /* x * 1 - 0 is x */
        }
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float &x = s[n][2 * half], &y = s[n][2 * half + 1];
                x = ex2(fad_f32_fma(x, c, -m[half]));
                y = ex2(fad_f32_fma(y, c, -m[half]));
                const unsigned pair = pack2<T>(x, y);
                const float both = fad_f32_add(low_half<T>(pair), high_half<T>(pair));
                sum[half] = n == 0 ? both : fad_f32_add(sum[half], both);
            }
    }
};

#endif
