/* Rotary embedding of one pair of values (N12). */
#ifndef FAD_NUMERICS_ROTARY_H
#define FAD_NUMERICS_ROTARY_H

#include "real.h"

FAD_FN void fad_f32_rotate(float *a, float *b, float cos, float sin) {
    const float x = *a, y = *b;
    *a = fad_f32_sub(fad_f32_mul(x, cos), fad_f32_mul(y, sin));
    *b = fad_f32_add(fad_f32_mul(x, sin), fad_f32_mul(y, cos));
}
FAD_FN void fad_f64_rotate(double *a, double *b, double cos, double sin) {
    const double x = *a, y = *b;
    *a = fad_f64_sub(fad_f64_mul(x, cos), fad_f64_mul(y, sin));
    *b = fad_f64_add(fad_f64_mul(x, sin), fad_f64_mul(y, cos));
}

#endif
