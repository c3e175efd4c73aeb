/* The backward of the mma family of a GPU on a CPU (N13), without a vector or a tile: every sum by itself, clause by
 * clause. Slow and meant to be read; mma_gradient.inc is the same with vectors, and must give the same bits. */
#include "mma_row.h"

enum { BLOCK = FAD_BLOCK_KV, DELTA_LANES = 8, DELTA_CHUNK = 8 };

/* What the threads share, of one sequence at a time. */
typedef struct call {
    const fad_attn_problem *p, *gradient; /* gradient: dq, dk, dv, dout and dlse in the places of q .. lse */
    fad_sequence seq, gradient_seq;       /* the sequence in either */
    float *sinks;                         /* [Hq] its part of d_sinks */
} call;

/* A query row, and what gradients need of it beside. */
typedef struct gradient_row {
    row r;
    int is_term; /* lse is not -inf */
    const uint16_t *q, *dout;
    float dout_wide[FAD_MAX_HEAD_DIM];
    float logarithm, delta; /* L_i, delta_i */
} gradient_row;

/* Products of one step for all dims of a sum: a [STEP], 0 with a null row of b where there is no term. */
typedef struct products {
    float a[STEP];
    const uint16_t *b[STEP];
} products;

static float number_of(const fad_view *view, int64_t first, int64_t i, int64_t h) {
    return ((const float *)view->data)[first + i * view->stride_s + h * view->stride_h];
}

/* delta_i, but for dlse: lane t owns the chunks of eight dims t, t + 8, ... */
static float sum_delta(const gradient_row *g, const uint16_t *out) {
    float lanes[DELTA_LANES] = {0};
    for (int64_t d = 0; d < g->r.p->Dv; d++) {
        float *lane = &lanes[d / DELTA_CHUNK % DELTA_LANES];
        *lane = fad_f32_fma(g->dout_wide[d], widen(out[d], g->r.p->dtype), *lane);
    }
    return fad_f32_sum_lanes(lanes);
}

static void load_gradient_row(const call *c, int64_t i, int64_t h, gradient_row *g) {
    const fad_attn_problem *p = c->p;
    const float lse = number_of(&p->lse, c->seq.lse, i, h);
    load_row(p, c->seq, i, h, &g->r);
    g->is_term = lse != -INFINITY;
    g->logarithm = fad_f32_saved_logarithm(lse);
    g->q = values_of(&p->q, c->seq.q, i, h);
    g->dout = values_of(&c->gradient->out, c->gradient_seq.out, i, h);
    for (int64_t d = 0; d < p->Dv; d++)
        g->dout_wide[d] = widen(g->dout[d], p->dtype);
    g->delta = sum_delta(g, values_of(&p->out, c->seq.out, i, h));
    if (c->gradient->lse.data)
        g->delta = fad_f32_sub(g->delta, number_of(&c->gradient->lse, c->gradient_seq.lse, i, h));
}

static int sees(const gradient_row *g, int64_t pos) { return g->is_term && g->r.seen.lo <= pos && pos < g->r.seen.hi; }

/* P and dS of a row and a key that it sees. */
static void get_pair(const gradient_row *g, int64_t pos, float *p_rounded, float *ds_rounded) {
    const row *r = &g->r;
    const fad_attn_problem *p = r->p;
    const float s = dot(r, r->q, key_row(r, &p->k, r->seq.k, pos), p->D), x = score(r, pos, s);
    const float dp = dot(r, g->dout_wide, key_row(r, &p->v, r->seq.v, pos), p->Dv);
    const float probability = fad_ex2(fad_f32_saved_exponent(x, r->c, g->logarithm));
    float ds = fad_f32_score_gradient(probability, dp, g->delta);
    if (p->softcap > 0)
        ds = fad_f32_mul(ds, fad_f32_softcap_slope(fad_f32_tanh(fad_f32_mul(s, r->scaled))));
    *p_rounded = widen(narrow(probability, p->dtype), p->dtype);
    *ds_rounded = widen(narrow(ds, p->dtype), p->dtype);
}

/* One step of the chains sum [n]. What is no term is 0 on both sides, so that it reaches nothing (N11). */
static void add_step(const fad_attn_problem *p, const products *x, int64_t n, float *sum) {
    const fad_tensor_core core = fad_cpu_tensor_core(p);
    for (int64_t d = 0; d < n; d++) {
        float b[STEP] = {0};
        for (int e = 0; e < STEP; e++)
            if (x->b[e])
                b[e] = widen(x->b[e][d], p->dtype);
        sum[d] = fad_tensor_core_step(core, x->a, b, STEP, sum[d]);
    }
}

static void store_gradient(uint16_t *to, const float *sum, float factor, int64_t n, fad_dtype dtype) {
    for (int64_t d = 0; d < n; d++)
        to[d] = narrow(fad_f32_finish_gradient(sum[d], factor), dtype);
}

/* dq of one row: keys ascending, 16 at a time at absolute multiples of position. */
static void query_gradient(const call *c, int64_t i, int64_t h) {
    const fad_attn_problem *p = c->p;
    float dq[FAD_MAX_HEAD_DIM] = {0};
    gradient_row g;
    load_gradient_row(c, i, h, &g);
    for (int64_t first = g.r.seen.lo / STEP * STEP; first < g.r.seen.hi; first += STEP) {
        products onto_dq = {0};
        for (int e = 0; e < STEP; e++)
            if (sees(&g, first + e)) {
                float unused;
                get_pair(&g, first + e, &unused, &onto_dq.a[e]);
                onto_dq.b[e] = key_row(&g.r, &p->k, c->seq.k, first + e);
            }
        add_step(p, &onto_dq, p->D, dq);
    }
    store_gradient(values_of(&c->gradient->q, c->gradient_seq.q, i, h), dq, (float)p->scale, p->D, p->dtype);
}

/* One step of 16 rows for the key at pos. */
static void add_rows(const fad_attn_problem *p, const gradient_row *rows, int64_t n, int64_t pos, float *dk,
                     float *dv) {
    products onto_dk = {0}, onto_dv = {0};
    for (int64_t e = 0; e < n; e++)
        if (sees(&rows[e], pos)) {
            get_pair(&rows[e], pos, &onto_dv.a[e], &onto_dk.a[e]);
            onto_dv.b[e] = rows[e].dout;
            onto_dk.b[e] = rows[e].q;
        }
    add_step(p, &onto_dv, p->Dv, dv);
    add_step(p, &onto_dk, p->D, dk);
}

/* dk and dv of up to 16 keys, from key number j on, which only share the loading of rows: one chain for each over the
 * query heads of the group and, for each of these, over all rows. */
static void key_gradients(const call *c, int64_t j, int64_t head_k) {
    const fad_attn_problem *p = c->p;
    const fad_span *span = &c->seq.span;
    const int64_t group = fad_group(p), keys = min_i(STEP, span->n_k - j), first_pos = span->k_pos + j;
    float dk[STEP][FAD_MAX_HEAD_DIM] = {{0}}, dv[STEP][FAD_MAX_HEAD_DIM] = {{0}};
    for (int64_t h = head_k * group; h < (head_k + 1) * group; h++)
        for (int64_t i = 0; i < span->n_q; i += STEP) {
            const int64_t n = min_i(STEP, span->n_q - i);
            gradient_row rows[STEP];
            if (fad_tile_kind(span, i, i + n - 1, first_pos, first_pos + keys) == FAD_TILE_SKIP)
                continue;
            for (int64_t e = 0; e < n; e++)
                load_gradient_row(c, i + e, h, &rows[e]);
            for (int64_t e = 0; e < keys; e++)
                add_rows(p, rows, n, first_pos + e, dk[e], dv[e]);
        }
    for (int64_t e = 0; e < keys; e++) {
        store_gradient(values_of(&c->gradient->k, c->gradient_seq.k, j + e, head_k), dk[e], (float)p->scale, p->D,
                       p->dtype);
        store_gradient(values_of(&c->gradient->v, c->gradient_seq.v, j + e, head_k), dv[e], 1, p->Dv, p->dtype);
    }
}

/* The sequence's part of a head's dz. */
static void sink_gradient(const call *c, int64_t h) {
    const float z = ((const float *)c->p->sinks)[h];
    float sum = 0;
    for (int64_t first = 0; first < c->seq.span.n_q; first += BLOCK) {
        float part = 0;
        for (int64_t i = first; i < min_i(first + BLOCK, c->seq.span.n_q); i++) {
            gradient_row g;
            load_gradient_row(c, i, h, &g);
            const float e = fad_f32_exp2(fad_f32_saved_exponent(z, (float)FAD_LOG2E, g.logarithm));
            if (g.is_term)
                part = fad_f32_fma(-e, g.delta, part);
        }
        sum = fad_f32_add(sum, part);
    }
    c->sinks[h] = sum;
}

/* Items of a sequence: rows of every query head, keys of every kv head by 16, and where there are sinks query heads. */
static void run_item(const void *ctx, int64_t item, char *memory) {
    const call *c = ctx;
    const int64_t rows = c->seq.span.n_q * c->p->Hq, keys = fad_partition_end(c->seq.span.n_k, STEP) * c->p->Hk;
    (void)memory;
    if (item < rows)
        query_gradient(c, item / c->p->Hq, item % c->p->Hq);
    else if (item < rows + keys)
        key_gradients(c, (item - rows) / c->p->Hk * STEP, (item - rows) % c->p->Hk);
    else
        sink_gradient(c, item - rows - keys);
}

/* The sums of each sequence and head. */
fad_status fad_cpu_mma_backward_workspace(const fad_attn_problem *p, int32_t num_threads, size_t *bytes) {
    (void)num_threads;
    *bytes = p->sinks ? (size_t)(fad_sequence_count(p) * p->Hq) * sizeof(float) : 0;
    return FAD_OK;
}

fad_status fad_cpu_mma_backward(const fad_attn_problem *p, const fad_attn_gradients *gradients, const fad_runtime *r) {
    const fad_attn_problem gradient = fad_cpu_gradient_problem(p, gradients);
    call c = {.p = p, .gradient = &gradient};
    fad_cpu_clear_unused(&gradient);
    for (int64_t b = 0; b < fad_sequence_count(p); b++) {
        c.seq = fad_get_sequence(p, b);
        c.gradient_seq = fad_get_sequence(&gradient, b);
        c.sinks = gradients->d_sinks ? (float *)r->workspace + b * p->Hq : NULL;
        const int64_t items = c.seq.span.n_q * p->Hq + fad_partition_end(c.seq.span.n_k, STEP) * p->Hk;
        fad_cpu_run(r, run_item, &c, items + (c.sinks ? p->Hq : 0), NULL, 0);
    }
    if (gradients->d_sinks)
        fad_cpu_sum_sinks(p, r->workspace, gradients->d_sinks);
    return FAD_OK;
}
