/* The backward of the mma family. */
#include "host.cuh"

static fad_status refuse() {
    return fad_core->fail(FAD_UNSUPPORTED, "there is no backward of arithmetic 'mma', which is the default for float16 "
                                           "and bfloat16 on a CUDA device: pass arithmetic='fma'");
}

fad_status mma_backward_workspace(const fad_attn_problem *, int32_t, size_t *) { return refuse(); }

fad_status mma_backward(const fad_attn_problem *, const fad_attn_gradients *, const fad_runtime *) { return refuse(); }
