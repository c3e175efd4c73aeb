/* Which clusters csrc/cuda/hopper_cluster_launch.cu chooses, without a GPU: what it asks the driver is answered here, and the
 * kernels do nothing.
 *
 * choose_clusters HELD STATES KERNEL SPLIT_PARALLEL B Hq Hk L D PAGE_SIZE: of one query row on a device of 132
 * multiprocessors that holds HELD clusters, under a forced schedule; PAGE_SIZE 0: no pages. Prints the thread blocks of a
 * split, the splits of a cluster, whether it serves pages, how often the driver was asked, and last for clusters of how many
 * thread blocks; 0 thread blocks of a split: no cluster. */
#include <cstdio>
#include <cstdlib>

#include <cuda_runtime.h>

static int held, asked, of_blocks;
static cudaError_t answer(int *count, const cudaLaunchConfig_t &config) {
    const cudaLaunchAttribute &cluster = *config.attrs;
    if (config.numAttrs != 1 || cluster.id != cudaLaunchAttributeClusterDimension || config.blockDim.x != 256 ||
        config.dynamicSmemBytes != 1000 || cluster.val.clusterDim.x != config.gridDim.x)
        return cudaErrorInvalidValue;
    asked++;
    of_blocks = (int)config.gridDim.x;
    *count = held;
    return cudaSuccess;
}
#define cudaFuncSetAttribute(...) cudaSuccess
#define cudaOccupancyMaxActiveClusters(count, kernel, config) answer(count, *(config))
#include "../../csrc/cuda/hopper_cluster_launch.cu"

static fad_schedule schedule;
static fad_status fail(fad_status status, const char *, ...) { return status; }
static const fad_schedule *forced_schedule() { return &schedule; }
static const fad_core_services services = {fail, forced_schedule, FAD_STRUCT_BYTES, FAD_CONTRACT_VERSION};
const fad_core_services *fad_core = &services;
fad_status cuda_status(cudaError_t error, const char *) { return error == cudaSuccess ? FAD_OK : FAD_DEVICE_ERROR; }

/* Head dims, and dims of a thread block, of each head dim in the order of the library's tables. */
template <int D, int DIMS, bool FOLDS, bool PAGES> static void kernel(fad_attn_problem, Work) {}
template <int D, int DIMS, bool FOLDS, bool PAGES> static MmaKernel shape_of() {
    constexpr int RANKS = D / DIMS, SPLITS = FOLDS ? CLUSTER_THREAD_BLOCKS / RANKS : 0;
    return {DECODE_ROWS, D, 256, false, 1000, 0, kernel<D, DIMS, FOLDS, PAGES>, RANKS, PAGES, SPLITS};
}
#define BOTH(D, DIMS, FOLDS) shape_of<D, DIMS, FOLDS, false>(), shape_of<D, DIMS, FOLDS, true>()
static const MmaKernel alone[] = {BOTH(64, 16, false),  BOTH(64, 32, false),  BOTH(128, 32, false),
                                  BOTH(128, 64, false), BOTH(256, 32, false), BOTH(256, 64, false)};
static const MmaKernel folding[] = {BOTH(64, 16, true), BOTH(64, 32, true), BOTH(128, 32, true), BOTH(128, 64, true),
                                    BOTH(256, 64, true)};
MmaKernels hopper_cluster_bf16() { return list_kernels(alone); }
MmaKernels hopper_cluster_fp16() { return list_kernels(alone); }
MmaKernels hopper_cluster_fold_bf16() { return list_kernels(folding); }
MmaKernels hopper_cluster_fold_fp16() { return list_kernels(folding); }

int main(int, char **argv) {
    int64_t x[10];
    for (int i = 0; i < 10; i++)
        x[i] = atoll(argv[i + 1]);
    static const int32_t pages = 0;
    fad_attn_problem p = {};
    held = (int)x[0];
    schedule.kernel = (int)x[2], schedule.split_parallel = (int)x[3];
    p.dtype = FAD_BFLOAT16;
    p.B = x[4], p.Hq = x[5], p.Hk = x[6], p.Sq = 1, p.Sk = x[7], p.D = p.Dv = x[8];
    p.split_size = 1024;
    p.page_size = x[9];
    p.block_table = x[9] ? &pages : nullptr;
    Device device = {0, 132, 227 * 1024, 90};
    const MmaKernel *found = nullptr;
    int splits = 1;
    for (int twice = 0; twice < 2; twice++) {
        found = nullptr, splits = 1;
        if (find_cluster(&p, device, most_splits(&p), x[1], &found, &splits) != FAD_OK)
            return 1;
    }
    printf("%d %d %d %d %d\n", found ? found->ranks : 0, splits, found && found->pages, asked, of_blocks);
    return 0;
}
