/* Appends to caches and rotations of rows (N12): a thread moves one part of one row of one head at a time. */
#include "../core/cache.h"
#include "host.cuh"

constexpr int THREADS = 256;

static __device__ int64_t first_part() { return blockIdx.x * (int64_t)blockDim.x + threadIdx.x; }
static __device__ int64_t part_step() { return gridDim.x * (int64_t)blockDim.x; }

static __device__ char *row_of(const fad_view &view, int bytes, int64_t b, int64_t s, int64_t h) {
    return (char *)view.data + (b * view.stride_b + s * view.stride_s + h * view.stride_h) * bytes;
}

/* The parts of k, then those of v. Rows that the cache has no place for are left out. */
static __global__ void append_kernel(const __grid_constant__ fad_cache_append p) {
    const fad_rotary none = {};
    const int bytes = p.dtype == FAD_FLOAT64 ? 8 : p.dtype == FAD_FLOAT32 ? 4 : 2;
    const int64_t k_parts = fad_row_parts(&p.rotary, p.D), parts = k_parts + p.Dv;
    for (int64_t at = first_part(); at < p.B * p.S * p.Hk * parts; at += part_step()) {
        const int64_t part = at % parts, h = at / parts % p.Hk, i = at / parts / p.Hk % p.S,
                      b = at / parts / p.Hk / p.S;
        const int64_t position = fad_append_position(&p, b, i);
        int64_t entry, row;
        if (!fad_find_place(&p, b, position, &entry, &row))
            continue;
        if (part >= k_parts)
            fad_move_part(&none, p.dtype, row_of(p.v, bytes, entry, row, h), row_of(p.v_new, bytes, b, i, h), 0,
                          part - k_parts);
        else
            fad_move_part(&p.rotary, p.dtype, row_of(p.k, bytes, entry, row, h), row_of(p.k_new, bytes, b, i, h),
                          min(position, p.rotary.n_positions - 1), part);
    }
}

static __global__ void rotate_kernel(const __grid_constant__ fad_rotation p) {
    const int bytes = p.dtype == FAD_FLOAT64 ? 8 : p.dtype == FAD_FLOAT32 ? 4 : 2;
    const int64_t parts = fad_row_parts(&p.rotary, p.D);
    for (int64_t at = first_part(); at < p.B * p.S * p.H * parts; at += part_step()) {
        const int64_t part = at % parts, h = at / parts % p.H, i = at / parts / p.H % p.S, b = at / parts / p.H / p.S;
        const int64_t position = fad_rotation_position(&p, b, i);
        fad_move_part(&p.rotary, p.dtype, row_of(p.out, bytes, b, i, h), row_of(p.x, bytes, b, i, h),
                      max(min(position, p.rotary.n_positions - 1), (int64_t)0), part);
    }
}

/* Enough thread blocks for every part, or as many as fill any device; each goes on until nothing is left. */
static int64_t blocks_for(int64_t parts) { return min((parts + THREADS - 1) / THREADS, (int64_t)1 << 14); }

fad_status cuda_append(const fad_cache_append *p, const fad_runtime *runtime) {
    const int64_t parts = p->B * p->S * p->Hk * (fad_row_parts(&p->rotary, p->D) + p->Dv);
    return launch(append_kernel, blocks_for(parts), THREADS, 0, runtime->stream, {}, *p);
}

fad_status cuda_rotate(const fad_rotation *p, const fad_runtime *runtime) {
    const int64_t parts = p->B * p->S * p->H * fad_row_parts(&p->rotary, p->D);
    return launch(rotate_kernel, blocks_for(parts), THREADS, 0, runtime->stream, {}, *p);
}
