/* One lane of fp64: for checking gradients, not for speed. */
#ifndef FAD_CPU_VEC_H
#define FAD_CPU_VEC_H

#include "../numerics/contract.h"

typedef double real;
typedef double vreal;
#define REAL_IS_F64
#define VW 1
#define VMR 4
#define VNV 4
#define REAL(name) fad_f64_##name
#define REAL_DTYPE FAD_FLOAT64
#define REAL_CONST(name) FAD_F64_##name

#include "vec_one_lane.h"

#endif
