/* Where new rows go in a cache, and how their values get there, rotated or not: for the host and for kernels. */
#ifndef FAD_CORE_CACHE_H
#define FAD_CORE_CACHE_H

#include "../flash_attn_det.h"
#include "../numerics/contract.h"

FAD_FN int64_t fad_append_position(const fad_cache_append *p, int64_t b, int64_t i) {
    return (p->cache_seqlens ? p->cache_seqlens[b] : 0) + i;
}

/* Entry of k and v (or page) and row in it of the row that stands at a position of sequence b. False: the cache has no
 * such place, which the host has refused where it could read the arrays. */
FAD_FN int fad_find_place(const fad_cache_append *p, int64_t b, int64_t position, int64_t *entry, int64_t *row) {
    const int named = p->block_table || p->cache_batch_idx;
    if (position < 0 || position >= p->Sk)
        return 0;
    *entry = b, *row = position;
    if (p->block_table) {
        *entry = p->block_table[b * p->block_table_stride + position / p->page_size];
        *row = position % p->page_size;
    } else if (p->cache_batch_idx) {
        *entry = p->cache_batch_idx[b];
    }
    return !named || (*entry >= 0 && *entry < p->Bk);
}

FAD_FN int64_t fad_rotation_position(const fad_rotation *p, int64_t b, int64_t i) {
    return (p->offsets ? p->offsets[b] : 0) + (p->advance ? i : 0);
}

/* Values of the compute type fp32, from and to a row of the dtype. */
FAD_FN float fad_read_value(const void *row, int64_t d, fad_dtype dtype) {
    return dtype == FAD_FLOAT32    ? ((const float *)row)[d]
           : dtype == FAD_BFLOAT16 ? fad_bf16_widen(((const uint16_t *)row)[d])
                                   : fad_f16_widen(((const uint16_t *)row)[d]);
}
FAD_FN void fad_write_value(void *row, int64_t d, fad_dtype dtype, float x) {
    if (dtype == FAD_FLOAT32)
        ((float *)row)[d] = fad_f32_canonical(x);
    else
        ((uint16_t *)row)[d] = dtype == FAD_BFLOAT16 ? fad_bf16_round(x) : fad_f16_round(x);
}
FAD_FN void fad_copy_value(void *to, const void *from, int64_t d, fad_dtype dtype) {
    if (dtype == FAD_FLOAT64)
        ((uint64_t *)to)[d] = ((const uint64_t *)from)[d];
    else if (dtype == FAD_FLOAT32)
        ((uint32_t *)to)[d] = ((const uint32_t *)from)[d];
    else
        ((uint16_t *)to)[d] = ((const uint16_t *)from)[d];
}

/* A row of D values moves in so many parts: a pair that is rotated, or a value that is copied. */
FAD_FN int64_t fad_row_parts(const fad_rotary *r, int64_t D) { return r->cos ? D - r->dim / 2 : D; }

/* N12. */
FAD_FN void fad_move_part(const fad_rotary *r, fad_dtype dtype, void *to, const void *from, int64_t position,
                          int64_t part) {
    const int64_t half = r->cos ? r->dim / 2 : 0, at = position * half + part;
    const int64_t a = r->interleaved ? 2 * part : part, b = r->interleaved ? a + 1 : a + half;
    if (part >= half) {
        fad_copy_value(to, from, part + half, dtype);
    } else if (dtype == FAD_FLOAT64) {
        double x = ((const double *)from)[a], y = ((const double *)from)[b];
        fad_f64_rotate(&x, &y, ((const double *)r->cos)[at], ((const double *)r->sin)[at]);
        ((double *)to)[a] = fad_f64_canonical(x);
        ((double *)to)[b] = fad_f64_canonical(y);
    } else {
        float x = fad_read_value(from, a, dtype), y = fad_read_value(from, b, dtype);
        fad_f32_rotate(&x, &y, fad_read_value(r->cos, at, r->dtype), fad_read_value(r->sin, at, r->dtype));
        fad_write_value(to, a, dtype, x);
        fad_write_value(to, b, dtype, y);
    }
}

#endif
