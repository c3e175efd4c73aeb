#include "cuda_on_cpu.h"

#include "cuda/hopper_cluster_bf16.cu"
#include "cuda/hopper_cluster_fold_bf16.cu"
#include "cuda/hopper_decode_bf16.cu"
#include "cuda/mma_decode_bf16.cu"
#define WARPS mma_decode_bf16
#define ENGINE hopper_decode_bf16
#define CLUSTERS hopper_cluster_bf16
#define FOLDING_CLUSTERS hopper_cluster_fold_bf16
#define RUN run_decode_bf16
#include "decode.inc"
