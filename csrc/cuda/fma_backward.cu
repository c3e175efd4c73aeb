/* The backward of the fma family. */
#include "host.cuh"

static fad_status refuse() {
    return fad_core->fail(FAD_UNSUPPORTED, "there is no backward on a CUDA device yet, only on the CPU");
}

fad_status fma_backward_workspace(const fad_attn_problem *, int32_t, size_t *) { return refuse(); }

fad_status fma_backward(const fad_attn_problem *, const fad_attn_gradients *, const fad_runtime *) { return refuse(); }
