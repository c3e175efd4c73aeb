/* Eight lanes of fp32: AVX2 with FMA and F16C. See vec_avx512.h for what each operation means. */
#ifndef FAD_CPU_VEC_H
#define FAD_CPU_VEC_H

#include <immintrin.h>

#include "../numerics/contract.h"

typedef float real;
typedef __m256 vreal;
#define VW 8
#define VMR 4
#define VNV 2
#define REAL(name) fad_f32_##name
#define REAL_DTYPE FAD_FLOAT32
#define REAL_CONST(name) FAD_F32_##name

static inline vreal v_set(real x) { return _mm256_set1_ps(x); }
static inline vreal v_load(const real *p) { return _mm256_loadu_ps(p); }
static inline void v_store(real *p, vreal x) { _mm256_storeu_ps(p, x); }
static inline vreal v_iota(void) { return _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7); }
static inline vreal v_add(vreal a, vreal b) { return _mm256_add_ps(a, b); }
static inline vreal v_sub(vreal a, vreal b) { return _mm256_sub_ps(a, b); }
static inline vreal v_mul(vreal a, vreal b) { return _mm256_mul_ps(a, b); }
static inline vreal v_div(vreal a, vreal b) { return _mm256_div_ps(a, b); }
static inline vreal v_fma(vreal a, vreal b, vreal c) { return _mm256_fmadd_ps(a, b, c); }
static inline vreal v_max(vreal candidate, vreal running) { return _mm256_max_ps(candidate, running); }
static inline vreal v_abs(vreal x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
static inline vreal v_copysign(vreal x, vreal sign) {
    const vreal mask = _mm256_set1_ps(-0.0f);
    return _mm256_or_ps(_mm256_andnot_ps(mask, x), _mm256_and_ps(mask, sign));
}
static inline vreal v_rint(vreal x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline vreal v_select_lt(vreal a, vreal b, vreal yes, vreal no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
static inline vreal v_scale2(vreal z) {
    return _mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(z), 23), _mm256_set1_epi32(0x3f800000)));
}
typedef __m256i vint;
static inline vint v_add_int(vint a, vint b) { return _mm256_add_epi32(a, b); }
static inline vint v_to_int(vreal x) { return _mm256_cvttps_epi32(x); }
static inline vreal v_from_int(vint x) { return _mm256_cvtepi32_ps(x); }
static inline vreal v_cut_int(vint x) {
    const vreal nearest = v_from_int(x);
    const vint up = _mm256_cmpgt_epi32(_mm256_abs_epi32(v_to_int(nearest)), _mm256_abs_epi32(x)); /* -1 if too large */
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(nearest), up));
}
static inline vreal v_power(vreal x) { return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(0x7f800000))); }
static inline vreal v_power_over(int n, vreal power) {
    return _mm256_castsi256_ps(
        _mm256_sub_epi32(_mm256_set1_epi32((int32_t)((uint32_t)(254 + n) << 23)), _mm256_castps_si256(power)));
}
static inline vreal v_canonical(vreal x) {
    const vreal nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
    return _mm256_blendv_ps(x, nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}
static inline int v_any_lt(vreal a, vreal b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ)) != 0; }
static inline int v_any_nan(vreal x) { return _mm256_movemask_ps(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)) != 0; }
static inline real v_max_lanes(vreal x) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
}
static inline vreal v_load_bf16(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
static inline vreal v_load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }

static inline void v_transpose(vreal *rows) {
    vreal t[VW];
    for (int i = 0; i < VW; i += 4) {
        const vreal a = _mm256_unpacklo_ps(rows[i], rows[i + 1]), b = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
        const vreal c = _mm256_unpacklo_ps(rows[i + 2], rows[i + 3]), d = _mm256_unpackhi_ps(rows[i + 2], rows[i + 3]);
        t[i] = _mm256_shuffle_ps(a, c, 0x44);
        t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
        t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
        t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
    }
    for (int i = 0; i < 4; i++) {
        rows[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
        rows[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
    }
}

#endif
