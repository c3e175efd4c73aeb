#include "call.h"

#include <stddef.h>
#include <string.h>

#define LL(x) ((long long)(x))
#define REQUIRE(call, condition, ...)                                                                                  \
    do {                                                                                                               \
        if (!(condition))                                                                                              \
            return fad_torch_fail(call, FAD_INVALID_ARGUMENT, __VA_ARGS__);                                            \
    } while (0)

static const char *const names[N_TENSOR_ARGS] = {
    "q",         "k",         "v",     "cu_seqlens_q", "cu_seqlens_k", "seqused_q",
    "seqused_k", "leftpad_k", "k_pos", "alibi_slopes", "sinks",
};

typedef struct tensor {
    void *data;
    int64_t ndim, numel, *sizes, *strides;
    int32_t dtype, device_type, device_index;
} tensor;

static fad_status describe(fad_torch_call *call, AtenTensorHandle handle, tensor *t) {
    TRY_TORCH(call, aoti_torch_get_data_ptr(handle, &t->data));
    TRY_TORCH(call, aoti_torch_get_dim(handle, &t->ndim));
    TRY_TORCH(call, aoti_torch_get_numel(handle, &t->numel));
    TRY_TORCH(call, aoti_torch_get_sizes(handle, &t->sizes));
    TRY_TORCH(call, aoti_torch_get_strides(handle, &t->strides));
    TRY_TORCH(call, aoti_torch_get_dtype(handle, &t->dtype));
    TRY_TORCH(call, aoti_torch_get_device_type(handle, &t->device_type));
    TRY_TORCH(call, aoti_torch_get_device_index(handle, &t->device_index));
    return FAD_OK;
}

static double as_double(StableIValue bits) {
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static fad_status set_dtype(fad_torch_call *call, const tensor *t) {
    const struct {
        int32_t torch;
        fad_dtype ours;
    } known[] = {
        {aoti_torch_dtype_float32(), FAD_FLOAT32},
        {aoti_torch_dtype_float16(), FAD_FLOAT16},
        {aoti_torch_dtype_bfloat16(), FAD_BFLOAT16},
        {aoti_torch_dtype_float64(), FAD_FLOAT64},
    };
    call->dtype = t[ARG_Q].dtype;
    call->compute_dtype =
        call->dtype == aoti_torch_dtype_float64() ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
    REQUIRE(call, t[ARG_K].dtype == call->dtype && t[ARG_V].dtype == call->dtype, "q, k and v have different dtypes");
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
        if (known[i].torch == call->dtype) {
            call->problem.dtype = known[i].ours;
            return FAD_OK;
        }
    return fad_torch_fail(call, FAD_INVALID_ARGUMENT,
                          "q, k and v have an unknown dtype, expected float32, float16, bfloat16 or float64");
}

static fad_status set_device(fad_torch_call *call, const tensor *t) {
    call->device_type = t[ARG_Q].device_type;
    call->device_index = t[ARG_Q].device_index;
    call->problem.device = call->device_type == aoti_torch_device_type_cpu() ? FAD_CPU : FAD_CUDA;
    for (int i = ARG_K; i < N_TENSOR_ARGS; i++)
        REQUIRE(call, t[i].device_type == call->device_type && t[i].device_index == call->device_index,
                "%s is on another device than q", names[i]);
    return FAD_OK;
}

/* Views of q, k, v as [b, s, h, :]; packed ones have no b. */
static fad_status set_views(fad_torch_call *call, const tensor *t) {
    fad_attn_problem *p = &call->problem;
    const int64_t offsets_q = t[ARG_CU_SEQLENS_Q].numel, offsets_k = t[ARG_CU_SEQLENS_K].numel;
    const int packed = offsets_q > 0 || offsets_k > 0;
    fad_view *const views[] = {&p->q, &p->k, &p->v};
    for (int i = ARG_Q; i <= ARG_V; i++) {
        REQUIRE(call, t[i].ndim == (packed ? 3 : 4), "%s has %lld dimensions, expected %s", names[i], LL(t[i].ndim),
                packed ? "3: [rows, heads, head_dim]" : "4: [batch, rows, heads, head_dim]");
        const int64_t *sizes = t[i].sizes + !packed, *strides = t[i].strides + !packed; /* [s, h, :] */
        REQUIRE(call, t[i].numel == 0 || sizes[2] <= 1 || strides[2] == 1,
                "%s has stride %lld in its last dimension, expected 1", names[i], LL(strides[2]));
        *views[i] = (fad_view){t[i].data, packed ? 0 : t[i].strides[0], strides[0], strides[1]};
    }
    const int64_t *q = t[ARG_Q].sizes, *k = t[ARG_K].sizes, *v = t[ARG_V].sizes;
    p->B = packed ? (offsets_q > 0 ? offsets_q : offsets_k) - 1 : q[0];
    REQUIRE(call, packed || (k[0] == p->B && v[0] == p->B),
            "q has batch %lld, k has %lld, v has %lld: expected one batch size", LL(p->B), LL(k[0]), LL(v[0]));
    q += !packed, k += !packed, v += !packed;
    REQUIRE(call, k[0] == v[0], "k has %lld rows, v has %lld", LL(k[0]), LL(v[0]));
    REQUIRE(call, k[1] == v[1], "k has %lld heads, v has %lld", LL(k[1]), LL(v[1]));
    REQUIRE(call, q[2] == k[2], "k has head dim %lld, q has %lld", LL(k[2]), LL(q[2]));
    p->Sq = q[0], p->Hq = q[1], p->D = q[2];
    p->Sk = k[0], p->Hk = k[1], p->Dv = v[2];
    return FAD_OK;
}

static fad_status set_int_array(fad_torch_call *call, const tensor *t, int argument, int64_t length,
                                const int32_t **array) {
    const tensor *a = &t[argument];
    if (a->numel == 0)
        return FAD_OK;
    REQUIRE(call, a->dtype == aoti_torch_dtype_int32(), "%s has the wrong dtype, expected int32", names[argument]);
    REQUIRE(call, a->ndim == 1, "%s has %lld dimensions, expected 1", names[argument], LL(a->ndim));
    REQUIRE(call, a->numel == length, "%s has %lld elements, expected %lld", names[argument], LL(a->numel), LL(length));
    REQUIRE(call, a->numel == 1 || a->strides[0] == 1, "%s has stride %lld, expected 1", names[argument],
            LL(a->strides[0]));
    *array = a->data;
    return FAD_OK;
}

/* alibi_slopes [Hq] or [B, Hq], sinks [Hq]: compute type, heads contiguous. */
static fad_status set_head_array(fad_torch_call *call, const tensor *t, int argument, const void **array) {
    const tensor *a = &t[argument];
    const fad_attn_problem *p = &call->problem;
    if (a->numel == 0)
        return FAD_OK;
    REQUIRE(call, a->dtype == call->compute_dtype,
            "%s has the wrong dtype, expected float64 for float64 inputs and float32 otherwise", names[argument]);
    const int batched = argument == ARG_ALIBI_SLOPES && a->ndim == 2;
    REQUIRE(call, a->ndim == 1 || batched, "%s has %lld dimensions, expected 1%s", names[argument], LL(a->ndim),
            argument == ARG_ALIBI_SLOPES ? " or 2" : "");
    REQUIRE(call, a->sizes[a->ndim - 1] == p->Hq, "%s has %lld elements, expected one per query head (%lld)",
            names[argument], LL(a->sizes[a->ndim - 1]), LL(p->Hq));
    REQUIRE(call, !batched || a->sizes[0] == p->B, "%s has %lld rows, expected one per sequence (%lld)",
            names[argument], LL(a->sizes[0]), LL(p->B));
    REQUIRE(call, p->Hq == 1 || a->strides[a->ndim - 1] == 1, "%s has stride %lld in its last dimension, expected 1",
            names[argument], LL(a->strides[a->ndim - 1]));
    *array = a->data;
    if (batched)
        call->problem.alibi_stride_b = a->strides[0];
    return FAD_OK;
}

fad_status fad_torch_unpack(fad_torch_call *call, const StableIValue *stack) {
    fad_attn_problem *p = &call->problem;
    tensor t[N_TENSOR_ARGS];
    for (int i = 0; i < N_TENSOR_ARGS; i++)
        TRY(describe(call, call->tensors[i], &t[i]));
    TRY(set_device(call, t));
    TRY(set_dtype(call, t));
    TRY(set_views(call, t));
    TRY(set_int_array(call, t, ARG_CU_SEQLENS_Q, p->B + 1, &p->cu_seqlens_q));
    TRY(set_int_array(call, t, ARG_CU_SEQLENS_K, p->B + 1, &p->cu_seqlens_k));
    TRY(set_int_array(call, t, ARG_SEQUSED_Q, p->B, &p->seqused_q));
    TRY(set_int_array(call, t, ARG_SEQUSED_K, p->B, &p->seqused_k));
    TRY(set_int_array(call, t, ARG_LEFTPAD_K, p->B, &p->leftpad_k));
    TRY(set_int_array(call, t, ARG_K_POS, p->B, &p->k_pos));
    TRY(set_head_array(call, t, ARG_ALIBI_SLOPES, &p->alibi_slopes));
    TRY(set_head_array(call, t, ARG_SINKS, &p->sinks));
    p->scale = as_double(stack[ARG_SCALE]);
    p->causal = (stack[ARG_CAUSAL] & 0xff) != 0;
    p->window_left = (int64_t)stack[ARG_WINDOW_LEFT];
    p->window_right = (int64_t)stack[ARG_WINDOW_RIGHT];
    p->softcap = as_double(stack[ARG_SOFTCAP]);
    p->split_size = (int64_t)stack[ARG_SPLIT_SIZE];
    const int64_t arithmetic = (int64_t)stack[ARG_ARITHMETIC];
    REQUIRE(call, arithmetic >= FAD_ARITHMETIC_AUTO && arithmetic <= FAD_ARITHMETIC_MMA_SM80,
            "arithmetic is %lld, expected 0 (auto), 1 (fma), 2 (mma), 3 (mma_sm90) or 4 (mma_sm80)", LL(arithmetic));
    p->arithmetic = (fad_arithmetic)arithmetic;
    return FAD_OK;
}
