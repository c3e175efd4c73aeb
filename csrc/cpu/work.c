/* Units of work on the caller's threads, which balance themselves: each takes the next unit until none is left. */
#include "kernel.h"

#include <stdatomic.h>

typedef struct work {
    fad_cpu_item item;
    const void *call;
    int64_t n_items;
    char *memory;
    size_t memory_bytes;
    atomic_int_fast64_t next;
} work;

static void run_thread(int64_t begin, int64_t end, void *ctx) {
    work *w = ctx;
    const fenv_t caller = fad_cpu_enter_contract();
    for (int64_t thread = begin; thread < end; thread++)
        for (int64_t i; (i = atomic_fetch_add(&w->next, 1)) < w->n_items;)
            w->item(w->call, i, w->memory + (size_t)thread * w->memory_bytes);
    fesetenv(&caller);
}

void fad_cpu_run(const fad_runtime *r, fad_cpu_item item, const void *call, int64_t n_items, char *memory,
                 size_t memory_bytes) {
    const int64_t threads = n_items < r->num_threads ? n_items : r->num_threads;
    work w = {.item = item, .call = call, .n_items = n_items, .memory = memory, .memory_bytes = memory_bytes};
    if (r->parallel_for && threads > 1)
        r->parallel_for(threads, run_thread, &w);
    else if (threads > 0)
        run_thread(0, 1, &w);
}
