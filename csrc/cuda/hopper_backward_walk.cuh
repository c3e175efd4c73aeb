/* The walk of the Hopper kernel of dk and dv over the query rows that see a tile of keys: ROWS rows of a head a step, heads
 * ascending, and for each its rows (N13). The producer keeps the steps coming: one lane their rows, by the copy engine, and
 * one warp what sum_rows found for them. */
#ifndef FAD_CUDA_HOPPER_BACKWARD_WALK_CUH
#define FAD_CUDA_HOPPER_BACKWARD_WALK_CUH

#include "hopper_backward_tile.cuh"
#include "mma_backward_keys.cuh"
#include "work.cuh"

/* Of a step. SOME_OUTSIDE: not all rows are of the sequence, and what lies there is anything. */
enum { EVERY_PAIR_IS_TERM = 1, SOME_NOT_FINITE = 2, SOME_OUTSIDE = 4 };

/* What a step is, and of each of its rows what sum_rows found; zeros, and so no terms, outside the sequence. */
template <int ROWS> struct StepSums {
    alignas(16) float log2_sum[ROWS], delta[ROWS];
    int state[ROWS];
    QueryStep step;
    int kind;
};

/* The steps of a tile: heads ascending, and for each its rows (N13). By whole warps. */
template <class S> static __device__ __forceinline__ int count_steps(const KeyTile &t) {
    const int rows = t.end_row - t.row / S::ROWS * S::ROWS;
    return uniform(t.row < t.end_row ? (t.end_head - t.head) * ((rows + S::ROWS - 1) / S::ROWS) : 0);
}
template <class S> struct QueryWalk {
    const int first, end; /* rows */
    QueryStep step;
    int left; /* steps, this one included */

    __device__ __forceinline__ explicit QueryWalk(const KeyTile &t)
        : first(uniform(t.row / S::ROWS * S::ROWS)), end(uniform(t.end_row)), step{uniform(t.head), first},
          left(count_steps<S>(t)) {}
    __device__ __forceinline__ void advance() {
        left--;
        step.row += S::ROWS;
        if (step.row >= end)
            step = {step.head + 1, first};
    }
};

/* One lane: the rows of q and dout. */
template <class S, class Shared>
static __device__ __forceinline__ void produce_rows(const fad_attn_problem &p, const CUtensorMap &q_map,
                                                    const CUtensorMap &dout_map, Shared &sm, QueryWalk<S> walk) {
    int64_t first;
    fad_owned_rows(p.cu_seqlens_q, p.B, sm.t.seq.index, p.Sq, &first);
    const int entry = p.cu_seqlens_q ? 0 : (int)sm.t.seq.index;
    const uint64_t policy = keep_as_usual(); /* other tiles of the head read the same */
#pragma unroll 1
    for (Ring ring; walk.left > 0; walk.advance(), ring.advance(S::SLOTS)) {
        const int i = ring.index;
        barrier_wait(sm.empty[i], ring.round ^ 1);
        barrier_arrive_expect(sm.full[i], sizeof sm.q[i] + sizeof sm.dout[i]);
#pragma unroll
        for (int piece = 0; piece < sm.q[i].PIECES; piece++) {
            copy_box(sm.q[i].piece[piece], q_map, sm.full[i], piece * 64, (int)first + walk.step.row, walk.step.head,
                     entry, policy);
            copy_box(sm.dout[i].piece[piece], dout_map, sm.full[i], piece * 64, (int)first + walk.step.row,
                     walk.step.head, entry, policy);
        }
    }
}

/* One warp: what sum_rows found for them. */
template <class S, class Shared>
static __device__ __forceinline__ void produce_sums(const fad_attn_problem &p, const RowSums &sums, Shared &sm,
                                                    QueryWalk<S> walk) {
    constexpr int EACH = S::ROWS / 32;
    const fad_span &span = sm.t.seq.span;
    const int lane = threadIdx.x % 32, n_q = (int)span.n_q;
    /* Steps that begin at rows whole_row .. whole_end - 1 meet every key. N2: key j stands where row j + shift does. */
    const int64_t shift = span.n_q - span.n_k;
    const int whole_row = (int)(span.right < 0 ? 0 : fad_clamp(sm.t.first + sm.t.hi - 1 + shift - span.right, 0, n_q));
    const int whole_end =
        (int)(span.left < 0 ? n_q : fad_clamp(sm.t.first + sm.t.lo + shift + span.left - (S::ROWS - 2), 0, n_q));
#pragma unroll 1
    for (Ring ring; walk.left > 0; walk.advance(), ring.advance(S::SLOTS)) {
        StepSums<S::ROWS> &to = sm.sums[ring.index];
        const int64_t first = sm.t.sums + walk.step.head * p.Sq + walk.step.row;
        float log2_sum[EACH], delta[EACH];
        int state[EACH], every = ~0, any = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++) { /* asked for before there is room: memory is late */
            const int r = lane + 32 * i;
            const bool exists = walk.step.row + r < n_q;
            log2_sum[i] = exists ? sums.log2_sum[first + r] : 0;
            delta[i] = exists ? sums.delta[first + r] : 0;
            state[i] = exists ? sums.state[first + r] : 0;
            every &= state[i], any |= state[i];
        }
        barrier_wait(sm.empty[ring.index], ring.round ^ 1);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            to.log2_sum[lane + 32 * i] = log2_sum[i];
            to.delta[lane + 32 * i] = delta[i];
            to.state[lane + 32 * i] = state[i];
        }
        const bool terms = __all_sync(~0u, (every & ROW_HAS_TERMS) != 0),
                   not_finite = __any_sync(~0u, (any & ROW_NOT_FINITE) != 0);
        if (lane == 0) {
            const bool met = walk.step.row >= whole_row && walk.step.row < whole_end;
            to.step = walk.step;
            to.kind = (terms && met ? EVERY_PAIR_IS_TERM : 0) | (not_finite ? SOME_NOT_FINITE : 0) |
                      (walk.step.row + S::ROWS > n_q ? SOME_OUTSIDE : 0);
        }
        warp_arrives(sm.full[ring.index]);
    }
}

#endif
