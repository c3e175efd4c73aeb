/* Whether clusters share splits, and of which kernel. */
#include "hopper_kernel.cuh"
#include "host.cuh"

/* count: of clusters of so many thread blocks that a device holds at once. */
struct ClusterCount {
    const void *kernel; /* null: not known yet; written last */
    int device, blocks, count;
};
/* Those that the driver has been asked for, which takes it a while; any thread adds to them. What does not fit is asked for
 * again. */
static ClusterCount cluster_counts[1024];
static int n_cluster_counts;

static const ClusterCount *find_count(const void *kernel, int device, int blocks) {
    for (const ClusterCount &known : cluster_counts) {
        const void *const of = __atomic_load_n(&known.kernel, __ATOMIC_ACQUIRE);
        if (!of)
            break;
        if (of == kernel && known.device == device && known.blocks == blocks)
            return &known;
    }
    return nullptr;
}

static void add_count(const void *kernel, int device, int blocks, int count) {
    constexpr int MOST = sizeof cluster_counts / sizeof *cluster_counts;
    if (__atomic_load_n(&n_cluster_counts, __ATOMIC_RELAXED) >= MOST)
        return;
    const int at = __atomic_fetch_add(&n_cluster_counts, 1, __ATOMIC_RELAXED);
    if (at >= MOST)
        return;
    ClusterCount &added = cluster_counts[at];
    added.device = device, added.blocks = blocks, added.count = count;
    __atomic_store_n(&added.kernel, kernel, __ATOMIC_RELEASE);
}

/* Clusters of so many thread blocks that the device holds at once. */
static fad_status count_clusters(const MmaKernel &kernel, const Device &device, int blocks, int *count) {
    const void *const run = (const void *)kernel.run;
    if (const ClusterCount *known = find_count(run, device.id, blocks)) {
        *count = known->count;
        return FAD_OK;
    }
    cudaLaunchAttribute attribute = cluster_of(blocks);
    cudaLaunchConfig_t config = {
        (unsigned)blocks, (unsigned)kernel.threads, kernel.shared_bytes, nullptr, &attribute, 1};
    TRY_CUDA(cudaFuncSetAttribute(run, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes));
    TRY_CUDA(cudaOccupancyMaxActiveClusters(count, run, &config));
    add_count(run, device.id, blocks, *count);
    return FAD_OK;
}

/* Whether such clusters can have all splits of a tile: those of all tiles at once. */
static fad_status can_fold(const fad_attn_problem *p, const Device &device, int64_t n_splits, const MmaKernel &kernel,
                           bool *can) {
    const fad_schedule *forced = fad_core->forced_schedule();
    int clusters = 0;
    *can = n_splits > 1 && n_splits <= kernel.splits && forced->split_parallel != 2;
    if (!*can || forced->kernel)
        return FAD_OK;
    TRY(count_clusters(kernel, device, (int)n_splits * kernel.ranks, &clusters));
    *can = tile_bound(*p, kernel.rows) <= clusters;
    return FAD_OK;
}

/* Whether splits are so long, and so few, that such clusters pay: each thread block has a multiprocessor of its own. Two of
 * a split fit everywhere; more leave some idle, while others would have to take two. */
static bool clusters_pay(const fad_attn_problem *p, const Device &device, int64_t n_splits, const MmaKernel &kernel) {
    const int64_t blocks = tile_bound(*p, kernel.rows) * n_splits * kernel.ranks,
                  keys = min(p->Sk, p->split_size); /* of a split */
    const bool many = kernel.ranks > 2, room = blocks <= device.multiprocessors * (many ? 7 : 8) / 8;
    return room && (keys >= CLUSTER_KEYS * (many ? 3 : 5) / 8 || fad_core->forced_schedule()->kernel);
}

/* The first of those that fold splits, or else of those that do not. */
fad_status find_cluster(const fad_attn_problem *p, const Device &device, int64_t n_splits, bool states,
                        const MmaKernel **kernel, int *splits) {
    const bool bf16 = p->dtype == FAD_BFLOAT16, forced = fad_core->forced_schedule()->kernel;
    const MmaKernels tables[] = {bf16 ? hopper_cluster_fold_bf16() : hopper_cluster_fold_fp16(),
                                 bf16 ? hopper_cluster_bf16() : hopper_cluster_fp16()};
    const int64_t dims = max(p->D, p->Dv);
    /* with k_pos a sequence may touch two splits that are longer than itself */
    if (p->split_size > CLUSTER_KEYS && (p->Sk > CLUSTER_KEYS || p->k_pos))
        return FAD_OK;
    for (const MmaKernels &table : tables)
        for (const MmaKernel *k = table.begin; k < table.end; k++) {
            const bool narrowest = k->dims >= dims && (k->dims == 64 || k->dims / 2 < dims),
                       serves = narrowest && k->pages == !!p->block_table && !(k->splits && states),
                       pays = clusters_pay(p, device, n_splits, *k);
            bool can = serves && (pays || forced);
            if (can && k->splits)
                TRY(can_fold(p, device, n_splits, *k, &can));
            if (!can)
                continue;
            *kernel = k;
            if (k->splits)
                *splits = (int)n_splits;
            if (k->splits || pays) /* else, if forced, the last will do */
                return FAD_OK;
        }
    return FAD_OK;
}
