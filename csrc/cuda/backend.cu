/* The CUDA backend: which family a call belongs to (N7), and what both share on the host. Nothing waits for the device. */
#include "fold.cuh"
#include "host.cuh"

const fad_core_services *fad_core;

fad_status cuda_status(cudaError_t error, const char *what) {
    return error == cudaSuccess ? FAD_OK
                                : fad_core->fail(FAD_DEVICE_ERROR, "%s failed: %s", what, cudaGetErrorString(error));
}

fad_status get_device(Device *device) {
    int major, minor;
    TRY_CUDA(cudaGetDevice(&device->id));
    const int id = device->id;
    TRY_CUDA(cudaDeviceGetAttribute(&device->multiprocessors, cudaDevAttrMultiProcessorCount, id));
    TRY_CUDA(cudaDeviceGetAttribute(&device->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, id));
    TRY_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id));
    TRY_CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, id));
    device->compute = 10 * major + minor;
    return FAD_OK;
}

size_t lay_out_partials(const fad_attn_problem *p, int64_t n_splits, char *base, fad_partials *partials) {
    const size_t rows = (size_t)(n_splits * p->B * p->Sq * p->Hq), ml = (rows * sizeof(float) + 63) / 64 * 64;
    *partials = {base + 2 * ml, base, base + ml, n_splits};
    return 2 * ml + rows * (size_t)p->Dv * sizeof(float);
}

fad_status fold_partials(const fad_attn_problem *p, const fad_partials &partials, void *stream) {
    constexpr int FULL = 8; /* warps that each multiprocessor should have */
    Device device;
    TRY(get_device(&device));
    const int64_t rows = tile_bound(*p, 1);
    const bool many = rows * p->Dv > (int64_t)FULL * 32 * device.multiprocessors;
    const int values = many && p->Dv % 4 == 0 ? 4 : 1;
    const auto kernel = values == 4 ? fold_splits<4> : fold_splits<1>;
    const FoldWork work(*p, (p->Dv + 32 * values - 1) / (32 * values));
    return launch(kernel, (rows * work.parts + FOLD_WARPS - 1) / FOLD_WARPS, FOLD_WARPS * 32, 0, stream, {0, true}, *p,
                  partials, work);
}

/* A thread block for each row, a thread for each of its values. */
fad_status store_sink_states(const fad_attn_problem *p, const fad_partials &partials, void *stream) {
    return launch(store_sinks, tile_bound(*p, 1), (int)(p->Dv + 31) / 32 * 32, 0, stream, {}, *p, partials);
}

static fad_status select_family(const fad_attn_problem *p, const fad_backend **family) {
    if (p->dtype == FAD_FLOAT64)
        return fad_core->fail(FAD_UNSUPPORTED,
                              "float64 has no CUDA kernel; move the tensors to the CPU, whose bits are the contract's");
    if (p->arithmetic == FAD_ARITHMETIC_MMA && p->dtype == FAD_FLOAT32)
        return fad_core->fail(FAD_UNSUPPORTED, "arithmetic 'mma' is for float16 and bfloat16; float32 has 'fma'");
    *family = p->arithmetic == FAD_ARITHMETIC_FMA || p->dtype == FAD_FLOAT32 ? &fma_family : &mma_family;
    return FAD_OK;
}

static fad_status workspace(const fad_attn_problem *p, int32_t num_threads, size_t *bytes) {
    const fad_backend *family;
    TRY(select_family(p, &family));
    return family->workspace(p, num_threads, bytes);
}

static fad_status forward(const fad_attn_problem *p, const fad_runtime *runtime) {
    const fad_backend *family;
    TRY(select_family(p, &family));
    return family->forward(p, runtime);
}

static fad_status partial_states(const fad_attn_problem *p, const fad_partials *partials, const fad_runtime *runtime) {
    const fad_backend *family;
    TRY(select_family(p, &family));
    TRY(family->partials(p, partials, runtime));
    return p->sinks ? store_sink_states(p, *partials, runtime->stream) : FAD_OK;
}

static fad_status backward_workspace(const fad_attn_problem *p, int32_t num_threads, size_t *bytes) {
    const fad_backend *family;
    TRY(select_family(p, &family));
    return family->backward_workspace(p, num_threads, bytes);
}

static fad_status backward(const fad_attn_problem *p, const fad_attn_gradients *gradients, const fad_runtime *runtime) {
    const fad_backend *family;
    TRY(select_family(p, &family));
    return family->backward(p, gradients, runtime);
}

const fad_device_backend *fad_cuda_backend(const fad_core_services *services) {
    static const fad_device_backend backend = {
        {workspace, forward, partial_states, backward_workspace, backward}, cuda_append, cuda_rotate};
    static const fad_struct_bytes bytes = FAD_STRUCT_BYTES;
    fad_core = services;
    const bool same = services->bytes.services == bytes.services && !memcmp(&services->bytes, &bytes, sizeof bytes) &&
                      services->contract == FAD_CONTRACT_VERSION;
    return same ? &backend : nullptr;
}
