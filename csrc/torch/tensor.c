/* What all ops ask of their tensors, and make. */
#include "call.h"

#include <stddef.h>

static fad_status describe(fad_torch_call *call, AtenTensorHandle handle, fad_torch_tensor *t) {
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

static fad_status set_dtype(fad_torch_call *call) {
    const struct {
        int32_t torch;
        fad_dtype ours;
    } known[] = {
        {aoti_torch_dtype_float32(), FAD_FLOAT32},
        {aoti_torch_dtype_float16(), FAD_FLOAT16},
        {aoti_torch_dtype_bfloat16(), FAD_BFLOAT16},
        {aoti_torch_dtype_float64(), FAD_FLOAT64},
    };
    call->dtype = call->t[0].dtype;
    call->compute_dtype =
        call->dtype == aoti_torch_dtype_float64() ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
        if (known[i].torch == call->dtype) {
            call->ours = known[i].ours;
            return FAD_OK;
        }
    return fad_torch_fail(call, FAD_INVALID_ARGUMENT,
                          "%s has an unknown dtype, expected float32, float16, bfloat16 or float64", call->t[0].name);
}

fad_status fad_torch_describe(fad_torch_call *call, const fad_torch_op *op) {
    fad_torch_tensor *t = call->t;
    for (int i = 0; i < op->n_tensors; i++) {
        t[i].name = op->names[i];
        TRY(describe(call, call->tensors[i], &t[i]));
    }
    call->device_type = t[0].device_type;
    call->device_index = t[0].device_index;
    call->device = call->device_type == aoti_torch_device_type_cpu() ? FAD_CPU : FAD_CUDA;
    for (int i = 1; i < op->n_tensors; i++)
        REQUIRE(call, t[i].device_type == call->device_type && t[i].device_index == call->device_index,
                "%s is on another device than %s", t[i].name, t[0].name);
    return set_dtype(call);
}

fad_status fad_torch_check_dtype(fad_torch_call *call, const fad_torch_tensor *t) {
    REQUIRE(call, t->dtype == call->dtype, "%s has another dtype than %s", t->name, call->t[0].name);
    return FAD_OK;
}

fad_status fad_torch_get_view(fad_torch_call *call, const fad_torch_tensor *t, int packed, fad_view *view) {
    REQUIRE(call, t->ndim == (packed ? 3 : 4), "%s has %lld dimensions, expected %s", t->name, LL(t->ndim),
            packed ? "3: [rows, heads, head_dim]" : "4: [batch, rows, heads, head_dim]");
    const int64_t *sizes = t->sizes + !packed, *strides = t->strides + !packed; /* [s, h, :] */
    REQUIRE(call, t->numel == 0 || sizes[2] <= 1 || strides[2] == 1,
            "%s has stride %lld in its last dimension, expected 1", t->name, LL(strides[2]));
    *view = (fad_view){t->data, packed ? 0 : t->strides[0], strides[0], strides[1]};
    return FAD_OK;
}

fad_status fad_torch_get_ints(fad_torch_call *call, const fad_torch_tensor *t, int64_t n, const int32_t **array) {
    if (t->numel == 0)
        return FAD_OK;
    REQUIRE(call, t->dtype == aoti_torch_dtype_int32(), "%s has the wrong dtype, expected int32", t->name);
    REQUIRE(call, t->ndim == 1, "%s has %lld dimensions, expected 1", t->name, LL(t->ndim));
    REQUIRE(call, t->numel == n, "%s has %lld elements, expected %lld", t->name, LL(t->numel), LL(n));
    REQUIRE(call, t->numel == 1 || t->strides[0] == 1, "%s has stride %lld, expected 1", t->name, LL(t->strides[0]));
    *array = t->data;
    return FAD_OK;
}

/* block_table [B, columns], rows contiguous. */
static fad_status get_pages(fad_torch_call *call, const fad_torch_tensor *table, int64_t B, fad_torch_cache *cache) {
    static const int32_t empty; /* an address for a table without entries: it is given all the same */
    REQUIRE(call, table->dtype == aoti_torch_dtype_int32(), "%s has the wrong dtype, expected int32", table->name);
    REQUIRE(call, table->sizes[0] == B, "%s has %lld rows, expected one per sequence (%lld)", table->name,
            LL(table->sizes[0]), LL(B));
    REQUIRE(call, table->numel == 0 || table->sizes[1] == 1 || table->strides[1] == 1,
            "%s has stride %lld in its last dimension, expected 1", table->name, LL(table->strides[1]));
    cache->block_table = table->numel ? table->data : &empty;
    cache->block_table_stride = table->strides[0];
    cache->page_size = cache->Sk; /* of the tensor so far */
    cache->Sk *= table->sizes[1];
    return FAD_OK;
}

fad_status fad_torch_check_table(fad_torch_call *call, const fad_torch_tensor *table) {
    REQUIRE(call, fad_torch_is_paged(table) || (table->ndim == 1 && table->numel == 0),
            "%s has %lld dimensions, expected 2", table->name, LL(table->ndim));
    return FAD_OK;
}

fad_status fad_torch_get_cache(fad_torch_call *call, const fad_torch_tensor *kv, const fad_torch_tensor *places,
                               int64_t B, fad_torch_cache *cache) {
    const fad_torch_tensor *k = &kv[0], *v = &kv[1], *batch_idx = &places[0], *table = &places[1];
    TRY(fad_torch_check_table(call, table));
    TRY(fad_torch_get_view(call, k, 0, &cache->k));
    TRY(fad_torch_get_view(call, v, 0, &cache->v));
    TRY(fad_torch_get_ints(call, batch_idx, B, &cache->cache_batch_idx));
    REQUIRE(call, k->sizes[0] == v->sizes[0], "%s has %lld %s, %s has %lld", k->name, LL(k->sizes[0]),
            fad_torch_is_paged(table) ? "pages" : "entries", v->name, LL(v->sizes[0]));
    REQUIRE(call, k->sizes[1] == v->sizes[1], "%s has %lld rows, %s has %lld", k->name, LL(k->sizes[1]), v->name,
            LL(v->sizes[1]));
    REQUIRE(call, k->sizes[2] == v->sizes[2], "%s has %lld heads, %s has %lld", k->name, LL(k->sizes[2]), v->name,
            LL(v->sizes[2]));
    cache->Bk = k->sizes[0], cache->Sk = k->sizes[1], cache->Hk = k->sizes[2], cache->D = k->sizes[3];
    cache->Dv = v->sizes[3];
    if (fad_torch_is_paged(table))
        return get_pages(call, table, B, cache);
    REQUIRE(call, cache->cache_batch_idx || cache->Bk == B, "%s has batch %lld, expected that of %s, %lld", k->name,
            LL(cache->Bk), call->t[0].name, LL(B));
    return FAD_OK;
}

fad_status fad_torch_make_result(fad_torch_call *call, int index, int64_t ndim, const int64_t *sizes, int32_t dtype,
                                 void **data) {
    int64_t strides[5], stride = 1;
    for (int64_t i = ndim - 1; i >= 0; i--) {
        strides[i] = stride;
        stride *= sizes[i] > 0 ? sizes[i] : 1;
    }
    TRY_TORCH(call, aoti_torch_empty_strided(ndim, sizes, strides, dtype, call->device_type, call->device_index,
                                             &call->results[index]));
    TRY_TORCH(call, aoti_torch_get_data_ptr(call->results[index], data));
    return FAD_OK;
}

/* fad_runtime.parallel_for returns nothing, so what torch said is kept here until the call is over. */
static _Thread_local AOTITorchError parallel_error;

static void parallel_for(int64_t n, fad_range_fn fn, void *ctx) {
    const AOTITorchError error = torch_parallel_for(0, n, 1, fn, ctx);
    if (error)
        parallel_error = error;
}

fad_status fad_torch_check_parallel(fad_torch_call *call) {
    return parallel_error ? fad_torch_fail(call, FAD_DEVICE_ERROR, "PyTorch failed: torch_parallel_for") : FAD_OK;
}

fad_status fad_torch_make_runtime(fad_torch_call *call) {
    uint32_t n_threads = 1;
    parallel_error = 0;
    if (call->device == FAD_CUDA) {
        TRY(fad_torch_current_stream(call, &call->runtime.stream));
    } else {
        TRY_TORCH(call, torch_get_num_threads(&n_threads));
        call->runtime.parallel_for = parallel_for;
    }
    call->runtime.num_threads = (int32_t)n_threads;
    return FAD_OK;
}
