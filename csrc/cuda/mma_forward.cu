/* The mma family's scheduler: chooses kernels and tiles, and whether splits run in parallel. Free to change (N1); lengths
 * are device arrays, so the choices use only shapes. */
#include "hopper_kernel.cuh"
#include "mma_check.cuh"

struct Plan {
    const MmaKernel *kernel;
    const HopperKernel *hopper; /* kernel is its shape; null: a generic one */
    CUtensorMap k_map, v_map;   /* for it, */
    bool keys_by_warp;          /* unless it does without */
    Device device;
    int resident;              /* thread blocks that the device holds at once */
    int64_t n_tiles, n_splits; /* upper bounds for packed calls */
    int64_t item_splits;       /* consecutive splits that are one item */
    int cluster_splits;        /* all of a tile, if a cluster folds them, or 1 */
    bool states;               /* are wanted, not out */
    bool spill;
};

/* Rows of one kv head of one sequence; of packed sequences, on average. */
static int64_t typical_rows(const fad_attn_problem *p) {
    return (p->cu_seqlens_q ? p->Sq / max(p->B, (int64_t)1) : p->Sq) * fad_group(p);
}

/* The smallest tile that holds the rows of a sequence, else the largest; or the forced one. */
static const MmaKernel *choose_kernel(const fad_attn_problem *p, const Device &device) {
    const bool bf16 = p->dtype == FAD_BFLOAT16;
    const MmaKernels tables[] = {bf16 ? mma_decode_bf16() : mma_decode_fp16(),
                                 bf16 ? mma_tile_bf16() : mma_tile_fp16()};
    const int64_t dims = max(p->D, p->Dv), forced = fad_core->forced_schedule()->tile_rows;
    const int64_t rows = forced ? forced : typical_rows(p);
    const MmaKernel *best = nullptr;
    for (const MmaKernels &table : tables)
        for (const MmaKernel *k = table.begin; k < table.end; k++) {
            const bool narrowest = k->dims >= dims && (k->dims == 64 || k->dims / 2 < dims);
            if (narrowest && k->shared_bytes <= (size_t)device.shared_bytes && (!best || best->rows < rows))
                best = k;
        }
    return best;
}

/* The Hopper kernel where it can run, else null. */
static void choose_hopper(const fad_attn_problem *p, Plan *plan) {
#ifdef FAD_HOPPER
    const fad_schedule *forced = fad_core->forced_schedule();
    if (plan->device.compute != 90 || forced->kernel == 1)
        return;
    plan->hopper = find_hopper_kernel(p, forced->tile_rows ? forced->tile_rows : typical_rows(p));
    const bool by_engine = describe_keys(p, *plan->hopper, &plan->k_map, &plan->v_map);
    plan->keys_by_warp = !by_engine && p->block_table && plan->hopper->copies;
    if (!by_engine && !plan->keys_by_warp)
        plan->hopper = nullptr;
#else
    (void)p, (void)plan;
#endif
}

/* Whether the states of all splits may go through memory: never those of packed calls. */
static bool may_spill(const fad_attn_problem *p, const Plan &plan) {
    const int forced = fad_core->forced_schedule()->split_parallel;
    /* As long as the states are not larger than K and V. */
    const double states = 4.0 * p->Sq * p->Hq * p->Dv * plan.n_splits, keys = 2.0 * p->Sk * p->Hk * (p->D + p->Dv);
    return !p->cu_seqlens_q && plan.n_splits > 1 && (forced ? forced == 2 : states <= keys);
}

/* A kernel whose clusters share splits, if that is possible and pays, else null. */
static fad_status choose_cluster(const fad_attn_problem *p, Plan *plan) {
    plan->kernel = nullptr;
    plan->cluster_splits = 1;
#ifdef FAD_HOPPER
    const fad_schedule *forced = fad_core->forced_schedule();
    const bool few = (forced->tile_rows ? forced->tile_rows : typical_rows(p)) <= DECODE_ROWS,
               wanted = forced->kernel == 0 || forced->kernel == 3;
    if (plan->device.compute == 90 && wanted && few && (plan->n_splits == 1 || may_spill(p, *plan)))
        return find_cluster(p, plan->device, plan->n_splits, plan->states, &plan->kernel, &plan->cluster_splits);
#else
    (void)p;
#endif
    return FAD_OK;
}

static fad_status count_resident(const Plan &plan, int *resident) {
    const MmaKernel &kernel = *plan.kernel;
    const void *run = plan.hopper ? (const void *)plan.hopper->run : (const void *)kernel.run;
    int of_one;
    TRY_CUDA(cudaFuncSetAttribute(run, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.device.shared_bytes));
    TRY_CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_one, run, kernel.threads, kernel.shared_bytes));
    *resident = max(of_one, 1) * plan.device.multiprocessors; /* none: the launch says why */
    return FAD_OK;
}

/* How many consecutive splits a thread block should take so that all of them together fill the device `least` times or a
 * little more often, if that leaves less of it idle. */
static int64_t split_run(const Plan &plan, int least) {
    int64_t best = 1;
    double best_use = 0;
    for (int waves = least; waves < least + 3 && plan.n_tiles > 0 && plan.n_splits > 0; waves++) {
        const int64_t runs = fad_clamp(waves * plan.resident / plan.n_tiles, 1, plan.n_splits);
        const int64_t length = (plan.n_splits + runs - 1) / runs,
                      items = plan.n_tiles * ((plan.n_splits + length - 1) / length);
        const double waves_taken = (double)((items + plan.resident - 1) / plan.resident);
        const double use = (double)(plan.n_tiles * plan.n_splits) / (waves_taken * plan.resident * length);
        if (use > best_use * 1.1)
            best = length, best_use = use;
    }
    return best;
}
/* Every run of splits has a start and an end to pay for, so that one wave would do. But where there are several thread
 * blocks on a multiprocessor, and states are spilled anyway, they hide them from each other, and short runs end together. */
static int64_t choose_run(const Plan &plan) {
    constexpr int WAVES = 4;
    const int64_t run = split_run(plan, 1);
    const bool many = plan.n_tiles * plan.n_splits > (int64_t)(WAVES - 1) * plan.resident,
               several = plan.resident > plan.device.multiprocessors && !plan.kernel->persistent;
    return many && several && run < plan.n_splits ? split_run(plan, WAVES) : run;
}

static int64_t runs_of(const Plan &plan, int64_t n_splits) {
    return (n_splits + plan.item_splits - 1) / plan.item_splits;
}

static fad_status make_plan(const fad_attn_problem *p, bool states, Plan *plan) {
    TRY(check_lengths(p));
    const int64_t entries = fad_cache_entries(p), rows = p->block_table ? p->page_size : p->Sk;
    TRY(check_rows("q", p->q, p->cu_seqlens_q ? 1 : p->B, p->Sq, p->Hq, p->D));
    TRY(check_rows("k", p->k, entries, rows, p->Hk, p->D));
    TRY(check_rows("v", p->v, entries, rows, p->Hk, p->Dv));
    TRY(get_device(&plan->device));
    plan->n_splits = most_splits(p);
    plan->states = states;
    plan->hopper = nullptr;
    plan->k_map = plan->v_map = {}; /* kernels that do not need them get them all the same */
    plan->keys_by_warp = false;
    TRY(choose_cluster(p, plan));
    if (!plan->kernel) {
        choose_hopper(p, plan);
        plan->kernel = plan->hopper ? &plan->hopper->shape : choose_kernel(p, plan->device);
    }
    if (!plan->kernel)
        return fad_core->fail(FAD_UNSUPPORTED, "head dims %lld and %lld need more shared memory than this device has",
                              (long long)p->D, (long long)p->Dv);
    TRY(count_resident(*plan, &plan->resident));
    plan->n_tiles = tile_bound(*p, plan->kernel->rows);
    plan->item_splits = plan->kernel->ranks > 1 ? 1 : choose_run(*plan);
    /* Spilling pays where tiles alone leave multiprocessors idle. */
    const bool pays = plan->item_splits < plan->n_splits || fad_core->forced_schedule()->split_parallel == 2;
    plan->spill = may_spill(p, *plan) && pays && plan->cluster_splits == 1;
    return FAD_OK;
}

/* The workspace: the counter of the items, on a line of its own, and then partial states, or running ones at rest. */
constexpr size_t COUNTER_BYTES = 64;

static size_t rest_bytes(const Plan &plan) {
    return plan.n_splits > 1 ? (size_t)min(plan.n_tiles, (int64_t)plan.resident) * plan.kernel->rest_bytes : 0;
}

static fad_status workspace(const fad_attn_problem *p, int32_t, size_t *bytes) {
    Plan plan;
    fad_partials partials;
    TRY(make_plan(p, false, &plan));
    *bytes = COUNTER_BYTES + (plan.spill ? lay_out_partials(p, plan.n_splits, nullptr, &partials) : rest_bytes(plan));
    return FAD_OK;
}

/* Tiles with all their splits, or runs of n_splits. */
static Work make_work(const fad_attn_problem *p, const Plan &plan, int64_t n_splits, void *rest,
                      const fad_partials &partials) {
    const int64_t item_splits = n_splits ? plan.item_splits : plan.n_splits,
                  n_items = plan.n_tiles * (n_splits ? runs_of(plan, n_splits) : 1);
    return {n_items,       plan.n_tiles,
            item_splits,   n_splits,
            nullptr,       rest,
            partials,      plan.keys_by_warp,
            ScoreRule(*p), DenseWork(*p, plan.kernel->rows, n_items, plan.n_tiles, item_splits)};
}

/* One thread block an item or, persistent, as many as the device holds at once. */
static fad_status run(const fad_attn_problem *p, const Plan &plan, Work work, const fad_runtime *runtime) {
    const MmaKernel &kernel = *plan.kernel;
    const int64_t grid = kernel.persistent ? min(work.n_items, (int64_t)plan.resident) : work.n_items;
    if (grid < work.n_items) {
        work.counter = (unsigned long long *)runtime->workspace;
        TRY_CUDA(cudaMemsetAsync(work.counter, 0, COUNTER_BYTES, (cudaStream_t)runtime->stream));
    }
    const LaunchOptions options = {(size_t)plan.device.shared_bytes, false,
                                   kernel.splits ? kernel.ranks * work.cluster_splits : 1};
    if (plan.hopper)
        return launch(plan.hopper->run, grid, kernel.threads, kernel.shared_bytes, runtime->stream, options, *p, work,
                      plan.k_map, plan.v_map);
    return launch(kernel.run, grid * kernel.ranks, kernel.threads, kernel.shared_bytes, runtime->stream, options, *p,
                  work);
}

/* Runs of splits of every tile. */
static fad_status run_splits(const fad_attn_problem *p, const Plan &plan, const fad_partials &partials,
                             int64_t n_splits, const fad_runtime *runtime) {
    if (n_splits == 0) /* make_work() would take it for tiles with all their splits */
        return FAD_OK;
    fad_partials of_splits = partials; /* a sink's state, if there is one, is not the kernel's */
    of_splits.n_splits = n_splits;
    return run(p, plan, make_work(p, plan, n_splits, nullptr, of_splits), runtime);
}

static fad_status forward(const fad_attn_problem *p, const fad_runtime *runtime) {
    Plan plan;
    fad_partials partials;
    TRY(check_rows("out", p->out, p->cu_seqlens_q ? 1 : p->B, p->Sq, p->Hq, p->Dv));
    TRY(make_plan(p, false, &plan));
    char *const after_counter = (char *)runtime->workspace + COUNTER_BYTES;
    if (plan.cluster_splits > 1) {
        Work work = make_work(p, plan, plan.n_splits, nullptr, {});
        work.cluster_splits = plan.cluster_splits;
        work.cluster = Divisor(plan.cluster_splits);
        return run(p, plan, work, runtime);
    }
    if (!plan.spill) /* every tile with all its splits */
        return run(p, plan, make_work(p, plan, 0, after_counter, {}), runtime);
    lay_out_partials(p, plan.n_splits, after_counter, &partials);
    TRY(run_splits(p, plan, partials, plan.n_splits, runtime));
    return fold_partials(p, partials, runtime->stream);
}

static fad_status partial_states(const fad_attn_problem *p, const fad_partials *partials, const fad_runtime *runtime) {
    Plan plan;
    TRY(make_plan(p, true, &plan));
    return run_splits(p, plan, *partials, fad_split_capacity(p), runtime);
}

const fad_backend mma_family = {workspace, forward, partial_states, mma_backward_workspace, mma_backward};
