#include "hopper_cluster.cuh"

MmaKernels hopper_cluster_fold_fp16() {
    static const MmaKernel kernels[] = {
        hopper_cluster_of<ClusterShape<FAD_FLOAT16, 64, 16, false, true>>(),
        hopper_cluster_of<ClusterShape<FAD_FLOAT16, 64, 32, false, true>>(),
        hopper_cluster_of<ClusterShape<FAD_FLOAT16, 128, 32, false, true>>(),
        hopper_cluster_of<ClusterShape<FAD_FLOAT16, 128, 64, false, true>>(),
        hopper_cluster_of<ClusterShape<FAD_FLOAT16, 256, 64, false, true>>(),
        hopper_cluster_of<ClusterShape<FAD_FLOAT16, 64, 16, true, true>>(),
        hopper_cluster_of<ClusterShape<FAD_FLOAT16, 64, 32, true, true>>(),
        hopper_cluster_of<ClusterShape<FAD_FLOAT16, 128, 32, true, true>>(),
        hopper_cluster_of<ClusterShape<FAD_FLOAT16, 128, 64, true, true>>(),
        hopper_cluster_of<ClusterShape<FAD_FLOAT16, 256, 64, true, true>>(),
    };
    return list_kernels(kernels);
}
