/* Scalar arithmetic of the contract: every rounding is one named operation, in C11 and in CUDA, for fp32 and fp64.
 *
 * fad_f32_*, fad_f64_*: add sub mul div fma max(candidate, running) abs copysign rint select_lt, and
 * scale2(z) = 2^n for z = MAGIC + n. The elementary functions and the softmax steps are then written once, in
 * elementary.inc, softmax.inc and gradient.inc, over these names; vector code includes the same files over its own
 * operations. */
#ifndef FAD_NUMERICS_REAL_H
#define FAD_NUMERICS_REAL_H

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if !defined(__CUDACC__) && FLT_EVAL_METHOD != 0
#error "fp32 and fp64 expressions must be rounded as what they are; x87 keeps more"
#endif

#ifdef __CUDACC__
#define FAD_FN static __host__ __device__ __forceinline__
#else
#define FAD_FN static inline __attribute__((unused))
#endif

/* MAGIC = 1.5 * 2^(p-1) for p bits of significand: adding it rounds to an integer that sits in the low bits. */
#define FAD_F32_MAGIC 0x1.8p23f
#define FAD_F64_MAGIC 0x1.8p52
/* |t| up to which fma(x, c, MAGIC) - MAGIC is the integer nearest to x * c (N6). */
#define FAD_F32_LIMIT 0x1p22f
#define FAD_F64_LIMIT 0x1p51
/* Reference of the empty state (N3): finite, so that differences of references are not NaN. (Between
 * two references of +inf they are, but there l and O are NaN already.) */
#define FAD_F32_SENTINEL (-0x1p126f)
#define FAD_F64_SENTINEL (-0x1p1022)
/* Powers of two below 2^MIN_EXP count as 0 (N6): the smallest normal number. */
#define FAD_F32_MIN_EXP (-126.0f)
#define FAD_F64_MIN_EXP (-1022.0)
#define FAD_LOG2E 0x1.71547652b82fep+0
#define FAD_LN2 0x1.62e42fefa39efp-1

FAD_FN uint32_t fad_f32_bits(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}
FAD_FN float fad_f32_from_bits(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}
FAD_FN uint64_t fad_f64_bits(double x) {
    uint64_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}
FAD_FN double fad_f64_from_bits(uint64_t u) {
    double x;
    memcpy(&x, &u, sizeof x);
    return x;
}

#ifdef __CUDA_ARCH__ /* the intrinsics are never contracted, whatever the compiler's flags */
FAD_FN float fad_f32_add(float a, float b) { return __fadd_rn(a, b); }
FAD_FN float fad_f32_sub(float a, float b) { return __fsub_rn(a, b); }
FAD_FN float fad_f32_mul(float a, float b) { return __fmul_rn(a, b); }
FAD_FN float fad_f32_div(float a, float b) { return __fdiv_rn(a, b); }
FAD_FN float fad_f32_fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FAD_FN double fad_f64_add(double a, double b) { return __dadd_rn(a, b); }
FAD_FN double fad_f64_sub(double a, double b) { return __dsub_rn(a, b); }
FAD_FN double fad_f64_mul(double a, double b) { return __dmul_rn(a, b); }
FAD_FN double fad_f64_div(double a, double b) { return __ddiv_rn(a, b); }
FAD_FN double fad_f64_fma(double a, double b, double c) { return __fma_rn(a, b, c); }
#else /* compiled with -ffp-contract=off */
FAD_FN float fad_f32_add(float a, float b) { return a + b; }
FAD_FN float fad_f32_sub(float a, float b) { return a - b; }
FAD_FN float fad_f32_mul(float a, float b) { return a * b; }
FAD_FN float fad_f32_div(float a, float b) { return a / b; }
FAD_FN float fad_f32_fma(float a, float b, float c) { return fmaf(a, b, c); }
FAD_FN double fad_f64_add(double a, double b) { return a + b; }
FAD_FN double fad_f64_sub(double a, double b) { return a - b; }
FAD_FN double fad_f64_mul(double a, double b) { return a * b; }
FAD_FN double fad_f64_div(double a, double b) { return a / b; }
FAD_FN double fad_f64_fma(double a, double b, double c) { return fma(a, b, c); }
#endif

FAD_FN float fad_f32_set(float x) { return x; }
FAD_FN float fad_f32_abs(float x) { return fad_f32_from_bits(fad_f32_bits(x) & 0x7fffffffu); }
FAD_FN float fad_f32_copysign(float x, float sign) { return copysignf(x, sign); }
FAD_FN float fad_f32_rint(float x) { return rintf(x); }
FAD_FN float fad_f32_max(float candidate, float running) { return candidate > running ? candidate : running; }
FAD_FN float fad_f32_select_lt(float a, float b, float yes, float no) { return a < b ? yes : no; }
FAD_FN float fad_f32_scale2(float z) { return fad_f32_from_bits((fad_f32_bits(z) << 23) + 0x3f800000u); }

FAD_FN double fad_f64_set(double x) { return x; }
FAD_FN double fad_f64_abs(double x) { return fad_f64_from_bits(fad_f64_bits(x) & 0x7fffffffffffffffu); }
FAD_FN double fad_f64_copysign(double x, double sign) { return copysign(x, sign); }
FAD_FN double fad_f64_rint(double x) { return rint(x); }
FAD_FN double fad_f64_max(double candidate, double running) { return candidate > running ? candidate : running; }
FAD_FN double fad_f64_select_lt(double a, double b, double yes, double no) { return a < b ? yes : no; }
FAD_FN double fad_f64_scale2(double z) { return fad_f64_from_bits((fad_f64_bits(z) << 52) + 0x3ff0000000000000u); }

/* Finite significand in [sqrt(1/2), sqrt(2)) and integer exponent of a positive normal x. */
FAD_FN float fad_f32_split_exponent(float x, float *exponent) {
    uint32_t bits = fad_f32_bits(x), shifted = bits - 0x3f3504f3u; /* sqrt(1/2), rounded */
    int32_t e = (int32_t)shifted >> 23;
    *exponent = (float)e;
    return fad_f32_from_bits(bits - ((uint32_t)e << 23));
}
FAD_FN double fad_f64_split_exponent(double x, double *exponent) {
    uint64_t bits = fad_f64_bits(x), shifted = bits - 0x3fe6a09e667f3bcdu;
    int64_t e = (int64_t)shifted >> 52;
    *exponent = (double)e;
    return fad_f64_from_bits(bits - ((uint64_t)e << 52));
}

/* N9: whatever produced a NaN, it is stored as this one. */
FAD_FN float fad_f32_canonical(float x) { return x != x ? fad_f32_from_bits(0x7fc00000u) : x; }
FAD_FN double fad_f64_canonical(double x) { return x != x ? fad_f64_from_bits(0x7ff8000000000000u) : x; }

#define FAD_E float
#define FAD_R float
#define FAD_OP(name) fad_f32_##name
#define FAD_CONST(name) FAD_F32_##name
#define FAD_SCALAR
#include "elementary.inc"
#include "softmax.inc"
#include "gradient.inc"
#undef FAD_E
#undef FAD_R
#undef FAD_OP
#undef FAD_CONST

#define FAD_E double
#define FAD_R double
#define FAD_OP(name) fad_f64_##name
#define FAD_CONST(name) FAD_F64_##name
#include "elementary.inc"
#include "softmax.inc"
#include "gradient.inc"
#undef FAD_E
#undef FAD_R
#undef FAD_OP
#undef FAD_CONST
#undef FAD_SCALAR

#endif
