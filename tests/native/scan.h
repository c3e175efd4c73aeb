/* Errors of the elementary functions against a wider type, in units in the last place of the exact result. */
#ifndef FAD_TESTS_SCAN_H
#define FAD_TESTS_SCAN_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct fad_scan_result {
    double worst;
    uint32_t at, count; /* bit pattern of the worst argument; arguments tried */
} fad_scan_result;

/* The largest error over the floats with bit patterns first, first + stride, ... <= last. */
fad_scan_result fad_scan(double (*error)(uint32_t bits), uint32_t first, uint32_t last, uint32_t stride);

double fad_error_exp2(uint32_t bits);
double fad_error_tanh(uint32_t bits);
double fad_error_log2(uint32_t bits);
double fad_error_log2_absolute(uint32_t bits); /* not in ulp: |error| itself */

/* fp64, against long double: as good as that type is wider than double. */
double fad_error_exp2_f64(double x);
double fad_error_tanh_f64(double x);
double fad_error_log2_f64(double x);

#ifdef __cplusplus
}
#endif
#endif
