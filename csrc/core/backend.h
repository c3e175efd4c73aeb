/* What a backend offers the core, and what the core lends to one that lives in a library of its own. C and C++. */
#ifndef FAD_CORE_BACKEND_H
#define FAD_CORE_BACKEND_H

#include "sequence.h"

/* Bytes of one element: of q, k, v and out; of scores, lse and partials. */
static inline size_t fad_dtype_bytes(fad_dtype dtype) {
    return dtype == FAD_FLOAT64 ? 8 : dtype == FAD_FLOAT32 ? 4 : 2;
}
static inline size_t fad_compute_bytes(fad_dtype dtype) { return dtype == FAD_FLOAT64 ? 8 : 4; }

#ifdef __cplusplus
extern "C" {
#endif

/* The arguments have been checked; of CUDA's, what the host cannot read has not. */
typedef struct fad_backend {
    fad_status (*workspace)(const fad_attn_problem *problem, int32_t num_threads, size_t *bytes);
    fad_status (*forward)(const fad_attn_problem *problem, const fad_runtime *runtime);
    fad_status (*partials)(const fad_attn_problem *problem, const fad_partials *partials, const fad_runtime *runtime);
    fad_status (*backward_workspace)(const fad_attn_problem *problem, int32_t num_threads, size_t *bytes);
    fad_status (*backward)(const fad_attn_problem *problem, const fad_attn_gradients *gradients,
                           const fad_runtime *runtime);
} fad_backend;

/* Of a device that has a library of its own. */
typedef struct fad_device_backend {
    fad_backend attention;
    fad_status (*append)(const fad_cache_append *append, const fad_runtime *runtime);
    fad_status (*rotate)(const fad_rotation *rotation, const fad_runtime *runtime);
} fad_device_backend;

/* Bytes of every struct that one library hands to the other: libraries of one build agree on them. */
typedef struct fad_struct_bytes {
    size_t services; /* first, so that it can be read from services of any build: only if it agrees is there a rest */
    size_t problem, gradients, partials, append, rotation, runtime, schedule, backend;
} fad_struct_bytes;

typedef struct fad_core_services {
    fad_status (*fail)(fad_status status, const char *format, ...); /* records this thread's error text */
    const fad_schedule *(*forced_schedule)(void);
    fad_struct_bytes bytes; /* this, and */
    int64_t contract;       /* FAD_CONTRACT_VERSION: what the backend must have been built with */
} fad_core_services;

#define FAD_STRUCT_BYTES                                                                                               \
    {sizeof(fad_core_services), sizeof(fad_attn_problem), sizeof(fad_attn_gradients),                                  \
     sizeof(fad_partials),      sizeof(fad_cache_append), sizeof(fad_rotation),                                        \
     sizeof(fad_runtime),       sizeof(fad_schedule),     sizeof(fad_device_backend)}

/* The only symbol of libflash_attn_det_cuda. Null if it was built with other structs or another contract. */
FAD_API const fad_device_backend *fad_cuda_backend(const fad_core_services *services);

#ifdef __cplusplus
}
#endif
#endif
