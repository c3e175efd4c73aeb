/* The Hopper kernels on emulated thread blocks, as mma_forward.cu launches them. */
#ifndef EMULATION_KERNELS_H
#define EMULATION_KERNELS_H
#include "flash_attn_det.h"
#include "machine.h"

/* For few rows, with the keys copied by warps or by the copy engine, or clusters of many or of few thread blocks. */
enum DecodeKernel { BY_WARPS, BY_ENGINE, LARGE_CLUSTERS, SMALL_CLUSTERS, DECODE_KERNELS };
extern int calls_of[DECODE_KERNELS], folding_calls; /* that each has served so far; of clusters that folded splits */

struct Launch {
    fad_partials partials; /* null: out and lse are wanted */
    int64_t n_splits, item_splits;
    int grid;            /* of the tile kernel */
    DecodeKernel kernel; /* of the others; where it cannot serve the call, BY_WARPS does */
};
/* dims: 64, 128 or 256. "" or what went wrong. */
std::string run_tile_bf16(const fad_attn_problem &p, int dims, const Launch &launch, const emulation::Options &options);
std::string run_tile_fp16(const fad_attn_problem &p, int dims, const Launch &launch, const emulation::Options &options);
std::string run_decode_bf16(const fad_attn_problem &p, int dims, const Launch &launch,
                            const emulation::Options &options);
std::string run_decode_fp16(const fad_attn_problem &p, int dims, const Launch &launch,
                            const emulation::Options &options);
#endif
