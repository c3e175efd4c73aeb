/* The ops of flash_attn_det on the CPU and CUDA dispatch keys.
 *
 * A boxed kernel owns its tensor arguments and hands over its results. It raises by a C++ exception out of
 * aoti_torch_check, so run() releases everything first and raises last. */
#include "call.h"

#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>

#define TORCH_2_10 (UINT64_C(2) << 56 | UINT64_C(10) << 48) /* the oldest ABI that is promised to work */

fad_status fad_torch_fail(fad_torch_call *call, fad_status status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(call->message, sizeof call->message, format, args);
    va_end(args);
    return status;
}

static fad_status enter_device(fad_torch_call *call) {
    if (call->device == FAD_CUDA)
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

static fad_status run_body(fad_torch_call *call, const fad_torch_op *op, const StableIValue *stack) {
    TRY(fad_torch_describe(call, op));
    TRY(op->unpack(call, stack));
    TRY(enter_device(call));
    return op->body(call);
}

static void run(StableIValue *stack, const fad_torch_op *op) {
    fad_torch_call call = {0};
    for (int i = 0; i < op->n_tensors; i++)
        call.tensors[i] = (AtenTensorHandle)(uintptr_t)stack[i];
    fad_status status = run_body(&call, op, stack);

    bool released = release(call.tensors, op->n_tensors);
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
    for (int i = 0; i < op->n_results; i++)
        stack[i] = (StableIValue)(uintptr_t)call.results[i];
}

#define OPS(X) X(check) X(fwd) X(fwd_partials) X(bwd) X(append) X(rotate)

#define KERNEL(name)                                                                                                   \
    static void name(StableIValue *stack, uint64_t n_arguments, uint64_t n_results) {                                  \
        (void)n_arguments, (void)n_results;                                                                            \
        run(stack, &fad_torch_##name);                                                                                 \
    }
OPS(KERNEL)

/* Gives the kernels to torch's dispatcher; Python calls it once, after it defined the schemas. 0 on success. Builds of
 * torch without CUDA take the CUDA key as well: it is a name. */
FAD_API int32_t fad_torch_register(void) {
    static const char *const keys[] = {"CPU", "CUDA"};
    static TorchLibraryHandle libraries[2]; /* kept: a registration lasts as long as its library */
    AOTITorchError error = 0;
    for (int i = 0; i < 2 && !error; i++) {
        error = aoti_torch_library_init_impl("flash_attn_det", keys[i], __FILE__, __LINE__, &libraries[i]);
#define REGISTER(name)                                                                                                 \
    if (!error)                                                                                                        \
        error = torch_library_impl(libraries[i], #name, name, TORCH_2_10);
        OPS(REGISTER)
    }
    return error;
}
