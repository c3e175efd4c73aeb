/* The CPU's scheduler of the backward. delta and weight of all rows come first (the mma family has no weight); then
 * either all gradients in one pass, a unit of work being a kv head of a sequence, or dk and dv by tiles of keys and dq by
 * tiles of rows, which computes scores twice and keeps more threads busy. Everything here is free to change (N14): no
 * decision reaches the arithmetic. */
#include "kernel.h"

/* Sums of dq that one pass may keep for each thread. */
enum { DQ_BYTES_MAX = 4 << 20, BLOCK = FAD_BLOCK_KV };

/* PASS_WEIGH has the items of PASS_ROWS. */
typedef enum pass { PASS_WEIGH, PASS_ALL, PASS_KEYS, PASS_ROWS } pass;

typedef struct plan {
    const fad_cpu_kernel *kernel;
    int64_t blocks; /* of rows or of keys, that a tile takes */
    int one_pass;
    size_t scratch_bytes;                         /* of one thread */
    size_t offsets_bytes, rows_bytes, sink_bytes; /* before it in the workspace: offsets, delta, weight, sinks */
} plan;

typedef struct call {
    const fad_attn_problem *problem;
    fad_attn_problem gradient; /* the problem, with gradients in the places of tensors */
    plan plan;
    pass pass;
    int64_t *first_item;  /* [sequences + 1] number of each sequence's first item of the pass */
    char *delta, *weight; /* [B][Hq][Sq] or packed [Hq][Sq] */
    char *sinks;          /* [sequences][Hq] */
    char *scratch;
} call;

static size_t round_up(size_t bytes) { return (bytes + 63) / 64 * 64; }
static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

static int64_t first_block(const fad_span *s) { return fad_partition_first(s->k_pos, BLOCK); }
static int64_t end_block(const fad_span *s) {
    return s->n_k ? fad_partition_end(s->k_pos + s->n_k, BLOCK) : first_block(s);
}

static int64_t longest_q(const fad_attn_problem *p) {
    int64_t longest = 0;
    for (int64_t b = 0; b < fad_sequence_count(p); b++) {
        const int64_t rows = fad_get_sequence(p, b).span.n_q;
        longest = rows > longest ? rows : longest;
    }
    return longest;
}

/* One pass is less work, if its sums of dq stay near the core and there are units of work for all threads. */
static int choose_one_pass(const fad_attn_problem *p, int32_t num_threads, int64_t dq_rows) {
    const int forced = fad_forced_schedule()->split_parallel;
    const int64_t row_bytes = (p->D + 15) / 16 * 16 * (int64_t)fad_compute_bytes(p->dtype);
    if (forced)
        return forced == 1;
    return dq_rows * row_bytes <= DQ_BYTES_MAX && (num_threads == 1 || p->B * p->Hk >= 2 * (int64_t)num_threads);
}

static fad_status make_plan(const fad_attn_problem *p, int32_t num_threads, plan *out) {
    plan n = {0};
    const size_t real = fad_compute_bytes(p->dtype), sequences = (size_t)fad_sequence_count(p);
    const int64_t rows = divide_up(longest_q(p), BLOCK) * BLOCK, forced = fad_forced_schedule()->tile_rows;
    const fad_status status = fad_cpu_select(p->dtype, &n.kernel);
    if (status != FAD_OK)
        return status;
    n.blocks = forced ? divide_up(forced, BLOCK) : p->D + p->Dv <= 128 ? FAD_GRADIENT_BLOCKS_MAX : 2;
    n.one_pass = choose_one_pass(p, num_threads, rows * fad_group(p));
    const int64_t dq_rows = n.one_pass ? rows * fad_group(p) : n.blocks * BLOCK;
    n.scratch_bytes = round_up(n.kernel->gradient_bytes(p, n.blocks, dq_rows));
    n.offsets_bytes = round_up((sequences + 1) * sizeof(int64_t));
    n.rows_bytes = round_up((size_t)((p->cu_seqlens_q ? 1 : p->B) * p->Hq * p->Sq) * real);
    n.sink_bytes = p->sinks ? round_up(sequences * (size_t)p->Hq * real) : 0;
    *out = n;
    return FAD_OK;
}

fad_status fad_cpu_backward_workspace(const fad_attn_problem *problem, int32_t num_threads, size_t *bytes) {
    plan n;
    const fad_status status = make_plan(problem, num_threads, &n);
    if (status == FAD_OK)
        *bytes = n.offsets_bytes + 2 * n.rows_bytes + n.sink_bytes + (size_t)num_threads * n.scratch_bytes;
    return status;
}

/* Sequence b, whole: all its rows and keys, of no head yet. */
static fad_cpu_gradient_tile get_sequence(const call *c, int64_t b) {
    const fad_attn_problem *p = c->problem;
    fad_cpu_gradient_tile t = {.problem = p, .gradient = &c->gradient, .blocks_at_once = c->plan.blocks};
    const size_t real = fad_compute_bytes(p->dtype);
    const size_t first_row = (size_t)(p->cu_seqlens_q ? p->cu_seqlens_q[b] : b * p->Hq * p->Sq);
    t.seq = fad_get_sequence(p, b);
    t.gradient_seq = fad_get_sequence(&c->gradient, b);
    t.end_row = t.seq.span.n_q;
    t.block = first_block(&t.seq.span);
    t.end_block = end_block(&t.seq.span);
    t.delta = c->delta + first_row * real;
    t.weight = c->weight + first_row * real;
    t.rows_h = p->Sq;
    return t;
}

static int64_t count_items(const call *c, int64_t b) {
    const fad_attn_problem *p = c->problem;
    const fad_span s = fad_get_sequence(p, b).span;
    switch (c->pass) {
    case PASS_KEYS:
        return p->Hk * divide_up(end_block(&s) - first_block(&s), c->plan.blocks);
    case PASS_WEIGH:
    case PASS_ROWS:
        return p->Hq * divide_up(s.n_q, c->plan.blocks * BLOCK);
    default:
        return p->Hk;
    }
}

static fad_cpu_gradient_tile get_tile(const call *c, int64_t item) {
    const fad_attn_problem *p = c->problem;
    const int64_t group = fad_group(p);
    int64_t b = 0, hi = fad_sequence_count(p); /* binary search: first_item[b] <= item < first_item[hi] */
    while (hi - b > 1) {
        const int64_t mid = (b + hi) / 2;
        if (c->first_item[mid] <= item)
            b = mid;
        else
            hi = mid;
    }
    fad_cpu_gradient_tile t = get_sequence(c, b);
    const int64_t items = c->first_item[b + 1] - c->first_item[b], local = item - c->first_item[b];
    const int by_rows = c->pass == PASS_ROWS || c->pass == PASS_WEIGH;
    const int64_t per_head = items / (by_rows ? p->Hq : p->Hk), head = local / per_head;
    t.want_q = c->pass != PASS_KEYS;
    t.want_kv = !by_rows;
    t.head_k = by_rows ? head / group : head;
    t.head = by_rows ? head : head * group;
    t.end_head = by_rows ? head + 1 : t.head + group;
    if (c->pass == PASS_KEYS) {
        t.block += local % per_head * c->plan.blocks;
        t.end_block = fad_clamp(t.block + c->plan.blocks, 0, t.end_block);
    } else if (by_rows) {
        const int64_t rows = c->plan.blocks * BLOCK;
        t.row = (per_head - 1 - local % per_head) * rows; /* last rows first: a causal mask shows them most keys */
        t.end_row = fad_clamp(t.row + rows, 0, t.end_row);
    }
    return t;
}

static void run_tile(const void *ctx, int64_t item, char *memory) {
    const call *c = ctx;
    const fad_cpu_gradient_tile t = get_tile(c, item);
    c->plan.kernel->tile_gradients(&t, memory);
}

static void run_weigh(const void *ctx, int64_t item, char *memory) {
    const call *c = ctx;
    const fad_cpu_gradient_tile t = get_tile(c, item);
    c->plan.kernel->weigh_rows(&t, memory);
}

static void run_sink(const void *ctx, int64_t item, char *memory) {
    const call *c = ctx;
    fad_cpu_gradient_tile t = get_sequence(c, item / c->problem->Hq);
    (void)memory;
    t.head = item % c->problem->Hq;
    c->plan.kernel->sink_gradient(&t, c->sinks + (size_t)item * fad_compute_bytes(c->problem->dtype));
}

static void run_pass(call *c, pass pass, const fad_runtime *r) {
    const int64_t sequences = fad_sequence_count(c->problem);
    c->pass = pass;
    c->first_item[0] = 0;
    for (int64_t b = 0; b < sequences; b++)
        c->first_item[b + 1] = c->first_item[b] + count_items(c, b);
    fad_cpu_run(r, pass == PASS_WEIGH ? run_weigh : run_tile, c, c->first_item[sequences], c->scratch,
                c->plan.scratch_bytes);
}

/* Zeros in rows first .. end - 1 of [rows, H, n], from element start on. */
static void clear_rows(const fad_view *view, fad_dtype dtype, int64_t start, int64_t first, int64_t end, int64_t H,
                       int64_t n) {
    const int64_t bytes = (int64_t)fad_dtype_bytes(dtype);
    for (int64_t i = first; i < end; i++)
        for (int64_t h = 0; h < H; h++)
            memset((char *)view->data + (start + i * view->stride_s + h * view->stride_h) * bytes, 0,
                   (size_t)(n * bytes));
}

/* Rows of dq, dk and dv that no sequence uses. */
void fad_cpu_clear_unused(const fad_attn_problem *g) {
    for (int64_t b = 0; b < fad_sequence_count(g); b++) {
        const fad_sequence s = fad_get_sequence(g, b);
        int64_t first;
        const int64_t rows = fad_owned_rows(g->cu_seqlens_k, g->B, b, g->Sk, &first), pad = s.k_row - first;
        clear_rows(&g->q, g->dtype, s.q, s.span.n_q, s.q_rows, g->Hq, g->D);
        clear_rows(&g->k, g->dtype, s.k, -pad, 0, g->Hk, g->D);
        clear_rows(&g->k, g->dtype, s.k, s.span.n_k, rows - pad, g->Hk, g->D);
        clear_rows(&g->v, g->dtype, s.v, -pad, 0, g->Hk, g->Dv);
        clear_rows(&g->v, g->dtype, s.v, s.span.n_k, rows - pad, g->Hk, g->Dv);
    }
}

void fad_cpu_sum_sinks(const fad_attn_problem *p, const void *sums, void *d_sinks) {
    const int64_t H = p->Hq, sequences = fad_sequence_count(p);
    const fenv_t caller = fad_cpu_enter_contract();
    for (int64_t h = 0; h < H; h++) {
        double sum64 = 0;
        float sum32 = 0;
        for (int64_t b = 0; b < sequences; b++)
            if (p->dtype == FAD_FLOAT64)
                sum64 = fad_f64_add(sum64, ((const double *)sums)[b * H + h]);
            else
                sum32 = fad_f32_add(sum32, ((const float *)sums)[b * H + h]);
        if (p->dtype == FAD_FLOAT64)
            ((double *)d_sinks)[h] = fad_f64_finish_gradient(sum64, 1);
        else
            ((float *)d_sinks)[h] = fad_f32_finish_gradient(sum32, 1);
    }
    fesetenv(&caller);
}

fad_status fad_cpu_backward(const fad_attn_problem *p, const fad_attn_gradients *gradients, const fad_runtime *r) {
    call c = {.problem = p, .gradient = fad_cpu_gradient_problem(p, gradients), .first_item = r->workspace};
    const fad_status status = make_plan(p, r->num_threads, &c.plan);
    if (status != FAD_OK)
        return status;
    c.delta = (char *)r->workspace + c.plan.offsets_bytes;
    c.weight = c.delta + c.plan.rows_bytes;
    c.sinks = c.weight + c.plan.rows_bytes;
    c.scratch = c.sinks + c.plan.sink_bytes;
    fad_cpu_clear_unused(&c.gradient);
    run_pass(&c, PASS_WEIGH, r);
    if (c.plan.one_pass) {
        run_pass(&c, PASS_ALL, r);
    } else {
        run_pass(&c, PASS_KEYS, r);
        run_pass(&c, PASS_ROWS, r);
    }
    if (gradients->d_sinks) {
        fad_cpu_run(r, run_sink, &c, fad_sequence_count(p) * p->Hq, c.scratch, 0);
        fad_cpu_sum_sinks(p, c.sinks, gradients->d_sinks);
    }
    return FAD_OK;
}
