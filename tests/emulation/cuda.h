/* In place of CUDA's: what the copy engine knows of a tensor [entries, rows, heads, dims] of 16-bit numbers. */
#ifndef EMULATION_CUDA_H
#define EMULATION_CUDA_H
#include <cstdint>
struct CUtensorMap {
    const uint16_t *data;
    int64_t sizes[4];   /* dims, rows, heads, entries */
    int64_t strides[4]; /* elements */
    int box_rows;       /* by 64 dims */
};
#endif
