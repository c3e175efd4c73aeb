/* Finds libflash_attn_det_cuda.so beside this library, on the first call with CUDA tensors: machines without a GPU never
 * load it, and builds without nvcc do not have it. */
#define _GNU_SOURCE /* dladdr */
#include "core.h"

#include <dlfcn.h>
#include <stdatomic.h>
#include <stdio.h>

static const char library_name[] = "libflash_attn_det_cuda.so";

static fad_status library_path(char *path, size_t size) {
    Dl_info info;
    const void *here = &library_name;
    if (!dladdr(here, &info) || !info.dli_fname)
        return fad_fail(FAD_UNSUPPORTED, "cannot tell where this library was loaded from, to find %s beside it",
                        library_name);
    const char *slash = strrchr(info.dli_fname, '/');
    const int directory = slash ? (int)(slash - info.dli_fname) + 1 : 0;
    if (snprintf(path, size, "%.*s%s", directory, info.dli_fname, library_name) >= (int)size)
        return fad_fail(FAD_UNSUPPORTED, "the path of %s is longer than %zu bytes", library_name, size);
    return FAD_OK;
}

fad_status fad_load_cuda(const fad_device_backend **backend) {
    static const fad_core_services services = {fad_fail, fad_forced_schedule, FAD_STRUCT_BYTES, FAD_CONTRACT_VERSION};
    static _Atomic(const fad_device_backend *) loaded;
    char path[4096];
    if ((*backend = atomic_load(&loaded)))
        return FAD_OK;
    const fad_status status = library_path(path, sizeof path);
    if (status != FAD_OK)
        return status;
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return fad_fail(FAD_UNSUPPORTED,
                        "the tensors are on a CUDA device, but this build has no CUDA kernels (%s); install again "
                        "with nvcc on the PATH, FLASH_ATTN_DET_CUDA=1 makes that an error",
                        dlerror());
    const fad_device_backend *(*entry)(const fad_core_services *);
    /* POSIX's way around function pointers that are not objects */
    *(void **)&entry = dlsym(library, "fad_cuda_backend");
    *backend = entry ? entry(&services) : NULL;
    if (!*backend)
        return fad_fail(FAD_UNSUPPORTED, "%s is from another build of flash_attn_det: install again", path);
    atomic_store(&loaded, *backend);
    return FAD_OK;
}
