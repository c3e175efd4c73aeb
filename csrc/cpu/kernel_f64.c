#include "vec_f64.h"

#define FAD_ISA f64
#include "tile.inc"
