/* The fma family's kernels and their scheduler: chooses tiles and whether splits run in parallel. Free to change (N1);
 * lengths are device arrays, so the choices use only shapes. */
#include "fma_kernel.cuh"
#include "host.cuh"

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

struct Plan {
    const FmaKernel *kernel;
    size_t shared_bytes, most_shared; /* of a thread block, beside its Tile; what this device has */
    int64_t n_tiles, n_splits;        /* upper bounds for packed calls */
    bool spill;
};

static size_t most_shared(const Device &device) { return (size_t)device.shared_bytes - sizeof(Tile); }

/* The largest tile that the rows of a sequence fill and the device's shared memory holds, or the forced one. */
static const FmaKernel *choose_kernel(const fad_attn_problem *p, const Device &device) {
    const int64_t rows = p->Sq * fad_group(p), forced = fad_core->forced_schedule()->tile_rows;
    const FmaKernel *best = nullptr;
    for (const FmaKernel &k : fma_kernels) {
        const bool narrowest = k.values >= p->Dv && (k.values == 64 || k.values / 2 < p->Dv);
        if (!narrowest || k.shared_bytes(p->D) > most_shared(device) || (forced && k.rows > forced && best))
            continue;
        if (forced || !best || best->rows < rows)
            best = &k;
    }
    return best;
}

static fad_status make_plan(const fad_attn_problem *p, Plan *plan) {
    Device device;
    TRY(get_device(&device));
    plan->kernel = choose_kernel(p, device);
    if (!plan->kernel)
        return fad_core->fail(FAD_UNSUPPORTED, "head dim %lld needs more shared memory than this device has",
                              (long long)p->D);
    plan->shared_bytes = plan->kernel->shared_bytes(p->D);
    plan->most_shared = most_shared(device);
    plan->n_tiles = tile_bound(*p, plan->kernel->rows);
    plan->n_splits = most_splits(p);
    const int forced = fad_core->forced_schedule()->split_parallel;
    /* Up to so many rows for a kv head, the states stay small beside K and V: at 256 rows, head dims of 128 and the
     * default split size, a quarter of fp32 K and V, half of 16-bit ones. */
    const bool few_rows = p->Sq * fad_group(p) <= 256 && plan->n_tiles < 2 * device.multiprocessors;
    plan->spill = !p->cu_seqlens_q && plan->n_splits > 1 && (forced ? forced == 2 : few_rows);
    return FAD_OK;
}

/* 16-bit out cannot hold the running O of a prefill with several splits. */
static size_t running_bytes(const fad_attn_problem *p, const Plan &plan) {
    const int64_t rows = p->cu_seqlens_q ? p->Sq : p->B * p->Sq;
    return p->dtype == FAD_FLOAT32 || plan.n_splits <= 1 ? 0 : (size_t)(rows * p->Hq * p->Dv) * sizeof(float);
}

static fad_status workspace(const fad_attn_problem *p, int32_t, size_t *bytes) {
    Plan plan;
    fad_partials partials;
    TRY(make_plan(p, &plan));
    *bytes = plan.spill ? lay_out_partials(p, plan.n_splits, nullptr, &partials) : running_bytes(p, plan);
    return FAD_OK;
}

static fad_status run_splits(const fad_attn_problem *p, const Plan &plan, const fad_partials &partials,
                             int64_t n_splits, void *stream) {
    return launch(plan.kernel->split, plan.n_tiles * n_splits, THREADS, plan.shared_bytes, stream,
                  {plan.most_shared, false}, *p, partials, plan.n_tiles);
}

static fad_status forward(const fad_attn_problem *p, const fad_runtime *runtime) {
    Plan plan;
    fad_partials partials;
    TRY(make_plan(p, &plan));
    if (!plan.spill)
        return launch(plan.kernel->prefill, plan.n_tiles, THREADS, plan.shared_bytes, runtime->stream,
                      {plan.most_shared, false}, *p,
                      running_bytes(p, plan) ? (float *)runtime->workspace : (float *)nullptr);
    lay_out_partials(p, plan.n_splits, (char *)runtime->workspace, &partials);
    TRY(run_splits(p, plan, partials, plan.n_splits, runtime->stream));
    return fold_partials(p, partials, runtime->stream);
}

static fad_status partial_states(const fad_attn_problem *p, const fad_partials *partials, const fad_runtime *runtime) {
    Plan plan;
    TRY(make_plan(p, &plan));
    return run_splits(p, plan, *partials, fad_split_capacity(p), runtime->stream);
}

const fad_backend fma_family = {workspace, forward, partial_states, fma_backward_workspace, fma_backward};
