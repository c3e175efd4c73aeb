/* A stand-in for libtorch_cpu.so at link time: the same symbol names, and the same SONAME from the Makefile. At run time
 * the loader finds the real library, which Python has loaded with `import torch`. Never installed. */
#define FAD_TORCH_FUNCTION(result, name, ...)                                                                          \
    __attribute__((visibility("default"))) void name(void) {}
#define FAD_TORCH_CUDA_FUNCTION(result, name, ...)
#include "stable_abi.h"
