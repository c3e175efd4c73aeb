/* Sixteen lanes of fp32: AVX-512F. */
#ifndef FAD_CPU_VEC_H
#define FAD_CPU_VEC_H

#include <immintrin.h>

#include "../numerics/contract.h"

typedef float real;
typedef __m512 vreal;
#define VW 16 /* lanes */
#define VMR 4 /* rows of a chain tile, */
#define VNV 4 /* and its vectors: VMR * VNV accumulators must cover the latency of fma and fit the registers */
#define REAL(name) fad_f32_##name
#define REAL_DTYPE FAD_FLOAT32
#define REAL_CONST(name) FAD_F32_##name

static inline vreal v_set(real x) { return _mm512_set1_ps(x); }
static inline vreal v_load(const real *p) { return _mm512_loadu_ps(p); }
static inline void v_store(real *p, vreal x) { _mm512_storeu_ps(p, x); }
/* Lane numbers 0, 1, 2, ... */
static inline vreal v_iota(void) { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
static inline vreal v_add(vreal a, vreal b) { return _mm512_add_ps(a, b); }
static inline vreal v_sub(vreal a, vreal b) { return _mm512_sub_ps(a, b); }
static inline vreal v_mul(vreal a, vreal b) { return _mm512_mul_ps(a, b); }
static inline vreal v_div(vreal a, vreal b) { return _mm512_div_ps(a, b); }
static inline vreal v_fma(vreal a, vreal b, vreal c) { return _mm512_fmadd_ps(a, b, c); }
/* The instruction returns its second operand for NaN: a NaN candidate is ignored (N6). */
static inline vreal v_max(vreal candidate, vreal running) { return _mm512_max_ps(candidate, running); }
static inline __m512i v_bits(vreal x) { return _mm512_castps_si512(x); }
static inline vreal v_from_bits(__m512i x) { return _mm512_castsi512_ps(x); }
static inline vreal v_abs(vreal x) { return v_from_bits(_mm512_and_si512(v_bits(x), _mm512_set1_epi32(0x7fffffff))); }
static inline vreal v_copysign(vreal x, vreal sign) {
    const __m512i mask = _mm512_set1_epi32(INT32_MIN);
    return v_from_bits(_mm512_or_si512(_mm512_andnot_si512(mask, v_bits(x)), _mm512_and_si512(mask, v_bits(sign))));
}
static inline vreal v_rint(vreal x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT); }
static inline vreal v_select_lt(vreal a, vreal b, vreal yes, vreal no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
static inline vreal v_scale2(vreal z) {
    return v_from_bits(_mm512_add_epi32(_mm512_slli_epi32(v_bits(z), 23), _mm512_set1_epi32(0x3f800000)));
}
/* What the emulation of tensor cores (mma_block.inc) needs: integers beside floats. */
typedef __m512i vint;
static inline vint v_add_int(vint a, vint b) { return _mm512_add_epi32(a, b); }
static inline vint v_to_int(vreal x) { return _mm512_cvttps_epi32(x); } /* toward zero */
static inline vreal v_from_int(vint x) { return _mm512_cvtepi32_ps(x); }
static inline vreal v_cut_int(vint x) { /* toward zero, |x| < 2^31 - 128 */
    return _mm512_cvt_roundepi32_ps(x, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
}
/* 2^e of x = +-1.xxx * 2^e; 0 of 0 and subnormal numbers, infinity of infinity and NaN. */
static inline vreal v_power(vreal x) { return v_from_bits(_mm512_and_si512(v_bits(x), _mm512_set1_epi32(0x7f800000))); }
/* 2^n / power, for a power of two and a normal result. */
static inline vreal v_power_over(int n, vreal power) {
    return v_from_bits(_mm512_sub_epi32(_mm512_set1_epi32((int32_t)((uint32_t)(254 + n) << 23)), v_bits(power)));
}
/* NaN lanes replaced by the canonical quiet NaN (N9). */
static inline vreal v_canonical(vreal x) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x, v_from_bits(_mm512_set1_epi32(0x7fc00000)));
}
static inline int v_any_lt(vreal a, vreal b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ) != 0; }
static inline int v_any_nan(vreal x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) != 0; }
static inline real v_max_lanes(vreal x) { return _mm512_reduce_max_ps(x); } /* x without NaN */
/* Exact widening of VW values (N7). */
static inline vreal v_load_bf16(const uint16_t *p) {
    return v_from_bits(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
static inline vreal v_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }

/* rows[i] lane j <-> rows[j] lane i: 4x4 blocks within 128-bit lanes, then the 128-bit lanes among themselves. */
static inline void v_transpose(vreal *rows) {
    vreal t[VW];
    for (int i = 0; i < VW; i += 4) {
        const vreal a = _mm512_unpacklo_ps(rows[i], rows[i + 1]), b = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
        const vreal c = _mm512_unpacklo_ps(rows[i + 2], rows[i + 3]), d = _mm512_unpackhi_ps(rows[i + 2], rows[i + 3]);
        t[i] = _mm512_shuffle_ps(a, c, 0x44);
        t[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
        t[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
        t[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
    }
    for (int i = 0; i < 4; i++) {
        const vreal a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88), b = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88);
        const vreal c = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd), d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xdd);
        rows[i] = _mm512_shuffle_f32x4(a, b, 0x88);
        rows[i + 8] = _mm512_shuffle_f32x4(a, b, 0xdd);
        rows[i + 4] = _mm512_shuffle_f32x4(c, d, 0x88);
        rows[i + 12] = _mm512_shuffle_f32x4(c, d, 0xdd);
    }
}

#endif
