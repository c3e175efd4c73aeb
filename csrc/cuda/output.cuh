/* N8 (sink), N9, N10: from a row's last state to out and lse; and where partial states lie. */
#ifndef FAD_CUDA_OUTPUT_CUH
#define FAD_CUDA_OUTPUT_CUH

#include "locate.cuh"

struct Row {
    int64_t i, h; /* query row of the sequence, query head */
};
__device__ inline Row unpack_row(const fad_attn_problem &p, int64_t packed, int64_t head_k) {
    const int64_t group = fad_group(&p);
    return {packed / group, head_k * group + packed % group};
}

/* Folds the sink and writes lse. Leaves m and l final; returns the factor that the sink puts on O. */
__device__ inline float finish_row(const fad_attn_problem &p, const fad_sequence &s, int64_t packed, int64_t head_k,
                                   bool active, float &m, float &l) {
    const Row row = unpack_row(p, packed, head_k);
    float a = 1;
    if (p.sinks && active) {
        float sink_l;
        const float sink_m = fad_f32_sink_state(((const float *)p.sinks)[row.h], &sink_l), now = fad_f32_max(sink_m, m);
        a = fad_f32_pow2(fad_f32_sub(m, now));
        l = fad_f32_fold(l, a, sink_l, fad_f32_pow2(fad_f32_sub(sink_m, now)));
        m = now;
    }
    if (p.lse.data)
        ((float *)p.lse.data)[s.lse + row.i * p.lse.stride_s + row.h * p.lse.stride_h] = fad_f32_finish_lse(m, l);
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
__device__ inline OutRow out_row(const fad_attn_problem &p, const fad_sequence &s, int64_t packed, int64_t head_k) {
    const Row row = unpack_row(p, packed, head_k);
    const int64_t at = s.out + row.i * p.out.stride_s + row.h * p.out.stride_h;
    return {(char *)p.out.data + at * (p.dtype == FAD_FLOAT32 ? 4 : 2), p.dtype};
}

/* Partial states as in fad_partials. Packed calls have the same layout with one batch of Sq rows. */
__device__ inline int64_t batch_of(const fad_attn_problem &p, const fad_sequence &s, int64_t i, int64_t *row) {
    int64_t first;
    fad_owned_rows(p.cu_seqlens_q, p.B, s.index, p.Sq, &first);
    *row = first + i;
    return p.cu_seqlens_q ? 0 : s.index;
}
__device__ inline int64_t partial_row(const fad_attn_problem &p, const fad_sequence &s, int64_t packed, int64_t head_k,
                                      int64_t split) {
    const Row r = unpack_row(p, packed, head_k);
    int64_t row, b = batch_of(p, s, r.i, &row);
    return ((split * (p.cu_seqlens_q ? 1 : p.B) + b) * p.Hq + r.h) * p.Sq + row;
}
__device__ inline int64_t partial_values(const fad_attn_problem &p, const fad_sequence &s, int64_t packed,
                                         int64_t head_k, int64_t split) {
    const Row r = unpack_row(p, packed, head_k);
    int64_t row, b = batch_of(p, s, r.i, &row);
    return (((split * (p.cu_seqlens_q ? 1 : p.B) + b) * p.Sq + row) * p.Hq + r.h) * p.Dv;
}

/* Where a row's running O rests: fp32 out itself, or [rows of the buffer, Hq, Dv]. */
__device__ inline float *running_row(const fad_attn_problem &p, const fad_sequence &s, int64_t packed, int64_t head_k,
                                     float *running) {
    const Row r = unpack_row(p, packed, head_k);
    return running ? running + partial_values(p, s, packed, head_k, 0)
                   : (float *)p.out.data + s.out + r.i * p.out.stride_s + r.h * p.out.stride_h;
}

/* N8: the fold of spilled splits, in ascending order: one row a warp. */
static __global__ void fold_splits(const __grid_constant__ fad_attn_problem p, const fad_partials partials) {
    constexpr int LANES = 32, PER_LANE = FAD_MAX_HEAD_DIM / LANES;
    Tile t;
    const int64_t warp = (blockIdx.x * (int64_t)blockDim.x + threadIdx.x) / LANES;
    if (!locate_tile(p, 1, warp, t))
        return;
    const int lane = threadIdx.x % LANES;
    float m = FAD_F32_SENTINEL, l = 0, o[PER_LANE] = {};
    for (int64_t split = 0; split < partials.n_splits; split++) {
        const int64_t at = partial_row(p, t.seq, t.row0, t.head_k, split);
        const float part_m = ((const float *)partials.m)[at], part_l = ((const float *)partials.l)[at],
                    now = fad_f32_max(part_m, m);
        const float a = fad_f32_pow2(fad_f32_sub(m, now)), b = fad_f32_pow2(fad_f32_sub(part_m, now));
        const float *part = (const float *)partials.o + partial_values(p, t.seq, t.row0, t.head_k, split);
        l = fad_f32_fold(l, a, part_l, b);
        m = now;
#pragma unroll
        for (int n = 0; n < PER_LANE; n++)
            if (lane + n * LANES < p.Dv)
                o[n] = fad_f32_fold(o[n], a, part[lane + n * LANES], b);
    }
    const float a = finish_row(p, t.seq, t.row0, t.head_k, t.n_active, m, l);
    const OutRow out = out_row(p, t.seq, t.row0, t.head_k);
#pragma unroll
    for (int n = 0; n < PER_LANE; n++)
        if (lane + n * LANES < p.Dv)
            out.store(lane + n * LANES, fad_f32_finish_out(fad_f32_mul(o[n], a), l));
}

/* N8: the sink as one more state, behind the splits; empty for rows past n_q. */
static __global__ void store_sinks(const __grid_constant__ fad_attn_problem p, const fad_partials partials) {
    Tile t;
    if (!locate_tile(p, 1, blockIdx.x * (int64_t)blockDim.x / 32 + threadIdx.x / 32, t))
        return;
    const int64_t split = partials.n_splits - 1, at = partial_row(p, t.seq, t.row0, t.head_k, split);
    float l, m = fad_f32_sink_state(((const float *)p.sinks)[unpack_row(p, t.row0, t.head_k).h], &l);
    ((float *)partials.m)[at] = t.n_active ? m : FAD_F32_SENTINEL;
    ((float *)partials.l)[at] = t.n_active ? fad_f32_canonical(l) : 0;
    for (int64_t d = threadIdx.x % 32; d < p.Dv; d += 32)
        ((float *)partials.o)[partial_values(p, t.seq, t.row0, t.head_k, split) + d] = 0;
}

#endif
