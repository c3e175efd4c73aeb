/* N8 (sink), N9, N10: from a row's last state to out and lse; and where partial states lie. */
#ifndef FAD_CUDA_OUTPUT_CUH
#define FAD_CUDA_OUTPUT_CUH

#include "locate.cuh"

/* N8: folds the sink of a row's head into m and l; returns the factor that it puts on O. */
__device__ inline float fold_sink(const fad_attn_problem &p, const Tile &t, int r, float &m, float &l) {
    float sink_l;
    const float sink_m = fad_f32_sink_state(((const float *)p.sinks)[row_of(t, r).h], &sink_l);
    const float now = fad_f32_max(sink_m, m), a = fad_f32_pow2(fad_f32_sub(m, now));
    l = fad_f32_fold(l, a, sink_l, fad_f32_pow2(fad_f32_sub(sink_m, now)));
    m = now;
    return a;
}

__device__ inline void store_lse(const fad_attn_problem &p, const Tile &t, int r, float m, float l) {
    const Row row = row_of(t, r);
    if (p.lse.data)
        ((float *)p.lse.data)[t.seq.lse + row.i * p.lse.stride_s + row.h * p.lse.stride_h] = fad_f32_finish_lse(m, l);
}

/* Folds the sink and writes lse. Leaves m and l final; returns the factor that the sink puts on O. */
__device__ inline float finish_row(const fad_attn_problem &p, const Tile &t, int r, float &m, float &l) {
    const float a = p.sinks && r < t.n_active ? fold_sink(p, t, r, m, l) : 1;
    store_lse(p, t, r, m, l);
    return a;
}

/* One row of out; each value is rounded once to the output dtype. */
struct OutRow {
    void *data;
    fad_dtype dtype;
    __device__ void store(int64_t d, float value) const {
        if (dtype == FAD_FLOAT32)
            ((float *)data)[d] = value;
        else
            ((uint16_t *)data)[d] = dtype == FAD_BFLOAT16 ? fad_bf16_round(value) : fad_f16_round(value);
    }
};
__device__ inline OutRow out_row(const fad_attn_problem &p, const Tile &t, int r) {
    const Row row = row_of(t, r);
    const int64_t at = t.seq.out + row.i * p.out.stride_s + row.h * p.out.stride_h;
    return {(char *)p.out.data + at * (p.dtype == FAD_FLOAT32 ? 4 : 2), p.dtype};
}

/* Partial states as in fad_partials. Packed calls have the same layout with one batch of Sq rows. */
struct PartialRow {
    int64_t b, row, h;
};
__device__ inline PartialRow locate_partial(const fad_attn_problem &p, const Tile &t, int r, int64_t split) {
    const Row row = row_of(t, r);
    int64_t first;
    fad_owned_rows(p.cu_seqlens_q, p.B, t.seq.index, p.Sq, &first);
    return {p.cu_seqlens_q ? split : split * p.B + t.seq.index, first + row.i, row.h};
}
__device__ inline int64_t partial_row(const fad_attn_problem &p, const Tile &t, int r, int64_t split) {
    const PartialRow at = locate_partial(p, t, r, split);
    return (at.b * p.Hq + at.h) * p.Sq + at.row;
}
__device__ inline int64_t partial_values(const fad_attn_problem &p, const Tile &t, int r, int64_t split) {
    const PartialRow at = locate_partial(p, t, r, split);
    return ((at.b * p.Sq + at.row) * p.Hq + at.h) * p.Dv;
}

/* Where a row's running O rests: fp32 out itself, or [rows of the buffer, Hq, Dv]. */
__device__ inline float *running_row(const fad_attn_problem &p, const Tile &t, int r, float *running) {
    const Row row = row_of(t, r);
    return running ? running + partial_values(p, t, r, 0)
                   : (float *)p.out.data + t.seq.out + row.i * p.out.stride_s + row.h * p.out.stride_h;
}

#endif
