/* The CUDA scheduler: chooses tiles and whether splits run in parallel, and launches. Everything here is free to change
 * (N1). Lengths are device arrays, so the choices use only shapes; nothing waits for the device. */
#include "../core/backend.h"
#include "fma_kernel.cuh"

static const fad_core_services *core;

/* One shape of the fma family. */
struct FmaKernel {
    int rows, values; /* rows of its tile, largest Dv */
    size_t (*shared_bytes)(int64_t D);
    void (*prefill)(fad_attn_problem, float *running);
    void (*split)(fad_attn_problem, fad_partials, int64_t n_tiles);
};
#define FMA_KERNEL(TR, TK, DV)                                                                                         \
    {FmaShape<TR, TK, DV>::ROWS, DV, FmaShared<FmaShape<TR, TK, DV>>::bytes, fma_prefill<FmaShape<TR, TK, DV>>,        \
     fma_split<FmaShape<TR, TK, DV>>}
static const FmaKernel fma_kernels[] = {
    FMA_KERNEL(1, 1, 64),  FMA_KERNEL(1, 1, 128), FMA_KERNEL(1, 1, 256), FMA_KERNEL(4, 1, 64),  FMA_KERNEL(4, 1, 128),
    FMA_KERNEL(4, 1, 256), FMA_KERNEL(4, 4, 64),  FMA_KERNEL(4, 4, 128), FMA_KERNEL(4, 4, 256),
};

struct Device {
    int multiprocessors, shared_bytes;
};

static fad_status cuda_status(cudaError_t error, const char *what) {
    return error == cudaSuccess ? FAD_OK
                                : core->fail(FAD_DEVICE_ERROR, "%s failed: %s", what, cudaGetErrorString(error));
}
#define TRY_CUDA(call)                                                                                                 \
    do {                                                                                                               \
        const fad_status status_ = cuda_status(call, #call);                                                           \
        if (status_ != FAD_OK)                                                                                         \
            return status_;                                                                                            \
    } while (0)

static fad_status get_device(Device *device) {
    int id;
    TRY_CUDA(cudaGetDevice(&id));
    TRY_CUDA(cudaDeviceGetAttribute(&device->multiprocessors, cudaDevAttrMultiProcessorCount, id));
    TRY_CUDA(cudaDeviceGetAttribute(&device->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, id));
    return FAD_OK;
}

struct Plan {
    const FmaKernel *kernel;
    size_t shared_bytes;
    int64_t n_tiles, n_splits; /* upper bounds for packed calls */
    bool spill;
};

/* The largest tile that the rows of a sequence fill and the device's shared memory holds, or the forced one. */
static const FmaKernel *choose_kernel(const fad_attn_problem *p, const Device &device) {
    const int64_t rows = p->Sq * fad_group(p), forced = core->forced_schedule()->tile_rows;
    const FmaKernel *best = nullptr;
    for (const FmaKernel &k : fma_kernels) {
        const bool narrowest = k.values >= p->Dv && (k.values == 64 || k.values / 2 < p->Dv);
        if (!narrowest || k.shared_bytes(p->D) + sizeof(Tile) > (size_t)device.shared_bytes ||
            (forced && k.rows > forced && best))
            continue;
        if (forced || !best || best->rows < rows)
            best = &k;
    }
    return best;
}

static fad_status make_plan(const fad_attn_problem *p, Plan *plan) {
    Device device;
    if (p->dtype == FAD_FLOAT64)
        return core->fail(FAD_UNSUPPORTED,
                          "float64 has no CUDA kernel; move the tensors to the CPU, whose bits are the contract's");
    if (p->arithmetic == FAD_ARITHMETIC_MMA || (p->arithmetic == FAD_ARITHMETIC_AUTO && p->dtype != FAD_FLOAT32))
        return core->fail(FAD_UNSUPPORTED,
                          "arithmetic 'mma', the default for 16-bit tensors on a CUDA device, has no kernel yet: "
                          "pass arithmetic='fma'");
    const fad_status status = get_device(&device);
    if (status != FAD_OK)
        return status;
    plan->kernel = choose_kernel(p, device);
    if (!plan->kernel)
        return core->fail(FAD_UNSUPPORTED, "head dim %lld needs more shared memory than this device has",
                          (long long)p->D);
    plan->shared_bytes = plan->kernel->shared_bytes(p->D);
    plan->n_tiles = tile_bound(*p, plan->kernel->rows);
    plan->n_splits = fad_split_capacity(p) + (p->k_pos != NULL); /* an offset start can touch one more */
    const int forced = core->forced_schedule()->split_parallel;
    /* Up to so many rows for a kv head, the states stay small beside K and V: at 256 rows, head dims of 128 and the
     * default split size, a quarter of fp32 K and V, half of 16-bit ones. */
    const bool few_rows = p->Sq * fad_group(p) <= 256 && plan->n_tiles < 2 * device.multiprocessors;
    plan->spill = !p->cu_seqlens_q && plan->n_splits > 1 && (forced ? forced == 2 : few_rows);
    return FAD_OK;
}

/* One state per split and row, each array on a 64-byte boundary. */
static size_t lay_out_partials(const fad_attn_problem *p, int64_t n_splits, char *base, fad_partials *partials) {
    const size_t rows = (size_t)(n_splits * p->B * p->Sq * p->Hq), ml = (rows * sizeof(float) + 63) / 64 * 64;
    *partials = {base + 2 * ml, base, base + ml, n_splits};
    return 2 * ml + rows * (size_t)p->Dv * sizeof(float);
}

/* 16-bit out cannot hold the running O of a prefill with several splits. */
static size_t running_bytes(const fad_attn_problem *p, const Plan &plan) {
    const int64_t rows = p->cu_seqlens_q ? p->Sq : p->B * p->Sq;
    return p->dtype == FAD_FLOAT32 || plan.n_splits <= 1 ? 0 : (size_t)(rows * p->Hq * p->Dv) * sizeof(float);
}

static fad_status workspace(const fad_attn_problem *p, int32_t, size_t *bytes) {
    Plan plan;
    fad_partials partials;
    const fad_status status = make_plan(p, &plan);
    if (status == FAD_OK)
        *bytes = plan.spill ? lay_out_partials(p, plan.n_splits, nullptr, &partials) : running_bytes(p, plan);
    return status;
}

template <class... Args>
static fad_status launch(void (*kernel)(Args...), int64_t blocks, int threads, size_t shared, void *stream,
                         Args... args) {
    if (blocks == 0)
        return FAD_OK;
    if (blocks > INT32_MAX)
        return core->fail(FAD_UNSUPPORTED, "the call needs %lld thread blocks, a launch holds %d", (long long)blocks,
                          INT32_MAX);
    TRY_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    kernel<<<(unsigned)blocks, threads, shared, (cudaStream_t)stream>>>(args...);
    return cuda_status(cudaGetLastError(), "kernel launch");
}

static fad_status run_splits(const fad_attn_problem *p, const Plan &plan, const fad_partials &partials,
                             int64_t n_splits, void *stream) {
    return launch(plan.kernel->split, plan.n_tiles * n_splits, THREADS, plan.shared_bytes, stream, *p, partials,
                  plan.n_tiles);
}

/* A grid with one warp for each row of out. */
static fad_status run_rows(const fad_attn_problem *p, void (*kernel)(fad_attn_problem, fad_partials),
                           const fad_partials &partials, void *stream) {
    constexpr int WARPS = 4;
    return launch(kernel, (tile_bound(*p, 1) + WARPS - 1) / WARPS, WARPS * 32, 0, stream, *p, partials);
}

static fad_status forward(const fad_attn_problem *p, const fad_runtime *runtime) {
    Plan plan;
    fad_partials partials;
    fad_status status = make_plan(p, &plan);
    if (status != FAD_OK)
        return status;
    if (!plan.spill)
        return launch(plan.kernel->prefill, plan.n_tiles, THREADS, plan.shared_bytes, runtime->stream, *p,
                      running_bytes(p, plan) ? (float *)runtime->workspace : (float *)nullptr);
    lay_out_partials(p, plan.n_splits, (char *)runtime->workspace, &partials);
    status = run_splits(p, plan, partials, plan.n_splits, runtime->stream);
    return status != FAD_OK ? status : run_rows(p, fold_splits, partials, runtime->stream);
}

static fad_status partial_states(const fad_attn_problem *p, const fad_partials *partials, const fad_runtime *runtime) {
    Plan plan;
    fad_status status = make_plan(p, &plan);
    if (status == FAD_OK)
        status = run_splits(p, plan, *partials, fad_split_capacity(p), runtime->stream);
    return status != FAD_OK || !p->sinks ? status : run_rows(p, store_sinks, *partials, runtime->stream);
}

const fad_backend *fad_cuda_backend(const fad_core_services *services) {
    static const fad_backend backend = {workspace, forward, partial_states};
    core = services;
    const bool same = services->problem_bytes == sizeof(fad_attn_problem) && services->contract == FAD_CONTRACT_VERSION;
    return same ? &backend : nullptr;
}
