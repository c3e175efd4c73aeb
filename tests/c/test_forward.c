/* Random calls through the public API, between guard pages, against one row at a time of the contract's own headers:
 * every instruction set, layout and dtype, dense and packed, any strides, on a workspace full of rubbish. The same calls
 * with emulated tensor cores, and the backward of either, one instruction set against the other. */
#include "check.h"

#include <pthread.h>

#include "../../csrc/flash_attn_det.h"
#include "../../csrc/numerics/contract.h"

static const size_t dtype_bytes[] = {4, 2, 2, 8};

static double element(const void *data, fad_dtype dtype, int64_t i) {
    switch (dtype) {
    case FAD_FLOAT32:
        return ((const float *)data)[i];
    case FAD_FLOAT16:
        return fad_f16_widen(((const uint16_t *)data)[i]);
    case FAD_BFLOAT16:
        return fad_bf16_widen(((const uint16_t *)data)[i]);
    default:
        return ((const double *)data)[i];
    }
}

static void set_element(void *data, fad_dtype dtype, int64_t i, double x) {
    switch (dtype) {
    case FAD_FLOAT32:
        ((float *)data)[i] = (float)x;
        break;
    case FAD_FLOAT16:
        ((uint16_t *)data)[i] = fad_f16_round((float)x);
        break;
    case FAD_BFLOAT16:
        ((uint16_t *)data)[i] = fad_bf16_round((float)x);
        break;
    default:
        ((double *)data)[i] = x;
    }
}

/* One row by the contract, fp32 compute: q [D], keys and values by position. */
#define CONTRACT_ROW(real, REAL, name)                                                                                 \
    static void name(const fad_attn_problem *p, const fad_span *span, int64_t i, const double *q, const double *k,     \
                     const double *v, double slope, const double *sink, double *out, double *lse) {                    \
        const fad_interval see = fad_visible(span, i);                                                                 \
        int plain;                                                                                                     \
        const real c = REAL(score_factor)(p->scale, p->softcap > 0 || p->alibi_slopes, &plain);                        \
        const real scaled = (real)(p->softcap > 0 ? p->scale / p->softcap : p->scale);                                 \
        real M = REAL(sentinel), L = 0, O[FAD_MAX_HEAD_DIM] = {0};                                                     \
        const int64_t end = span->k_pos + span->n_k;                                                                   \
        for (int64_t split = fad_partition_first(span->k_pos, p->split_size); split * p->split_size < end; split++) {  \
            real m = REAL(sentinel), l = 0, o[FAD_MAX_HEAD_DIM] = {0};                                                 \
            for (int64_t b = split * p->split_size; b < end && b < (split + 1) * p->split_size; b += FAD_BLOCK_KV) {   \
                real x[FAD_BLOCK_KV], x_max = -INFINITY;                                                               \
                for (int64_t j = 0; j < FAD_BLOCK_KV; j++) {                                                           \
                    if (b + j < see.lo || b + j >= see.hi)                                                             \
                        continue;                                                                                      \
                    const double *key = k + (b + j - span->k_pos) * p->D;                                              \
                    x[j] = 0;                                                                                          \
                    for (int64_t d = 0; d < p->D; d++)                                                                 \
                        x[j] = REAL(fma)((real)q[d], (real)key[d], x[j]);                                              \
                    if (!plain)                                                                                        \
                        x[j] = REAL(scaled_score)(x[j], scaled, (real)p->softcap);                                     \
                    if (p->alibi_slopes)                                                                               \
                        x[j] = REAL(fma)((real) - slope, (real)llabs(fad_query_position(span, i) - b - j), x[j]);      \
                    x_max = REAL(max)(x[j], x_max);                                                                    \
                }                                                                                                      \
                const real now = REAL(reference)(m, x_max, c), a = REAL(pow2)(m - now);                                \
                m = now;                                                                                               \
                l *= a;                                                                                                \
                for (int64_t d = 0; d < p->Dv; d++)                                                                    \
                    o[d] *= a;                                                                                         \
                for (int64_t j = 0; j < FAD_BLOCK_KV; j++) {                                                           \
                    if (b + j < see.lo || b + j >= see.hi)                                                             \
                        continue;                                                                                      \
                    const real w = REAL(probability)(x[j], c, m);                                                      \
                    l += w;                                                                                            \
                    for (int64_t d = 0; d < p->Dv; d++)                                                                \
                        o[d] = REAL(fma)(w, (real)v[(b + j - span->k_pos) * p->Dv + d], o[d]);                         \
                }                                                                                                      \
            }                                                                                                          \
            const real now = REAL(max)(m, M), a = REAL(pow2)(M - now), z = REAL(pow2)(m - now);                        \
            M = now;                                                                                                   \
            L = REAL(fold)(L, a, l, z);                                                                                \
            for (int64_t d = 0; d < p->Dv; d++)                                                                        \
                O[d] = REAL(fold)(O[d], a, o[d], z);                                                                   \
        }                                                                                                              \
        if (sink) {                                                                                                    \
            real l, m = REAL(sink_state)((real) * sink, &l), now = REAL(max)(m, M), a = REAL(pow2)(M - now);           \
            L = REAL(fold)(L, a, l, REAL(pow2)(m - now));                                                              \
            M = now;                                                                                                   \
            for (int64_t d = 0; d < p->Dv; d++)                                                                        \
                O[d] *= a;                                                                                             \
        }                                                                                                              \
        for (int64_t d = 0; d < p->Dv; d++)                                                                            \
            out[d] = REAL(finish_out)(O[d], L);                                                                        \
        *lse = REAL(finish_lse)(M, L);                                                                                 \
    }
#define fad_f32_sentinel FAD_F32_SENTINEL
#define fad_f64_sentinel FAD_F64_SENTINEL
#define F32(name) fad_f32_##name
#define F64(name) fad_f64_##name
CONTRACT_ROW(float, F32, contract_row_f32)
CONTRACT_ROW(double, F64, contract_row_f64)

/* A tensor [b, s, h, :] in a guarded buffer of its own, in a random order of dimensions, with gaps, maybe backwards. */
typedef struct tensor {
    guarded memory;
    fad_view view;
} tensor;

static tensor make_tensor(uint64_t *rng, int64_t b, int64_t s, int64_t h, int64_t d, size_t bytes) {
    int64_t sizes[] = {b, s, h}, strides[3], extent = d + random_in(rng, 0, 3), first = 0, last = d;
    int order[] = {0, 1, 2};
    for (int i = 2; i > 0; i--) {
        const int j = (int)random_in(rng, 0, i), t = order[i];
        order[i] = order[j];
        order[j] = t;
    }
    for (int i = 0; i < 3; i++) {
        const int dim = order[i], backwards = random_in(rng, 0, 5) == 0;
        strides[dim] = backwards ? -extent : extent;
        if (sizes[dim] > 0) {
            *(backwards ? &first : &last) += (sizes[dim] - 1) * strides[dim];
            extent *= sizes[dim];
        }
    }
    const int64_t count = b && s && h ? last - first : 0;
    tensor t = {guarded_alloc((size_t)count * bytes, bytes, (int)random_in(rng, 0, 1)),
                {NULL, strides[0], strides[1], strides[2]}};
    t.view.data = (char *)t.memory.data - first * (int64_t)bytes;
    return t;
}

static int64_t at(const fad_view *view, int64_t b, int64_t s, int64_t h) {
    return b * view->stride_b + s * view->stride_s + h * view->stride_h;
}

static void fill(uint64_t *rng, const tensor *t, fad_dtype dtype, int64_t b, int64_t s, int64_t h, int64_t d,
                 double gain) {
    for (int64_t i = 0; i < b * s * h; i++)
        for (int64_t e = 0; e < d; e++) {
            double x = gain * (double)(random_in(rng, -1048576, 1048576)) / 524288;
            const int64_t special = random_in(rng, 0, 3000);
            x = special == 0 ? NAN : special == 1 ? INFINITY : special == 2 ? -INFINITY : x;
            set_element(t->view.data, dtype, at(&t->view, i / (s * h), i / h % s, i % h) + e, x);
        }
}

/* Ranges on threads of their own; the last one on the caller's. */
typedef struct range {
    int64_t index;
    fad_range_fn fn;
    void *ctx;
} range;
static void *run_range(void *argument) {
    const range *r = argument;
    r->fn(r->index, r->index + 1, r->ctx);
    return NULL;
}
static void parallel_for(int64_t n, fad_range_fn fn, void *ctx) {
    pthread_t threads[8];
    range ranges[8];
    CHECK(n >= 1 && n <= 8, "%lld ranges", (long long)n);
    for (int64_t i = 0; i < n; i++) {
        ranges[i] = (range){i, fn, ctx};
        if (i < n - 1)
            CHECK(!pthread_create(&threads[i], NULL, run_range, &ranges[i]), "pthread_create");
    }
    run_range(&ranges[n - 1]);
    for (int64_t i = 0; i < n - 1; i++)
        CHECK(!pthread_join(threads[i], NULL), "pthread_join");
}

static int same_bits(const void *a, const void *b, size_t bytes) { return !memcmp(a, b, bytes); }

enum { MAX_B = 3, MAX_ROWS = 90, MAX_KEYS = 400 };

static int32_t array[6][MAX_B + 1];
enum { CU_Q, CU_K, USED_Q, USED_K, LEFTPAD, POS };

static void random_lengths(uint64_t *rng, fad_attn_problem *p, int64_t rows, int64_t keys, int packed) {
    for (int64_t b = 0; b < p->B; b++) {
        const int64_t owned_q = packed ? random_in(rng, 0, rows) : rows,
                      owned_k = packed ? random_in(rng, 0, keys) : keys;
        array[CU_Q][b + 1] = array[CU_Q][b] + (int32_t)owned_q;
        array[CU_K][b + 1] = array[CU_K][b] + (int32_t)owned_k;
        array[USED_Q][b] = (int32_t)random_in(rng, 0, owned_q);
        array[LEFTPAD][b] = (int32_t)random_in(rng, 0, owned_k);
        array[USED_K][b] = (int32_t)random_in(rng, 0, owned_k - (packed ? 0 : array[LEFTPAD][b]));
        array[POS][b] = (int32_t)random_in(rng, 0, 300);
    }
    p->Sq = packed ? array[CU_Q][p->B] + random_in(rng, 0, 3) : rows;
    p->Sk = packed ? array[CU_K][p->B] + random_in(rng, 0, 3) : keys;
    if (packed) {
        p->cu_seqlens_q = array[CU_Q];
        p->cu_seqlens_k = array[CU_K];
    }
    p->seqused_q = random_in(rng, 0, 2) ? NULL : array[USED_Q];
    p->seqused_k = random_in(rng, 0, 2) ? NULL : array[USED_K];
    p->leftpad_k = packed || random_in(rng, 0, 2) ? NULL : array[LEFTPAD];
    if (p->leftpad_k && !p->seqused_k)
        p->seqused_k = array[USED_K];
    p->k_pos = random_in(rng, 0, 2) ? NULL : array[POS];
}

/* Expected out and lse of row i of sequence b, head h. */
static void expected_row(const fad_attn_problem *p, int64_t b, int64_t i, int64_t h, double *out, double *lse) {
    static double q[FAD_MAX_HEAD_DIM], k[MAX_KEYS * FAD_MAX_HEAD_DIM], v[MAX_KEYS * FAD_MAX_HEAD_DIM];
    const int packed = p->cu_seqlens_q != NULL;
    const int64_t hk = h / (p->Hq / p->Hk), batch = packed ? 0 : b, row0 = packed ? p->cu_seqlens_q[b] : 0;
    const int64_t pad = p->leftpad_k ? p->leftpad_k[b] : 0, key0 = packed ? p->cu_seqlens_k[b] : pad;
    fad_span span = {packed ? p->cu_seqlens_q[b + 1] - row0 : p->Sq,
                     packed ? p->cu_seqlens_k[b + 1] - key0 : p->Sk - pad, p->k_pos ? p->k_pos[b] : 0, p->window_left,
                     p->causal ? 0 : p->window_right};
    span.n_q = p->seqused_q ? p->seqused_q[b] : span.n_q;
    span.n_k = p->seqused_k ? p->seqused_k[b] : span.n_k;
    if (i >= span.n_q) {
        memset(out, 0, (size_t)p->Dv * sizeof *out);
        *lse = -INFINITY;
        return;
    }
    for (int64_t d = 0; d < p->D; d++)
        q[d] = element(p->q.data, p->dtype, at(&p->q, batch, row0 + i, h) + d);
    for (int64_t j = 0; j < span.n_k; j++) {
        for (int64_t d = 0; d < p->D; d++)
            k[j * p->D + d] = element(p->k.data, p->dtype, at(&p->k, batch, key0 + j, hk) + d);
        for (int64_t d = 0; d < p->Dv; d++)
            v[j * p->Dv + d] = element(p->v.data, p->dtype, at(&p->v, batch, key0 + j, hk) + d);
    }
    const int wide = p->dtype == FAD_FLOAT64;
    const int64_t which = b * p->alibi_stride_b + h;
    const double slope = !p->alibi_slopes ? 0
                         : wide           ? ((const double *)p->alibi_slopes)[which]
                                          : ((const float *)p->alibi_slopes)[which];
    const double sink = !p->sinks ? 0 : wide ? ((const double *)p->sinks)[h] : ((const float *)p->sinks)[h];
    (wide ? contract_row_f64 : contract_row_f32)(p, &span, i, q, k, v, slope, p->sinks ? &sink : NULL, out, lse);
}

/* FNV-1a of every result of the contract: what it prints must be the same on every machine. */
static uint64_t digest = UINT64_C(0xcbf29ce484222325);

static void add_to_digest(const void *data, size_t bytes) {
    for (size_t i = 0; i < bytes; i++)
        digest = (digest ^ ((const unsigned char *)data)[i]) * UINT64_C(0x100000001b3);
}

/* Demands the contract's bits of out and lse; first: this call's first comparison, which goes into the digest. */
static void compare(const fad_attn_problem *p, const char *what, int first) {
    const int packed = p->cu_seqlens_q != NULL;
    const size_t bytes = dtype_bytes[p->dtype], real = p->dtype == FAD_FLOAT64 ? 8 : 4;
    for (int64_t b = 0; b < p->B + packed; b++) {
        const int64_t batch = packed ? 0 : b, row0 = packed ? p->cu_seqlens_q[b] : 0;
        const int64_t rows = !packed ? p->Sq : (b < p->B ? p->cu_seqlens_q[b + 1] : p->Sq) - row0;
        for (int64_t i = 0; i < rows; i++)
            for (int64_t h = 0; h < p->Hq; h++) {
                double out[FAD_MAX_HEAD_DIM] = {0}, lse = -INFINITY, rounded;
                if (b < p->B) /* rows behind the last sequence: 0 and -inf */
                    expected_row(p, b, i, h, out, &lse);
                for (int64_t d = 0; d < p->Dv; d++) {
                    const int64_t o = at(&p->out, batch, row0 + i, h) + d;
                    set_element(&rounded, p->dtype, 0, out[d]);
                    if (first)
                        add_to_digest((const char *)p->out.data + o * (int64_t)bytes, bytes);
                    CHECK(same_bits((const char *)p->out.data + o * (int64_t)bytes, &rounded, bytes),
                          "%s: out[%lld, %lld, %lld, %lld] is %a, expected %a", what, (long long)b, (long long)i,
                          (long long)h, (long long)d, element(p->out.data, p->dtype, o),
                          element(&rounded, p->dtype, 0));
                }
                const fad_dtype compute = p->dtype == FAD_FLOAT64 ? FAD_FLOAT64 : FAD_FLOAT32;
                const int64_t l = at(&p->lse, batch, row0 + i, h);
                set_element(&rounded, compute, 0, lse);
                if (p->lse.data && first)
                    add_to_digest((const char *)p->lse.data + l * (int64_t)real, real);
                if (p->lse.data)
                    CHECK(same_bits((const char *)p->lse.data + l * (int64_t)real, &rounded, real),
                          "%s: lse[%lld, %lld, %lld] is %a, expected %a", what, (long long)b, (long long)i,
                          (long long)h, element(p->lse.data, compute, l), lse);
            }
    }
}

static fad_schedule random_schedule(uint64_t *rng, int32_t isa) {
    return (fad_schedule){.isa = fad_cpu_isa(isa),
                          .layout = (int32_t)random_in(rng, 0, 2),
                          .tile_rows = random_in(rng, 0, 2) ? 0 : (int32_t)random_in(rng, 1, 256),
                          .split_parallel = (int32_t)random_in(rng, 0, 2)};
}

/* One forward, or with g its backward, under a schedule, on a workspace full of rubbish. what: gets the call in words. */
static void run(uint64_t *rng, const fad_attn_problem *p, const fad_attn_gradients *g, const fad_schedule *s,
                char *what, size_t size, uint64_t seed) {
    const int32_t threads = (int32_t)random_in(rng, 1, 4);
    size_t workspace_bytes;
    snprintf(what, size, "call %llu%s, arithmetic %d, %s, layout %d, tile_rows %d, split_parallel %d, %d threads",
             (unsigned long long)seed, g ? ", backward" : "", p->arithmetic, s->isa, s->layout, s->tile_rows,
             s->split_parallel, threads);
    CHECK(fad_force_schedule(s) == FAD_OK, "%s: %s", what, fad_last_error());
    CHECK((g ? fad_attn_backward_workspace : fad_attn_workspace)(p, threads, &workspace_bytes) == FAD_OK, "%s: %s",
          what, fad_last_error());
    guarded workspace = guarded_alloc(workspace_bytes, 64, GUARD_END);
    for (size_t i = 0; i + 8 <= workspace_bytes; i += 8) /* the rubbish that overflows most easily */
        memcpy((char *)workspace.data + i, &(int64_t){random_bits(rng) & 1 ? INT64_MIN : INT64_MAX}, 8);
    const fad_runtime r = {threads, threads > 1 ? parallel_for : NULL, workspace.data, workspace_bytes, NULL};
    CHECK((g ? fad_attn_backward(p, g, &r) : fad_attn_forward(p, &r)) == FAD_OK, "%s: %s", what, fad_last_error());
    guarded_free(&workspace);
}

/* Emulated tensor cores: every instruction set gives the bits of the first, which go into the digest. */
static void emulated_calls(uint64_t *rng, const fad_attn_problem *p, const guarded *out, const guarded *lse,
                           uint64_t seed) {
    char *expected = malloc(out->bytes + lse->bytes + 1);
    CHECK(expected, "malloc");
    for (int32_t isa = 0; fad_cpu_isa(isa); isa++) {
        char what[128];
        const fad_schedule s = random_schedule(rng, isa);
        memset(out->data, 0xa5, out->bytes);
        memset(lse->data, 0xa5, lse->bytes);
        run(rng, p, NULL, &s, what, sizeof what, seed);
        if (isa == 0) {
            memcpy(expected, out->data, out->bytes);
            memcpy(expected + out->bytes, lse->data, lse->bytes);
            add_to_digest(out->data, out->bytes);
            add_to_digest(lse->data, lse->bytes);
        }
        CHECK(same_bits(expected, out->data, out->bytes), "%s: out differs from that of %s", what, fad_cpu_isa(0));
        CHECK(same_bits(expected + out->bytes, lse->data, lse->bytes), "%s: lse differs from that of %s", what,
              fad_cpu_isa(0));
    }
    free(expected);
}

/* What one backward writes: dq, dk, dv, d_sinks. */
enum { N_GRADIENTS = 4 };

/* The backward of a call whose out and lse are there: every instruction set gives the bits of the first. dout, dlse: of
 * the shapes of out and lse. */
static void backward_calls(uint64_t *rng, const fad_attn_problem *p, const tensor *dout, const tensor *dlse,
                           tensor *results, uint64_t seed) {
    char *expected[N_GRADIENTS];
    const fad_attn_gradients g = {.dout = dout->view,
                                  .dlse = seed % 2 ? dlse->view : (fad_view){NULL, 0, 0, 0},
                                  .dq = results[0].view,
                                  .dk = results[1].view,
                                  .dv = results[2].view,
                                  .d_sinks = p->sinks ? results[3].view.data : NULL};
    for (int i = 0; i < N_GRADIENTS; i++)
        CHECK((expected[i] = malloc(results[i].memory.bytes + 1)), "malloc");
    for (int32_t isa = 0; fad_cpu_isa(isa); isa++) {
        char what[160];
        const fad_schedule s = random_schedule(rng, isa);
        for (int i = 0; i < N_GRADIENTS; i++)
            memset(results[i].memory.data, 0xa5, results[i].memory.bytes);
        run(rng, p, &g, &s, what, sizeof what, seed);
        for (int i = 0; i < N_GRADIENTS; i++) {
            const guarded *m = &results[i].memory;
            if (isa == 0) {
                memcpy(expected[i], m->data, m->bytes);
                add_to_digest(m->data, m->bytes);
            }
            CHECK(same_bits(expected[i], m->data, m->bytes), "%s: result %d differs from that of %s", what, i,
                  fad_cpu_isa(0));
        }
    }
    for (int i = 0; i < N_GRADIENTS; i++)
        free(expected[i]);
}

static void one_call(uint64_t seed) {
    static double slopes_f64[MAX_B * 8], sinks_f64[8];
    static float slopes_f32[MAX_B * 8], sinks_f32[8];
    uint64_t rng = seed;
    fad_attn_problem p = {0};
    p.dtype = (fad_dtype)random_in(&rng, 0, 3);
    p.B = random_in(&rng, 0, MAX_B);
    p.Hk = random_in(&rng, 1, 2);
    p.Hq = p.Hk * random_in(&rng, 1, 3);
    p.D = random_in(&rng, 0, 3) ? random_in(&rng, 1, 40) : random_in(&rng, 1, FAD_MAX_HEAD_DIM);
    p.Dv = random_in(&rng, 0, 3) ? random_in(&rng, 1, 40) : random_in(&rng, 1, FAD_MAX_HEAD_DIM);
    const int packed = random_in(&rng, 0, 2) == 0;
    const int64_t rows = random_in(&rng, 0, 3) ? random_in(&rng, 0, 9) : random_in(&rng, 0, MAX_ROWS / MAX_B);
    random_lengths(&rng, &p, rows, random_in(&rng, 0, MAX_KEYS), packed);
    p.scale = random_in(&rng, 0, 3) ? 0.25 : (double)random_in(&rng, -10, 10) / 8;
    p.causal = (int32_t)random_in(&rng, 0, 1);
    p.window_left = random_in(&rng, 0, 1) ? -1 : random_in(&rng, 0, 300);
    p.window_right = random_in(&rng, 0, 1) ? -1 : random_in(&rng, 0, 300);
    p.softcap = random_in(&rng, 0, 2) ? 0 : 2.5;
    p.split_size = FAD_MMA_BLOCK_KV * random_in(&rng, 1, 3);
    for (int i = 0; i < MAX_B * 8; i++)
        slopes_f32[i] = (float)(slopes_f64[i] = (double)random_in(&rng, -64, 64) / 256);
    for (int i = 0; i < 8; i++)
        sinks_f32[i] = (float)(sinks_f64[i] = (double)random_in(&rng, -64, 64) / 16);
    p.alibi_slopes = random_in(&rng, 0, 2) ? NULL : p.dtype == FAD_FLOAT64 ? (void *)slopes_f64 : (void *)slopes_f32;
    p.alibi_stride_b = random_in(&rng, 0, 1) ? 8 : 0;
    p.sinks = random_in(&rng, 0, 2) ? NULL : p.dtype == FAD_FLOAT64 ? (void *)sinks_f64 : (void *)sinks_f32;

    const int64_t batch = packed ? 1 : p.B;
    const size_t bytes = dtype_bytes[p.dtype];
    const double gain = p.dtype == FAD_FLOAT16 || random_in(&rng, 0, 3) ? 1 : 1e9;
    tensor q = make_tensor(&rng, batch, p.Sq, p.Hq, p.D, bytes), k = make_tensor(&rng, batch, p.Sk, p.Hk, p.D, bytes);
    tensor v = make_tensor(&rng, batch, p.Sk, p.Hk, p.Dv, bytes),
           out = make_tensor(&rng, batch, p.Sq, p.Hq, p.Dv, bytes);
    const fad_dtype compute = p.dtype == FAD_FLOAT64 ? FAD_FLOAT64 : FAD_FLOAT32;
    const size_t real = dtype_bytes[compute];
    tensor lse = make_tensor(&rng, batch, p.Sq, p.Hq, 1, real);
    tensor dout = make_tensor(&rng, batch, p.Sq, p.Hq, p.Dv, bytes),
           dlse = make_tensor(&rng, batch, p.Sq, p.Hq, 1, real);
    tensor gradients[N_GRADIENTS] = {
        make_tensor(&rng, batch, p.Sq, p.Hq, p.D, bytes), make_tensor(&rng, batch, p.Sk, p.Hk, p.D, bytes),
        make_tensor(&rng, batch, p.Sk, p.Hk, p.Dv, bytes), make_tensor(&rng, 1, 1, 1, p.Hq, real)};
    fill(&rng, &q, p.dtype, batch, p.Sq, p.Hq, p.D, gain);
    fill(&rng, &k, p.dtype, batch, p.Sk, p.Hk, p.D, 1);
    fill(&rng, &v, p.dtype, batch, p.Sk, p.Hk, p.Dv, 1);
    fill(&rng, &dout, p.dtype, batch, p.Sq, p.Hq, p.Dv, 1);
    fill(&rng, &dlse, compute, batch, p.Sq, p.Hq, 1, 1);
    p.q = q.view;
    p.k = k.view;
    p.v = v.view;
    p.out = out.view;
    p.lse = lse.view;
    if (random_in(&rng, 0, 3) == 0)
        p.lse.data = NULL;

    for (int32_t isa = 0; fad_cpu_isa(isa); isa++) {
        char what[128];
        const fad_schedule s = random_schedule(&rng, isa);
        memset(out.memory.data, 0xa5, out.memory.bytes);
        memset(lse.memory.data, 0xa5, lse.memory.bytes);
        run(&rng, &p, NULL, &s, what, sizeof what, seed);
        compare(&p, what, isa == 0);
    }
    if (p.lse.data)
        backward_calls(&rng, &p, &dout, &dlse, gradients, seed);
    if (p.dtype == FAD_FLOAT16 || p.dtype == FAD_BFLOAT16) {
        p.arithmetic =
            seed % 3 ? FAD_ARITHMETIC_MMA_SM90 : FAD_ARITHMETIC_MMA_SM80; /* rng is not the same everywhere */
        emulated_calls(&rng, &p, &out.memory, &lse.memory, seed);
        if (p.lse.data)
            backward_calls(&rng, &p, &dout, &dlse, gradients, seed);
    }
    CHECK(fad_force_schedule(NULL) == FAD_OK, "%s", fad_last_error());
    guarded_free(&q.memory);
    guarded_free(&k.memory);
    guarded_free(&v.memory);
    guarded_free(&out.memory);
    guarded_free(&lse.memory);
    guarded_free(&dout.memory);
    guarded_free(&dlse.memory);
    for (int i = 0; i < N_GRADIENTS; i++)
        guarded_free(&gradients[i].memory);
}

/* test_forward [calls [first seed]] */
int main(int argc, char **argv) {
    const uint64_t calls = argc > 1 ? strtoull(argv[1], NULL, 10) : 300,
                   first = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    for (uint64_t seed = first; seed < first + calls; seed++)
        one_call(seed);
    printf("%llu calls, digest of all results %016llx\n", (unsigned long long)calls, (unsigned long long)digest);
    return 0;
}
