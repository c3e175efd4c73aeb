/* Keys and values in pages: where they lie. */
#ifndef FAD_CUDA_PAGES_CUH
#define FAD_CUDA_PAGES_CUH

#include "../flash_attn_det.h"

/* Where a row of k and v lies. */
struct PagePlace {
    int page;     /* what the block table says, not looked at yet, or it would be waited for; */
    unsigned row; /* of the page */
};

/* Of a sequence's row of k and v, by its row of the block table; any place if it does not exist. */
static __device__ __forceinline__ PagePlace find_place(const int32_t *pages, unsigned page_size, unsigned row,
                                                       bool exists) {
    const unsigned page = row / page_size;
    return {exists ? pages[page] : 0, row - page * page_size};
}

/* A page of a pool of n_pages, whatever the block table says. */
static __device__ __forceinline__ unsigned clamp_page(int page, unsigned n_pages) {
    return min((unsigned)max(page, 0), n_pages - 1);
}

#endif
