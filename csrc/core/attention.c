/* The entry points: check everything, then hand the call to the backend of its device. */
#include "core.h"

fad_status fad_select_backend(const fad_attn_problem *problem, const fad_backend **backend) {
    if (problem->device == FAD_CPU)
        return fad_cpu_select_backend(problem, backend);
    const fad_device_backend *cuda;
    const fad_status loaded = fad_load_cuda(&cuda);
    if (loaded == FAD_OK)
        *backend = &cuda->attention;
    return loaded;
}

static fad_status select_backend(const fad_attn_problem *problem, const fad_backend **backend) {
    const fad_status status = fad_check_problem(problem);
    return status != FAD_OK ? status : fad_select_backend(problem, backend);
}

fad_status fad_attn_check(const fad_attn_problem *problem) {
    const fad_backend *backend;
    return select_backend(problem, &backend);
}

fad_status fad_attn_workspace(const fad_attn_problem *problem, int32_t num_threads, size_t *bytes) {
    const fad_backend *backend;
    const fad_status status = select_backend(problem, &backend);
    if (status != FAD_OK)
        return status;
    if (num_threads < 1 || !bytes)
        return fad_fail(FAD_INVALID_ARGUMENT, "num_threads is %d and bytes is %p, expected at least 1 and an address",
                        num_threads, (void *)bytes);
    return backend->workspace(problem, num_threads, bytes);
}

static fad_status check_workspace(const fad_backend *backend, const fad_attn_problem *problem,
                                  const fad_runtime *runtime) {
    size_t bytes = 0;
    if (!runtime || runtime->num_threads < 1)
        return fad_fail(FAD_INVALID_ARGUMENT, "runtime is null or has no threads, expected num_threads of at least 1");
    const fad_status status = backend->workspace(problem, runtime->num_threads, &bytes);
    return status != FAD_OK ? status : fad_check_workspace(runtime, bytes);
}

fad_status fad_attn_forward(const fad_attn_problem *problem, const fad_runtime *runtime) {
    const fad_backend *backend;
    fad_status status = select_backend(problem, &backend);
    if (status == FAD_OK)
        status = fad_check_out(problem);
    if (status == FAD_OK)
        status = check_workspace(backend, problem, runtime);
    return status != FAD_OK ? status : backend->forward(problem, runtime);
}

fad_status fad_attn_partials_count(const fad_attn_problem *problem, int64_t *count) {
    fad_status status = fad_check_problem(problem);
    if (status == FAD_OK)
        status = fad_check_splittable(problem);
    if (status == FAD_OK && !count)
        status = fad_fail(FAD_INVALID_ARGUMENT, "count is null, expected an address");
    if (status == FAD_OK)
        *count = fad_split_capacity(problem) + (problem->sinks != NULL);
    return status;
}

fad_status fad_attn_partials(const fad_attn_problem *problem, const fad_partials *partials,
                             const fad_runtime *runtime) {
    const fad_backend *backend;
    fad_status status = select_backend(problem, &backend);
    if (status == FAD_OK)
        status = fad_check_partials(problem, partials);
    if (status == FAD_OK)
        status = check_workspace(backend, problem, runtime);
    return status != FAD_OK ? status : backend->partials(problem, partials, runtime);
}
