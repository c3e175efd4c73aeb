/* One query row of the mma family on a CPU, without a vector: what its scalar forward and backward share. */
#ifndef FAD_CPU_MMA_ROW_H
#define FAD_CPU_MMA_ROW_H

#include "kernel.h"

enum { STEP = 16 };

/* One query row. */
typedef struct row {
    const fad_attn_problem *p;
    fad_tensor_core core;
    fad_sequence seq;
    int64_t i, h;
    int64_t pos;       /* N2 */
    fad_interval seen; /* N4 */
    float c, scaled, softcap, slope;
    int plain;
    float q[FAD_MAX_HEAD_DIM];
} row;

static inline int64_t min_i(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max_i(int64_t a, int64_t b) { return a > b ? a : b; }

static inline float widen(uint16_t x, fad_dtype dtype) {
    return dtype == FAD_BFLOAT16 ? fad_bf16_widen(x) : fad_f16_widen(x);
}
static inline uint16_t narrow(float x, fad_dtype dtype) {
    return dtype == FAD_BFLOAT16 ? fad_bf16_round(x) : fad_f16_round(x);
}

/* Row `index` of head h of a view whose sequence starts at element first. */
static inline uint16_t *values_of(const fad_view *view, int64_t first, int64_t index, int64_t h) {
    return (uint16_t *)view->data + first + index * view->stride_s + h * view->stride_h;
}
static inline const uint16_t *key_row(const row *r, const fad_view *view, int64_t first, int64_t pos) {
    const int64_t at = fad_key_offset(view, first, fad_find_key(&r->seq, pos - r->seq.span.k_pos));
    return (const uint16_t *)view->data + at + r->h / fad_group(r->p) * view->stride_h;
}

static inline void load_row(const fad_attn_problem *p, fad_sequence seq, int64_t i, int64_t h, row *r) {
    *r = (row){.p = p, .seq = seq, .i = i, .h = h, .softcap = (float)p->softcap};
    r->core = fad_cpu_tensor_core(p);
    r->pos = fad_query_position(&seq.span, i);
    r->seen = fad_visible(&seq.span, i);
    r->c = fad_f32_score_factor(p->scale, p->softcap > 0 || p->alibi_slopes, &r->plain);
    r->scaled = (float)(p->softcap > 0 ? p->scale / p->softcap : p->scale);
    if (p->alibi_slopes && i < seq.span.n_q) /* rows behind the last sequence have no slope */
        r->slope = ((const float *)p->alibi_slopes)[seq.index * p->alibi_stride_b + h];
    for (int64_t d = 0; d < p->D; d++)
        r->q[d] = widen(values_of(&p->q, seq.q, i, h)[d], p->dtype);
}

/* N7: the dot product of x [n] and row y, a chain of steps from 0. */
static inline float dot(const row *r, const float *x, const uint16_t *y, int64_t n) {
    float s = 0;
    for (int64_t d = 0; d < n; d += STEP) {
        const int products = (int)min_i(STEP, n - d);
        float b[STEP];
        for (int e = 0; e < products; e++)
            b[e] = widen(y[d + e], r->p->dtype);
        s = fad_tensor_core_step(r->core, x + d, b, products, s);
    }
    return s;
}

/* N5 of the key at pos, which the row sees: x from the dot product s. */
static inline float score(const row *r, int64_t pos, float s) {
    if (r->plain)
        return s;
    const float x = fad_f32_scaled_score(s, r->scaled, r->softcap);
    return r->p->alibi_slopes ? fad_f32_fma(-r->slope, fad_f32_abs((float)(r->pos - pos)), x) : x;
}

#endif
