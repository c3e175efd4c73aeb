/* The backward of the fma family: its passes, and what they keep in the workspace. Free to change (N14). */
#include "fma_gradient.cuh"
#include "host.cuh"

constexpr int MOST_SLICES = FAD_MAX_HEAD_DIM / BLOCK;
constexpr size_t STATIC_SHARED = 1024; /* more than a kernel's shared memory beside what its launch asks for */
static_assert(STATIC_SHARED > sizeof(GradientTile) + 4 * sizeof(GradientMatrix), "it holds what the kernels have");

static size_t most_shared(const Device &device) { return (size_t)device.shared_bytes - STATIC_SHARED; }

/* Bytes of a pass's shared memory where its sums, of as many dims, are cut into slices. */
static size_t weigh_bytes() { return GradientShared::bytes(0); }
static size_t key_bytes(const fad_attn_problem *p, int slices) {
    return GradientShared::bytes(GradientSums::floats(p->D, slices) + GradientSums::floats(p->Dv, slices));
}
static size_t row_bytes(const fad_attn_problem *p, int slices) {
    return GradientShared::bytes(GradientSums::floats(p->D, slices));
}

/* The fewest slices that the device's shared memory holds: every slice computes the scores again. */
static fad_status choose_slices(const fad_attn_problem *p, size_t (*bytes)(const fad_attn_problem *, int),
                                const Device &device, int *slices) {
    const size_t most = most_shared(device);
    for (*slices = 1; *slices < MOST_SLICES && bytes(p, *slices) > most;)
        *slices *= 2;
    return bytes(p, *slices) <= most
               ? FAD_OK
               : fad_core->fail(FAD_UNSUPPORTED, "the backward needs %zu bytes of shared memory, this device has %d",
                                bytes(p, *slices), device.shared_bytes);
}

static size_t round_up(size_t bytes) { return (bytes + 63) / 64 * 64; }

/* delta or weight of every row; the parts of the sinks' gradient. */
static size_t rows_bytes(const fad_attn_problem *p) {
    return round_up((size_t)((p->cu_seqlens_q ? 1 : p->B) * p->Hq * p->Sq) * sizeof(float));
}
static size_t sinks_bytes(const fad_attn_problem *p) {
    return p->sinks ? round_up((size_t)(p->B * p->Hq) * sizeof(float)) : 0;
}

fad_status fma_backward_workspace(const fad_attn_problem *p, int32_t, size_t *bytes) {
    *bytes = 2 * rows_bytes(p) + sinks_bytes(p);
    return FAD_OK;
}

static fad_status clear(const fad_attn_problem *p, const fad_view &view, const int32_t *cu_seqlens, int64_t rows,
                        int64_t heads, int64_t n, void *stream) {
    const int64_t entries = cu_seqlens ? 1 : p->B, warps = entries * rows * heads;
    const int64_t blocks = (warps + THREADS / 32 - 1) / (THREADS / 32);
    return launch(clear_gradient, blocks < 4096 ? blocks : (int64_t)4096, THREADS, 0, stream, {}, view,
                  (int64_t)fad_dtype_bytes(p->dtype), entries, rows, heads, n);
}

static fad_status run_pass(void (*kernel)(GradientCall), int64_t tiles, size_t shared, const Device &device,
                           const GradientCall &call, void *stream) {
    return launch(kernel, tiles * call.slices, THREADS, shared, stream, {most_shared(device), false}, call);
}

static fad_status sum_sink_gradients(const GradientCall &call, float *d_sinks, void *stream) {
    const int64_t heads = call.p.Hq;
    TRY(launch(sink_parts, call.p.B * heads, THREADS, 0, stream, {}, call));
    return launch(sum_sinks, (heads + THREADS - 1) / THREADS, THREADS, 0, stream, {}, (const float *)call.sinks,
                  call.p.B, heads, d_sinks);
}

fad_status fma_backward(const fad_attn_problem *p, const fad_attn_gradients *gradients, const fad_runtime *runtime) {
    GradientCall call = {*p, *p, (float *)runtime->workspace, nullptr, nullptr, 1};
    void *stream = runtime->stream;
    int key_slices, row_slices;
    Device device;
    TRY(get_device(&device));
    TRY(choose_slices(p, key_bytes, device, &key_slices));
    TRY(choose_slices(p, row_bytes, device, &row_slices));
    call.g.q = gradients->dq, call.g.k = gradients->dk, call.g.v = gradients->dv;
    call.g.out = gradients->dout, call.g.lse = gradients->dlse;
    call.weight = (float *)((char *)runtime->workspace + rows_bytes(p));
    call.sinks = (float *)((char *)call.weight + rows_bytes(p));
    TRY(clear(p, call.g.q, p->cu_seqlens_q, p->Sq, p->Hq, p->D, stream));
    TRY(clear(p, call.g.k, p->cu_seqlens_k, p->Sk, p->Hk, p->D, stream));
    TRY(clear(p, call.g.v, p->cu_seqlens_k, p->Sk, p->Hk, p->Dv, stream));
    TRY(run_pass(weigh_rows, gradient_tiles<ByRows>(*p), weigh_bytes(), device, call, stream));
    call.slices = key_slices;
    TRY(run_pass(key_gradients, gradient_tiles<ByKeys>(*p), key_bytes(p, key_slices), device, call, stream));
    call.slices = row_slices;
    TRY(run_pass(row_gradients, gradient_tiles<ByRows>(*p), row_bytes(p, row_slices), device, call, stream));
    return gradients->d_sinks ? sum_sink_gradients(call, (float *)gradients->d_sinks, stream) : FAD_OK;
}
