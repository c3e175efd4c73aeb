#include "cuda_on_cpu.h"

#include "cuda/hopper_tile_bf16.cu"
#define TABLE hopper_tile_bf16
#define RUN run_tile_bf16
#include "tile.inc"
