/* One call of an op, on its way from torch's boxed stack through the C library and back. */
#ifndef FAD_TORCH_CALL_H
#define FAD_TORCH_CALL_H

#include "../flash_attn_det.h"
#include "stable_abi.h"

enum { MAX_TENSOR_ARGS = 17, MAX_RESULTS = 4 };

/* What torch says of one of the tensors. */
typedef struct fad_torch_tensor {
    const char *name;
    void *data;
    int64_t ndim, numel, *sizes, *strides;
    int32_t dtype, device_type, device_index;
} fad_torch_tensor;

typedef struct fad_torch_call {
    AtenTensorHandle tensors[MAX_TENSOR_ARGS]; /* owned; null past the op's */
    AtenTensorHandle results[MAX_RESULTS];     /* owned until they are returned; null where not allocated */
    AtenTensorHandle workspace;                /* owned, or null */
    DeviceGuardHandle guard;                   /* owned; null on the CPU */
    fad_torch_tensor t[MAX_TENSOR_ARGS];       /* describes tensors */
    fad_attn_problem problem;                  /* the op's own of these four point into tensors and results */
    fad_attn_gradients gradients;
    fad_cache_append append;
    fad_rotation rotation;
    fad_runtime runtime;                                     /* points into workspace */
    fad_device device;                                       /* of the first tensor, and of all */
    fad_dtype ours;                                          /* its dtype in our numbers */
    int32_t device_type, device_index, dtype, compute_dtype; /* in torch's numbers */
    char message[640];                                       /* detail of a failure */
} fad_torch_call;

/* An op: its tensors come first on the stack, in the order of their names. One that may be absent is when it is empty and
 * has one dimension: the ABI of torch 2.10 has no way for C to receive an optional. */
typedef struct fad_torch_op {
    const char *const *names;
    int n_tensors, n_results;
    fad_status (*unpack)(fad_torch_call *call, const StableIValue *stack); /* fills the op's struct, but for results */
    fad_status (*body)(fad_torch_call *call);
} fad_torch_op;
extern const fad_torch_op fad_torch_check, fad_torch_fwd, fad_torch_fwd_partials, fad_torch_bwd, fad_torch_append,
    fad_torch_rotate;

/* Records the detail text and returns status. */
fad_status fad_torch_fail(fad_torch_call *call, fad_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* Returns FAD_DEVICE_ERROR from the calling function when a call into torch fails. */
#define TRY_TORCH(call, expression)                                                                                    \
    do {                                                                                                               \
        if ((expression) != 0)                                                                                         \
            return fad_torch_fail(call, FAD_DEVICE_ERROR, "PyTorch failed: %s", #expression);                          \
    } while (0)
#define TRY(expression)                                                                                                \
    do {                                                                                                               \
        const fad_status try_status_ = (expression);                                                                   \
        if (try_status_ != FAD_OK)                                                                                     \
            return try_status_;                                                                                        \
    } while (0)
#define TRY_CORE(call, expression)                                                                                     \
    do {                                                                                                               \
        const fad_status core_status_ = (expression);                                                                  \
        if (core_status_ != FAD_OK)                                                                                    \
            return fad_torch_fail(call, core_status_, "%s", fad_last_error());                                         \
    } while (0)
#define REQUIRE(call, condition, ...)                                                                                  \
    do {                                                                                                               \
        if (!(condition))                                                                                              \
            return fad_torch_fail(call, FAD_INVALID_ARGUMENT, __VA_ARGS__);                                            \
    } while (0)
#define LL(x) ((long long)(x))

/* Describes the op's tensors. The first decides device and dtype; all must be on that device. */
fad_status fad_torch_describe(fad_torch_call *call, const fad_torch_op *op);

/* What the structs cannot express and the C library therefore cannot check: dtypes, ranks, and that shapes agree. */
fad_status fad_torch_check_dtype(fad_torch_call *call, const fad_torch_tensor *t); /* the call's */
/* A view of [b, s, h, :], or of [s, h, :] where packed. */
fad_status fad_torch_get_view(fad_torch_call *call, const fad_torch_tensor *t, int packed, fad_view *view);
/* An int32 array of n elements, or null where it is absent. */
fad_status fad_torch_get_ints(fad_torch_call *call, const fad_torch_tensor *t, int64_t n, const int32_t **array);

/* k and v of a cache for B sequences, as the structs describe it. */
typedef struct fad_torch_cache {
    fad_view k, v;
    int64_t Sk, Hk, D, Dv, Bk, block_table_stride, page_size;
    const int32_t *cache_batch_idx, *block_table;
} fad_torch_cache;
/* k and v, then cache_batch_idx and block_table. */
fad_status fad_torch_get_cache(fad_torch_call *call, const fad_torch_tensor *kv, const fad_torch_tensor *places,
                               int64_t B, fad_torch_cache *cache);
static inline int fad_torch_is_paged(const fad_torch_tensor *block_table) { return block_table->ndim == 2; }
fad_status fad_torch_check_table(fad_torch_call *call, const fad_torch_tensor *block_table);

/* Allocates contiguous result number index, in the dtype. */
fad_status fad_torch_make_result(fad_torch_call *call, int index, int64_t ndim, const int64_t *sizes, int32_t dtype,
                                 void **data);

/* Threads or the stream of the call's device; no workspace. check_parallel() follows the work. */
fad_status fad_torch_make_runtime(fad_torch_call *call);
fad_status fad_torch_check_parallel(fad_torch_call *call);

/* The stream that torch uses now on the device of the call, which is a CUDA device. */
fad_status fad_torch_current_stream(fad_torch_call *call, void **stream);

#endif
