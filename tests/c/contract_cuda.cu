// The contract's headers are for CUDA as well: this must compile without a warning. It calls the steps from device code,
// so that a host-only construct cannot slip in.
#include "../../csrc/numerics/contract.h"

__global__ void contract_f32(float *out, const unsigned short *in, float c) {
    const float x = fad_bf16_widen(in[0]) + fad_f16_widen(in[1]);
    const float m = fad_f32_reference(FAD_F32_SENTINEL, fad_f32_scaled_score(x, 0.5f, 30.0f), c);
    const float l = fad_f32_add(fad_f32_probability(x, c, m), fad_f32_probability_near(x, c, m));
    const float o = fad_f32_fold(x, fad_f32_pow2(fad_f32_sub(FAD_F32_SENTINEL, m)), l, 1.0f);
    out[0] = fad_f32_finish_out(o, l);
    out[1] = fad_f32_finish_lse(m, l);
    out[2] = (float)fad_bf16_round(o) + (float)fad_f16_round(o);
}

__global__ void contract_f64(double *out, double x, double c) {
    const double m = fad_f64_reference(FAD_F64_SENTINEL, fad_f64_scaled_score(x, 0.5, 30.0), c);
    const double l = fad_f64_add(fad_f64_probability(x, c, m), fad_f64_probability_near(x, c, m));
    const double o = fad_f64_fold(x, fad_f64_pow2(fad_f64_sub(FAD_F64_SENTINEL, m)), l, 1.0);
    out[0] = fad_f64_finish_out(o, l);
    out[1] = fad_f64_finish_lse(m, l);
}

__global__ void gradient_f32(float *out, const float *in, float c) {
    const float x = in[threadIdx.x], m = fad_f32_saved_reference(x), l = fad_f32_saved_logarithm(x);
    const float p = fad_f32_mul(fad_f32_saved_exponential(x, c, m), fad_f32_saved_weight(l));
    const float e = fad_f32_exp2(fad_f32_saved_exponent(x, c, l));
    const float ds = fad_f32_score_gradient(p, e, fad_f32_sum_lanes(in));
    out[0] = fad_f32_finish_gradient(fad_f32_mul(ds, fad_f32_softcap_slope(fad_f32_tanh(x))), c);
}

__global__ void rotary(float *x, double *y) {
    fad_f32_rotate(x, x + 1, x[2], x[3]);
    fad_f64_rotate(y, y + 1, y[2], y[3]);
}

__global__ void positions(long long *out, long long n_q, long long n_k) {
    const fad_span span = {n_q, n_k, 0, -1, 0};
    const fad_interval visible = fad_visible(&span, threadIdx.x);
    out[0] = fad_partition_end(visible.hi, FAD_BLOCK_KV) - fad_partition_first(visible.lo, FAD_BLOCK_KV);
    out[1] = fad_tile_kind(&span, 0, n_q - 1, visible.lo, visible.hi);
}
