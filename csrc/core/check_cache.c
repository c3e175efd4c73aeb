/* The checks of caches: where sequences lie in them, appends, and rotations. */
#include "require.h"

fad_status fad_check_cache(const fad_cache *c) {
    REQUIRE(!c->block_table || !c->cache_batch_idx, "block_table and cache_batch_idx are given, expected one of them");
    if (!c->block_table && !c->cache_batch_idx)
        return FAD_OK;
    const char *unit = c->block_table ? "pages" : "entries",
               *array = c->block_table ? "block_table" : "cache_batch_idx";
    REQUIRE(c->Bk >= (c->B > 0 && c->Sk > 0) && c->Bk <= INT32_MAX,
            "k and v have %lld %s and %s is given: expected 1 to 2^31 - 1", LL(c->Bk), unit, array);
    const double rows = (double)(c->block_table ? c->page_size : c->Sk);
    REQUIRE((double)c->Bk * rows * (double)c->Hk * FAD_MAX_HEAD_DIM <= FAD_MAX_ELEMENTS,
            "k and v have %lld %s of %g rows and %lld heads: too large", LL(c->Bk), unit, rows, LL(c->Hk));
    if (!c->block_table)
        return FAD_OK;
    REQUIRE(c->page_size >= 1, "k and v have pages of %lld rows, expected at least 1", LL(c->page_size));
    REQUIRE(c->Sk % c->page_size == 0, "a sequence has %lld key rows in pages of %lld, expected whole pages", LL(c->Sk),
            LL(c->page_size));
    REQUIRE(c->Sk <= INT32_MAX, "block_table has %lld columns of pages of %lld rows: expected below 2^31 rows",
            LL(c->Sk / c->page_size), LL(c->page_size));
    return FAD_OK;
}

fad_status fad_check_cache_rows(const fad_cache *c, int64_t b, int64_t first, int64_t end) {
    REQUIRE(!c->cache_batch_idx || (c->cache_batch_idx[b] >= 0 && c->cache_batch_idx[b] < c->Bk),
            "cache_batch_idx[%lld] is %d, expected 0 to %lld: k and v have %lld entries", LL(b), c->cache_batch_idx[b],
            LL(c->Bk - 1), LL(c->Bk));
    if (!c->block_table || first >= end)
        return FAD_OK;
    const int32_t *pages = c->block_table + b * c->block_table_stride;
    for (int64_t column = first / c->page_size; column <= (end - 1) / c->page_size; column++)
        REQUIRE(pages[column] >= 0 && pages[column] < c->Bk,
                "block_table[%lld][%lld] is %d, expected 0 to %lld: k and v have %lld pages", LL(b), LL(column),
                pages[column], LL(c->Bk - 1), LL(c->Bk));
    return FAD_OK;
}

static fad_status check_place(fad_device device, fad_dtype dtype) {
    REQUIRE(dtype >= FAD_FLOAT32 && dtype <= FAD_FLOAT64, "dtype is %d, expected a fad_dtype", dtype);
    REQUIRE(device == FAD_CPU || device == FAD_CUDA, "device is %d, expected a fad_device", device);
    return FAD_OK;
}

static fad_status check_rows(const char *name, int64_t B, int64_t S, int64_t H, int64_t D) {
    REQUIRE(B >= 0 && B < INT32_MAX && S >= 0, "%s has batch %lld and %lld rows: expected none below 0", name, LL(B),
            LL(S));
    REQUIRE(H >= 1, "%s has %lld heads, expected at least 1", name, LL(H));
    REQUIRE(D >= 1 && D <= FAD_MAX_HEAD_DIM, "head dim of %s is %lld, expected 1 to %d", name, LL(D), FAD_MAX_HEAD_DIM);
    REQUIRE((double)(B + 1) * (double)S * (double)H * FAD_MAX_HEAD_DIM <= FAD_MAX_ELEMENTS,
            "%s has batch %lld, %lld rows and %lld heads: too large", name, LL(B), LL(S), LL(H));
    return FAD_OK;
}

static fad_status check_rotary(const fad_rotary *r, fad_dtype dtype, int64_t D) {
    if (!r->cos && !r->sin)
        return FAD_OK;
    REQUIRE(r->cos && r->sin, "only one of the tables cos and sin is given, expected both or none");
    REQUIRE(r->dtype == dtype || r->dtype == (dtype == FAD_FLOAT64 ? FAD_FLOAT64 : FAD_FLOAT32),
            "the dtype of cos and sin is %d, expected that of the rows, %d, or their compute type", r->dtype, dtype);
    REQUIRE(r->dim >= 0 && r->dim % 2 == 0 && r->dim <= D,
            "cos and sin are for %lld dims of a row, expected an even number up to its head dim %lld", LL(r->dim),
            LL(D));
    REQUIRE(r->n_positions >= 1 && r->n_positions <= INT32_MAX, "cos and sin have %lld rows, expected 1 to 2^31 - 1",
            LL(r->n_positions));
    REQUIRE(r->interleaved == 0 || r->interleaved == 1, "interleaved is %d, expected 0 or 1", r->interleaved);
    return FAD_OK;
}

/* Each position of S rows from `first` on, or all at first, has a row in the tables. */
static fad_status check_positions(const fad_rotary *r, const char *name, int64_t b, int64_t first, int64_t S) {
    REQUIRE(!r->cos || S == 0 || first + S <= r->n_positions,
            "%s[%lld] is %lld and %lld positions follow: cos and sin have %lld rows", name, LL(b), LL(first), LL(S),
            LL(r->n_positions));
    return FAD_OK;
}

/* Run only where the host can read the arrays. */
static fad_status check_append_lengths(const fad_cache_append *p, const fad_cache *cache) {
    for (int64_t b = 0; b < p->B; b++) {
        const int64_t used = p->cache_seqlens ? p->cache_seqlens[b] : 0;
        REQUIRE(used >= 0 && used + p->S <= p->Sk,
                "cache_seqlens[%lld] is %lld and %lld rows are appended, expected 0 to the cache's %lld rows together",
                LL(b), LL(used), LL(p->S), LL(p->Sk));
        TRY(fad_check_cache_rows(cache, b, used, used + p->S));
        TRY(check_positions(&p->rotary, "cache_seqlens", b, used, p->S));
    }
    return FAD_OK;
}

fad_status fad_check_append(const fad_cache_append *p) {
    REQUIRE(p, "append is null");
    TRY(check_place(p->device, p->dtype));
    TRY(check_rows("k_new", p->B, p->S, p->Hk, p->D));
    TRY(check_rows("v_new", p->B, p->S, p->Hk, p->Dv));
    REQUIRE(p->Sk >= 0 && (double)(p->B + 1) * (double)p->Sk * (double)p->Hk * FAD_MAX_HEAD_DIM <= FAD_MAX_ELEMENTS,
            "the cache has batch %lld, %lld rows and %lld heads: expected none below 0, and less", LL(p->B), LL(p->Sk),
            LL(p->Hk));
    const fad_cache cache = {
        p->B, p->Sk, p->Hk, p->Bk, p->cache_batch_idx, p->block_table, p->block_table_stride, p->page_size};
    TRY(fad_check_cache(&cache));
    TRY(check_rotary(&p->rotary, p->dtype, p->D));
    REQUIRE(p->B == 0 || p->S == 0 || (p->k_new.data && p->v_new.data), "k_new or v_new has a null data pointer");
    REQUIRE(p->B == 0 || p->S == 0 || p->Sk == 0 || (p->k.data && p->v.data), "k or v has a null data pointer");
    return p->device == FAD_CPU ? check_append_lengths(p, &cache) : FAD_OK;
}

fad_status fad_check_rotation(const fad_rotation *p) {
    REQUIRE(p, "rotation is null");
    TRY(check_place(p->device, p->dtype));
    TRY(check_rows("x", p->B, p->S, p->H, p->D));
    REQUIRE(p->rotary.cos || p->rotary.sin, "cos and sin are null");
    TRY(check_rotary(&p->rotary, p->dtype, p->D));
    REQUIRE(p->advance == 0 || p->advance == 1, "advance is %d, expected 0 or 1", p->advance);
    REQUIRE(p->B == 0 || p->S == 0 || (p->x.data && p->out.data), "x or out has a null data pointer");
    for (int64_t b = 0; p->device == FAD_CPU && b < p->B; b++) {
        const int64_t first = p->offsets ? p->offsets[b] : 0;
        REQUIRE(first >= 0, "offsets[%lld] is %lld, expected 0 or more", LL(b), LL(first));
        TRY(check_positions(&p->rotary, "offsets", b, first, p->advance ? p->S : p->S > 0));
    }
    return FAD_OK;
}
