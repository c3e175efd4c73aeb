/* Four lanes of fp32: AArch64. See vec_avx512.h for what each operation means. */
#ifndef FAD_CPU_VEC_H
#define FAD_CPU_VEC_H

#include <arm_neon.h>

#include "../numerics/contract.h"

typedef float real;
typedef float32x4_t vreal;
#define VW 4
#define VMR 4
#define VNV 4
#define REAL(name) fad_f32_##name
#define REAL_DTYPE FAD_FLOAT32
#define REAL_CONST(name) FAD_F32_##name

static inline vreal v_set(real x) { return vdupq_n_f32(x); }
static inline vreal v_load(const real *p) { return vld1q_f32(p); }
static inline void v_store(real *p, vreal x) { vst1q_f32(p, x); }
static inline vreal v_iota(void) { return (vreal){0, 1, 2, 3}; }
static inline vreal v_add(vreal a, vreal b) { return vaddq_f32(a, b); }
static inline vreal v_sub(vreal a, vreal b) { return vsubq_f32(a, b); }
static inline vreal v_mul(vreal a, vreal b) { return vmulq_f32(a, b); }
static inline vreal v_div(vreal a, vreal b) { return vdivq_f32(a, b); }
static inline vreal v_fma(vreal a, vreal b, vreal c) { return vfmaq_f32(c, a, b); }
static inline vreal v_max(vreal candidate, vreal running) {
    return vbslq_f32(vcgtq_f32(candidate, running), candidate, running);
}
static inline vreal v_abs(vreal x) { return vabsq_f32(x); }
static inline vreal v_copysign(vreal x, vreal sign) { return vbslq_f32(vdupq_n_u32(0x80000000u), sign, x); }
static inline vreal v_rint(vreal x) { return vrndnq_f32(x); }
static inline vreal v_select_lt(vreal a, vreal b, vreal yes, vreal no) { return vbslq_f32(vcltq_f32(a, b), yes, no); }
static inline vreal v_scale2(vreal z) {
    return vreinterpretq_f32_u32(vaddq_u32(vshlq_n_u32(vreinterpretq_u32_f32(z), 23), vdupq_n_u32(0x3f800000u)));
}
typedef int32x4_t vint;
static inline vint v_add_int(vint a, vint b) { return vaddq_s32(a, b); }
static inline vint v_to_int(vreal x) { return vcvtq_s32_f32(x); }
static inline vreal v_from_int(vint x) { return vcvtq_f32_s32(x); }
static inline vreal v_cut_int(vint x) {
    const vreal nearest = v_from_int(x);
    const uint32x4_t up = vcgtq_s32(vabsq_s32(v_to_int(nearest)), vabsq_s32(x)); /* -1 if too large */
    return vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(nearest), up));
}
static inline vreal v_power(vreal x) {
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x), vdupq_n_u32(0x7f800000u)));
}
static inline vreal v_power_over(int n, vreal power) {
    return vreinterpretq_f32_u32(vsubq_u32(vdupq_n_u32((uint32_t)(254 + n) << 23), vreinterpretq_u32_f32(power)));
}
static inline vreal v_canonical(vreal x) {
    return vbslq_f32(vceqq_f32(x, x), x, vreinterpretq_f32_u32(vdupq_n_u32(0x7fc00000u)));
}
static inline int v_any_lt(vreal a, vreal b) { return vmaxvq_u32(vcltq_f32(a, b)) != 0; }
static inline int v_any_nan(vreal x) { return vminvq_u32(vceqq_f32(x, x)) == 0; }
static inline real v_max_lanes(vreal x) { return vmaxvq_f32(x); }
static inline vreal v_load_bf16(const uint16_t *p) {
    return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vld1_u16(p)), 16));
}
static inline vreal v_load_f16(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }

static inline void v_transpose(vreal *rows) {
    const float32x4x2_t a = vtrnq_f32(rows[0], rows[1]), b = vtrnq_f32(rows[2], rows[3]);
    rows[0] = vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
    rows[1] = vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
    rows[2] = vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
    rows[3] = vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
}

#endif
