#include "vec_avx2.h"

#define FAD_ISA avx2
#include "tile.inc"
