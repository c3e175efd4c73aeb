/* Shared within the library: errors, argument checks, the backends. */
#ifndef FAD_CORE_H
#define FAD_CORE_H

#include "backend.h"

/* Records the detail text of this thread's failure and returns status. */
fad_status fad_fail(fad_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* The only place where arguments are checked. Arrays of lengths are read only where the host can: device == FAD_CPU. */
fad_status fad_check_problem(const fad_attn_problem *problem);
fad_status fad_check_out(const fad_attn_problem *problem); /* forward only */
fad_status fad_check_workspace(const fad_runtime *runtime, size_t workspace_bytes);
fad_status fad_check_splittable(const fad_attn_problem *problem); /* partial states are defined for it */
fad_status fad_check_partials(const fad_attn_problem *problem, const fad_partials *partials);

fad_status fad_check_backward(const fad_attn_problem *problem); /* that there is one */
fad_status fad_check_gradients(const fad_attn_problem *problem, const fad_attn_gradients *gradients);

fad_status fad_check_append(const fad_cache_append *append);
fad_status fad_check_rotation(const fad_rotation *rotation);

/* The shape of a cache, and whatever names its entries or pages. */
typedef struct fad_cache {
    int64_t B, Sk, Hk, Bk;
    const int32_t *cache_batch_idx, *block_table;
    int64_t block_table_stride, page_size;
} fad_cache;

static inline fad_cache fad_cache_of(const fad_attn_problem *p) {
    return (fad_cache){p->B,        p->Sk, p->Hk, p->Bk, p->cache_batch_idx, p->block_table, p->block_table_stride,
                       p->page_size};
}
fad_status fad_check_cache(const fad_cache *cache);
/* Rows first .. end - 1 of sequence b lie in k and v. Reads the arrays. */
fad_status fad_check_cache_rows(const fad_cache *cache, int64_t b, int64_t first, int64_t end);

extern const fad_backend fad_cpu_backend;
extern const fad_backend fad_cpu_mma_backend; /* emulates tensor cores, one row at a time */

/* Whether the call asks for tensor cores that the CPU emulates. */
static inline int fad_is_emulated(const fad_attn_problem *p) {
    return p->arithmetic == FAD_ARITHMETIC_MMA_SM90 || p->arithmetic == FAD_ARITHMETIC_MMA_SM80;
}

/* The CPU's backend for a call: fad_cpu_mma_backend where tensor cores are emulated and the instruction set is "scalar",
 * else fad_cpu_backend. FAD_INVALID_ARGUMENT as from fad_cpu_select. */
fad_status fad_cpu_select_backend(const fad_attn_problem *problem, const fad_backend **backend);
fad_status fad_load_cuda(const fad_device_backend **backend);
/* The backend of a call's device, whose arguments have been checked. */
fad_status fad_select_backend(const fad_attn_problem *problem, const fad_backend **backend);

/* The CPU's own. */
fad_status fad_cpu_backward_workspace(const fad_attn_problem *problem, int32_t num_threads, size_t *bytes);
fad_status fad_cpu_backward(const fad_attn_problem *problem, const fad_attn_gradients *gradients,
                            const fad_runtime *runtime);
fad_status fad_cpu_append(const fad_cache_append *append, const fad_runtime *runtime);
fad_status fad_cpu_rotate(const fad_rotation *rotation, const fad_runtime *runtime);

/* This thread's forced schedule; all zero when nothing is forced. */
const fad_schedule *fad_forced_schedule(void);

#endif
