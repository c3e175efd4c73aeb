/* The ops flash_attn_det::fwd and flash_attn_det::fwd_partials on the CPU and CUDA dispatch keys.
 *
 * A boxed kernel owns its tensor arguments and hands over its results. It raises by a C++ exception out of
 * aoti_torch_check, so run() releases everything first and raises last. */
#include "call.h"

#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>

#define TORCH_2_10 (UINT64_C(2) << 56 | UINT64_C(10) << 48) /* the oldest ABI that is promised to work */
enum { WORKSPACE_ALIGNMENT = 64 };

fad_status fad_torch_fail(fad_torch_call *call, fad_status status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(call->message, sizeof call->message, format, args);
    va_end(args);
    return status;
}

#define TRY_CORE(call, expression)                                                                                     \
    do {                                                                                                               \
        const fad_status core_status_ = (expression);                                                                  \
        if (core_status_ != FAD_OK)                                                                                    \
            return fad_torch_fail(call, core_status_, "%s", fad_last_error());                                         \
    } while (0)

/* fad_runtime.parallel_for returns nothing, so what torch said is kept here until the call is over. */
static _Thread_local AOTITorchError parallel_error;

static void parallel_for(int64_t n, fad_range_fn fn, void *ctx) {
    const AOTITorchError error = torch_parallel_for(0, n, 1, fn, ctx);
    if (error)
        parallel_error = error;
}

static fad_status check_parallel(fad_torch_call *call) {
    return parallel_error ? fad_torch_fail(call, FAD_DEVICE_ERROR, "PyTorch failed: torch_parallel_for") : FAD_OK;
}

static fad_status make_runtime(fad_torch_call *call) {
    uint32_t n_threads = 1;
    size_t bytes = 0;
    parallel_error = 0;
    if (call->problem.device == FAD_CPU) {
        TRY_TORCH(call, torch_get_num_threads(&n_threads));
        call->runtime.parallel_for = parallel_for;
    }
    TRY_CORE(call, fad_attn_workspace(&call->problem, (int32_t)n_threads, &bytes));
    if (call->problem.device == FAD_CUDA)
        TRY(fad_torch_current_stream(call, &call->runtime.stream));
    call->runtime.num_threads = (int32_t)n_threads;
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

/* Allocates a contiguous result number index. */
static fad_status make_result(fad_torch_call *call, int index, int64_t ndim, const int64_t *sizes, int32_t dtype,
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

/* out [B, Sq, Hq, Dv] or packed [Sq, Hq, Dv]; lse [B, Hq, Sq] or packed [Hq, Sq]. */
static fad_status forward(fad_torch_call *call) {
    fad_attn_problem *p = &call->problem;
    const int packed = p->cu_seqlens_q != NULL;
    const int64_t out[] = {p->B, p->Sq, p->Hq, p->Dv}, lse[] = {p->B, p->Hq, p->Sq};
    TRY(make_result(call, 0, 4 - packed, out + packed, call->dtype, &p->out.data));
    TRY(make_result(call, 1, 3 - packed, lse + packed, call->compute_dtype, &p->lse.data));
    p->out.stride_b = p->Sq * p->Hq * p->Dv, p->out.stride_s = p->Hq * p->Dv, p->out.stride_h = p->Dv;
    p->lse.stride_b = p->Hq * p->Sq, p->lse.stride_s = 1, p->lse.stride_h = p->Sq;
    TRY(make_runtime(call));
    TRY_CORE(call, fad_attn_forward(p, &call->runtime));
    return check_parallel(call);
}

/* o [C, B, Sq, Hq, Dv], m and l [C, B, Hq, Sq]. */
static fad_status forward_partials(fad_torch_call *call) {
    const fad_attn_problem *p = &call->problem;
    fad_partials partials = {0};
    TRY_CORE(call, fad_attn_partials_count(p, &partials.n_splits));
    const int64_t o[] = {partials.n_splits, p->B, p->Sq, p->Hq, p->Dv}, ml[] = {partials.n_splits, p->B, p->Hq, p->Sq};
    TRY(make_result(call, 0, 5, o, call->compute_dtype, &partials.o));
    TRY(make_result(call, 1, 4, ml, call->compute_dtype, &partials.m));
    TRY(make_result(call, 2, 4, ml, call->compute_dtype, &partials.l));
    TRY(make_runtime(call));
    TRY_CORE(call, fad_attn_partials(p, &partials, &call->runtime));
    return check_parallel(call);
}

static fad_status enter_device(fad_torch_call *call) {
    if (call->problem.device == FAD_CUDA)
        TRY_TORCH(call, aoti_torch_create_device_guard(call->device_index, &call->guard));
    return FAD_OK;
}

/* True if torch took every handle back. */
static bool release(AtenTensorHandle *handles, int n) {
    bool released = true;
    for (int i = 0; i < n; i++)
        if (handles[i] && aoti_torch_delete_tensor_object(handles[i]) != 0)
            released = false;
    return released;
}

static void run(StableIValue *stack, int n_results, fad_status (*body)(fad_torch_call *)) {
    fad_torch_call call = {0};
    for (int i = 0; i < N_TENSOR_ARGS; i++)
        call.tensors[i] = (AtenTensorHandle)(uintptr_t)stack[i];
    fad_status status = fad_torch_unpack(&call, stack);
    if (status == FAD_OK)
        status = enter_device(&call);
    if (status == FAD_OK)
        status = body(&call);

    bool released = release(call.tensors, N_TENSOR_ARGS);
    released = release(&call.workspace, 1) && released;
    if (status != FAD_OK)
        released = release(call.results, MAX_RESULTS) && released;
    if (call.guard)
        released = aoti_torch_delete_device_guard(call.guard) == 0 && released;
    if (status == FAD_OK && !released)
        status = fad_torch_fail(&call, FAD_DEVICE_ERROR, "PyTorch failed to take back a tensor or the device guard");
    if (status != FAD_OK) {
        char message[sizeof call.message + 32];
        snprintf(message, sizeof message, "flash_attn_det[%d]: %s", (int)status, call.message);
        aoti_torch_check(false, __func__, __FILE__, __LINE__, message);
    }
    for (int i = 0; i < n_results; i++)
        stack[i] = (StableIValue)(uintptr_t)call.results[i];
}

static void fwd(StableIValue *stack, uint64_t n_arguments, uint64_t n_results) {
    (void)n_arguments;
    run(stack, (int)n_results, forward);
}

static void fwd_partials(StableIValue *stack, uint64_t n_arguments, uint64_t n_results) {
    (void)n_arguments;
    run(stack, (int)n_results, forward_partials);
}

/* Gives the kernels to torch's dispatcher; Python calls it once, after it defined the schemas. 0 on success. Builds of
 * torch without CUDA take the CUDA key as well: it is a name. */
FAD_API int32_t fad_torch_register(void) {
    static const char *const keys[] = {"CPU", "CUDA"};
    static TorchLibraryHandle libraries[2]; /* kept: a registration lasts as long as its library */
    AOTITorchError error = 0;
    for (int i = 0; i < 2 && !error; i++) {
        error = aoti_torch_library_init_impl("flash_attn_det", keys[i], __FILE__, __LINE__, &libraries[i]);
        if (!error)
            error = torch_library_impl(libraries[i], "fwd", fwd, TORCH_2_10);
        if (!error)
            error = torch_library_impl(libraries[i], "fwd_partials", fwd_partials, TORCH_2_10);
    }
    return error;
}
