/* Positions, visibility and partition (N2, N3, N4): integers only, so every kernel gets the same answer. */
#ifndef FAD_NUMERICS_MASK_H
#define FAD_NUMERICS_MASK_H

#include "constants.h"
#include "real.h"

/* What one sequence's rows may see. left, right: window in keys, -1 unbounded; causal is right = 0. */
typedef struct fad_span {
    int64_t n_q, n_k; /* rows and keys in use */
    int64_t k_pos;    /* position of the first key */
    int64_t left, right;
} fad_span;

typedef struct fad_interval {
    int64_t lo, hi; /* positions lo .. hi - 1; empty if hi <= lo */
} fad_interval;

/* N2: position of query row i, aligned to the end of the keys. May be negative: such a row stands before every key. */
FAD_FN int64_t fad_query_position(const fad_span *s, int64_t i) { return s->k_pos + s->n_k - s->n_q + i; }

/* N4: positions that row i sees. lo and hi never fall as i grows. */
FAD_FN fad_interval fad_visible(const fad_span *s, int64_t i) {
    int64_t p = fad_query_position(s, i);
    fad_interval v = {s->k_pos, s->k_pos + s->n_k};
    if (s->left >= 0 && v.lo < p - s->left)
        v.lo = p - s->left;
    if (s->right >= 0 && v.hi > p + s->right + 1)
        v.hi = p + s->right + 1;
    return v;
}

typedef enum fad_tile { FAD_TILE_SKIP, FAD_TILE_PARTIAL, FAD_TILE_FULL } fad_tile;

/* N4: the tile of rows first .. last and positions lo .. hi - 1. FULL: every row sees every one of them. */
FAD_FN fad_tile fad_tile_kind(const fad_span *s, int64_t first, int64_t last, int64_t lo, int64_t hi) {
    fad_interval a = fad_visible(s, first), z = fad_visible(s, last);
    if (hi <= a.lo || z.hi <= lo || z.hi <= a.lo)
        return FAD_TILE_SKIP;
    return z.lo <= lo && hi <= a.hi ? FAD_TILE_FULL : FAD_TILE_PARTIAL;
}

/* a / b, b positive. On a GPU the division of 64 bits is a call of a hundred instructions, that of 32 bits a tenth
 * of it, and most numbers are small. */
FAD_FN int64_t fad_quotient(int64_t a, int64_t b) {
#ifdef __CUDA_ARCH__
    if ((a | b) >> 32 == 0)
        return (uint32_t)a / (uint32_t)b;
#endif
    return a / b;
}

/* N3: blocks and splits are counted from position 0. Positions of keys are never negative. */
FAD_FN int64_t fad_partition_first(int64_t lo, int64_t size) { return fad_quotient(lo, size); }
FAD_FN int64_t fad_partition_end(int64_t hi, int64_t size) { return fad_quotient(hi + size - 1, size); }

#endif
