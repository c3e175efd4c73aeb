/* Every argument check, before any work. Messages name the argument, its value and what was expected. */
#include "require.h"

#include <float.h>
#include <math.h>

/* Window and split sizes beyond this mean nothing more, and sums of a few of them must not overflow. */
static const int64_t max_extent = INT64_C(1) << 40;

static fad_status check_shape(const fad_attn_problem *p) {
    REQUIRE(p->B >= 0 && p->Sq >= 0 && p->Sk >= 0, "batch %lld, query rows %lld, key rows %lld: expected none below 0",
            LL(p->B), LL(p->Sq), LL(p->Sk));
    REQUIRE(p->Hk >= 1 && p->Hq >= 1 && p->Hq % p->Hk == 0,
            "q has %lld heads, k and v have %lld: expected a positive multiple of the kv heads", LL(p->Hq), LL(p->Hk));
    REQUIRE(p->D >= 1 && p->D <= FAD_MAX_HEAD_DIM, "head dim of q and k is %lld, expected 1 to %d", LL(p->D),
            FAD_MAX_HEAD_DIM);
    REQUIRE(p->Dv >= 1 && p->Dv <= FAD_MAX_HEAD_DIM, "head dim of v is %lld, expected 1 to %d", LL(p->Dv),
            FAD_MAX_HEAD_DIM);
    const double rows = (double)(p->B + 1) * (double)p->Hq * FAD_MAX_HEAD_DIM;
    REQUIRE(p->B < INT32_MAX && rows * (double)p->Sq <= FAD_MAX_ELEMENTS && rows * (double)p->Sk <= FAD_MAX_ELEMENTS,
            "batch %lld, query rows %lld, key rows %lld, heads %lld: too large", LL(p->B), LL(p->Sq), LL(p->Sk),
            LL(p->Hq));
    return FAD_OK;
}

/* Which of the forms of q, and of k and v, are given. */
static fad_status check_layout(const fad_attn_problem *p) {
    const fad_cache cache = fad_cache_of(p);
    REQUIRE(!p->cu_seqlens_k || !p->block_table, "block_table and cu_seqlens_k are given, expected one of them");
    REQUIRE(p->block_table || !p->cu_seqlens_q == !p->cu_seqlens_k,
            "only one of cu_seqlens_q and cu_seqlens_k is given, expected both or none");
    REQUIRE(!p->block_table || !p->cu_seqlens_q || p->seqused_k || p->B == 0,
            "block_table and cu_seqlens_q are given without seqused_k, expected the number of keys of each sequence");
    REQUIRE(!p->cu_seqlens_k || !p->leftpad_k, "leftpad_k is given for packed sequences, which have no padding");
    REQUIRE(!p->cu_seqlens_q || !p->cache_batch_idx, "cache_batch_idx is given for packed sequences, which need none");
    return fad_check_cache(&cache);
}

static fad_status check_data(const fad_attn_problem *p) {
    const int has_q = p->Sq > 0 && (p->B > 0 || p->cu_seqlens_q), has_k = p->Sk > 0 && (p->B > 0 || p->cu_seqlens_k);
    REQUIRE(!has_q || p->q.data, "q has a null data pointer but %lld rows", LL(p->Sq));
    REQUIRE(!has_k || (p->k.data && p->v.data), "k or v has a null data pointer but %lld rows", LL(p->Sk));
    return FAD_OK;
}

static fad_status check_options(const fad_attn_problem *p) {
    const int f64 = p->dtype == FAD_FLOAT64; /* factors must be finite, and softcap positive, where they are used */
    const double largest = f64 ? DBL_MAX / 2 : FLT_MAX / 2, smallest = f64 ? DBL_MIN : FLT_MIN;
    REQUIRE(fabs(p->scale) <= largest, "scale is %g, expected a finite number in the compute type", p->scale);
    REQUIRE(
        p->softcap == 0 || (p->softcap >= smallest && p->softcap <= largest && fabs(p->scale) / p->softcap <= largest),
        "softcap is %g, expected 0 (off) or a positive number so that scale / softcap is finite in the compute type",
        p->softcap);
    REQUIRE(p->causal == 0 || p->causal == 1, "causal is %d, expected 0 or 1", p->causal);
    REQUIRE(p->window_left >= -1 && p->window_left <= max_extent,
            "left window is %lld, expected -1 (unbounded) or 0 to 2^40", LL(p->window_left));
    REQUIRE(p->window_right >= -1 && p->window_right <= max_extent,
            "right window is %lld, expected -1 (unbounded) or 0 to 2^40", LL(p->window_right));
    /* N3: the larger block counts for both families, so that the family does not decide which sizes are valid. */
    _Static_assert(FAD_MMA_BLOCK_KV % FAD_BLOCK_KV == 0, "a split is whole blocks of either family");
    REQUIRE(p->split_size > 0 && p->split_size % FAD_MMA_BLOCK_KV == 0 && p->split_size <= max_extent,
            "split_size is %lld, expected a positive multiple of %d", LL(p->split_size), FAD_MMA_BLOCK_KV);
    REQUIRE(!p->alibi_slopes ||
                ((p->cu_seqlens_k || p->Sk < FAD_MAX_ALIBI_KEYS) && (p->cu_seqlens_q || p->Sq < FAD_MAX_ALIBI_KEYS)),
            "ALiBi with %lld keys and %lld query rows: expected fewer than %d of each", LL(p->Sk), LL(p->Sq),
            FAD_MAX_ALIBI_KEYS);
    return FAD_OK;
}

static fad_status check_cu_seqlens(const char *name, const int32_t *cu, int64_t B, int64_t rows) {
    if (!cu)
        return FAD_OK;
    REQUIRE(cu[0] == 0, "%s[0] is %d, expected 0", name, cu[0]);
    for (int64_t b = 0; b < B; b++)
        REQUIRE(cu[b] <= cu[b + 1], "%s falls from %d to %d at index %lld, expected an ascending list", name, cu[b],
                cu[b + 1], LL(b + 1));
    REQUIRE(cu[B] <= rows, "%s ends at %d, past the %lld rows of the tensor", name, cu[B], LL(rows));
    return FAD_OK;
}

/* Each length within what its sequence owns. Run only where the host can read the arrays. */
static fad_status check_lengths(const fad_attn_problem *p) {
    for (int64_t b = 0; b < p->B; b++) {
        const int64_t q_rows = p->cu_seqlens_q ? p->cu_seqlens_q[b + 1] - p->cu_seqlens_q[b] : p->Sq;
        const int64_t k_rows = p->cu_seqlens_k ? p->cu_seqlens_k[b + 1] - p->cu_seqlens_k[b] : p->Sk;
        const int64_t pad = p->leftpad_k ? p->leftpad_k[b] : 0;
        REQUIRE(pad >= 0 && pad <= k_rows, "leftpad_k[%lld] is %lld, expected 0 to the %lld key rows", LL(b), LL(pad),
                LL(k_rows));
        REQUIRE(!p->seqused_q || (p->seqused_q[b] >= 0 && p->seqused_q[b] <= q_rows),
                "seqused_q[%lld] is %d, expected 0 to the sequence's %lld query rows", LL(b), p->seqused_q[b],
                LL(q_rows));
        REQUIRE(!p->seqused_k || (p->seqused_k[b] >= 0 && p->seqused_k[b] <= k_rows - pad),
                "seqused_k[%lld] is %d, expected 0 to the sequence's %lld keys", LL(b), p->seqused_k[b],
                LL(k_rows - pad));
        REQUIRE(!p->k_pos || p->k_pos[b] >= 0, "k_pos[%lld] is %d, expected 0 or more", LL(b), p->k_pos[b]);
        REQUIRE(!p->alibi_slopes || (q_rows < FAD_MAX_ALIBI_KEYS && k_rows < FAD_MAX_ALIBI_KEYS),
                "ALiBi with %lld keys and %lld query rows in sequence %lld: expected fewer than %d of each", LL(k_rows),
                LL(q_rows), LL(b), FAD_MAX_ALIBI_KEYS);
        REQUIRE(!p->k_pos || !p->alibi_slopes || p->k_pos[b] + k_rows < FAD_MAX_ALIBI_KEYS,
                "k_pos[%lld] is %d: ALiBi reaches position %lld, expected below %d", LL(b), p->k_pos[b],
                LL(p->k_pos[b] + k_rows), FAD_MAX_ALIBI_KEYS);
    }
    return FAD_OK;
}

/* Every entry that holds a key names something in k and v. Run only where the host can read the arrays. */
static fad_status check_entries(const fad_attn_problem *p) {
    const fad_cache cache = fad_cache_of(p);
    for (int64_t b = 0; b < p->B; b++) {
        const fad_sequence s = fad_get_sequence(p, b);
        TRY(fad_check_cache_rows(&cache, b, s.k_row, s.k_row + s.span.n_k));
    }
    return FAD_OK;
}

static fad_status check_arithmetic(const fad_attn_problem *p) {
    REQUIRE(p->arithmetic >= FAD_ARITHMETIC_AUTO && p->arithmetic <= FAD_ARITHMETIC_MMA_SM80,
            "arithmetic is %d, expected a fad_arithmetic", p->arithmetic);
    if (p->device == FAD_CPU && p->arithmetic == FAD_ARITHMETIC_MMA)
        return fad_fail(FAD_UNSUPPORTED, "arithmetic 'mma' needs tensor cores; on the CPU use 'fma' or 'auto', or "
                                         "'mma_sm90', which emulates them");
    if (!fad_is_emulated(p))
        return FAD_OK;
    const char *name = p->arithmetic == FAD_ARITHMETIC_MMA_SM90 ? "mma_sm90" : "mma_sm80";
    REQUIRE(p->dtype == FAD_FLOAT16 || p->dtype == FAD_BFLOAT16,
            "arithmetic is '%s' but the inputs are %s, expected float16 or bfloat16", name,
            p->dtype == FAD_FLOAT32 ? "float32" : "float64");
    if (p->device == FAD_CUDA)
        return fad_fail(FAD_UNSUPPORTED, "arithmetic '%s' emulates tensor cores on the CPU; on a CUDA device use 'mma'",
                        name);
    return FAD_OK;
}

fad_status fad_check_problem(const fad_attn_problem *p) {
    REQUIRE(p, "problem is null");
    REQUIRE(p->dtype >= FAD_FLOAT32 && p->dtype <= FAD_FLOAT64, "dtype is %d, expected a fad_dtype", p->dtype);
    REQUIRE(p->device == FAD_CPU || p->device == FAD_CUDA, "device is %d, expected a fad_device", p->device);
    TRY(check_arithmetic(p));
    TRY(check_shape(p));
    TRY(check_layout(p));
    TRY(check_data(p));
    TRY(check_options(p));
    if (p->device != FAD_CPU)
        return FAD_OK;
    TRY(check_cu_seqlens("cu_seqlens_q", p->cu_seqlens_q, p->B, p->Sq));
    TRY(check_cu_seqlens("cu_seqlens_k", p->cu_seqlens_k, p->B, p->Sk));
    TRY(check_lengths(p));
    return check_entries(p);
}

fad_status fad_check_out(const fad_attn_problem *p) {
    const int has_out = p->Sq > 0 && (p->B > 0 || p->cu_seqlens_q);
    REQUIRE(!has_out || p->out.data, "out has a null data pointer but %lld rows", LL(p->Sq));
    return FAD_OK;
}

fad_status fad_check_backward(const fad_attn_problem *p) {
    TRY(fad_check_problem(p));
    if (fad_is_emulated(p))
        return fad_fail(FAD_UNSUPPORTED, "there is no backward of emulated tensor cores, only of arithmetic 'fma'");
    if (p->block_table || p->cache_batch_idx)
        return fad_fail(FAD_UNSUPPORTED, "%s is given: there is no backward into a cache",
                        p->block_table ? "block_table" : "cache_batch_idx");
    return FAD_OK;
}

fad_status fad_check_gradients(const fad_attn_problem *p, const fad_attn_gradients *g) {
    const int has_q = p->Sq > 0 && (p->B > 0 || p->cu_seqlens_q), has_k = p->Sk > 0 && (p->B > 0 || p->cu_seqlens_k);
    REQUIRE(g, "gradients is null");
    REQUIRE(!has_q || (p->out.data && p->lse.data && g->dout.data && g->dq.data),
            "out, lse, dout or dq has a null data pointer but %lld rows", LL(p->Sq));
    REQUIRE(!has_k || (g->dk.data && g->dv.data), "dk or dv has a null data pointer but %lld rows", LL(p->Sk));
    REQUIRE(!g->d_sinks || p->sinks, "d_sinks is given, but sinks is null");
    return FAD_OK;
}

fad_status fad_check_workspace(const fad_runtime *r, size_t workspace_bytes) {
    REQUIRE(r->workspace_bytes >= workspace_bytes, "the workspace has %zu bytes, expected at least %zu",
            r->workspace_bytes, workspace_bytes);
    REQUIRE(!workspace_bytes || (r->workspace && (uintptr_t)r->workspace % 64 == 0),
            "the workspace is at %p, expected a 64-byte aligned address", r->workspace);
    return FAD_OK;
}

fad_status fad_check_splittable(const fad_attn_problem *p) {
    REQUIRE(!p->cu_seqlens_q, "partial states of packed sequences are not defined: pass dense tensors");
    REQUIRE(!p->k_pos, "partial states with k_pos are not defined: pass k_pos = None");
    return FAD_OK;
}

fad_status fad_check_partials(const fad_attn_problem *p, const fad_partials *partials) {
    TRY(fad_check_splittable(p));
    REQUIRE(partials, "partials is null");
    const int64_t count = fad_split_capacity(p) + (p->sinks != NULL);
    REQUIRE(partials->n_splits == count, "partials has room for %lld states, expected %lld", LL(partials->n_splits),
            LL(count));
    REQUIRE(count * p->B * p->Sq == 0 || (partials->o && partials->m && partials->l), "partials has a null pointer");
    return FAD_OK;
}
