/* The getter of the current CUDA stream is in libtorch_cuda.so, which only CUDA builds of torch have. It is looked up in
 * the process, so that one shim serves every build. (The device-generic getter knows a stream's id, not its handle.) */
#define _GNU_SOURCE /* RTLD_NOLOAD */
#include "call.h"

#include <dlfcn.h>
#include <stdatomic.h>

static aoti_torch_get_current_cuda_stream_fn find_getter(void) {
    static _Atomic(void *) found;
    void *symbol = atomic_load(&found);
    void *library = symbol ? NULL : dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD); /* kept open: torch stays */
    if (library)
        atomic_store(&found, symbol = dlsym(library, "aoti_torch_get_current_cuda_stream"));
    aoti_torch_get_current_cuda_stream_fn getter;
    *(void **)&getter = symbol; /* POSIX's way around function pointers that are not objects */
    return getter;
}

fad_status fad_torch_current_stream(fad_torch_call *call, void **stream) {
    const aoti_torch_get_current_cuda_stream_fn get_current_cuda_stream = find_getter();
    if (!get_current_cuda_stream)
        return fad_torch_fail(call, FAD_UNSUPPORTED,
                              "the tensors are on a CUDA device, but this PyTorch has no libtorch_cuda.so with "
                              "aoti_torch_get_current_cuda_stream: it needs a CUDA build of torch 2.10 or newer");
    TRY_TORCH(call, get_current_cuda_stream(call->device_index, stream));
    return FAD_OK;
}
