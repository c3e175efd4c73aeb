/* One call of an op, on its way from torch's boxed stack through the C library and back. */
#ifndef FAD_TORCH_CALL_H
#define FAD_TORCH_CALL_H

#include "../flash_attn_det.h"
#include "stable_abi.h"

/* Order of the arguments on the stack: that of the schemas in flash_attn_det/ops.py. Tensors come first. A tensor of the
 * second group is absent when it is empty: the ABI of torch 2.10 has no way for C to receive an optional. */
enum {
    ARG_Q,
    ARG_K,
    ARG_V,
    ARG_CU_SEQLENS_Q,
    ARG_CU_SEQLENS_K,
    ARG_SEQUSED_Q,
    ARG_SEQUSED_K,
    ARG_LEFTPAD_K,
    ARG_K_POS,
    ARG_ALIBI_SLOPES,
    ARG_SINKS,
    N_TENSOR_ARGS,
    ARG_SCALE = N_TENSOR_ARGS,
    ARG_CAUSAL,
    ARG_WINDOW_LEFT,
    ARG_WINDOW_RIGHT,
    ARG_SOFTCAP,
    ARG_SPLIT_SIZE,
    ARG_ARITHMETIC,
    N_ARGS
};
enum { MAX_RESULTS = 3 };

typedef struct fad_torch_call {
    AtenTensorHandle tensors[N_TENSOR_ARGS]; /* owned */
    AtenTensorHandle results[MAX_RESULTS];   /* owned until they are returned; null where not allocated */
    AtenTensorHandle workspace;              /* owned, or null */
    DeviceGuardHandle guard;                 /* owned; null on the CPU */
    fad_attn_problem problem;                /* points into tensors and results */
    fad_runtime runtime;                     /* points into workspace */
    int32_t device_type, device_index, dtype, compute_dtype; /* in torch's numbers */
    char message[640];                                       /* detail of a failure */
} fad_torch_call;

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

/* Fills call->problem from call->tensors and the scalars on the stack, all but the outputs. Checks whatever the struct
 * cannot express and fad_attn_check() therefore cannot see: dtypes, devices, ranks and that shapes agree. */
fad_status fad_torch_unpack(fad_torch_call *call, const StableIValue *stack);

/* The stream that torch uses now on the device of the call, which is a CUDA device. */
fad_status fad_torch_current_stream(fad_torch_call *call, void **stream);

#endif
