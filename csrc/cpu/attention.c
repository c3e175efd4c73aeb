/* The CPU scheduler: cuts a call into tiles, runs them on the caller's threads, folds splits in ascending order.
 * Everything here is free to change (N1): no decision reaches the arithmetic. */
#include "kernel.h"

/* Up to here rows are too few to fill vector lanes. */
enum { KEYS_LAYOUT_MAX_ROWS = 8 };

typedef struct plan {
    const fad_cpu_kernel *kernel;
    int64_t tile_rows, n_tiles;
    int64_t wave; /* splits of a tile that run in parallel before they are folded; 0: one by one, folded in place */
    fad_layout layout; /* of every tile; 0: chosen tile by tile. What is forced is known to the caller's thread only */
    size_t scratch_bytes, state_bytes;                   /* of one thread; of one tile */
    size_t offsets_bytes, threads_bytes, partials_bytes; /* the three parts of the workspace */
} plan;

static size_t round_up(size_t bytes) { return (bytes + 63) / 64 * 64; }

static int64_t tiles_of(const fad_attn_problem *p, int64_t q_rows, int64_t tile_rows) {
    return p->Hk * ((q_rows * fad_group(p) + tile_rows - 1) / tile_rows);
}

static int64_t count_tiles(const fad_attn_problem *p, int64_t tile_rows) {
    int64_t n = 0;
    if (!p->cu_seqlens_q)
        return p->B * tiles_of(p, p->Sq, tile_rows);
    for (int64_t b = 0; b < fad_sequence_count(p); b++)
        n += tiles_of(p, fad_get_sequence(p, b).q_rows, tile_rows);
    return n;
}

static int64_t longest_q(const fad_attn_problem *p) {
    int64_t longest = 0;
    for (int64_t b = 0; b < fad_sequence_count(p); b++) {
        const int64_t rows = fad_get_sequence(p, b).q_rows;
        longest = rows > longest ? rows : longest;
    }
    return longest;
}

/* Splits from the first to the last position of the keys: those that sequence s can touch. */
static int64_t first_split(const fad_attn_problem *p, const fad_span *s) {
    return fad_partition_first(s->k_pos, p->split_size);
}
static int64_t end_split(const fad_attn_problem *p, const fad_span *s) {
    return s->n_k ? fad_partition_end(s->k_pos + s->n_k, p->split_size) : first_split(p, s);
}

static int64_t most_splits(const fad_attn_problem *p) {
    int64_t most = 0;
    for (int64_t b = 0; b < p->B; b++) {
        const fad_span s = fad_get_sequence(p, b).span;
        const int64_t n = end_split(p, &s) - first_split(p, &s);
        most = n > most ? n : most;
    }
    return most;
}

/* Larger tiles read K and V less often; more tiles keep the threads busy. */
static int64_t choose_tile_rows(const fad_attn_problem *p, int32_t num_threads) {
    const int64_t rows = longest_q(p) * fad_group(p);
    if (fad_forced_schedule()->tile_rows)
        return fad_forced_schedule()->tile_rows;
    if (rows <= KEYS_LAYOUT_MAX_ROWS)
        return rows > 0 ? rows : 1;
    for (int64_t t = FAD_TILE_ROWS_MAX; t > 64; t /= 2)
        if (count_tiles(p, t) >= 8 * (int64_t)num_threads)
            return t;
    return 64;
}

/* Splits run in parallel where there are too few tiles for the threads, in waves, so that the states between them stay
 * small however long the keys are. */
static int64_t choose_wave(const fad_attn_problem *p, int64_t n_tiles, int32_t num_threads) {
    const int64_t n_splits = most_splits(p), enough = 8 * (int64_t)num_threads;
    const int forced = fad_forced_schedule()->split_parallel;
    if (n_splits <= 1 || n_tiles == 0 || forced == 1 || (!forced && (num_threads == 1 || n_tiles >= enough / 2)))
        return 0;
    return fad_clamp((enough + n_tiles - 1) / n_tiles, 2, n_splits);
}

static fad_status make_plan(const fad_attn_problem *p, int32_t num_threads, int partials, plan *out) {
    plan n = {0};
    const fad_status status = fad_cpu_select(p->dtype, &n.kernel);
    if (status != FAD_OK)
        return status;
    n.tile_rows = choose_tile_rows(p, num_threads);
    n.n_tiles = count_tiles(p, n.tile_rows);
    n.wave = partials ? 0 : choose_wave(p, n.n_tiles, num_threads);
    n.layout = (fad_layout)fad_forced_schedule()->layout;
    if (fad_is_emulated(p) || (!n.layout && n.tile_rows <= KEYS_LAYOUT_MAX_ROWS))
        n.layout = FAD_LAYOUT_KEYS;
    n.scratch_bytes = round_up(n.kernel->scratch_bytes(p, n.tile_rows));
    n.state_bytes = round_up(n.kernel->state_bytes(p, n.tile_rows, n.layout));
    n.offsets_bytes = round_up((size_t)(fad_sequence_count(p) + 1) * sizeof(int64_t));
    n.threads_bytes = (size_t)num_threads * (n.scratch_bytes + 2 * n.state_bytes);
    n.partials_bytes = n.wave ? (size_t)(n.n_tiles * (n.wave + 1)) * n.state_bytes : 0;
    *out = n;
    return FAD_OK;
}

typedef struct call {
    const fad_attn_problem *problem;
    const fad_partials *partials; /* null: a forward */
    plan plan;
    int64_t *first_tile; /* [sequences + 1] number of each sequence's first tile */
    char *threads, *states;
    int64_t wave_first; /* first split of the wave, counted from the first that a tile sees */
} call;

static fad_cpu_tile get_tile(const call *c, int64_t number) {
    const fad_attn_problem *p = c->problem;
    int64_t lo = 0, hi = fad_sequence_count(p); /* binary search: first_tile[lo] <= number < first_tile[hi] */
    while (hi - lo > 1) {
        const int64_t mid = (lo + hi) / 2;
        if (c->first_tile[mid] <= number)
            lo = mid;
        else
            hi = mid;
    }
    fad_cpu_tile t = {.problem = p, .seq = fad_get_sequence(p, lo)};
    const int64_t per_head = (c->first_tile[lo + 1] - c->first_tile[lo]) / p->Hk, local = number - c->first_tile[lo];
    const int64_t rows = t.seq.q_rows * fad_group(p), active = t.seq.span.n_q * fad_group(p);
    t.head_k = local / per_head;
    t.row0 = (per_head - 1 - local % per_head) *
             c->plan.tile_rows; /* last rows first: under a causal mask they are the longest */
    t.n_rows = rows - t.row0 < c->plan.tile_rows ? rows - t.row0 : c->plan.tile_rows;
    t.n_active = active <= t.row0 ? 0 : active - t.row0 < t.n_rows ? active - t.row0 : t.n_rows;
    t.layout = c->plan.layout ? c->plan.layout : t.n_rows <= KEYS_LAYOUT_MAX_ROWS ? FAD_LAYOUT_KEYS : FAD_LAYOUT_ROWS;
    return t;
}

/* Splits that some row of the tile sees (N4): lo .. hi - 1. */
static fad_interval visible_splits(const fad_cpu_tile *t) {
    const int64_t size = t->problem->split_size, g = fad_group(t->problem);
    fad_interval splits = {0, 0};
    if (!t->n_active)
        return splits;
    const fad_interval a = fad_visible(&t->seq.span, t->row0 / g),
                       z = fad_visible(&t->seq.span, (t->row0 + t->n_active - 1) / g);
    if (a.lo < z.hi) {
        splits.lo = fad_partition_first(a.lo, size);
        splits.hi = fad_partition_end(z.hi, size);
    }
    return splits;
}

/* One tile, its splits folded in place (N8). Folding into the empty state is exact, so the first split is the state. */
static void tile_in_place(const void *ctx, int64_t item, char *memory) {
    const call *c = ctx;
    const fad_cpu_kernel *k = c->plan.kernel;
    char *state = memory + c->plan.scratch_bytes, *part = state + c->plan.state_bytes;
    const fad_cpu_tile t = get_tile(c, item);
    const fad_interval splits = visible_splits(&t);
    if (splits.lo == splits.hi)
        k->clear(&t, state);
    else
        k->load(&t, memory);
    for (int64_t s = splits.lo; s < splits.hi; s++) {
        k->run_split(&t, memory, s, s == splits.lo ? state : part);
        if (s > splits.lo)
            k->fold(&t, state, part);
    }
    k->finish(&t, state);
}

/* State number nth of a tile's wave; behind them, number wave, the running state. */
static char *wave_state(const call *c, int64_t tile, int64_t nth) {
    return c->states + (size_t)(tile * (c->plan.wave + 1) + nth) * c->plan.state_bytes;
}

/* One split of one tile, into the workspace. The tiles of one split follow each other: heads that lie side by side in
 * memory are read while their pages are at hand. */
static void wave_split(const void *ctx, int64_t item, char *memory) {
    const call *c = ctx;
    const fad_cpu_kernel *k = c->plan.kernel;
    const int64_t tile = item % c->plan.n_tiles, nth = item / c->plan.n_tiles;
    const fad_cpu_tile t = get_tile(c, tile);
    const fad_interval splits = visible_splits(&t);
    const int64_t split = splits.lo + c->wave_first + nth;
    if (split >= splits.hi)
        return;
    k->load(&t, memory);
    k->run_split(&t, memory, split, wave_state(c, tile, nth));
}

/* Folds what wave_split left into the tile's running state (N8), and finishes it after its last wave. */
static void wave_fold(const void *ctx, int64_t item, char *memory) {
    const call *c = ctx;
    const fad_cpu_kernel *k = c->plan.kernel;
    char *state = wave_state(c, item, c->plan.wave);
    const fad_cpu_tile t = get_tile(c, item);
    const fad_interval splits = visible_splits(&t);
    const int64_t left = splits.hi - splits.lo - c->wave_first; /* splits that were not folded yet */
    (void)memory;
    if (left <= 0 && c->wave_first > 0)
        return;
    if (c->wave_first == 0)
        k->clear(&t, state);
    for (int64_t nth = 0; nth < c->plan.wave && nth < left; nth++)
        k->fold(&t, state, wave_state(c, item, nth));
    if (left <= c->plan.wave)
        k->finish(&t, state);
}

/* One split of one tile, for the caller. Splits that the tile does not see are empty states. */
static void tile_partial(const void *ctx, int64_t item, char *memory) {
    const call *c = ctx;
    const fad_cpu_kernel *k = c->plan.kernel;
    const int64_t n_splits = fad_split_capacity(c->problem), split = item % n_splits;
    char *state = memory + c->plan.scratch_bytes;
    const fad_cpu_tile t = get_tile(c, item / n_splits);
    const fad_interval splits = visible_splits(&t);
    if (split >= splits.lo && split < splits.hi) {
        k->load(&t, memory);
        k->run_split(&t, memory, split, state);
    } else {
        k->clear(&t, state);
    }
    k->store(&t, state, c->partials, split);
}

static void run(const call *c, const fad_runtime *r, fad_cpu_item item, int64_t n_items) {
    fad_cpu_run(r, item, c, n_items, c->threads, c->plan.scratch_bytes + 2 * c->plan.state_bytes);
}

static void start(call *c, const fad_runtime *r) {
    const fad_attn_problem *p = c->problem;
    c->first_tile = r->workspace;
    c->threads = (char *)r->workspace + c->plan.offsets_bytes;
    c->states = c->threads + c->plan.threads_bytes;
    c->first_tile[0] = 0;
    for (int64_t b = 0; b < fad_sequence_count(p); b++)
        c->first_tile[b + 1] = c->first_tile[b] + tiles_of(p, fad_get_sequence(p, b).q_rows, c->plan.tile_rows);
}

static size_t workspace_bytes(const plan *n) { return n->offsets_bytes + n->threads_bytes + n->partials_bytes; }

static fad_status cpu_workspace(const fad_attn_problem *problem, int32_t num_threads, size_t *bytes) {
    plan n;
    const fad_status status = make_plan(problem, num_threads, 0, &n);
    if (status == FAD_OK)
        *bytes = workspace_bytes(&n);
    return status;
}

static void run_waves(call *c, const fad_runtime *runtime) {
    int64_t most = 1; /* also tiles that see nothing are finished */
    for (int64_t tile = 0; tile < c->plan.n_tiles; tile++) {
        const fad_cpu_tile t = get_tile(c, tile);
        const fad_interval splits = visible_splits(&t);
        most = splits.hi - splits.lo > most ? splits.hi - splits.lo : most;
    }
    for (c->wave_first = 0; c->wave_first < most; c->wave_first += c->plan.wave) {
        run(c, runtime, wave_split, c->plan.n_tiles * c->plan.wave);
        run(c, runtime, wave_fold, c->plan.n_tiles);
    }
}

static fad_status cpu_forward(const fad_attn_problem *problem, const fad_runtime *runtime) {
    call c = {.problem = problem};
    const fad_status status = make_plan(problem, runtime->num_threads, 0, &c.plan);
    if (status != FAD_OK)
        return status;
    start(&c, runtime);
    if (!c.plan.wave)
        run(&c, runtime, tile_in_place, c.plan.n_tiles);
    else
        run_waves(&c, runtime);
    return FAD_OK;
}

void fad_cpu_store_sinks(const fad_attn_problem *p, const fad_partials *partials) {
    const size_t real = fad_compute_bytes(p->dtype), rows = (size_t)(p->B * p->Hq * p->Sq);
    const size_t before = (size_t)(partials->n_splits - 1) * rows;
    if (rows == 0)
        return;
    const fenv_t caller = fad_cpu_enter_contract();
    memset((char *)partials->o + before * (size_t)p->Dv * real, 0, rows * (size_t)p->Dv * real);
    for (size_t r = 0; r < rows; r++) {
        const int64_t i = (int64_t)r % p->Sq, h = (int64_t)r / p->Sq % p->Hq, b = (int64_t)r / p->Sq / p->Hq;
        const int unused = i >= fad_get_sequence(p, b).span.n_q;
        if (p->dtype == FAD_FLOAT64) {
            double l, m = fad_f64_sink_state(((const double *)p->sinks)[h], &l);
            ((double *)partials->m)[before + r] = unused ? FAD_F64_SENTINEL : m;
            ((double *)partials->l)[before + r] = unused ? 0 : fad_f64_canonical(l);
        } else {
            float l, m = fad_f32_sink_state(((const float *)p->sinks)[h], &l);
            ((float *)partials->m)[before + r] = unused ? FAD_F32_SENTINEL : m;
            ((float *)partials->l)[before + r] = unused ? 0 : fad_f32_canonical(l);
        }
    }
    fesetenv(&caller);
}

static fad_status cpu_partials(const fad_attn_problem *problem, const fad_partials *partials,
                               const fad_runtime *runtime) {
    call c = {.problem = problem, .partials = partials};
    const fad_status status = make_plan(problem, runtime->num_threads, 1, &c.plan);
    if (status != FAD_OK)
        return status;
    start(&c, runtime);
    run(&c, runtime, tile_partial, c.plan.n_tiles * fad_split_capacity(problem));
    if (problem->sinks)
        fad_cpu_store_sinks(problem, partials);
    return FAD_OK;
}

const fad_backend fad_cpu_backend = {cpu_workspace, cpu_forward, cpu_partials, fad_cpu_backward_workspace,
                                     fad_cpu_backward};
