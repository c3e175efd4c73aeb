/* Shared by the backends: errors, argument checks, the shape of a backend. */
#ifndef FAD_CORE_H
#define FAD_CORE_H

#include "sequence.h"

/* Records the detail text of this thread's failure and returns status. */
fad_status fad_fail(fad_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* The only place where arguments are checked. Arrays of lengths are read only where the host can: device == FAD_CPU. */
fad_status fad_check_problem(const fad_attn_problem *problem);
fad_status fad_check_workspace(const fad_runtime *runtime, size_t workspace_bytes);
fad_status fad_check_partials(const fad_attn_problem *problem, const fad_partials *partials);

/* Bytes of one element: of q, k, v and out; of scores, lse and partials. */
static inline size_t fad_dtype_bytes(fad_dtype dtype) {
    return dtype == FAD_FLOAT64 ? 8 : dtype == FAD_FLOAT32 ? 4 : 2;
}
static inline size_t fad_compute_bytes(fad_dtype dtype) { return dtype == FAD_FLOAT64 ? 8 : 4; }

/* What a device offers. The arguments have been checked. */
typedef struct fad_backend {
    fad_status (*workspace)(const fad_attn_problem *problem, int32_t num_threads, size_t *bytes);
    fad_status (*forward)(const fad_attn_problem *problem, const fad_runtime *runtime);
    fad_status (*partials)(const fad_attn_problem *problem, const fad_partials *partials, const fad_runtime *runtime);
} fad_backend;
extern const fad_backend fad_cpu_backend;

/* This thread's forced schedule; all zero when nothing is forced. */
const fad_schedule *fad_forced_schedule(void);

#endif
