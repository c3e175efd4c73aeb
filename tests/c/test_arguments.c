/* Bad arguments: the pinned status, a message that carries the offending value, and no output touched. */
#include "check.h"

#include <fenv.h>
#include <math.h>

#include "../../csrc/flash_attn_det.h"

enum { B = 2, SQ = 3, SK = 140, HQ = 4, HK = 2, DIM = 8, SPLIT = 128 };

static float q[B * SQ * HQ * DIM], k[B * SK * HK * DIM], v[B * SK * HK * DIM], out[B * SQ * HQ * DIM], lse[B * HQ * SQ];
static int32_t cu_q[] = {0, 3, 6}, cu_k[] = {0, 140, 280};
static _Alignas(64) char workspace[1 << 20];

static fad_attn_problem dense(void) {
    return (fad_attn_problem){
        .B = B,
        .Sq = SQ,
        .Sk = SK,
        .Hq = HQ,
        .Hk = HK,
        .D = DIM,
        .Dv = DIM,
        .q = {q, SQ * HQ * DIM, HQ * DIM, DIM},
        .k = {k, SK * HK * DIM, HK * DIM, DIM},
        .v = {v, SK * HK * DIM, HK * DIM, DIM},
        .out = {out, SQ * HQ * DIM, HQ * DIM, DIM},
        .lse = {lse, HQ * SQ, 1, SQ},
        .scale = 0.5,
        .window_left = -1,
        .window_right = -1,
        .split_size = SPLIT,
    };
}

static fad_attn_problem packed(void) {
    fad_attn_problem p = dense();
    p.Sq = B * SQ;
    p.Sk = B * SK;
    p.cu_seqlens_q = cu_q;
    p.cu_seqlens_k = cu_k;
    return p;
}

static fad_runtime runtime(void) {
    return (fad_runtime){.num_threads = 1, .workspace = workspace, .workspace_bytes = sizeof workspace};
}

static int untouched(void) {
    for (size_t i = 0; i < sizeof out / sizeof *out; i++)
        if (out[i] != 123)
            return 0;
    for (size_t i = 0; i < sizeof lse / sizeof *lse; i++)
        if (lse[i] != 123)
            return 0;
    return 1;
}

/* Every entry point must refuse the problem alike. */
static void refused(const fad_attn_problem *p, fad_status status, const char *message, int line) {
    const fad_runtime r = runtime();
    size_t bytes = 77;
    const fad_status got[] = {fad_attn_check(p), fad_attn_workspace(p, 1, &bytes), fad_attn_forward(p, &r)};
    for (int i = 0; i < 3; i++)
        CHECK(got[i] == status, "line %d, call %d: status %d, expected %d: %s", line, i, got[i], status,
              fad_last_error());
    CHECK(strstr(fad_last_error(), message), "line %d: message '%s' lacks '%s'", line, fad_last_error(), message);
    CHECK(bytes == 77, "line %d: a refused call wrote %zu", line, bytes);
    CHECK(untouched(), "line %d: a refused call wrote its output", line);
}

#define REFUSED_FROM(form, status, message, ...)                                                                       \
    do {                                                                                                               \
        fad_attn_problem p = form();                                                                                   \
        __VA_ARGS__;                                                                                                   \
        refused(&p, status, message, __LINE__);                                                                        \
    } while (0)
#define REFUSED(message, ...) REFUSED_FROM(dense, FAD_INVALID_ARGUMENT, message, __VA_ARGS__)
#define REFUSED_PACKED(message, ...) REFUSED_FROM(packed, FAD_INVALID_ARGUMENT, message, __VA_ARGS__)

static void problems(void) {
    static int32_t bad[3];
    static float slopes[HQ];
    REFUSED("batch -1", p.B = -1);
    REFUSED("query rows -2", p.Sq = -2);
    REFUSED("key rows -3", p.Sk = -3);
    REFUSED("q has 3 heads, k and v have 2", p.Hq = 3);
    REFUSED("q has 0 heads", p.Hq = 0);
    REFUSED("have 0", p.Hk = 0);
    REFUSED("head dim of q and k is 0", p.D = 0);
    REFUSED("head dim of q and k is 257", p.D = 257);
    REFUSED("head dim of v is 0", p.Dv = 0);
    REFUSED("head dim of v is 257", p.Dv = 257);
    REFUSED("scale is nan", p.scale = NAN);
    REFUSED("scale is inf", p.scale = INFINITY);
    REFUSED("softcap is -1", p.softcap = -1);
    REFUSED("softcap is nan", p.softcap = NAN);
    REFUSED("causal is 2", p.causal = 2);
    REFUSED("left window is -2", p.window_left = -2);
    REFUSED("right window is -7", p.window_right = -7);
    REFUSED("split_size is 0", p.split_size = 0);
    REFUSED("split_size is -128", p.split_size = -128);
    REFUSED("split_size is 64", p.split_size = 64);
    REFUSED("dtype is 9", p.dtype = (fad_dtype)9);
    REFUSED("device is 9", p.device = (fad_device)9);
    REFUSED("arithmetic is 9", p.arithmetic = (fad_arithmetic)9);
    REFUSED("null", p.q.data = NULL);
    REFUSED("null", p.k.data = NULL);
    REFUSED("null", p.v.data = NULL);
    REFUSED("ALiBi with 16777216 keys", p.alibi_slopes = slopes; p.Sk = 1 << 24);
    REFUSED("only one of cu_seqlens_q and cu_seqlens_k", p.cu_seqlens_q = cu_q);
    REFUSED("seqused_q[1] is 4", bad[0] = 3; bad[1] = 4; p.seqused_q = bad);
    REFUSED("seqused_k[0] is -1", bad[0] = -1; p.seqused_k = bad);
    REFUSED("seqused_k[0] is 141", bad[0] = 141; p.seqused_k = bad);
    REFUSED("leftpad_k[1] is 141", bad[0] = 0; bad[1] = 141; p.leftpad_k = bad);
    REFUSED("seqused_k[0] is 100", bad[0] = 100; bad[1] = 100; p.leftpad_k = bad; p.seqused_k = bad);
    REFUSED("k_pos[1] is -5", bad[0] = 0; bad[1] = -5; p.k_pos = bad);
    REFUSED_PACKED("cu_seqlens_q[0] is 1", bad[0] = 1; bad[1] = 3; bad[2] = 6; p.cu_seqlens_q = bad);
    REFUSED_PACKED("cu_seqlens_k falls from 100 to 50", bad[0] = 0; bad[1] = 100; bad[2] = 50; p.cu_seqlens_k = bad);
    REFUSED_PACKED("cu_seqlens_k ends at 281", bad[0] = 0; bad[1] = 100; bad[2] = 281; p.cu_seqlens_k = bad);
    REFUSED_PACKED("leftpad_k", bad[0] = bad[1] = 0; p.leftpad_k = bad);
    REFUSED("cache_batch_idx[1] is 2, expected 0 to 1", bad[0] = 0; bad[1] = 2; p.cache_batch_idx = bad; p.Bk = 2);
    REFUSED("k and v have 0 entries and cache_batch_idx is given", p.cache_batch_idx = bad);
    REFUSED("block_table[0][0] is -1, expected 0 to 1", bad[0] = -1; p.block_table = bad; p.page_size = SK; p.Bk = 2);
    REFUSED("pages of 0 rows", p.block_table = bad; p.Bk = 2);
    REFUSED("140 key rows in pages of 16", p.block_table = bad; p.page_size = 16; p.Bk = 2);
    REFUSED("block_table and cache_batch_idx are given", p.block_table = p.cache_batch_idx = bad);
    REFUSED_PACKED("block_table and cu_seqlens_k are given", p.block_table = bad; p.page_size = SK; p.Bk = 2);
    REFUSED_PACKED("without seqused_k", p.cu_seqlens_k = NULL; p.block_table = bad; p.page_size = 1; p.Bk = 2);
    REFUSED_PACKED("cache_batch_idx is given for packed sequences", p.cache_batch_idx = bad; p.Bk = 2);
    REFUSED_FROM(dense, FAD_UNSUPPORTED, "CUDA", p.device = FAD_CUDA);
    REFUSED_FROM(dense, FAD_UNSUPPORTED, "mma", p.arithmetic = FAD_ARITHMETIC_MMA);
    REFUSED("'mma_sm90' but the inputs are float32", p.arithmetic = FAD_ARITHMETIC_MMA_SM90);
    REFUSED("'mma_sm80' but the inputs are float64", p.arithmetic = FAD_ARITHMETIC_MMA_SM80; p.dtype = FAD_FLOAT64);
    REFUSED_FROM(dense, FAD_UNSUPPORTED, "'mma_sm80' emulates tensor cores on the CPU",
                 p.arithmetic = FAD_ARITHMETIC_MMA_SM80;
                 p.dtype = FAD_FLOAT16; p.device = FAD_CUDA);
    CHECK(fad_attn_check(NULL) == FAD_INVALID_ARGUMENT, "null problem");
    CHECK(strstr(fad_last_error(), "null"), "%s", fad_last_error());
}

static void runtimes(void) {
    const fad_attn_problem p = dense();
    fad_runtime r = runtime();
    size_t bytes;
    CHECK(fad_attn_workspace(&p, 0, &bytes) == FAD_INVALID_ARGUMENT, "no threads");
    CHECK(fad_attn_workspace(&p, 1, &bytes) == FAD_OK, "%s", fad_last_error());
    CHECK(fad_attn_forward(&p, NULL) == FAD_INVALID_ARGUMENT, "null runtime");
    r.num_threads = 0;
    CHECK(fad_attn_forward(&p, &r) == FAD_INVALID_ARGUMENT && strstr(fad_last_error(), "num_threads"), "%s",
          fad_last_error());
    r = runtime();
    r.workspace_bytes = bytes - 1;
    CHECK(fad_attn_forward(&p, &r) == FAD_INVALID_ARGUMENT && strstr(fad_last_error(), "workspace"), "%s",
          fad_last_error());
    r = runtime();
    r.workspace = workspace + 8;
    CHECK(fad_attn_forward(&p, &r) == FAD_INVALID_ARGUMENT && strstr(fad_last_error(), "aligned"), "%s",
          fad_last_error());
    r = runtime();
    r.workspace = NULL;
    CHECK(fad_attn_forward(&p, &r) == FAD_INVALID_ARGUMENT, "null workspace");
    CHECK(untouched(), "a refused call wrote its output");
}

static void partials(void) {
    static float o[2 * B * SQ * HQ * DIM], m[2 * B * HQ * SQ], l[2 * B * HQ * SQ];
    static int32_t zeros[B];
    const fad_runtime r = runtime();
    fad_partials states = {o, m, l, 2};
    fad_attn_problem p = dense();
    int64_t n = 0;
    p.out.data = p.lse.data = NULL; /* ignored */
    CHECK(fad_attn_partials_count(&p, &n) == FAD_OK && n == 2, "%lld states: %s", (long long)n, fad_last_error());
    CHECK(fad_attn_partials(&p, &states, &r) == FAD_OK, "%s", fad_last_error());
    states.n_splits = 3;
    CHECK(fad_attn_partials(&p, &states, &r) == FAD_INVALID_ARGUMENT && strstr(fad_last_error(), "room for 3"), "%s",
          fad_last_error());
    states = (fad_partials){NULL, m, l, 2};
    CHECK(fad_attn_partials(&p, &states, &r) == FAD_INVALID_ARGUMENT && strstr(fad_last_error(), "null"), "%s",
          fad_last_error());
    CHECK(fad_attn_partials(&p, NULL, &r) == FAD_INVALID_ARGUMENT, "null partials");
    p.k_pos = zeros;
    CHECK(fad_attn_partials_count(&p, &n) == FAD_INVALID_ARGUMENT && strstr(fad_last_error(), "k_pos"), "%s",
          fad_last_error());
    p = packed();
    CHECK(fad_attn_partials_count(&p, &n) == FAD_INVALID_ARGUMENT && strstr(fad_last_error(), "packed"), "%s",
          fad_last_error());
}

static float dq[B * SQ * HQ * DIM], dk[B * SK * HK * DIM], dv[B * SK * HK * DIM], d_sinks[HQ];

static fad_attn_gradients all_gradients(void) {
    const fad_attn_problem p = dense();
    fad_attn_gradients g = {.dout = p.out, .dlse = p.lse, .dq = p.q, .dk = p.k, .dv = p.v};
    g.dq.data = dq, g.dk.data = dk, g.dv.data = dv;
    return g;
}

#define BACKWARD_REFUSED(status, message, ...)                                                                         \
    do {                                                                                                               \
        fad_attn_problem p = dense();                                                                                  \
        fad_attn_gradients g = all_gradients();                                                                        \
        fad_runtime r = runtime();                                                                                     \
        __VA_ARGS__;                                                                                                   \
        dq[0] = dk[0] = dv[0] = 123;                                                                                   \
        CHECK(fad_attn_backward(&p, &g, &r) == status && strstr(fad_last_error(), message), "line %d: message '%s'",   \
              __LINE__, fad_last_error());                                                                             \
        CHECK(dq[0] == 123 && dk[0] == 123 && dv[0] == 123, "line %d: a refused call wrote", __LINE__);                \
    } while (0)

static void backward(void) {
    static const int32_t entries[B];
    const fad_attn_problem p = dense();
    const fad_attn_gradients g = all_gradients();
    const fad_runtime r = runtime();
    size_t bytes;
    CHECK(fad_attn_backward_workspace(&p, 1, &bytes) == FAD_OK && bytes <= sizeof workspace, "%zu bytes", bytes);
    CHECK(fad_attn_backward_workspace(&p, 0, &bytes) == FAD_INVALID_ARGUMENT, "no threads");
    CHECK(fad_attn_backward(&p, &g, &r) == FAD_OK, "%s", fad_last_error());
    CHECK(fad_attn_backward(&p, NULL, &r) == FAD_INVALID_ARGUMENT, "null gradients");
    CHECK(fad_attn_backward(&p, &g, NULL) == FAD_INVALID_ARGUMENT, "null runtime");
    BACKWARD_REFUSED(FAD_INVALID_ARGUMENT, "split_size", p.split_size = 7);
    BACKWARD_REFUSED(FAD_INVALID_ARGUMENT, "dout", g.dout.data = NULL);
    BACKWARD_REFUSED(FAD_INVALID_ARGUMENT, "lse", p.lse.data = NULL);
    BACKWARD_REFUSED(FAD_INVALID_ARGUMENT, "dk", g.dk.data = NULL);
    BACKWARD_REFUSED(FAD_INVALID_ARGUMENT, "d_sinks", g.d_sinks = d_sinks);
    BACKWARD_REFUSED(FAD_INVALID_ARGUMENT, "workspace", r.workspace_bytes = bytes - 1);
    BACKWARD_REFUSED(FAD_UNSUPPORTED, "CUDA", p.device = FAD_CUDA);
    BACKWARD_REFUSED(FAD_UNSUPPORTED, "cache_batch_idx", p.cache_batch_idx = entries, p.Bk = B);
}

static void null_pointers(void) {
    fad_attn_problem p = dense();
    const fad_runtime r = runtime();
    p.Sk = 0; /* no states, and still no place for them */
    CHECK(fad_attn_partials(&p, NULL, &r) == FAD_INVALID_ARGUMENT && strstr(fad_last_error(), "null"), "%s",
          fad_last_error());
    CHECK(fad_cpu_fma_flops(1, NULL) == FAD_INVALID_ARGUMENT && strstr(fad_last_error(), "null"), "%s",
          fad_last_error());
}

static void constants(void) {
    int64_t value = -7;
    int32_t n = 0;
    for (const char *name; (name = fad_constant_name(n)); n++)
        CHECK(fad_constant(name, &value) == FAD_OK, "%s: %s", name, fad_last_error());
    CHECK(n >= 5 && !fad_constant_name(n + 1) && !fad_constant_name(-1), "%d names", n);
    CHECK(fad_constant("BLOCK_KV", &value) == FAD_OK && value == 64, "BLOCK_KV is %lld", (long long)value);
    CHECK(fad_constant("MMA_BLOCK_KV", &value) == FAD_OK && value == 128, "MMA_BLOCK_KV is %lld", (long long)value);
    value = -7;
    CHECK(fad_constant("NO_SUCH_CONSTANT", &value) == FAD_INVALID_ARGUMENT && value == -7, "unknown name");
    CHECK(strstr(fad_last_error(), "NO_SUCH_CONSTANT"), "%s", fad_last_error());
    CHECK(fad_constant(NULL, &value) == FAD_INVALID_ARGUMENT, "null name");
    CHECK(FAD_OK == 0 && FAD_INVALID_ARGUMENT == 1 && FAD_UNSUPPORTED == 2 && FAD_DEVICE_ERROR == 3,
          "statuses are pinned");
}

static void schedules(void) {
    const fad_schedule bad[] = {{.layout = 3},         {.layout = -1}, {.tile_rows = 257}, {.tile_rows = -1},
                                {.split_parallel = 3}, {.kernel = 4},  {.kernel = -1}};
    const fad_schedule unknown = {.isa = "abacus"};
    const fad_attn_problem p = dense();
    const fad_runtime r = runtime();
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        CHECK(fad_force_schedule(&bad[i]) == FAD_INVALID_ARGUMENT, "schedule %zu", i);
    CHECK(fad_cpu_isa(0) && !fad_cpu_isa(-1) && !fad_cpu_isa(100), "list of instruction sets");
    if (fad_force_schedule(&unknown) == FAD_OK)
        CHECK(fad_attn_forward(&p, &r) == FAD_INVALID_ARGUMENT, "unknown instruction set");
    CHECK(strstr(fad_last_error(), "abacus"), "%s", fad_last_error());
    CHECK(untouched(), "a refused call wrote its output");
    CHECK(fad_force_schedule(NULL) == FAD_OK, "back to automatic");
    CHECK(fad_attn_forward(&p, &r) == FAD_OK, "%s", fad_last_error());
    CHECK(!untouched(), "a good call wrote nothing");
}

/* A workspace must not grow with the length of the keys beyond the states of one wave of splits. */
static void workspaces(void) {
    size_t bytes[2] = {0, 0};
    for (int i = 0; i < 2; i++) {
        fad_attn_problem p = dense();
        p.B = 1;
        p.Sq = 128;
        p.Sk = i ? 1 << 24 : 1 << 16;
        p.Hq = 32;
        CHECK(fad_attn_workspace(&p, 64, &bytes[i]) == FAD_OK, "%s", fad_last_error());
    }
    CHECK(bytes[0] == bytes[1] && bytes[0] < 64u << 20, "%zu bytes for 64 Ki keys, %zu for 16 Mi", bytes[0], bytes[1]);
}

/* The sink's state, too, is computed in the contract's floating-point environment, not in the caller's. */
static void rounding_mode(void) {
    static float o[3 * B * SQ * HQ * DIM], m[2][3 * B * HQ * SQ], l[2][3 * B * HQ * SQ];
    static const float sinks[HQ] = {0.3f, 2.2f, 123.7f, -7.9f};
    const int modes[] = {FE_TONEAREST, FE_UPWARD};
    fad_attn_problem p = dense();
    const fad_runtime r = runtime();
    p.sinks = sinks;
    for (int i = 0; i < 2; i++) {
        const fad_partials partials = {o, m[i], l[i], 3};
        CHECK(fesetround(modes[i]) == 0, "rounding mode %d", modes[i]);
        const fad_status status = fad_attn_partials(&p, &partials, &r);
        CHECK(fegetround() == modes[i], "the caller's rounding mode was not given back");
        CHECK(fesetround(FE_TONEAREST) == 0, "rounding mode");
        CHECK(status == FAD_OK, "%s", fad_last_error());
    }
    CHECK(!memcmp(m[0], m[1], sizeof m[0]) && !memcmp(l[0], l[1], sizeof l[0]),
          "states know the caller's rounding mode");
}

int main(void) {
    for (size_t i = 0; i < sizeof out / sizeof *out; i++)
        out[i] = 123;
    for (size_t i = 0; i < sizeof lse / sizeof *lse; i++)
        lse[i] = 123;
    problems();
    runtimes();
    partials();
    backward();
    null_pointers();
    constants();
    schedules();
    workspaces();
    rounding_mode();
    return 0;
}
