/* One lane of fp32: any machine. Without hardware fma the library's fmaf keeps the bits, slowly. */
#ifndef FAD_CPU_VEC_H
#define FAD_CPU_VEC_H

#include "../numerics/contract.h"

typedef float real;
typedef float vreal;
#define VW 1  /* lanes */
#define VMR 4 /* rows of a chain tile */
#define VNV 4 /* vectors of a chain tile */
#define REAL(name) fad_f32_##name
#define REAL_DTYPE FAD_FLOAT32
#define REAL_CONST(name) FAD_F32_##name

#include "vec_one_lane.h"

static inline vreal v_load_bf16(const uint16_t *p) { return fad_bf16_widen(*p); }
static inline vreal v_load_f16(const uint16_t *p) { return fad_f16_widen(*p); }

#endif
