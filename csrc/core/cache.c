/* The entry points of appends and rotations: check everything, then hand the call to its device. */
#include "require.h"

static fad_status check_runtime(const fad_runtime *runtime) {
    REQUIRE(runtime && runtime->num_threads >= 1,
            "runtime is null or has no threads, expected num_threads of at least 1");
    return FAD_OK;
}

fad_status fad_append_to_cache(const fad_cache_append *append, const fad_runtime *runtime) {
    const fad_device_backend *cuda;
    TRY(fad_check_append(append));
    TRY(check_runtime(runtime));
    if (append->device == FAD_CPU)
        return fad_cpu_append(append, runtime);
    TRY(fad_load_cuda(&cuda));
    return cuda->append(append, runtime);
}

fad_status fad_rotate(const fad_rotation *rotation, const fad_runtime *runtime) {
    const fad_device_backend *cuda;
    TRY(fad_check_rotation(rotation));
    TRY(check_runtime(runtime));
    if (rotation->device == FAD_CPU)
        return fad_cpu_rotate(rotation, runtime);
    TRY(fad_load_cuda(&cuda));
    return cuda->rotate(rotation, runtime);
}
