#include "vec_neon.h"

#define FAD_ISA neon
#include "tile.inc"
