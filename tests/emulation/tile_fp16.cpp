#include "cuda_on_cpu.h"

#include "cuda/hopper_tile_fp16.cu"
#define TABLE hopper_tile_fp16
#define RUN run_tile_fp16
#include "tile.inc"
