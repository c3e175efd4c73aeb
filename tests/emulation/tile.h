/* The Hopper tile kernel on the emulated thread block, as mma_forward.cu launches it. */
#ifndef EMULATION_TILE_H
#define EMULATION_TILE_H
#include "flash_attn_det.h"
#include "machine.h"

struct Launch {
    fad_partials partials; /* null: out and lse are wanted */
    int64_t n_splits, item_splits;
    int grid;
};
/* dims: 64, 128 or 256. "" or what went wrong. */
std::string run_tile_bf16(const fad_attn_problem &p, int dims, const Launch &launch, const emulation::Options &options);
std::string run_tile_fp16(const fad_attn_problem &p, int dims, const Launch &launch, const emulation::Options &options);
#endif
