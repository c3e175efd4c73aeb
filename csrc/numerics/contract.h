/* The contract: scheduling is free, arithmetic is fixed.
 *
 * A kernel may choose any tile, grid, split-parallelism, pipeline, page walk, thread or device count. It may not change
 * the sequence of roundings that produces one output row. The clauses below say what that sequence is; the headers of
 * this folder are the same clauses as code, for C11 and CUDA alike. Kernels cite a clause at the line that obeys it and
 * tests are named after the clause they check. After contract version 1 a changed bit needs a new version.
 *
 * "Compute type" is fp64 for fp64 inputs and fp32 otherwise; LIMIT, SENTINEL and MIN_EXP below depend on it (real.h).
 * Rounding is to nearest even, subnormals are kept, and mul-add pairs are fused only where a clause says fma. scale,
 * softcap, log2(e) and ln 2 are fp64 numbers, rounded to the compute type where they meet one.
 *
 * N1  Row.        out[i] and lse[i] depend only on that row of q, the K/V rows it may see, its position and theirs within
 *                 its own sequence, its head's slope and sink, and static configuration: head dims, dtype, scale, softcap,
 *                 mask kind, split_size, arithmetic family, contract version. Nothing else of the call can reach them.
 * N2  Position.   Keys are numbered from their sequence's first key (k_pos for a cache that dropped its oldest keys), never
 *                 from the buffer. Query row i of n_q stands at k_pos + n_k - n_q + i.                            (mask.h)
 * N3  Partition.  A block is BLOCK_KV keys in the fma family and MMA_BLOCK_KV in mma. A split is split_size keys, a
 *                 multiple of MMA_BLOCK_KV in both families. Blocks and splits lie at absolute multiples of position. The
 *                 running reference may change only at a block of the family; each split starts from the empty state
 *                 (m = SENTINEL, l = 0, O = 0).                                                                (mask.h)
 * N4  Visibility. Row at position p sees positions in [p - left, p + right] that exist (causal: right = 0). A key outside
 *                 contributes exactly nothing: no term in the maximum, in l or in O, whatever its bits. Blocks, splits
 *                 and tiles without a visible key may be skipped or executed.                                    (mask.h)
 * N5  Score.      s is the dot product of q and k. Plain (no softcap, no ALiBi, and c > 0): the base-2 factor is
 *                 c = scale * log2(e), a product in fp64 rounded to the compute type, and x = s. Otherwise c = log2(e)
 *                 and x = s * scale, or x = softcap * tanh(s * (scale / softcap)), the quotient in fp64 and rounded; then
 *                 with ALiBi x = fma(-slope, |pos_q - pos_k|, x).                                           (softmax.inc)
 * N6  Reference.  The running reference m of a row is an integer. At each block of the family (N3)
 *                 m' = max(m, ref(max_j x_j)) over the block's keys j, where ref(x) is the integer nearest to the exact
 *                 product x * c if the rounded one is within LIMIT, and the integer nearest to the rounded one beyond.
 *                 O and l are multiplied by 2^(m - m') (0 below 2^MIN_EXP) before the block's first key, then
 *                 p_j = exp2(fma(x_j, c, -m')), or exp2(x_j * c - m') with two roundings where |m'| > LIMIT. A maximum
 *                 ignores NaN; a NaN score makes p NaN.                                                     (softmax.inc)
 * N7  Families.   fma: dot products are chains of fused multiply-adds in the compute type from 0, ascending d; for each
 *                 visible key in ascending order l = l + p and O_d = fma(p, v_d, O_d); 16-bit inputs are widened exactly;
 *                 exp2, tanh and log2 are the polynomials of elementary.inc.
 *                 mma (fp16, bf16): a step is one k = 16 matrix instruction, fp32 += 16 products, as the GPU's generation
 *                 rounds it. s is a chain of steps from 0 over d ascending, 16 at a time, d padded with zeros. exp2 of a
 *                 probability is ex2.approx.ftz.f32; tanh, log2 and a sink's exp2 are those of elementary.inc. O is a
 *                 chain of steps over keys ascending, 16 at a time at absolute multiples of position, of p rounded to
 *                 the input type and v; what is masked or missing counts as 0 and is exact. l sums p as
 *                 rounded for O, so that their quotient does not see what rounding did to a heavy key, in four lanes
 *                 t = 0..3: within a block of MMA_BLOCK_KV = 128 keys, b_t = sum over i = 0..15, ascending, of
 *                 (p_{8i+2t} + p_{8i+2t+1}), keys counted from the block's first; then l_t = l_t * 2^(m - m') + b_t;
 *                 at the end of a split l = (l_0 + l_1) + (l_2 + l_3).
 * N8  Fold.       Splits are folded in ascending order into the empty state: M' = max(M, m_c),
 *                 O = O * 2^(M - M') + O_c * 2^(m_c - M'), l likewise, M = M'; each product and the sum rounded once. The
 *                 sink z of a head is folded last, as the state m = max(SENTINEL, ref(z)), l = exp2(z * log2(e) - m) by
 *                 the rules of N6 with c = log2(e), O = 0.                                                  (softmax.inc)
 * N9  Finish.     out = O / l + 0, one division, rounded once to the output dtype. lse = (M + log2 l) * ln 2. NaN results
 *                 are stored as the canonical quiet NaN. Partial states leave as O + 0, m, l.                (softmax.inc)
 * N10 Empty.      A row with l = 0 (no visible key, or only scores that x * c puts below SENTINEL, -inf among them) gives
 *                 out = 0 and lse = -inf.
 * N11 Non-finite. Inf and NaN in what a row may see propagate as IEEE arithmetic says; in what it may not see they do not
 *                 reach it.
 * N12 Rotary.     A pair of values (a, b) of a row at position p becomes (a * cos - b * sin, a * sin + b * cos), with cos
 *                 and sin of row p and the pair's column of the tables: four products, then a difference and a sum, each
 *                 rounded on its own in the compute type, which inputs and tables are widened to exactly; then rounded
 *                 once to the dtype of the row. Values behind the rotated ones are copied.                     (rotary.h)
 * N13 Backward.   From q, k, v, out (as it was rounded for the output), lse, dO and dlse; every operation is rounded once in
 *                 the compute type. A sum in blocks is a chain from 0 for each block, ascending, and the chains added,
 *                 ascending, onto 0: query rows i of a sequence in blocks of BLOCK_KV, counted from its first row; keys j
 *                 in the blocks of N3, those of the fma family. A pair (i, j) is a term of a sum if N4 lets row i see key
 *                 j and lse_i is not -inf; what is no term reaches nothing. With x and c of N5, by the dot products of N7:
 *                 fma: m_i = lse_i * log2(e), rounded to an integer; e_ij = exp2(min(64, fma(x_ij, c, -m_i)));
 *                 l_i sums e_ij over j in blocks, then adds the sink's e, whose x is z and c is log2(e); w_i = 1 / l_i, 0 if
 *                 l_i is; p_ij = e_ij * w_i. delta_i = (the chain of fma(dO_id, out_id) over ascending d) - dlse_i.
 *                 dv_j sums fma(p_ij, dO_i) and dk_j fma(ds_ij, q_i): over the query heads that read the kv head,
 *                 ascending, and for each over i in blocks. dq_i sums fma(ds_ij, k_j) over j in blocks.
 *                 mma: L_i = lse_i * log2(e); p_ij = ex2.approx.ftz.f32(fma(x_ij, c, -L_i)). delta_i: lane t = 0..7 is a
 *                 chain of fma(dO_id, out_id) from 0 over the d of which d / 8 % 8 is t, ascending; delta_i =
 *                 ((l_0 + l_1) + (l_2 + l_3)) + ((l_4 + l_5) + (l_6 + l_7)) - dlse_i. P and dS are p and ds rounded to the
 *                 input type, and 0 where there is no term. dv_j is a chain of steps of P_ij and dO_i from 0, dk_j of
 *                 dS_ij and q_i: one chain over the query heads that read the kv head, ascending, and within each over i
 *                 ascending, 16 at a time at multiples of 16 from the sequence's first row. dq_i is a chain of steps of
 *                 dS_ij and k_j over keys ascending, 16 at a time at absolute multiples of position. Steps without a term
 *                 may be skipped or executed.
 *                 Both: dp_ij is the dot product (N7) of dO_i and v_j. ds_ij = p_ij * (dp_ij - delta_i), with softcap
 *                 ds_ij * fma(-t, t, 1), t the tanh of N5. From the sums sum * scale (dv: sum), + 0, one rounding to the
 *                 dtype, NaN as in N9. dz of a head sums fma(-p_i, delta_i) over i, where lse_i is not -inf, in blocks
 *                 for each sequence, and these over sequences ascending, + 0: p_i is the sink's probability, e * w_i in
 *                 the fma family and exp2(fma(z, log2(e), -L_i)), with the exp2 of elementary.inc, in mma.  (gradient.inc)
 * N14 Gradient.   dq of a row depends on that row of q, out, lse, dO and dlse, and on what N1 lets it see, as N1 says of
 *                 out. dk and dv depend on all rows of their own sequence, and nothing of another; dz alone spans the
 *                 call. So rows that are passed in two calls get the same dq, but dk and dv of the rows of each call,
 *                 rounded; their sum is not that of one call. split_size reaches gradients through out and lse alone.
 */
#ifndef FAD_NUMERICS_CONTRACT_H
#define FAD_NUMERICS_CONTRACT_H

#include "constants.h"
#include "half.h"
#include "mask.h"
#include "real.h"
#include "rotary.h"

#endif
