/* What two GPU instructions of the mma family compute (N7), in plain C: a step of a tensor core, and
 * ex2.approx.ftz.f32. With them a CPU repeats bit for bit what a GPU did; no kernel of a GPU needs this file.
 *
 * Measured on an H100 and on an H200, where none of 200,000 results differs in each class of operands (normal, any finite
 * bits, subnormal, zeros beside large factors, overflow, Inf and NaN; fp16 and bf16): the step of compute capability 9.0;
 * and none of 8,438,062 results of ex2 of any bits. On the H100 also normal numbers (none of 576,000), and ex2 for every
 * argument with 2^-60 <= |x|, -126 < x < 64 (none of 1,115,422,719). What an accumulator of 0 does was fitted to results of
 * the H100 (docs/audit.md). tests/cuda/tensor_core.cu measures all of it again. Published by others and not measured by us:
 * the step of compute capability 8.0.
 */
#ifndef FAD_NUMERICS_TENSOR_CORE_H
#define FAD_NUMERICS_TENSOR_CORE_H

#include "real.h"

enum { FAD_TENSOR_CORE_ZERO = -133 }; /* exponent of an accumulator that is 0 */

/* How a generation of tensor cores adds products of 16-bit numbers to fp32. */
typedef struct fad_tensor_core {
    int products;       /* of one sum; a k = 16 step is 16 / products sums, one after the other */
    int fraction_bits;  /* that every term of a sum keeps below the largest exponent */
    int least_exponent; /* of the inputs' smallest normal number: subnormal ones are aligned as if they had it */
} fad_tensor_core;

/* sm: 90 or 80. least_exponent: -14 for fp16 and -126 for bf16. */
FAD_FN fad_tensor_core fad_tensor_core_of(int sm, int least_exponent) {
    fad_tensor_core core;
    core.products = sm == 90 ? 16 : 8;
    core.fraction_bits = sm == 90 ? 25 : 24;
    core.least_exponent = least_exponent;
    return core;
}

/* Exponent e of a finite x != 0, 2^e <= |x| < 2^(e + 1), or least >= -126 if e is below it. */
FAD_FN int fad_tensor_core_exponent(float x, int least) {
    const int e = (int)(fad_f32_bits(x) >> 23 & 0xffu) - 127;
    return e > least ? e : least;
}

/* Toward zero to fp32: from 2^128 on infinity, subnormals kept, zero is +0. */
FAD_FN float fad_tensor_core_round(double x) {
    float y = (float)x;
    if (fabs((double)y) > fabs(x) && fabs(x) < 0x1p128)
        y = fad_f32_from_bits(fad_f32_bits(y) - 1);
    return fad_f32_add(y, 0);
}

/* c + the sum of a[i] * b[i], i < n. The exact products and c are cut toward zero to fraction_bits below the largest
 * exponent, that of a product being the sum of its factors' (so it may be in [2, 4)); then they are added exactly and the
 * sum is cut toward zero to fp32. Products that are zero take no part; c = 0 does, as if its exponent were -133, which only
 * products of bf16 are small enough to notice. If anything is not finite, the result is what IEEE addition gives, some NaN
 * or an infinity. Doubles are used as integers: nothing but the two cuts rounds. */
FAD_FN float fad_tensor_core_sum(fad_tensor_core core, const float *a, const float *b, int n, float c) {
    int largest = c != 0 ? fad_tensor_core_exponent(c, -126) : FAD_TENSOR_CORE_ZERO;
    double total = (double)c, unit;
    for (int i = 0; i < n; i++)
        total += (double)a[i] * (double)b[i];
    if (!(fabs(total) < INFINITY))
        return (float)total;
    for (int i = 0; i < n; i++)
        if (a[i] != 0 && b[i] != 0) {
            const int e = fad_tensor_core_exponent(a[i], core.least_exponent) +
                          fad_tensor_core_exponent(b[i], core.least_exponent);
            largest = e > largest ? e : largest;
        }
    unit = fad_f64_from_bits((uint64_t)(1023 + core.fraction_bits - largest) << 52); /* of the sum, per 1 */
    total = (double)(int64_t)((double)c * unit);
    for (int i = 0; i < n; i++)
        total += (double)(int64_t)((double)a[i] * (double)b[i] * unit);
    return fad_tensor_core_round(total / unit);
}

/* One k = 16 step: c + n <= 16 products; what is missing counts as zeros. */
FAD_FN float fad_tensor_core_step(fad_tensor_core core, const float *a, const float *b, int n, float c) {
    for (int i = 0; i < n; i += core.products)
        c = fad_tensor_core_sum(core, a + i, b + i, n - i < core.products ? n - i : core.products, c);
    return c;
}

/* ex2 interpolates 2^f, 0 <= f < 1, by a quadratic in each of 64 segments, in fixed point with 38 fraction bits. Derived
 * from the measured table of all 2^23 values, which they give back exactly. */
typedef struct fad_ex2_segment {
    uint32_t constant; /* in units of 2^-25 */
    uint16_t slope, curvature;
} fad_ex2_segment;

/* 2^(i * 2^-23) in units of 2^-23, for i < 2^23. */
FAD_FN uint32_t fad_ex2_significand(uint32_t i) {
    static const fad_ex2_segment segments[64] = {
        {33554435, 22713, 494}, {33919818, 22960, 501}, {34289182, 23210, 506}, {34662565, 23463, 511},
        {35040018, 23718, 518}, {35421577, 23977, 521}, {35807292, 24238, 527}, {36197209, 24502, 532},
        {36591372, 24768, 541}, {36989825, 25038, 546}, {37392616, 25311, 551}, {37799797, 25586, 559},
        {38211409, 25865, 564}, {38627504, 26147, 568}, {39048131, 26431, 577}, {39473337, 26719, 583},
        {39903173, 27010, 589}, {40337690, 27304, 596}, {40776937, 27602, 600}, {41220970, 27902, 609},
        {41669836, 28206, 615}, {42123592, 28513, 622}, {42582286, 28824, 627}, {43045977, 29138, 633},
        {43514717, 29455, 641}, {43988561, 29776, 647}, {44467565, 30100, 655}, {44951786, 30428, 661},
        {45441278, 30759, 670}, {45936101, 31094, 677}, {46436314, 31432, 686}, {46941971, 31775, 691},
        {47453135, 32121, 699}, {47969867, 32471, 705}, {48492225, 32824, 715}, {49020269, 33182, 721},
        {49554065, 33543, 730}, {50093674, 33908, 739}, {50639159, 34277, 748}, {51190582, 34651, 753},
        {51748011, 35028, 763}, {52311510, 35409, 773}, {52881146, 35795, 779}, {53456983, 36185, 787},
        {54039091, 36579, 796}, {54627538, 36977, 806}, {55222393, 37380, 813}, {55823725, 37787, 822},
        {56431607, 38198, 833}, {57046106, 38614, 842}, {57667297, 39035, 849}, {58295254, 39460, 858},
        {58930048, 39889, 870}, {59571754, 40324, 877}, {60220447, 40763, 887}, {60876205, 41207, 896},
        {61539104, 41655, 909}, {62209220, 42109, 917}, {62886634, 42568, 925}, {63571424, 43031, 938},
        {64263672, 43500, 946}, {64963458, 43973, 959}, {65670863, 44452, 969}, {66385972, 44936, 980},
    };
    const fad_ex2_segment s = segments[i >> 17];
    const uint32_t x = i & 0x1ffffu, high = x >> 10;
    /* x * x / 2^19 without the partial products below 2^19: those of bits 10 and up with themselves and with bits 8 and
     * 9, and those of bits 2 to 7 with bits that are high enough. */
    uint32_t square = high * ((x >> 8) - 2 * high);
    for (int j = 2; j < 8; j++)
        square += (x >> j & 1) * (x >> (18 - j));
    const uint64_t sum = ((uint64_t)s.constant << 13) + (uint64_t)s.slope * x + (uint64_t)s.curvature * square;
    return (uint32_t)((sum + 6114) >> 15);
}

/* ex2.approx.ftz.f32: 1 for the smallest |x|, also subnormal ones, 0 for what is below 2^-126, infinity from 128 on. */
FAD_FN float fad_ex2(float x) {
    if (!(x < 128 && x >= -127)) /* also NaN */
        return x < 0 ? 0 : fad_f32_add(x, INFINITY);
    const int32_t size = (int32_t)(fad_f32_abs(x) * 0x1p23f);
    const int32_t fixed = x > 0 ? size : size & 0x7fffff ? ~size : -size; /* a negative number in ones' complement */
    const int32_t exponent = fixed >> 23;
    const uint32_t significand = fad_ex2_significand((uint32_t)fixed & 0x7fffffu);
    return exponent < -126 ? 0 : fad_f32_from_bits(((uint32_t)(exponent + 126) << 23) + significand);
}

/* N6, N7: p of a score x, as fad_f32_probability with the exp2 of mma. */
FAD_FN float fad_mma_probability(float x, float c, float m) {
    const int far = fad_f32_abs(m) > FAD_F32_LIMIT;
    return fad_ex2(far ? fad_f32_sub(fad_f32_mul(x, c), m) : fad_f32_fma(x, c, -m));
}

#endif
