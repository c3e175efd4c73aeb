#include "vec_scalar.h"

#define FAD_ISA scalar
#include "tile.inc"
