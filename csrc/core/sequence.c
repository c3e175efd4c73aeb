#include "core.h"

int64_t fad_split_capacity(const fad_attn_problem *p) { return fad_partition_end(p->Sk, p->split_size); }

/* Rows that sequence b owns in a buffer of n rows, and the first of them. */
static int64_t owned_rows(const int32_t *cu_seqlens, int64_t B, int64_t b, int64_t n, int64_t *first) {
    *first = cu_seqlens ? cu_seqlens[b] : 0;
    return !cu_seqlens ? n : (b < B ? cu_seqlens[b + 1] : n) - *first;
}

fad_sequence fad_get_sequence(const fad_attn_problem *p, int64_t b) {
    const int packed = p->cu_seqlens_q != NULL;
    int64_t q_row, k_row, k_rows;
    fad_sequence s = {.index = b};
    s.q_rows = owned_rows(p->cu_seqlens_q, p->B, b, p->Sq, &q_row);
    k_rows = owned_rows(p->cu_seqlens_k, p->B, b, p->Sk, &k_row);
    if (b < p->B) {
        const int64_t pad = p->leftpad_k ? p->leftpad_k[b] : 0;
        k_row += pad;
        s.span.n_q = p->seqused_q ? p->seqused_q[b] : s.q_rows;
        s.span.n_k = p->seqused_k ? p->seqused_k[b] : k_rows - pad;
        s.span.k_pos = p->k_pos ? p->k_pos[b] : 0; /* N2 */
    }
    s.span.left = p->window_left;
    s.span.right = p->causal ? 0 : p->window_right; /* N4 */
    const int64_t batch = packed ? 0 : b;
    s.q = batch * p->q.stride_b + q_row * p->q.stride_s;
    s.k = batch * p->k.stride_b + k_row * p->k.stride_s;
    s.v = batch * p->v.stride_b + k_row * p->v.stride_s;
    s.out = batch * p->out.stride_b + q_row * p->out.stride_s;
    s.lse = batch * p->lse.stride_b + q_row * p->lse.stride_s;
    return s;
}
