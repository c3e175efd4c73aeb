#include "scan.h"

#include "../../csrc/numerics/contract.h"

/* Distance in ulps of the exact value's binade; a normal result is expected. */
static double ulps_f32(float got, double exact) {
    int exponent;
    frexp(exact, &exponent);
    return fabs((double)got - exact) / ldexp(1.0, exponent - 24);
}

static double ulps_f64(double got, long double exact) {
    int exponent;
    frexpl(exact, &exponent);
    return (double)(fabsl((long double)got - exact) / ldexpl(1.0L, exponent - 53));
}

fad_scan_result fad_scan(double (*error)(uint32_t), uint32_t first, uint32_t last, uint32_t stride) {
    fad_scan_result r = {0, first, 0};
    for (uint64_t bits = first; bits <= last; bits += stride) {
        const double e = error((uint32_t)bits);
        r.count++;
        if (!(e <= r.worst)) { /* also a NaN */
            r.worst = e;
            r.at = (uint32_t)bits;
        }
    }
    return r;
}

double fad_error_exp2(uint32_t bits) {
    const float x = fad_f32_from_bits(bits);
    return ulps_f32(fad_f32_exp2(x), exp2((double)x));
}
double fad_error_tanh(uint32_t bits) {
    const float x = fad_f32_from_bits(bits);
    return ulps_f32(fad_f32_tanh(x), tanh((double)x));
}
double fad_error_log2(uint32_t bits) {
    const float x = fad_f32_from_bits(bits);
    return ulps_f32(fad_f32_log2(x), log2((double)x));
}
double fad_error_log2_absolute(uint32_t bits) {
    const float x = fad_f32_from_bits(bits);
    return fabs((double)fad_f32_log2(x) - log2((double)x));
}

double fad_error_exp2_f64(double x) { return ulps_f64(fad_f64_exp2(x), exp2l((long double)x)); }
double fad_error_tanh_f64(double x) { return ulps_f64(fad_f64_tanh(x), tanhl((long double)x)); }
double fad_error_log2_f64(double x) { return ulps_f64(fad_f64_log2(x), log2l((long double)x)); }
