#include "cuda_on_cpu.h"

#include "cuda/hopper_cluster_fp16.cu"
#include "cuda/hopper_cluster_fold_fp16.cu"
#include "cuda/hopper_decode_fp16.cu"
#include "cuda/mma_decode_fp16.cu"
#define WARPS mma_decode_fp16
#define ENGINE hopper_decode_fp16
#define CLUSTERS hopper_cluster_fp16
#define FOLDING_CLUSTERS hopper_cluster_fold_fp16
#define RUN run_decode_fp16
#include "decode.inc"
