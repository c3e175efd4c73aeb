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

extern const fad_backend fad_cpu_backend;
extern const fad_backend fad_cpu_mma_backend; /* emulates tensor cores, one row at a time */

/* Whether the call asks for tensor cores that the CPU emulates. */
static inline int fad_is_emulated(const fad_attn_problem *p) {
    return p->arithmetic == FAD_ARITHMETIC_MMA_SM90 || p->arithmetic == FAD_ARITHMETIC_MMA_SM80;
}

/* The CPU's backend for a call: fad_cpu_mma_backend where tensor cores are emulated and the instruction set is "scalar",
 * else fad_cpu_backend. FAD_INVALID_ARGUMENT as from fad_cpu_select. */
fad_status fad_cpu_select_backend(const fad_attn_problem *problem, const fad_backend **backend);
fad_status fad_load_cuda(const fad_backend **backend);

/* This thread's forced schedule; all zero when nothing is forced. */
const fad_schedule *fad_forced_schedule(void);

#endif
