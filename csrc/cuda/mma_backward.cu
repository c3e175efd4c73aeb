/* The scheduler of the mma family's backward: sums of rows, then dk and dv by tiles of keys, then dq by tiles of rows. Each
 * gradient has one owner, so that nothing is added in the order in which thread blocks happen to end. Free to change. */
#include "hopper_backward_kernel.cuh"
#include "mma_backward_sums.cuh"
#include "mma_check.cuh"

/* A kernel, and how many stages its pipeline has on this device. */
template <class Tiles> struct Choice {
    const BackwardKernel<Tiles> *kernel;
    int stages;
};

struct Plan {
    Choice<KeyTiles> keys; /* generic kernels */
    Choice<Work> rows;
    Device device;
};

/* The best kernel that the device's shared memory holds; a forced tile_rows chooses among those of the same dims. */
template <class Tiles>
static Choice<Tiles> choose_kernel(const fad_attn_problem *p, const BackwardKernels<Tiles> &table,
                                   size_t shared_bytes) {
    const int64_t dims = max(p->D, p->Dv), forced = fad_core->forced_schedule()->tile_rows;
    Choice<Tiles> best = {nullptr, 0};
    for (const BackwardKernel<Tiles> *k = table.begin; k < table.end; k++) {
        const bool narrowest = k->dims >= dims && (k->dims == 64 || k->dims / 2 < dims);
        const int stages = k->shared_bytes[1] <= shared_bytes ? 2 : k->shared_bytes[0] <= shared_bytes ? 1 : 0;
        if (narrowest && stages && (!best.kernel || (forced && best.kernel->tile > forced)))
            best = {k, stages};
    }
    return best;
}

static fad_status make_plan(const fad_attn_problem *p, Plan *plan) {
    const bool bf16 = p->dtype == FAD_BFLOAT16;
    TRY(check_lengths(p));
    TRY(get_device(&plan->device));
    const size_t shared_bytes = (size_t)plan->device.shared_bytes;
    plan->keys = choose_kernel(p, bf16 ? mma_backward_keys_bf16() : mma_backward_keys_fp16(), shared_bytes);
    plan->rows = choose_kernel(p, bf16 ? mma_backward_rows_bf16() : mma_backward_rows_fp16(), shared_bytes);
    if (!plan->keys.kernel || !plan->rows.kernel)
        return fad_core->fail(FAD_UNSUPPORTED,
                              "the backward of head dims %lld and %lld needs more shared memory than this device has",
                              (long long)p->D, (long long)p->Dv);
    return FAD_OK;
}

static fad_status check_tensors(const fad_attn_problem *p, const fad_attn_gradients *g) {
    const int64_t entries_q = p->cu_seqlens_q ? 1 : p->B, entries_k = fad_cache_entries(p);
    TRY(check_rows("q", p->q, entries_q, p->Sq, p->Hq, p->D));
    TRY(check_rows("k", p->k, entries_k, p->Sk, p->Hk, p->D));
    TRY(check_rows("v", p->v, entries_k, p->Sk, p->Hk, p->Dv));
    TRY(check_rows("out", p->out, entries_q, p->Sq, p->Hq, p->Dv));
    TRY(check_rows("dout", g->dout, entries_q, p->Sq, p->Hq, p->Dv));
    TRY(check_rows("dq", g->dq, entries_q, p->Sq, p->Hq, p->D));
    TRY(check_rows("dk", g->dk, entries_k, p->Sk, p->Hk, p->D));
    return check_rows("dv", g->dv, entries_k, p->Sk, p->Hk, p->Dv);
}

/* The workspace: an array after the other, each on a 64-byte boundary. Returns the bytes. */
static size_t lay_out_sums(const fad_attn_problem *p, char *base, RowSums *sums) {
    const size_t rows = (size_t)((p->cu_seqlens_q ? 1 : p->B) * p->Hq * p->Sq);
    const size_t bytes = (rows * sizeof(float) + 63) / 64 * 64;
    *sums = {(float *)base, (float *)(base + bytes), (int *)(base + 2 * bytes)};
    return 3 * bytes;
}

fad_status mma_backward_workspace(const fad_attn_problem *p, int32_t, size_t *bytes) {
    Plan plan;
    RowSums sums;
    TRY(make_plan(p, &plan));
    *bytes = lay_out_sums(p, nullptr, &sums);
    return FAD_OK;
}

/* Tiles of keys that a grid must hold: exact for dense calls, an upper bound for packed ones (each sequence, and the rows
 * behind the last, round up once). */
static int64_t key_tile_bound(const fad_attn_problem *p, int keys) {
    if (!p->cu_seqlens_k)
        return p->B * p->Hk * ((p->Sk + keys - 1) / keys);
    return p->Hk * (p->Sk / keys + fad_sequence_count(p));
}

/* Tiles of query rows, each an item of the forward's kind with all of its splits. */
static Work row_tiles_of(const fad_attn_problem *p, int rows) {
    const int64_t tiles = tile_bound(*p, rows), splits = fad_split_capacity(p) + 1;
    const DenseWork dense(*p, rows, tiles, tiles, splits, BACKWARD_HEADS_IN_TURN);
    return {tiles, tiles, splits, 0, nullptr, nullptr, {}, false, ScoreRule(*p), dense};
}

/* Whether the Hopper kernels serve this call, and how. */
static bool use_hopper(const fad_attn_problem *p, const fad_attn_gradients *g, const Plan &plan,
                       HopperBackwardPlan *hopper) {
#ifdef FAD_HOPPER
    return plan.device.compute == 90 && fad_core->forced_schedule()->kernel != 1 &&
           plan_hopper_backward(p, g->dout, hopper);
#else
    (void)p, (void)g, (void)plan, (void)hopper;
    return false;
#endif
}

fad_status mma_backward(const fad_attn_problem *p, const fad_attn_gradients *g, const fad_runtime *runtime) {
    Plan plan;
    HopperBackwardPlan hopper;
    RowSums sums;
    fad_attn_problem gradient = *p;
    TRY(check_tensors(p, g));
    TRY(make_plan(p, &plan));
    lay_out_sums(p, (char *)runtime->workspace, &sums);
    gradient.q = g->dq, gradient.k = g->dk, gradient.v = g->dv, gradient.out = g->dout, gradient.lse = g->dlse;
    const Work sum_tiles = row_tiles_of(p, SUM_ROWS);
    TRY(launch(p->dtype == FAD_BFLOAT16 ? sum_rows<FAD_BFLOAT16> : sum_rows<FAD_FLOAT16>, sum_tiles.n_items,
               SUM_THREADS, 0, runtime->stream, {}, *p, gradient, sums, sum_tiles));
    const bool by_hopper = use_hopper(p, g, plan, &hopper);
    const int keys = by_hopper ? hopper.keys->tile : plan.keys.kernel->tile,
              rows = by_hopper ? hopper.rows->tile : plan.rows.kernel->tile;
    const KeyTiles key_tiles(*p, keys);
    const Work row_tiles = row_tiles_of(p, rows);
    const int64_t key_blocks = key_tile_bound(p, keys);
    /* dq asks for nothing of dk and dv: its thread blocks may begin where those of the other kernel have run out. The sums are
     * there when that one begins. */
    const LaunchOptions after_sums = {(size_t)plan.device.shared_bytes, false},
                        beside_keys = {(size_t)plan.device.shared_bytes, key_blocks > 0};
    if (by_hopper) {
        auto run = [&](const auto &kernel, const LaunchOptions &options, int64_t blocks, const auto &tiles,
                       const CUtensorMap &a, const CUtensorMap &b) {
            return launch(kernel.run, blocks, kernel.threads, kernel.shared_bytes, runtime->stream, options, *p,
                          gradient, sums, tiles, a, b);
        };
        TRY(run(*hopper.keys, after_sums, key_blocks, key_tiles, hopper.q, hopper.dout));
        TRY(run(*hopper.rows, beside_keys, row_tiles.n_items, row_tiles, hopper.k, hopper.v));
    } else {
        auto run = [&](const auto &choice, const LaunchOptions &options, int64_t blocks, const auto &tiles) {
            return launch(choice.kernel->run, blocks, choice.kernel->threads,
                          choice.kernel->shared_bytes[choice.stages - 1], runtime->stream, options, *p, gradient, sums,
                          tiles, choice.stages);
        };
        TRY(run(plan.keys, after_sums, key_blocks, key_tiles));
        TRY(run(plan.rows, beside_keys, row_tiles.n_items, row_tiles));
    }
    return g->d_sinks ? launch(sum_sinks, p->Hq, SUM_THREADS, 0, runtime->stream, {}, *p, sums, (float *)g->d_sinks)
                      : FAD_OK;
}
