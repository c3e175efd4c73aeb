/* Warpgroups: the unit of wgmma, and of the roles in the Hopper kernels. The first one of a thread block produces, each
 * further one consumes. */
#ifndef FAD_CUDA_HOPPER_GROUP_CUH
#define FAD_CUDA_HOPPER_GROUP_CUH

#include "hopper_ptx.cuh"

constexpr int GROUP_THREADS = 128, GROUP_WARPS = 4, GROUP_ROWS = 64; /* of a warpgroup */
/* Named barriers; 1 + group is a consumer's own, FIRST_TURN + group when it may go on. */
constexpr int ALL_CONSUMERS = 8, FIRST_TURN = 9;

/* What is the same in all lanes of a warp, told to the compiler: it keeps it, and what is computed from it, in the
 * registers of the warp. */
static __device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

#endif
