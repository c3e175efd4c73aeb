/* 16-bit floats as bit patterns: exact widening, and rounding to nearest even with the canonical quiet NaN (N7, N9). */
#ifndef FAD_NUMERICS_HALF_H
#define FAD_NUMERICS_HALF_H

#include "real.h"

FAD_FN float fad_bf16_widen(uint16_t h) { return fad_f32_from_bits((uint32_t)h << 16); }

FAD_FN uint16_t fad_bf16_round(float x) {
    uint32_t u = fad_f32_bits(x);
    if (x != x)
        return 0x7fc0u;
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1)) >> 16); /* overflow carries into infinity */
}

FAD_FN float fad_f16_widen(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
    if (magnitude >= 0x7c00u) /* infinity, NaN */
        return fad_f32_from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    if (magnitude < 0x400u) /* subnormal: an integer times 2^-24 */
        return fad_f32_from_bits(sign | fad_f32_bits((float)magnitude * 0x1p-24f));
    return fad_f32_from_bits(sign | ((magnitude << 13) + ((127u - 15u) << 23)));
}

FAD_FN uint16_t fad_f16_round(float x) {
    uint32_t u = fad_f32_bits(x), sign = u >> 16 & 0x8000u, a = u & 0x7fffffffu;
    if (x != x)
        return 0x7e00u;
    if (a >= 0x477ff000u) /* 65520 and above round to infinity */
        return (uint16_t)(sign | 0x7c00u);
    if (a < 0x38800000u) /* below 2^-14: adding 1/2 leaves the multiple of 2^-24 in the low bits, rounded by the add */
        return (uint16_t)(sign | (fad_f32_bits(fad_f32_add(fad_f32_from_bits(a), 0.5f)) & 0x7ffu));
    a += 0xfffu + (a >> 13 & 1);
    return (uint16_t)(sign | ((a - ((127u - 15u) << 23)) >> 13));
}

#endif
