/* What the host side of the kernels shares: errors, launches, the device, where partial states lie in a workspace. */
#ifndef FAD_CUDA_HOST_CUH
#define FAD_CUDA_HOST_CUH

#include "../core/backend.h"

/* Set when the core asks for the backend. */
extern const fad_core_services *fad_core;

fad_status cuda_status(cudaError_t error, const char *what);
#define TRY(call)                                                                                                      \
    do {                                                                                                               \
        const fad_status status_ = (call);                                                                             \
        if (status_ != FAD_OK)                                                                                         \
            return status_;                                                                                            \
    } while (0)
#define TRY_CUDA(call) TRY(cuda_status(call, #call))

struct Device {
    int id, multiprocessors, shared_bytes, compute; /* compute: capability, 90 for 9.0 */
};
fad_status get_device(Device *device);

static inline cudaLaunchAttribute cluster_of(int blocks) {
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {(unsigned)blocks, 1, 1};
    return attribute;
}

/* most_shared: the most that any launch of this kernel may ask for. It is a setting of the kernel, which other threads
 * launch too, so that all must give the same; 0: none asks for any. */
struct LaunchOptions {
    size_t most_shared;
    /* May start before the kernel before it has ended, because it waits for it itself: if it has been compiled for compute
     * capability 9.0 or later. */
    bool before_last_ends;
    int cluster = 1; /* thread blocks that run together, if the kernel does not say */
};

template <class... Args>
static fad_status launch(void (*kernel)(Args...), int64_t blocks, int threads, size_t shared, void *stream,
                         LaunchOptions options, Args... args) {
    if (blocks == 0)
        return FAD_OK;
    if (blocks > INT32_MAX)
        return fad_core->fail(FAD_UNSUPPORTED, "the call needs %lld thread blocks, a launch holds %d",
                              (long long)blocks, INT32_MAX);
    if (options.most_shared)
        TRY_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)options.most_shared));
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config = {(unsigned)blocks, (unsigned)threads, shared, (cudaStream_t)stream, attributes, 0};
    if (options.before_last_ends) {
        cudaFuncAttributes code;
        TRY_CUDA(cudaFuncGetAttributes(&code, kernel));
        cudaLaunchAttribute &attribute = attributes[config.numAttrs++];
        attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute.val.programmaticStreamSerializationAllowed = code.ptxVersion >= 90;
    }
    if (options.cluster > 1)
        attributes[config.numAttrs++] = cluster_of(options.cluster);
    return cuda_status(cudaLaunchKernelEx(&config, kernel, args...), "kernel launch");
}

/* Splits that the keys of a sequence can touch. */
static inline int64_t most_splits(const fad_attn_problem *p) {
    return fad_split_capacity(p) + (p->k_pos != NULL); /* an offset start can touch one more */
}

/* One state per split and row at base, each array on a 64-byte boundary; returns the bytes. */
size_t lay_out_partials(const fad_attn_problem *p, int64_t n_splits, char *base, fad_partials *partials);

/* N8 in kernels of their own: spilled splits to out and lse; the sinks as one more state. */
fad_status fold_partials(const fad_attn_problem *p, const fad_partials &partials, void *stream);
fad_status store_sink_states(const fad_attn_problem *p, const fad_partials &partials, void *stream);

/* The families. partials() writes one state per split; the sinks' is the caller's. */
extern const fad_backend fma_family, mma_family;

/* Their entries for the backward. */
fad_status fma_backward_workspace(const fad_attn_problem *p, int32_t num_threads, size_t *bytes);
fad_status fma_backward(const fad_attn_problem *p, const fad_attn_gradients *gradients, const fad_runtime *runtime);
fad_status mma_backward_workspace(const fad_attn_problem *p, int32_t num_threads, size_t *bytes);
fad_status mma_backward(const fad_attn_problem *p, const fad_attn_gradients *gradients, const fad_runtime *runtime);

fad_status cuda_append(const fad_cache_append *append, const fad_runtime *runtime);
fad_status cuda_rotate(const fad_rotation *rotation, const fad_runtime *runtime);

#endif
