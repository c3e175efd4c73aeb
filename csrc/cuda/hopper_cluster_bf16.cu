#include "hopper_cluster.cuh"

MmaKernels hopper_cluster_bf16() {
    static const MmaKernel kernels[] = {
        hopper_cluster_of<ClusterShape<FAD_BFLOAT16, 64, 16, false, false>>(),
        hopper_cluster_of<ClusterShape<FAD_BFLOAT16, 64, 32, false, false>>(),
        hopper_cluster_of<ClusterShape<FAD_BFLOAT16, 128, 32, false, false>>(),
        hopper_cluster_of<ClusterShape<FAD_BFLOAT16, 128, 64, false, false>>(),
        hopper_cluster_of<ClusterShape<FAD_BFLOAT16, 256, 32, false, false>>(),
        hopper_cluster_of<ClusterShape<FAD_BFLOAT16, 256, 64, false, false>>(),
        hopper_cluster_of<ClusterShape<FAD_BFLOAT16, 64, 16, true, false>>(),
        hopper_cluster_of<ClusterShape<FAD_BFLOAT16, 64, 32, true, false>>(),
        hopper_cluster_of<ClusterShape<FAD_BFLOAT16, 128, 32, true, false>>(),
        hopper_cluster_of<ClusterShape<FAD_BFLOAT16, 128, 64, true, false>>(),
        hopper_cluster_of<ClusterShape<FAD_BFLOAT16, 256, 32, true, false>>(),
        hopper_cluster_of<ClusterShape<FAD_BFLOAT16, 256, 64, true, false>>(),
    };
    return list_kernels(kernels);
}
