/* The ops fwd, fwd_partials and bwd, and the refusals of the first by themselves. */
#include "call.h"

#include <stddef.h>
#include <string.h>

/* Order of the arguments on the stack: that of the schemas in flash_attn_det/ops.py. Tensors come first, */
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
    ARG_CACHE_BATCH_IDX,
    ARG_BLOCK_TABLE,
    ARG_ALIBI_SLOPES,
    ARG_SINKS,
    N_TENSOR_ARGS,
    ARG_DOUT = N_TENSOR_ARGS, /* bwd has more of them */
    ARG_OUT,
    ARG_LSE,
    ARG_DLSE,
    N_BACKWARD_TENSOR_ARGS
};
_Static_assert((int)N_BACKWARD_TENSOR_ARGS <= (int)MAX_TENSOR_ARGS, "a call has room for its tensors");
/* then the numbers. */
enum { SCALE, CAUSAL, WINDOW_LEFT, WINDOW_RIGHT, SOFTCAP, SPLIT_SIZE, ARITHMETIC };
enum { WORKSPACE_ALIGNMENT = 64 };

/* Of bwd; the other ops have the first N_TENSOR_ARGS. */
static const char *const names[N_BACKWARD_TENSOR_ARGS] = {
    "q",
    "k",
    "v",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "seqused_q",
    "seqused_k",
    "leftpad_k",
    "k_pos",
    "cache_batch_idx",
    "block_table",
    "alibi_slopes",
    "sinks",
    "dout",
    "out",
    "lse",
    "dlse",
};

static double as_double(StableIValue bits) {
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* k and v that are packed, or have an entry for each sequence. */
static fad_status set_keys(fad_torch_call *call, int packed) {
    fad_attn_problem *p = &call->problem;
    const fad_torch_tensor *t = call->t;
    TRY(fad_torch_get_view(call, &t[ARG_K], packed, &p->k));
    TRY(fad_torch_get_view(call, &t[ARG_V], packed, &p->v));
    const int64_t *k = t[ARG_K].sizes, *v = t[ARG_V].sizes;
    REQUIRE(call, packed || (k[0] == p->B && v[0] == p->B),
            "q has batch %lld, k has %lld, v has %lld: expected one batch size", LL(p->B), LL(k[0]), LL(v[0]));
    k += !packed, v += !packed;
    REQUIRE(call, k[0] == v[0], "k has %lld rows, v has %lld", LL(k[0]), LL(v[0]));
    REQUIRE(call, k[1] == v[1], "k has %lld heads, v has %lld", LL(k[1]), LL(v[1]));
    p->Sk = k[0], p->Hk = k[1], p->Dv = v[2];
    return FAD_OK;
}

/* k and v that are paged, or named by cache_batch_idx. */
static fad_status set_cache(fad_torch_call *call) {
    fad_attn_problem *p = &call->problem;
    fad_torch_cache c = {0};
    TRY(fad_torch_get_cache(call, &call->t[ARG_K], &call->t[ARG_CACHE_BATCH_IDX], p->B, &c));
    p->k = c.k, p->v = c.v;
    p->Sk = c.Sk, p->Hk = c.Hk, p->Dv = c.Dv, p->Bk = c.Bk;
    p->cache_batch_idx = c.cache_batch_idx;
    p->block_table = c.block_table, p->block_table_stride = c.block_table_stride, p->page_size = c.page_size;
    return FAD_OK;
}

/* Views of q, k, v as [b, s, h, :]; packed ones have no b. */
static fad_status set_views(fad_torch_call *call) {
    fad_attn_problem *p = &call->problem;
    const fad_torch_tensor *t = call->t;
    const int64_t offsets_q = t[ARG_CU_SEQLENS_Q].numel, offsets_k = t[ARG_CU_SEQLENS_K].numel;
    const int packed = offsets_q > 0 || offsets_k > 0;
    TRY(fad_torch_get_view(call, &t[ARG_Q], packed, &p->q));
    const int64_t *q = t[ARG_Q].sizes + !packed;
    p->B = packed ? (offsets_q > 0 ? offsets_q : offsets_k) - 1 : t[ARG_Q].sizes[0];
    p->Sq = q[0], p->Hq = q[1], p->D = q[2];
    TRY(fad_torch_check_table(call, &t[ARG_BLOCK_TABLE]));
    if (fad_torch_is_paged(&t[ARG_BLOCK_TABLE]) || t[ARG_CACHE_BATCH_IDX].numel > 0)
        TRY(set_cache(call));
    else
        TRY(set_keys(call, packed));
    const int64_t k_dims = t[ARG_K].sizes[t[ARG_K].ndim - 1];
    REQUIRE(call, k_dims == p->D, "k has head dim %lld, q has %lld", LL(k_dims), LL(p->D));
    return FAD_OK;
}

/* alibi_slopes [Hq] or [B, Hq], sinks [Hq]: compute type, heads contiguous. */
static fad_status set_head_array(fad_torch_call *call, int argument, const void **array) {
    const fad_torch_tensor *a = &call->t[argument];
    const fad_attn_problem *p = &call->problem;
    if (a->numel == 0)
        return FAD_OK;
    REQUIRE(call, a->dtype == call->compute_dtype,
            "%s has the wrong dtype, expected float64 for float64 inputs and float32 otherwise", a->name);
    const int batched = argument == ARG_ALIBI_SLOPES && a->ndim == 2;
    REQUIRE(call, a->ndim == 1 || batched, "%s has %lld dimensions, expected 1%s", a->name, LL(a->ndim),
            argument == ARG_ALIBI_SLOPES ? " or 2" : "");
    REQUIRE(call, a->sizes[a->ndim - 1] == p->Hq, "%s has %lld elements, expected one per query head (%lld)", a->name,
            LL(a->sizes[a->ndim - 1]), LL(p->Hq));
    REQUIRE(call, !batched || a->sizes[0] == p->B, "%s has %lld rows, expected one per sequence (%lld)", a->name,
            LL(a->sizes[0]), LL(p->B));
    REQUIRE(call, p->Hq == 1 || a->strides[a->ndim - 1] == 1, "%s has stride %lld in its last dimension, expected 1",
            a->name, LL(a->strides[a->ndim - 1]));
    *array = a->data;
    if (batched)
        call->problem.alibi_stride_b = a->strides[0];
    return FAD_OK;
}

static fad_status set_arrays(fad_torch_call *call) {
    fad_attn_problem *p = &call->problem;
    const fad_torch_tensor *t = call->t;
    TRY(fad_torch_get_ints(call, &t[ARG_CU_SEQLENS_Q], p->B + 1, &p->cu_seqlens_q));
    TRY(fad_torch_get_ints(call, &t[ARG_CU_SEQLENS_K], p->B + 1, &p->cu_seqlens_k));
    TRY(fad_torch_get_ints(call, &t[ARG_SEQUSED_Q], p->B, &p->seqused_q));
    TRY(fad_torch_get_ints(call, &t[ARG_SEQUSED_K], p->B, &p->seqused_k));
    TRY(fad_torch_get_ints(call, &t[ARG_LEFTPAD_K], p->B, &p->leftpad_k));
    TRY(fad_torch_get_ints(call, &t[ARG_K_POS], p->B, &p->k_pos));
    TRY(set_head_array(call, ARG_ALIBI_SLOPES, &p->alibi_slopes));
    return set_head_array(call, ARG_SINKS, &p->sinks);
}

static fad_status unpack_problem(fad_torch_call *call, const StableIValue *numbers) {
    fad_attn_problem *p = &call->problem;
    p->device = call->device;
    p->dtype = call->ours;
    TRY(fad_torch_check_dtype(call, &call->t[ARG_K]));
    TRY(fad_torch_check_dtype(call, &call->t[ARG_V]));
    TRY(set_views(call));
    TRY(set_arrays(call));
    p->scale = as_double(numbers[SCALE]);
    p->causal = (numbers[CAUSAL] & 0xff) != 0;
    p->window_left = (int64_t)numbers[WINDOW_LEFT];
    p->window_right = (int64_t)numbers[WINDOW_RIGHT];
    p->softcap = as_double(numbers[SOFTCAP]);
    p->split_size = (int64_t)numbers[SPLIT_SIZE];
    const int64_t arithmetic = (int64_t)numbers[ARITHMETIC];
    REQUIRE(call, arithmetic >= FAD_ARITHMETIC_AUTO && arithmetic <= FAD_ARITHMETIC_MMA_SM80,
            "arithmetic is %lld, expected 0 (auto), 1 (fma), 2 (mma), 3 (mma_sm90) or 4 (mma_sm80)", LL(arithmetic));
    p->arithmetic = (fad_arithmetic)arithmetic;
    return FAD_OK;
}

static fad_status unpack(fad_torch_call *call, const StableIValue *stack) {
    return unpack_problem(call, stack + N_TENSOR_ARGS);
}

typedef fad_status (*workspace_fn)(const fad_attn_problem *problem, int32_t num_threads, size_t *bytes);

static fad_status make_workspace(fad_torch_call *call, workspace_fn workspace_bytes) {
    size_t bytes = 0;
    TRY(fad_torch_make_runtime(call));
    TRY_CORE(call, workspace_bytes(&call->problem, call->runtime.num_threads, &bytes));
    call->runtime.workspace_bytes = bytes;
    if (bytes == 0)
        return FAD_OK;
    const int64_t size = (int64_t)bytes + WORKSPACE_ALIGNMENT - 1, stride = 1;
    void *start = NULL;
    TRY_TORCH(call, aoti_torch_empty_strided(1, &size, &stride, aoti_torch_dtype_uint8(), call->device_type,
                                             call->device_index, &call->workspace));
    TRY_TORCH(call, aoti_torch_get_data_ptr(call->workspace, &start));
    const uintptr_t mask = WORKSPACE_ALIGNMENT - 1;
    call->runtime.workspace = (void *)(((uintptr_t)start + mask) & ~mask);
    return FAD_OK;
}

/* out [B, Sq, Hq, Dv] or packed [Sq, Hq, Dv]; lse [B, Hq, Sq] or packed [Hq, Sq]. */
static fad_status forward(fad_torch_call *call) {
    fad_attn_problem *p = &call->problem;
    const int packed = p->cu_seqlens_q != NULL;
    const int64_t out[] = {p->B, p->Sq, p->Hq, p->Dv}, lse[] = {p->B, p->Hq, p->Sq};
    TRY(fad_torch_make_result(call, 0, 4 - packed, out + packed, call->dtype, &p->out.data));
    TRY(fad_torch_make_result(call, 1, 3 - packed, lse + packed, call->compute_dtype, &p->lse.data));
    p->out.stride_b = p->Sq * p->Hq * p->Dv, p->out.stride_s = p->Hq * p->Dv, p->out.stride_h = p->Dv;
    p->lse.stride_b = p->Hq * p->Sq, p->lse.stride_s = 1, p->lse.stride_h = p->Sq;
    TRY(make_workspace(call, fad_attn_workspace));
    TRY_CORE(call, fad_attn_forward(p, &call->runtime));
    return fad_torch_check_parallel(call);
}

/* o [C, B, Sq, Hq, Dv], m and l [C, B, Hq, Sq]. */
static fad_status forward_partials(fad_torch_call *call) {
    const fad_attn_problem *p = &call->problem;
    fad_partials partials = {0};
    TRY_CORE(call, fad_attn_partials_count(p, &partials.n_splits));
    const int64_t o[] = {partials.n_splits, p->B, p->Sq, p->Hq, p->Dv}, ml[] = {partials.n_splits, p->B, p->Hq, p->Sq};
    TRY(fad_torch_make_result(call, 0, 5, o, call->compute_dtype, &partials.o));
    TRY(fad_torch_make_result(call, 1, 4, ml, call->compute_dtype, &partials.m));
    TRY(fad_torch_make_result(call, 2, 4, ml, call->compute_dtype, &partials.l));
    TRY(make_workspace(call, fad_attn_workspace));
    TRY_CORE(call, fad_attn_partials(p, &partials, &call->runtime));
    return fad_torch_check_parallel(call);
}

/* out or dout [B, Sq, Hq, Dv] or packed. */
static fad_status get_out(fad_torch_call *call, const fad_torch_tensor *t, fad_view *view) {
    const fad_attn_problem *p = &call->problem;
    const int packed = p->cu_seqlens_q != NULL;
    TRY(fad_torch_check_dtype(call, t));
    TRY(fad_torch_get_view(call, t, packed, view));
    const int64_t *sizes = t->sizes + !packed;
    REQUIRE(call, (packed || t->sizes[0] == p->B) && sizes[0] == p->Sq && sizes[1] == p->Hq && sizes[2] == p->Dv,
            "%s has %lld rows, %lld heads and head dim %lld, expected the shape of out: %lld, %lld and %lld", t->name,
            LL(sizes[0]), LL(sizes[1]), LL(sizes[2]), LL(p->Sq), LL(p->Hq), LL(p->Dv));
    return FAD_OK;
}

/* lse or dlse [B, Hq, Sq] or packed [Hq, Sq]: compute type. */
static fad_status get_lse(fad_torch_call *call, const fad_torch_tensor *t, fad_view *view) {
    const fad_attn_problem *p = &call->problem;
    const int packed = p->cu_seqlens_q != NULL;
    REQUIRE(call, t->dtype == call->compute_dtype,
            "%s has the wrong dtype, expected float64 for float64 inputs and float32 otherwise", t->name);
    REQUIRE(call, t->ndim == 3 - packed, "%s has %lld dimensions, expected %d", t->name, LL(t->ndim), 3 - packed);
    const int64_t *sizes = t->sizes + !packed, *strides = t->strides + !packed;
    REQUIRE(call, (packed || t->sizes[0] == p->B) && sizes[0] == p->Hq && sizes[1] == p->Sq,
            "%s has %lld heads and %lld rows, expected the shape of lse: %lld and %lld", t->name, LL(sizes[0]),
            LL(sizes[1]), LL(p->Hq), LL(p->Sq));
    *view = (fad_view){t->data, packed ? 0 : t->strides[0], strides[1], strides[0]};
    return FAD_OK;
}

static fad_status unpack_backward(fad_torch_call *call, const StableIValue *stack) {
    const fad_torch_tensor *t = call->t;
    TRY(unpack_problem(call, stack + N_BACKWARD_TENSOR_ARGS));
    TRY(get_out(call, &t[ARG_DOUT], &call->gradients.dout));
    TRY(get_out(call, &t[ARG_OUT], &call->problem.out));
    TRY(get_lse(call, &t[ARG_LSE], &call->problem.lse));
    const int absent = t[ARG_DLSE].ndim == 1 && t[ARG_DLSE].numel == 0;
    return absent ? FAD_OK : get_lse(call, &t[ARG_DLSE], &call->gradients.dlse);
}

/* Result number index, contiguous, as one of q, k, v. */
static fad_status make_gradient(fad_torch_call *call, int index, const fad_torch_tensor *like, fad_view *view) {
    const int64_t n = like->ndim, *sizes = like->sizes;
    TRY(fad_torch_make_result(call, index, n, sizes, call->dtype, &view->data));
    view->stride_h = sizes[n - 1];
    view->stride_s = sizes[n - 2] * view->stride_h;
    view->stride_b = sizes[n - 3] * view->stride_s;
    return FAD_OK;
}

/* dq, dk, dv as q, k, v; d_sinks as sinks, empty where they are. */
static fad_status backward(fad_torch_call *call) {
    const fad_torch_tensor *sinks = &call->t[ARG_SINKS];
    fad_attn_gradients *g = &call->gradients;
    void *d_sinks;
    TRY_CORE(call, fad_attn_check(&call->problem));
    TRY(make_gradient(call, 0, &call->t[ARG_Q], &g->dq));
    TRY(make_gradient(call, 1, &call->t[ARG_K], &g->dk));
    TRY(make_gradient(call, 2, &call->t[ARG_V], &g->dv));
    TRY(fad_torch_make_result(call, 3, 1, sinks->sizes, call->compute_dtype, &d_sinks));
    g->d_sinks = call->problem.sinks ? d_sinks : NULL;
    TRY(make_workspace(call, fad_attn_backward_workspace));
    TRY_CORE(call, fad_attn_backward(&call->problem, g, &call->runtime));
    return fad_torch_check_parallel(call);
}

static fad_status check(fad_torch_call *call) {
    TRY_CORE(call, fad_attn_check(&call->problem));
    return FAD_OK;
}

const fad_torch_op fad_torch_check = {names, N_TENSOR_ARGS, 0, unpack, check};
const fad_torch_op fad_torch_fwd = {names, N_TENSOR_ARGS, 2, unpack, forward};
const fad_torch_op fad_torch_fwd_partials = {names, N_TENSOR_ARGS, 3, unpack, forward_partials};
const fad_torch_op fad_torch_bwd = {names, N_BACKWARD_TENSOR_ARGS, 4, unpack_backward, backward};
