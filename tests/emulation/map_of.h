/* What the copy engine knows of k or v. */
#ifndef EMULATION_MAP_OF_H
#define EMULATION_MAP_OF_H
#include "cuda_on_cpu.h"

static CUtensorMap map_of(const fad_attn_problem &p, const fad_view &view, int64_t dims, int box) {
    const int64_t rows = p.block_table ? p.page_size : p.Sk;
    return {(const uint16_t *)view.data,
            {dims, rows, p.Hk, fad_cache_entries(&p)},
            {1, view.stride_s, view.stride_h, view.stride_b},
            box};
}
#endif
