/* The ops append and rotate. */
#include "call.h"

#include <stddef.h>

/* append: the arguments on the stack, as in flash_attn_det/ops.py. */
enum {
    ARG_K_NEW,
    ARG_V_NEW,
    ARG_K_CACHE,
    ARG_V_CACHE,
    ARG_CACHE_SEQLENS,
    ARG_CACHE_BATCH_IDX,
    ARG_BLOCK_TABLE,
    ARG_APPEND_COS,
    ARG_APPEND_SIN,
    N_APPEND_TENSORS,
    ARG_APPEND_INTERLEAVED = N_APPEND_TENSORS
};
/* rotate */
enum { ARG_X, ARG_COS, ARG_SIN, ARG_OFFSETS, N_ROTATE_TENSORS, ARG_ADVANCE = N_ROTATE_TENSORS, ARG_INTERLEAVED };

/* cos and sin [n_positions, dim / 2], contiguous; absent when empty with one dimension. */
static fad_status get_rotary(fad_torch_call *call, const fad_torch_tensor *tables, StableIValue interleaved,
                             fad_rotary *rotary) {
    const fad_torch_tensor *cos = &tables[0], *sin = &tables[1];
    if (cos->ndim == 1 && cos->numel == 0 && sin->ndim == 1 && sin->numel == 0)
        return FAD_OK;
    REQUIRE(call, cos->ndim == 2 && sin->ndim == 2, "%s has %lld dimensions and %s has %lld, expected 2", cos->name,
            LL(cos->ndim), sin->name, LL(sin->ndim));
    REQUIRE(call, cos->dtype == sin->dtype && (cos->dtype == call->dtype || cos->dtype == call->compute_dtype),
            "%s and %s have the wrong dtype, expected that of %s or its compute dtype", cos->name, sin->name,
            call->t[0].name);
    REQUIRE(call, cos->sizes[0] == sin->sizes[0] && cos->sizes[1] == sin->sizes[1],
            "%s is [%lld, %lld], %s is [%lld, %lld]: expected one shape", cos->name, LL(cos->sizes[0]),
            LL(cos->sizes[1]), sin->name, LL(sin->sizes[0]), LL(sin->sizes[1]));
    REQUIRE(call, cos->sizes[0] > 0 && cos->sizes[1] > 0, "%s is [%lld, %lld], expected at least one row and column",
            cos->name, LL(cos->sizes[0]), LL(cos->sizes[1]));
    for (int i = 0; i < 2; i++)
        REQUIRE(call,
                (tables[i].sizes[0] == 1 || tables[i].strides[0] == tables[i].sizes[1]) &&
                    (tables[i].sizes[1] == 1 || tables[i].strides[1] == 1),
                "%s is not contiguous", tables[i].name);
    *rotary = (fad_rotary){cos->data,     sin->data,         cos->dtype == call->dtype ? call->ours : FAD_FLOAT32,
                           cos->sizes[0], 2 * cos->sizes[1], (interleaved & 0xff) != 0};
    return FAD_OK;
}

static fad_status unpack_append(fad_torch_call *call, const StableIValue *stack) {
    const fad_torch_tensor *t = call->t;
    fad_cache_append *p = &call->append;
    fad_torch_cache c = {0};
    for (int i = ARG_V_NEW; i <= ARG_V_CACHE; i++)
        TRY(fad_torch_check_dtype(call, &t[i]));
    TRY(fad_torch_get_view(call, &t[ARG_K_NEW], 0, &p->k_new));
    TRY(fad_torch_get_view(call, &t[ARG_V_NEW], 0, &p->v_new));
    const int64_t *k = t[ARG_K_NEW].sizes, *v = t[ARG_V_NEW].sizes;
    p->device = call->device, p->dtype = call->ours;
    p->B = k[0], p->S = k[1], p->Hk = k[2], p->D = k[3], p->Dv = v[3];
    for (int i = 0; i < 3; i++)
        REQUIRE(call, k[i] == v[i], "k is [%lld, %lld, %lld, ...], v is [%lld, %lld, %lld, ...]: expected one shape",
                LL(k[0]), LL(k[1]), LL(k[2]), LL(v[0]), LL(v[1]), LL(v[2]));
    TRY(fad_torch_get_cache(call, &t[ARG_K_CACHE], &t[ARG_CACHE_BATCH_IDX], p->B, &c));
    REQUIRE(call, c.Hk == p->Hk, "k_cache has %lld heads, k has %lld", LL(c.Hk), LL(p->Hk));
    REQUIRE(call, c.D == p->D, "k_cache has head dim %lld, k has %lld", LL(c.D), LL(p->D));
    REQUIRE(call, c.Dv == p->Dv, "v_cache has head dim %lld, v has %lld", LL(c.Dv), LL(p->Dv));
    p->k = c.k, p->v = c.v, p->Sk = c.Sk, p->Bk = c.Bk;
    p->cache_batch_idx = c.cache_batch_idx;
    p->block_table = c.block_table, p->block_table_stride = c.block_table_stride, p->page_size = c.page_size;
    TRY(fad_torch_get_ints(call, &t[ARG_CACHE_SEQLENS], p->B, &p->cache_seqlens));
    return get_rotary(call, &t[ARG_APPEND_COS], stack[ARG_APPEND_INTERLEAVED], &p->rotary);
}

static fad_status append(fad_torch_call *call) {
    TRY(fad_torch_make_runtime(call));
    TRY_CORE(call, fad_append_to_cache(&call->append, &call->runtime));
    return fad_torch_check_parallel(call);
}

static fad_status unpack_rotate(fad_torch_call *call, const StableIValue *stack) {
    const fad_torch_tensor *t = call->t;
    fad_rotation *p = &call->rotation;
    TRY(fad_torch_get_view(call, &t[ARG_X], 0, &p->x));
    const int64_t *x = t[ARG_X].sizes;
    p->device = call->device, p->dtype = call->ours;
    p->B = x[0], p->S = x[1], p->H = x[2], p->D = x[3];
    TRY(fad_torch_get_ints(call, &t[ARG_OFFSETS], p->B, &p->offsets));
    p->advance = (stack[ARG_ADVANCE] & 0xff) != 0;
    return get_rotary(call, &t[ARG_COS], stack[ARG_INTERLEAVED], &p->rotary);
}

/* out [B, S, H, D]. */
static fad_status rotate(fad_torch_call *call) {
    fad_rotation *p = &call->rotation;
    const int64_t out[] = {p->B, p->S, p->H, p->D};
    TRY(fad_torch_make_result(call, 0, 4, out, call->dtype, &p->out.data));
    p->out.stride_b = p->S * p->H * p->D, p->out.stride_s = p->H * p->D, p->out.stride_h = p->D;
    TRY(fad_torch_make_runtime(call));
    TRY_CORE(call, fad_rotate(p, &call->runtime));
    return fad_torch_check_parallel(call);
}

static const char *const append_names[N_APPEND_TENSORS] = {
    "k", "v", "k_cache", "v_cache", "cache_seqlens", "cache_batch_idx", "block_table", "rotary_cos", "rotary_sin",
};
static const char *const rotate_names[N_ROTATE_TENSORS] = {"x", "cos", "sin", "offsets"};

const fad_torch_op fad_torch_append = {append_names, N_APPEND_TENSORS, 0, unpack_append, append};
const fad_torch_op fad_torch_rotate = {rotate_names, N_ROTATE_TENSORS, 1, unpack_rotate, rotate};
