/* Appends to caches and rotations of rows. A unit of work is one row with all its heads. */
#include "kernel.h"

#include "../core/cache.h"

static char *row_of(const fad_view *view, fad_dtype dtype, int64_t b, int64_t s, int64_t h) {
    const int64_t at = b * view->stride_b + s * view->stride_s + h * view->stride_h;
    return (char *)view->data + at * (int64_t)fad_dtype_bytes(dtype);
}

static void move_row(const fad_rotary *rotary, fad_dtype dtype, int64_t D, void *to, const void *from,
                     int64_t position) {
    if (!rotary->cos) {
        memcpy(to, from, (size_t)D * fad_dtype_bytes(dtype));
        return;
    }
    for (int64_t part = 0; part < fad_row_parts(rotary, D); part++)
        fad_move_part(rotary, dtype, to, from, position, part);
}

static void append_row(const fad_cache_append *p, int64_t b, int64_t i) {
    static const fad_rotary none;
    const int64_t position = fad_append_position(p, b, i);
    int64_t entry, row;
    if (!fad_find_place(p, b, position, &entry, &row))
        return;
    for (int64_t h = 0; h < p->Hk; h++) {
        move_row(&p->rotary, p->dtype, p->D, row_of(&p->k, p->dtype, entry, row, h),
                 row_of(&p->k_new, p->dtype, b, i, h), position);
        move_row(&none, p->dtype, p->Dv, row_of(&p->v, p->dtype, entry, row, h), row_of(&p->v_new, p->dtype, b, i, h),
                 position);
    }
}

static void rotate_row(const fad_rotation *p, int64_t b, int64_t i) {
    for (int64_t h = 0; h < p->H; h++)
        move_row(&p->rotary, p->dtype, p->D, row_of(&p->out, p->dtype, b, i, h), row_of(&p->x, p->dtype, b, i, h),
                 fad_rotation_position(p, b, i));
}

/* One of the two. */
typedef struct call {
    const fad_cache_append *append;
    const fad_rotation *rotation;
    int64_t S, n_rows, n_threads;
} call;

/* Thread w takes the w-th share of the rows. */
static void work(int64_t begin, int64_t end, void *ctx) {
    const call *c = ctx;
    const fenv_t caller = fad_cpu_enter_contract();
    for (int64_t n = c->n_rows * begin / c->n_threads; n < c->n_rows * end / c->n_threads; n++) {
        if (c->append)
            append_row(c->append, n / c->S, n % c->S);
        else
            rotate_row(c->rotation, n / c->S, n % c->S);
    }
    fesetenv(&caller);
}

static fad_status run(call *c, const fad_runtime *runtime) {
    c->n_threads = runtime->parallel_for && runtime->num_threads < c->n_rows ? runtime->num_threads : 1;
    if (c->n_threads > 1)
        runtime->parallel_for(c->n_threads, work, c);
    else
        work(0, 1, c);
    return FAD_OK;
}

fad_status fad_cpu_append(const fad_cache_append *p, const fad_runtime *runtime) {
    call c = {.append = p, .S = p->S, .n_rows = p->B * p->S};
    return run(&c, runtime);
}

fad_status fad_cpu_rotate(const fad_rotation *p, const fad_runtime *runtime) {
    call c = {.rotation = p, .S = p->S, .n_rows = p->B * p->S};
    return run(&c, runtime);
}
