/* Where each sequence lies in the buffers: for the host and, where the lengths are device arrays, for kernels. */
#ifndef FAD_CORE_SEQUENCE_H
#define FAD_CORE_SEQUENCE_H

#include "../flash_attn_det.h"
#include "../numerics/contract.h"

/* One sequence: element offsets of its first row in each buffer, the query rows it owns (also the unused ones, which
 * must be written), and what its rows may see. */
typedef struct fad_sequence {
    int64_t index, q, k, v, out, lse, q_rows;
    int64_t k_row;               /* the row of k and v that holds the first key */
    const int32_t *pages;        /* of the sequence's rows of k and v; null: they are not paged */
    uint32_t page_size, n_pages; /* rows of a page; pages of the pool */
    fad_span span;
} fad_sequence;

/* A row of k and v within what starts at fad_sequence's k and v: of the sequence, or of a pool of pages. */
typedef struct fad_key_place {
    int64_t page, row;
} fad_key_place;

/* Packed calls have one more sequence, number B: the rows of the buffer behind the last one, all unused. */
FAD_FN int64_t fad_sequence_count(const fad_attn_problem *p) { return p->B + (p->cu_seqlens_q != NULL); }

/* Splits that a dense call's keys can occupy, from position 0. */
FAD_FN int64_t fad_split_capacity(const fad_attn_problem *p) { return fad_partition_end(p->Sk, p->split_size); }

/* Query heads per kv head. */
FAD_FN int64_t fad_group(const fad_attn_problem *p) { return fad_quotient(p->Hq, p->Hk); }

FAD_FN int64_t fad_clamp(int64_t x, int64_t lo, int64_t hi) { return x < lo ? lo : x > hi ? hi : x; }

/* Rows that sequence b owns in a buffer of n rows, and the first of them. Here and below lengths are clamped to what
 * the buffers hold: the host has checked those that it can read, of a device's arrays nothing is known. */
FAD_FN int64_t fad_owned_rows(const int32_t *cu_seqlens, int64_t B, int64_t b, int64_t n, int64_t *first) {
    *first = cu_seqlens ? fad_clamp(cu_seqlens[b], 0, n) : 0;
    return cu_seqlens && b < B ? fad_clamp(cu_seqlens[b + 1], *first, n) - *first : n - *first;
}

/* Entries of k and v: pages, sequences of a cache, or sequences of the call; packed ones are one. */
FAD_FN int64_t fad_cache_entries(const fad_attn_problem *p) {
    return p->block_table || p->cache_batch_idx ? p->Bk : p->cu_seqlens_k ? 1 : p->B;
}

/* The entry of k and v that sequence b reads, unless it is in pages. */
FAD_FN int64_t fad_cache_entry(const fad_attn_problem *p, int64_t b) {
    if (p->cache_batch_idx && b < p->B)
        return fad_clamp(p->cache_batch_idx[b], 0, p->Bk - 1);
    return p->cu_seqlens_k ? 0 : b;
}

FAD_FN fad_sequence fad_get_sequence(const fad_attn_problem *p, int64_t b) {
    const int packed = p->cu_seqlens_q != NULL;
    int64_t q_row, k_row, k_rows;
    fad_sequence s;
    memset(&s, 0, sizeof s);
    s.index = b;
    s.q_rows = fad_owned_rows(p->cu_seqlens_q, p->B, b, p->Sq, &q_row);
    k_rows = fad_owned_rows(p->cu_seqlens_k, p->B, b, p->Sk, &k_row);
    const int64_t entry = fad_cache_entry(p, b);
    if (b < p->B) {
        const int64_t pad = p->leftpad_k ? fad_clamp(p->leftpad_k[b], 0, k_rows) : 0;
        k_row += pad;
        s.span.n_q = p->seqused_q ? fad_clamp(p->seqused_q[b], 0, s.q_rows) : s.q_rows;
        s.span.n_k = p->seqused_k ? fad_clamp(p->seqused_k[b], 0, k_rows - pad) : k_rows - pad;
        s.span.k_pos = p->k_pos ? fad_clamp(p->k_pos[b], 0, INT32_MAX) : 0; /* N2 */
    }
    s.k_row = k_row;
    s.span.left = p->window_left;
    s.span.right = p->causal ? 0 : p->window_right; /* N4 */
    const int64_t batch = packed ? 0 : b;
    s.q = batch * p->q.stride_b + q_row * p->q.stride_s;
    if (p->block_table) {
        s.pages = p->block_table + b * p->block_table_stride;
        s.page_size = (uint32_t)p->page_size;
        s.n_pages = (uint32_t)p->Bk;
    } else {
        s.k = entry * p->k.stride_b + k_row * p->k.stride_s;
        s.v = entry * p->v.stride_b + k_row * p->v.stride_s;
    }
    s.out = batch * p->out.stride_b + q_row * p->out.stride_s;
    s.lse = batch * p->lse.stride_b + q_row * p->lse.stride_s;
    return s;
}

/* Key number j of a sequence, which exists. The host has checked the pages that it can read. */
FAD_FN fad_key_place fad_find_key(const fad_sequence *s, int64_t j) {
    fad_key_place place = {0, j};
    if (s->pages) {
        const uint32_t row = (uint32_t)(s->k_row + j); /* 32 bits hold it: paged calls have no longer sequences */
        place.page = fad_clamp(s->pages[row / s->page_size], 0, (int64_t)s->n_pages - 1);
        place.row = row % s->page_size;
    }
    return place;
}

/* Its element offset in a view of k or v; first: fad_sequence's k or v. */
FAD_FN int64_t fad_key_offset(const fad_view *view, int64_t first, fad_key_place place) {
    return first + place.page * view->stride_b + place.row * view->stride_s;
}

#endif
