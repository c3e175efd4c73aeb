#include "vec_avx512.h"

#define FAD_ISA avx512
#include "tile.inc"
