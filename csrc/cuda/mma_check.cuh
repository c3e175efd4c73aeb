/* What the mma family's schedulers ask of a call beyond what the core has checked. */
#ifndef FAD_CUDA_MMA_CHECK_CUH
#define FAD_CUDA_MMA_CHECK_CUH

#include "host.cuh"

/* Kernels read and write rows 16 bytes at a time. The stride of a dimension of one element does not matter. */
static fad_status check_rows(const char *name, const fad_view &view, int64_t entries, int64_t rows, int64_t heads,
                             int64_t dims) {
    const int64_t strides =
        (entries > 1 ? view.stride_b : 0) | (rows > 1 ? view.stride_s : 0) | (heads > 1 ? view.stride_h : 0);
    if ((strides | dims) % 8 == 0 && (uintptr_t)view.data % 16 == 0)
        return FAD_OK;
    return fad_core->fail(
        FAD_UNSUPPORTED,
        "%s has head dim %lld, strides %lld, %lld, %lld and address %p: the mma family needs multiples "
        "of 8 elements (pad with zeros) and of 16 bytes",
        name, (long long)dims, (long long)view.stride_b, (long long)view.stride_s, (long long)view.stride_h, view.data);
}

/* Kernels count the rows of a sequence in 32 bits. */
static fad_status check_lengths(const fad_attn_problem *p) {
    /* Boxes of a block or less are asked for 64 at a time (BoxCache), and so go past the end. */
    constexpr int64_t MOST = INT32_MAX - (64 + 1) * FAD_MMA_BLOCK_KV;
    return p->Sq <= MOST && p->Sk <= MOST
               ? FAD_OK
               : fad_core->fail(FAD_UNSUPPORTED,
                                "%lld query rows and %lld key rows: the mma family has kernels for up to %lld of each",
                                (long long)p->Sq, (long long)p->Sk, (long long)MOST);
}

#endif
