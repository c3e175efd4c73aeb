/* The entry points of the backward: check everything, then hand the call to the backend of its device. */
#include "require.h"

fad_status fad_attn_backward_workspace(const fad_attn_problem *problem, int32_t num_threads, size_t *bytes) {
    const fad_backend *backend;
    TRY(fad_check_backward(problem));
    REQUIRE(num_threads >= 1 && bytes, "num_threads is %d and bytes is %p, expected at least 1 and an address",
            num_threads, (void *)bytes);
    TRY(fad_select_backend(problem, &backend));
    return backend->backward_workspace(problem, num_threads, bytes);
}

fad_status fad_attn_backward(const fad_attn_problem *problem, const fad_attn_gradients *gradients,
                             const fad_runtime *runtime) {
    const fad_backend *backend;
    size_t bytes;
    TRY(fad_check_backward(problem));
    TRY(fad_check_gradients(problem, gradients));
    REQUIRE(runtime && runtime->num_threads >= 1,
            "runtime is null or has no threads, expected num_threads of at least 1");
    TRY(fad_select_backend(problem, &backend));
    TRY(backend->backward_workspace(problem, runtime->num_threads, &bytes));
    TRY(fad_check_workspace(runtime, bytes));
    return backend->backward(problem, gradients, runtime);
}
