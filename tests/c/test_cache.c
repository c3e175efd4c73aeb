/* Caches: keys in pages and in named entries give the bits of the same keys in one buffer, appends go where they should
 * and nowhere else, refused ones nowhere. Buffers end at pages that may not be touched. */
#include "check.h"

#include <math.h>

#include "../../csrc/flash_attn_det.h"
#include "../../csrc/numerics/contract.h"

enum { MAX_B = 3, MAX_SK = 200, MAX_SQ = 4, MAX_DIM = 20, HQ = 4, HK = 2 };

static const size_t dtype_bytes[] = {4, 2, 2, 8};

typedef struct sequences {
    int64_t B, Sk, D, Dv;
    fad_dtype dtype;
    int32_t used[MAX_B];
} sequences;

/* [entries, rows, HK, dims], contiguous, up to a guard page. */
static fad_view make_view(guarded *memory, int64_t entries, int64_t rows, int64_t heads, int64_t dims, size_t bytes) {
    *memory = guarded_alloc((size_t)(entries * rows * heads * dims) * bytes, 8, GUARD_END);
    return (fad_view){memory->data, rows * heads * dims, heads * dims, dims};
}

static void fill(uint64_t *rng, const guarded *memory, fad_dtype dtype) {
    for (size_t i = 0; i < memory->bytes / dtype_bytes[dtype]; i++) {
        const float x = (float)random_in(rng, -64, 64) / 32;
        if (dtype == FAD_FLOAT64)
            ((double *)memory->data)[i] = x;
        else if (dtype == FAD_FLOAT32)
            ((float *)memory->data)[i] = x;
        else
            ((uint16_t *)memory->data)[i] = dtype == FAD_FLOAT16 ? fad_f16_round(x) : fad_bf16_round(x);
    }
}

static const fad_runtime one_thread = {.num_threads = 1};

static void run(const fad_attn_problem *p, const char *what) {
    size_t bytes;
    CHECK(fad_attn_workspace(p, 1, &bytes) == FAD_OK, "%s: %s", what, fad_last_error());
    guarded workspace = guarded_alloc(bytes, 64, GUARD_END);
    const fad_runtime r = {1, NULL, workspace.data, bytes, NULL};
    CHECK(fad_attn_forward(p, &r) == FAD_OK, "%s: %s", what, fad_last_error());
    guarded_free(&workspace);
}

/* Each sequence's rows of k and v, appended to the cache of p in pieces. */
static void append_all(uint64_t *rng, const sequences *s, const fad_view *k, const fad_view *v,
                       const fad_attn_problem *p) {
    for (int64_t b = 0; b < s->B; b++)
        for (int32_t done = 0, n; done < s->used[b]; done += n) {
            n = (int32_t)random_in(rng, 1, s->used[b] - done);
            const int64_t bytes = (int64_t)dtype_bytes[s->dtype];
            fad_cache_append a = {.dtype = s->dtype, .B = 1, .S = n, .Hk = HK, .D = s->D, .Dv = s->Dv};
            a.k_new = *k, a.v_new = *v;
            a.k_new.data = (char *)k->data + (b * k->stride_b + done * k->stride_s) * bytes;
            a.v_new.data = (char *)v->data + (b * v->stride_b + done * v->stride_s) * bytes;
            a.k = p->k, a.v = p->v;
            a.cache_seqlens = &done;
            a.Sk = p->Sk, a.Bk = p->Bk;
            a.cache_batch_idx = p->cache_batch_idx ? p->cache_batch_idx + b : NULL;
            a.block_table = p->block_table ? p->block_table + b * p->block_table_stride : NULL;
            a.page_size = p->page_size;
            CHECK(fad_append_to_cache(&a, &one_thread) == FAD_OK, "%s", fad_last_error());
        }
}

/* Random entries or pages 0 .. n - 1, each once. */
static void shuffle(uint64_t *rng, int32_t *order, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        order[i] = (int32_t)i;
    for (int64_t i = n - 1; i > 0; i--) {
        const int64_t j = random_in(rng, 0, i);
        const int32_t x = order[i];
        order[i] = order[j], order[j] = x;
    }
}

/* The same attention over a cache; its out and lse must be those of p. */
static void compare(uint64_t *rng, const sequences *s, const fad_attn_problem *p, const guarded *out,
                    const guarded *lse, int64_t page_size, uint64_t seed) {
    static int32_t order[MAX_B * MAX_SK + 8];
    char what[64];
    const int64_t columns = page_size ? (s->Sk + page_size - 1) / page_size + random_in(rng, 0, 2) : 1;
    const size_t bytes = dtype_bytes[s->dtype];
    guarded k, v, places = guarded_alloc((size_t)(s->B * columns) * 4, 4, GUARD_END), out2, lse2;
    fad_attn_problem q = *p;
    snprintf(what, sizeof what, "call %llu, pages of %lld", (unsigned long long)seed, (long long)page_size);
    q.Bk = s->B * columns + 2;
    shuffle(rng, order, q.Bk);
    memcpy(places.data, order, places.bytes);
    if (page_size) {
        q.block_table = places.data, q.block_table_stride = columns, q.page_size = page_size;
        q.Sk = columns * page_size;
        for (int64_t b = 0; b < s->B; b++) /* no pages where no key is */
            for (int64_t c = (s->used[b] + page_size - 1) / page_size; c < columns; c++)
                ((int32_t *)places.data)[b * columns + c] = random_in(rng, 0, 1) ? -1 : INT32_MAX;
    } else {
        q.cache_batch_idx = places.data;
    }
    q.k = make_view(&k, q.Bk, page_size ? page_size : s->Sk, HK, s->D, bytes);
    q.v = make_view(&v, q.Bk, page_size ? page_size : s->Sk, HK, s->Dv, bytes);
    append_all(rng, s, &p->k, &p->v, &q);
    out2 = guarded_alloc(out->bytes, 8, GUARD_END), lse2 = guarded_alloc(lse->bytes, 8, GUARD_END);
    q.out.data = out2.data, q.lse.data = lse2.data;
    run(&q, what);
    CHECK(!memcmp(out->data, out2.data, out->bytes), "%s: out", what);
    CHECK(!memcmp(lse->data, lse2.data, lse->bytes), "%s: lse", what);
    guarded *const all[] = {&k, &v, &places, &out2, &lse2};
    for (int i = 0; i < 5; i++)
        guarded_free(all[i]);
}

static void one_call(uint64_t seed) {
    uint64_t rng = seed;
    sequences s = {.B = random_in(&rng, 1, MAX_B), .Sk = random_in(&rng, 1, MAX_SK), .D = random_in(&rng, 1, MAX_DIM)};
    const int64_t Sq = random_in(&rng, 1, MAX_SQ);
    s.Dv = random_in(&rng, 1, MAX_DIM);
    s.dtype = (fad_dtype)random_in(&rng, 0, 3);
    for (int64_t b = 0; b < s.B; b++)
        s.used[b] = (int32_t)random_in(&rng, 0, s.Sk);
    const size_t bytes = dtype_bytes[s.dtype], real = s.dtype == FAD_FLOAT64 ? 8 : 4;
    guarded q, k, v, out, lse;
    fad_attn_problem p = {.dtype = s.dtype, .B = s.B, .Sq = Sq, .Sk = s.Sk, .Hq = HQ, .Hk = HK, .D = s.D, .Dv = s.Dv};
    p.q = make_view(&q, s.B, Sq, HQ, s.D, bytes);
    p.k = make_view(&k, s.B, s.Sk, HK, s.D, bytes);
    p.v = make_view(&v, s.B, s.Sk, HK, s.Dv, bytes);
    p.out = make_view(&out, s.B, Sq, HQ, s.Dv, bytes);
    p.lse = make_view(&lse, s.B, Sq, HQ, 1, real);
    fill(&rng, &q, s.dtype), fill(&rng, &k, s.dtype), fill(&rng, &v, s.dtype);
    p.seqused_k = s.used;
    p.scale = 0.25, p.causal = (int32_t)random_in(&rng, 0, 1), p.split_size = FAD_MMA_BLOCK_KV;
    p.window_left = random_in(&rng, 0, 1) ? -1 : 50, p.window_right = -1;
    if (s.dtype == FAD_FLOAT16 && random_in(&rng, 0, 1))
        p.arithmetic = FAD_ARITHMETIC_MMA_SM90;
    run(&p, "one buffer");
    compare(&rng, &s, &p, &out, &lse, 0, seed);
    compare(&rng, &s, &p, &out, &lse, random_in(&rng, 1, 70), seed);
    guarded *const all[] = {&q, &k, &v, &out, &lse};
    for (int i = 0; i < 5; i++)
        guarded_free(all[i]);
}

/* N12, and that values behind the rotated ones are copied. */
static void test_n12_rotation(void) {
    enum { S = 5, D = 7, HALF = 2, POSITIONS = 9 };
    uint64_t rng = 3;
    guarded x, out, cos, sin;
    for (int32_t interleaved = 0; interleaved < 2; interleaved++)
        for (int32_t advance = 0; advance < 2; advance++) {
            fad_rotation r = {.B = 1, .S = S, .H = 1, .D = D, .advance = advance};
            const int32_t offset = 4;
            r.x = make_view(&x, 1, S, 1, D, 4), r.out = make_view(&out, 1, S, 1, D, 4);
            cos = guarded_alloc(POSITIONS * HALF * 4, 4, GUARD_END),
            sin = guarded_alloc(POSITIONS * HALF * 4, 4, GUARD_END);
            fill(&rng, &x, FAD_FLOAT32), fill(&rng, &cos, FAD_FLOAT32), fill(&rng, &sin, FAD_FLOAT32);
            r.offsets = &offset;
            r.rotary = (fad_rotary){cos.data, sin.data, FAD_FLOAT32, POSITIONS, 2 * HALF, interleaved};
            CHECK(fad_rotate(&r, &one_thread) == FAD_OK, "%s", fad_last_error());
            for (int i = 0; i < S; i++) {
                const float *from = (float *)x.data + i * D, *to = (float *)out.data + i * D;
                for (int pair = 0; pair < HALF; pair++) {
                    const int a = interleaved ? 2 * pair : pair, b = interleaved ? a + 1 : a + HALF;
                    const int at = (offset + advance * i) * HALF + pair;
                    const float c = ((float *)cos.data)[at], s = ((float *)sin.data)[at];
                    const float ac = from[a] * c, bs = from[b] * s, as = from[a] * s, bc = from[b] * c;
                    CHECK(to[a] == ac - bs && to[b] == as + bc, "row %d, pair %d", i, pair);
                }
                CHECK(!memcmp(to + 2 * HALF, from + 2 * HALF, (D - 2 * HALF) * sizeof *to), "row %d is copied", i);
            }
            guarded *const all[] = {&x, &out, &cos, &sin};
            for (int i = 0; i < 4; i++)
                guarded_free(all[i]);
        }
}

#define REFUSED(call, message)                                                                                         \
    CHECK((call) == FAD_INVALID_ARGUMENT && strstr(fad_last_error(), message), "'%s' lacks '%s'", fad_last_error(),    \
          message)

static void refusals(void) {
    static float new[2 * 3 * HK * 4], cache[2 * 8 * HK * 4], tables[4 * 2];
    static int32_t used[2] = {5, 0}, places[2] = {0, 1};
    const fad_cache_append good = {
        .B = 2,
        .S = 3,
        .Hk = HK,
        .D = 4,
        .Dv = 4,
        .Sk = 8,
        .Bk = 2,
        .cache_seqlens = used,
        .cache_batch_idx = places,
        .k_new = {new, 3 * HK * 4, HK * 4, 4},
        .v_new = {new, 3 * HK * 4, HK * 4, 4},
        .k = {cache, 8 * HK * 4, HK * 4, 4},
        .v = {cache, 8 * HK * 4, HK * 4, 4},
    };
    fad_cache_append a;
    for (size_t i = 0; i < sizeof new / sizeof *new; i++)
        new[i] = 1;
#define REFUSED_APPEND(message, ...)                                                                                   \
    do {                                                                                                               \
        a = good;                                                                                                      \
        __VA_ARGS__;                                                                                                   \
        REFUSED(fad_append_to_cache(&a, &one_thread), message);                                                        \
    } while (0)
    REFUSED_APPEND("cache_seqlens[0] is 5 and 4 rows are appended, expected 0 to the cache's 8 rows", a.S = 4);
    REFUSED_APPEND("cache_batch_idx[1] is 1, expected 0 to 0", a.Bk = 1);
    REFUSED_APPEND("k and v have 0 entries", a.Bk = 0);
    REFUSED_APPEND("block_table and cache_batch_idx are given", a.block_table = places; a.page_size = 8);
    REFUSED_APPEND("pages of 0 rows", a.block_table = places; a.cache_batch_idx = NULL);
    REFUSED_APPEND("8 key rows in pages of 5", a.block_table = places; a.cache_batch_idx = NULL; a.page_size = 5);
    REFUSED_APPEND("block_table[1][0] is 1, expected 0 to 0", a.block_table = places; a.cache_batch_idx = NULL;
                   a.page_size = 8; a.block_table_stride = 1; a.Bk = 1);
    REFUSED_APPEND("head dim of k_new is 0", a.D = 0);
    REFUSED_APPEND("k_new has 0 heads", a.Hk = 0);
    REFUSED_APPEND("dtype is 9", a.dtype = (fad_dtype)9);
    REFUSED_APPEND("null", a.k.data = NULL);
    REFUSED_APPEND("null", a.v_new.data = NULL);
    REFUSED_APPEND("only one of the tables", a.rotary.cos = tables);
    REFUSED_APPEND("cos and sin are for 6 dims", a.rotary = (fad_rotary){tables, tables, FAD_FLOAT32, 4, 6, 0});
    REFUSED_APPEND("cos and sin have 0 rows", a.rotary = (fad_rotary){tables, tables, FAD_FLOAT32, 0, 4, 0});
    REFUSED_APPEND("interleaved is 2", a.rotary = (fad_rotary){tables, tables, FAD_FLOAT32, 4, 4, 2});
    REFUSED_APPEND("dtype of cos and sin is 1", a.rotary = (fad_rotary){tables, tables, FAD_FLOAT16, 4, 4, 0});
    REFUSED_APPEND("cache_seqlens[0] is 5 and 3 positions",
                   a.rotary = (fad_rotary){tables, tables, FAD_FLOAT32, 4, 4, 0});
    REFUSED(fad_append_to_cache(NULL, &one_thread), "append is null");
    REFUSED(fad_append_to_cache(&good, NULL), "runtime is null");
    REFUSED(fad_rotate(NULL, &one_thread), "rotation is null");
    for (size_t i = 0; i < sizeof cache / sizeof *cache; i++)
        CHECK(cache[i] == 0, "a refused append wrote element %zu", i);
    CHECK(fad_append_to_cache(&good, &one_thread) == FAD_OK, "%s", fad_last_error());
    CHECK(cache[5 * HK * 4] == 1 && cache[8 * HK * 4] == 1 && cache[11 * HK * 4] == 0, "a good append wrote its rows");
}

/* test_cache [calls] */
int main(int argc, char **argv) {
    const uint64_t calls = argc > 1 ? strtoull(argv[1], NULL, 10) : 300;
    for (uint64_t seed = 1; seed <= calls; seed++)
        one_call(seed);
    test_n12_rotation();
    refusals();
    return 0;
}
