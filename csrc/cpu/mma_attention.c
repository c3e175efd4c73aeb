/* The mma family of a GPU on a CPU, for audits: one row at a time, clause by clause, without a vector or a tile. Slow
 * and meant to be read; mma_block.inc is the same with vectors, and must give the same bits. */
#include "kernel.h"

enum { BLOCK = FAD_MMA_BLOCK_KV, STEP = 16, LANES = 4 };

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

/* Of a split, or of the splits so far (N3, N8). */
typedef struct state {
    float m, l, o[FAD_MAX_HEAD_DIM];
} state;

static int64_t min_i(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t max_i(int64_t a, int64_t b) { return a > b ? a : b; }

static float widen(uint16_t x, fad_dtype dtype) { return dtype == FAD_BFLOAT16 ? fad_bf16_widen(x) : fad_f16_widen(x); }
static uint16_t narrow(float x, fad_dtype dtype) {
    return dtype == FAD_BFLOAT16 ? fad_bf16_round(x) : fad_f16_round(x);
}

/* Row `index` of head h of a view whose sequence starts at element first. */
static uint16_t *values_of(const fad_view *view, int64_t first, int64_t index, int64_t h) {
    return (uint16_t *)view->data + first + index * view->stride_s + h * view->stride_h;
}
static const uint16_t *key_row(const row *r, const fad_view *view, int64_t first, int64_t pos) {
    const int64_t at = fad_key_offset(view, first, fad_find_key(&r->seq, pos - r->seq.span.k_pos));
    return (const uint16_t *)view->data + at + r->h / fad_group(r->p) * view->stride_h;
}

static void load_row(const fad_attn_problem *p, fad_sequence seq, int64_t i, int64_t h, row *r) {
    *r = (row){.p = p, .seq = seq, .i = i, .h = h, .softcap = (float)p->softcap};
    r->core = fad_cpu_tensor_core(p);
    r->pos = fad_query_position(&seq.span, i);
    r->seen = fad_visible(&seq.span, i);
    r->c = fad_f32_score_factor(p->scale, p->softcap > 0 || p->alibi_slopes, &r->plain);
    r->scaled = (float)(p->softcap > 0 ? p->scale / p->softcap : p->scale);
    if (p->alibi_slopes)
        r->slope = ((const float *)p->alibi_slopes)[seq.index * p->alibi_stride_b + h];
    for (int64_t d = 0; d < p->D; d++)
        r->q[d] = widen(values_of(&p->q, seq.q, i, h)[d], p->dtype);
}

static void clear(state *s) { *s = (state){.m = FAD_F32_SENTINEL}; /* N3 */ }

/* N5 of the key at pos, which the row sees; N7: a chain of steps from 0. */
static float score(const row *r, int64_t pos) {
    const uint16_t *k = key_row(r, &r->p->k, r->seq.k, pos);
    float s = 0;
    for (int64_t d = 0; d < r->p->D; d += STEP) {
        const int n = (int)min_i(STEP, r->p->D - d);
        float b[STEP];
        for (int e = 0; e < n; e++)
            b[e] = widen(k[d + e], r->p->dtype);
        s = fad_tensor_core_step(r->core, r->q + d, b, n, s);
    }
    if (r->plain)
        return s;
    s = fad_f32_scaled_score(s, r->scaled, r->softcap);
    return r->p->alibi_slopes ? fad_f32_fma(-r->slope, fad_f32_abs((float)(r->pos - pos)), s) : s;
}

/* N7: l_t of one block; p [BLOCK], rounded to the input type, zero where the row sees no key. */
static void add_lanes(float *l, const float *p, float alpha) {
    for (int t = 0; t < LANES; t++) {
        float b = 0;
        for (int i = 0; i < BLOCK / 8; i++)
            b = fad_f32_add(b, fad_f32_add(p[8 * i + 2 * t], p[8 * i + 2 * t + 1]));
        l[t] = fad_f32_add(fad_f32_mul(l[t], alpha), b);
    }
}

/* N7: the chains of O over the keys of a block, of which the row sees those in `in`. What is masked counts as 0. */
static void add_values(const row *r, const float *p, int64_t block_lo, fad_interval in, float *o) {
    for (int64_t d = 0; d < r->p->Dv; d++)
        for (int j = 0; j < BLOCK; j += STEP) {
            float a[STEP] = {0}, b[STEP] = {0};
            for (int e = 0; e < STEP; e++) {
                const int64_t pos = block_lo + j + e;
                if (pos < in.lo || pos >= in.hi)
                    continue;
                a[e] = p[j + e];
                b[e] = widen(key_row(r, &r->p->v, r->seq.v, pos)[d], r->p->dtype);
            }
            o[d] = fad_tensor_core_step(r->core, a, b, STEP, o[d]);
        }
}

/* N6 for one block, of which the row sees the keys in `in`. */
static void run_block(const row *r, int64_t block_lo, fad_interval in, state *s, float *l) {
    float x[BLOCK], p[BLOCK] = {0}, best = -INFINITY;
    for (int64_t pos = in.lo; pos < in.hi; pos++) {
        x[pos - block_lo] = score(r, pos);
        best = fad_f32_max(x[pos - block_lo], best);
    }
    const float m = fad_f32_reference(s->m, best, r->c), alpha = fad_f32_pow2(fad_f32_sub(s->m, m));
    for (int64_t pos = in.lo; pos < in.hi; pos++)
        p[pos - block_lo] = widen(narrow(fad_mma_probability(x[pos - block_lo], r->c, m), r->p->dtype), r->p->dtype);
    s->m = m;
    add_lanes(l, p, alpha);
    for (int64_t d = 0; d < r->p->Dv; d++)
        s->o[d] = fad_f32_mul(s->o[d], alpha);
    add_values(r, p, block_lo, in, s->o);
}

/* N3: one split, from the empty state, blocks in ascending order. */
static void run_split(const row *r, int64_t split, state *s) {
    const int64_t size = r->p->split_size, lo = max_i(r->seen.lo, split * size);
    const int64_t hi = min_i(r->seen.hi, (split + 1) * size);
    float l[LANES] = {0};
    clear(s);
    if (lo >= hi)
        return;
    for (int64_t b = fad_partition_first(lo, BLOCK); b < fad_partition_end(hi, BLOCK); b++) {
        const fad_interval in = {max_i(lo, b * BLOCK), min_i(hi, (b + 1) * BLOCK)};
        run_block(r, b * BLOCK, in, s, l);
    }
    s->l = fad_f32_add(fad_f32_add(l[0], l[1]), fad_f32_add(l[2], l[3]));
}

/* N8. */
static void fold(const row *r, state *s, const state *part) {
    const float m = fad_f32_max(part->m, s->m);
    const float a = fad_f32_pow2(fad_f32_sub(s->m, m)), b = fad_f32_pow2(fad_f32_sub(part->m, m));
    s->m = m;
    s->l = fad_f32_fold(s->l, a, part->l, b);
    for (int64_t d = 0; d < r->p->Dv; d++)
        s->o[d] = fad_f32_fold(s->o[d], a, part->o[d], b);
}

/* N9, N10. */
static void finish(const row *r, const state *s) {
    const fad_attn_problem *p = r->p;
    uint16_t *out = values_of(&p->out, r->seq.out, r->i, r->h);
    for (int64_t d = 0; d < p->Dv; d++)
        out[d] = narrow(fad_f32_finish_out(s->o[d], s->l), p->dtype);
    if (p->lse.data)
        ((float *)p->lse.data)[r->seq.lse + r->i * p->lse.stride_s + r->h * p->lse.stride_h] =
            fad_f32_finish_lse(s->m, s->l);
}

static void store(const row *r, const state *s, const fad_partials *partials, int64_t split) {
    const fad_attn_problem *p = r->p;
    const int64_t b = split * p->B + r->seq.index, at = (b * p->Hq + r->h) * p->Sq + r->i;
    float *o = (float *)partials->o + ((b * p->Sq + r->i) * p->Hq + r->h) * p->Dv;
    for (int64_t d = 0; d < p->Dv; d++)
        o[d] = fad_f32_canonical(fad_f32_add(s->o[d], 0));
    ((float *)partials->m)[at] = s->m;
    ((float *)partials->l)[at] = fad_f32_canonical(s->l);
}

/* What the threads share: partials is null in a forward. */
typedef struct call {
    const fad_attn_problem *p;
    const fad_partials *partials;
    int64_t sequence, n_rows, n_threads;
} call;

static void forward_row(row *r) {
    state all, part;
    clear(&all);
    if (r->i < r->seq.span.n_q && r->seen.lo < r->seen.hi) {
        const int64_t end = fad_partition_end(r->seen.hi, r->p->split_size);
        for (int64_t split = fad_partition_first(r->seen.lo, r->p->split_size); split < end; split++) {
            run_split(r, split, &part);
            fold(r, &all, &part);
        }
    }
    if (r->i < r->seq.span.n_q && r->p->sinks) { /* N8: a state without values, folded last */
        clear(&part);
        part.m = fad_f32_sink_state(((const float *)r->p->sinks)[r->h], &part.l);
        fold(r, &all, &part);
    }
    finish(r, &all);
}

static void store_row(row *r, const fad_partials *partials) {
    state s;
    for (int64_t split = 0; split < fad_split_capacity(r->p); split++) {
        clear(&s);
        if (r->i < r->seq.span.n_q)
            run_split(r, split, &s);
        store(r, &s, partials, split);
    }
}

static void run_row(const call *c, int64_t i, int64_t h) {
    row r;
    load_row(c->p, fad_get_sequence(c->p, c->sequence), i, h, &r);
    if (c->partials)
        store_row(&r, c->partials);
    else
        forward_row(&r);
}

/* Thread w takes rows w, w + n_threads, ...: neighbours see about as many keys. */
static void work(int64_t begin, int64_t end, void *ctx) {
    const call *c = ctx;
    const fenv_t caller = fad_cpu_enter_contract();
    for (int64_t w = begin; w < end; w++)
        for (int64_t n = w; n < c->n_rows; n += c->n_threads)
            run_row(c, n / c->p->Hq, n % c->p->Hq);
    fesetenv(&caller);
}

static void run(const fad_attn_problem *p, const fad_partials *partials, const fad_runtime *runtime) {
    call c = {.p = p, .partials = partials};
    for (; c.sequence < fad_sequence_count(p); c.sequence++) {
        c.n_rows = fad_get_sequence(p, c.sequence).q_rows * p->Hq;
        c.n_threads = runtime->parallel_for ? min_i(runtime->num_threads, c.n_rows) : 1;
        if (c.n_threads > 1)
            runtime->parallel_for(c.n_threads, work, &c);
        else if (c.n_rows)
            work(0, 1, &c);
    }
}

static fad_status mma_workspace(const fad_attn_problem *p, int32_t num_threads, size_t *bytes) {
    (void)p, (void)num_threads;
    *bytes = 0;
    return FAD_OK;
}

static fad_status mma_forward(const fad_attn_problem *p, const fad_runtime *runtime) {
    run(p, NULL, runtime);
    return FAD_OK;
}

static fad_status mma_partials(const fad_attn_problem *p, const fad_partials *partials, const fad_runtime *runtime) {
    run(p, partials, runtime);
    if (p->sinks)
        fad_cpu_store_sinks(p, partials);
    return FAD_OK;
}

/* A backward of emulated tensor cores is refused before a backend is asked. */
const fad_backend fad_cpu_mma_backend = {mma_workspace, mma_forward, mma_partials, NULL, NULL};
