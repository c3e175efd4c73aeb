/* dk and dv of the mma family for compute capability 9.0: copy engine and wgmma, the bits of mma_backward_keys.cuh.
 *
 * A thread block takes a tile of keys of a kv head, 64 for each consuming warpgroup, which holds their dk and dv in
 * registers. The producer keeps the query rows that see one of them coming, a head after the other. A consumer starts the
 * score products of a step behind the sums of the step before, so that they run while it works on exp2. */
#ifndef FAD_CUDA_HOPPER_BACKWARD_KEYS_CUH
#define FAD_CUDA_HOPPER_BACKWARD_KEYS_CUH

#include "hopper_backward_tile.cuh"
#include "mma_backward_keys.cuh"
#include "work.cuh"

template <fad_dtype T_, int D_, int CONSUMERS_, int ROWS_, int SLOTS_>
struct HopperKeyGradientShape : BackwardRoles<CONSUMERS_> {
    static constexpr fad_dtype T = T_;
    static constexpr int D = D_, DIMS = D / 8; /* of all four tensors, zero-padded; n8 tiles of sums */
    static constexpr int ROWS = ROWS_, N = ROWS / 8, STEPS = ROWS / 16; /* query rows at a time; n8 tiles of scores */
    static constexpr int SLOTS = SLOTS_;
    /* P and dS as operands have registers of their own where there are enough. */
    static constexpr int OPERANDS = D == 128 ? 2 : 1;
};

/* Of a step. SOME_OUTSIDE: not all rows are of the sequence, and what lies there is anything. */
enum { EVERY_PAIR_IS_TERM = 1, SOME_NOT_FINITE = 2, SOME_OUTSIDE = 4 };

/* What a step is, and of each of its rows what sum_rows found; zeros, and so no terms, outside the sequence. */
template <int ROWS> struct StepSums {
    alignas(16) float log2_sum[ROWS], delta[ROWS];
    int state[ROWS];
    QueryStep step;
    int kind;
};

template <class S> struct HopperKeyGradientShared {
    Matrix<S::ROWS, S::D> q[S::SLOTS], dout[S::SLOTS];
    Matrix<GROUP_ROWS, S::D> k[S::CONSUMERS], v[S::CONSUMERS]; /* and dk, dv, staged */
    StepSums<S::ROWS> sums[S::SLOTS];
    KeyTile t;
    MemoryBarrier full[S::SLOTS], empty[S::SLOTS]; /* full: rows and their sums are there */
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

/* ---- producer ---- */

/* One lane: the rows of q and dout. */
template <class S>
static __device__ __forceinline__ void produce_rows(const fad_attn_problem &p, const CUtensorMap &q_map,
                                                    const CUtensorMap &dout_map, HopperKeyGradientShared<S> &sm,
                                                    QueryWalk<S> walk) {
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
template <class S>
static __device__ __forceinline__ void produce_sums(const fad_attn_problem &p, const RowSums &sums,
                                                    HopperKeyGradientShared<S> &sm, QueryWalk<S> walk) {
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

/* ---- consumers ---- */

/* The 64 keys of a warpgroup. */
template <class S> struct HopperKeyGradient {
    const fad_attn_problem &p;
    const fad_attn_problem &gradient;
    HopperKeyGradientShared<S> &sm;
    const ScoreRule rule;
    const int group = uniform(threadIdx.x / GROUP_THREADS - 1), lane = threadIdx.x % 32;
    const int first_of_warp = uniform(threadIdx.x % GROUP_THREADS / 32 * 16); /* key of the group */
    const uint64_t k = rows_of(sm.k[group]), q = rows_of(sm.q[0]);
    int left;  /* steps, the current one included */
    Ring ring; /* the slot of that */
    int kind;  /* of it */
    Fragments<1, S::DIMS> dk, dv;

    __device__ HopperKeyGradient(const fad_attn_problem &problem, const fad_attn_problem &of_gradient,
                                 HopperKeyGradientShared<S> &shared)
        : p(problem), gradient(of_gradient), sm(shared), rule(problem), left(count_steps<S>(shared.t)) {
        clear<1, S::DIMS>(dk);
        clear<1, S::DIMS>(dv);
    }

    /* N11: keys that do not exist are zeros; nothing is read there. */
    __device__ __forceinline__ void load_keys(Matrix<GROUP_ROWS, S::D> &to, const fad_view &view, int64_t first_key,
                                              int64_t dims) const {
        const KeyTile &t = sm.t;
        const int64_t row = t.first + group * GROUP_ROWS;
        const char *from = (const char *)view.data + 2 * (first_key + row * view.stride_s + t.head_k * view.stride_h);
#pragma unroll
        for (int piece = 0; piece < to.PIECES; piece++)
            load_rows<GROUP_ROWS, 8, GROUP_THREADS>(to.piece[piece], from + piece * 128, 2 * view.stride_s,
                                                    t.lo - group * GROUP_ROWS, t.hi - group * GROUP_ROWS,
                                                    (int)dims - piece * 64, threadIdx.x % GROUP_THREADS);
    }

    __device__ __forceinline__ void wait_for_rows() {
        barrier_wait(sm.full[ring.index], ring.round);
        kind = sm.sums[ring.index].kind;
    }
    /* Matrices by their distance from others: fewer descriptors to keep. */
    static constexpr int V_FROM_K = offsetof(HopperKeyGradientShared<S>, v) - offsetof(HopperKeyGradientShared<S>, k);
    static constexpr int DOUT_FROM_Q =
        offsetof(HopperKeyGradientShared<S>, dout) - offsetof(HopperKeyGradientShared<S>, q);
    __device__ __forceinline__ uint64_t q_at(int slot) const { return matrix_at(q, slot * (int)sizeof sm.q[0]); }
    __device__ __forceinline__ uint64_t dout_at(int slot) const { return matrix_at(q_at(slot), DOUT_FROM_Q); }

    __device__ __forceinline__ void start_scores(Fragments<1, S::N> &s) const {
        start_product<S::T, S::D, S::N>(s, k, q_at(ring.index));
    }
    __device__ __forceinline__ void start_dp(Fragments<1, S::N> &dp) const {
        start_product<S::T, S::D, S::N>(dp, matrix_at(k, V_FROM_K), dout_at(ring.index));
    }
    __device__ __forceinline__ void start_dv(const unsigned (&a)[S::STEPS][4], int slot) {
        start_sum<S::T, S::STEPS, S::DIMS>(dv, a, steps_of<S::ROWS, S::D>(dout_at(slot)));
    }
    __device__ __forceinline__ void start_dk(const unsigned (&a)[S::STEPS][4], int slot) {
        start_sum<S::T, S::STEPS, S::DIMS>(dk, a, steps_of<S::ROWS, S::D>(q_at(slot)));
    }

    /* N11: Inf or NaN where some pair of the step is no term. */
    __device__ __forceinline__ bool needs_guard() const {
        if (kind & SOME_NOT_FINITE)
            return true;
        if (!(kind & SOME_OUTSIDE))
            return false;
        const bool in_q = has_not_finite<S::T>(sm.q[ring.index], group); /* barriers: both are asked */
        return has_not_finite<S::T>(sm.dout[ring.index], group) || in_q;
    }

    __device__ __forceinline__ QueryColumns<StepSums<S::ROWS>> columns_at(int of_lane, int key, int distance) const {
        return {sm.sums[ring.index], of_lane % 4 * 2, key, distance, 0};
    }

    /* A step whose every pair is a term: s becomes P and dp dS (N13), the first beside the second product. */
    __device__ __forceinline__ void find_plain(Fragments<1, S::N> &s, Fragments<1, S::N> &dp) const {
        const auto columns = columns_at(lane, 0, 0);
        wgmma_wait<1>();
        find_probabilities<S::N>(s, rule.c, columns);
        wgmma_wait<0>();
        find_gradients<S::N>(s, dp, columns);
    }

    /* Any step: what is no term is 0 and reaches nothing. */
    __device__ __forceinline__ void find_any(Fragments<1, S::N> &s, Fragments<1, S::N> &dp) {
        const StepSums<S::ROWS> &of_rows = sm.sums[ring.index];
        const Band band(sm.t, of_rows.step);
        const int first = here_only(group * GROUP_ROWS + first_of_warp), of_lane = here_only(lane),
                  key = first + of_lane / 4;
        auto columns = columns_at(of_lane, key, band.distance);
        wgmma_wait<0>();
        if (rule.plain) {
            find_probabilities<S::N>(s, rule.c, columns);
            find_gradients<S::N>(s, dp, columns);
        } else {
            if (rule.alibi)
                columns.negative_slope =
                    -((const float *)p.alibi_slopes)[sm.t.seq.index * p.alibi_stride_b + of_rows.step.head];
            find_with_options<S::N>(s, dp, rule, columns);
        }
        if (kind & EVERY_PAIR_IS_TERM)
            return;
        clear_others<1, S::N>(s, dp, [&](int, int n, int e) {
            const int r = columns.first + 8 * n + e % 2;
            return band.meets(key + e / 2 * 8, r) && (of_rows.state[r] & ROW_HAS_TERMS);
        });
        if (needs_guard())
            add_guarded(s, dp, [&](int r, int row) {
                return band.meets(first + r, row) && (of_rows.state[row] & ROW_HAS_TERMS);
            });
    }

    /* N11: adds the step by itself; what is left of it changes nothing. */
    template <class Term>
    __device__ __forceinline__ void add_guarded(Fragments<1, S::N> &s, Fragments<1, S::N> &dp, Term term) {
        const FragmentsApart<S::T, S::STEPS> a(s), b(dp);
        a.add_to(dv, sm.dout[ring.index], term);
        zero_matrix<S>(sm.dout[ring.index]);
        b.add_to(dk, sm.q[ring.index], term);
        zero_matrix<S>(sm.q[ring.index]);
        clear<1, S::N>(s);
        clear<1, S::N>(dp);
    }

    /* From the products that are on their way to P and dS. */
    __device__ __forceinline__ void find(Fragments<1, S::N> &s, Fragments<1, S::N> &dp) {
        kind = uniform(kind);
        if (rule.plain && (kind & EVERY_PAIR_IS_TERM))
            find_plain(s, dp);
        else
            find_any(s, dp);
    }

    /* Starts the sums of a step. The operands are in use until those are complete: not written again before. */
    typedef unsigned Operands[S::OPERANDS][S::STEPS][4];
    __device__ __forceinline__ void start_sums(Operands &of, const Fragments<1, S::N> &s, const Fragments<1, S::N> &dp,
                                               int slot) {
        round_fragments<S::T, S::N>(of[0], s);
        start_dv(of[0], slot);
        if (S::OPERANDS == 1)
            wgmma_wait<0>();
        round_fragments<S::T, S::N>(of[S::OPERANDS - 1], dp);
        start_dk(of[S::OPERANDS - 1], slot);
    }

    __device__ __forceinline__ void run_steps() {
        Fragments<1, S::N> s, dp;
        Operands of;
        wait_for_rows();
        start_scores(s);
        start_dp(dp);
        find(s, dp);
#pragma unroll 1
        while (--left > 0) {
            const int slot = ring.index;
            start_sums(of, s, dp, slot);
            ring.advance(S::SLOTS);
            wait_for_rows();
            start_scores(s);
            wgmma_wait<1>();
            warp_arrives(sm.empty[slot]);
            start_dp(dp);
            find(s, dp);
        }
        start_sums(of, s, dp, ring.index);
        wgmma_wait<0>();
    }

    /* The group's gradients, staged, to rows of the buffer. */
    __device__ __forceinline__ void store_keys(const fad_view &view, int64_t first_key,
                                               Matrix<GROUP_ROWS, S::D> &staged, int64_t dims) const {
        const KeyTile &t = sm.t;
        const int64_t row = t.first + group * GROUP_ROWS;
        char *const to = (char *)view.data + 2 * (first_key + row * view.stride_s + t.head_k * view.stride_h);
#pragma unroll 2
        for (int at = threadIdx.x % GROUP_THREADS; at < GROUP_ROWS * staged.CHUNKS; at += GROUP_THREADS) {
            const int r = at / staged.CHUNKS, chunk = at % staged.CHUNKS;
            if (group * GROUP_ROWS + r < t.n_rows && chunk * 8 < dims)
                *(uint4 *)(to + 2 * (r * view.stride_s + chunk * 8)) = *staged.chunk(r, chunk);
        }
    }

    __device__ __forceinline__ void run() {
        const KeyTile &t = sm.t;
        if (left > 0) {
            load_keys(sm.k[group], p.k, t.seq.k, p.D);
            load_keys(sm.v[group], p.v, t.seq.v, p.Dv);
            cp_async_commit();
            cp_async_wait<0>();
            fence_async_proxy();
            named_barrier_sync(1 + group, GROUP_THREADS); /* the group's k and v may be read */
            run_steps();
        }
        named_barrier_sync(1 + group, GROUP_THREADS); /* and overwritten */
        auto is_key = [&](int r) { return group * GROUP_ROWS + r >= t.lo && group * GROUP_ROWS + r < t.hi; };
        stage<S::T, S::DIMS>(sm.k[group], first_of_warp, dk, (float)p.scale, is_key);
        stage<S::T, S::DIMS>(sm.v[group], first_of_warp, dv, 1, is_key);
        named_barrier_sync(1 + group, GROUP_THREADS); /* dk and dv are staged */
        store_keys(gradient.k, t.gradient.k, sm.k[group], p.D);
        store_keys(gradient.v, t.gradient.v, sm.v[group], p.Dv);
    }
};

template <class S>
__global__ void __launch_bounds__(S::THREADS, 1)
    hopper_backward_keys(const __grid_constant__ fad_attn_problem p, const __grid_constant__ fad_attn_problem gradient,
                         const __grid_constant__ RowSums sums, const __grid_constant__ CUtensorMap q_map,
                         const __grid_constant__ CUtensorMap dout_map) {
    extern __shared__ __align__(1024) char hopper_memory[];
    HopperKeyGradientShared<S> &sm = *(HopperKeyGradientShared<S> *)hopper_memory;
    if (threadIdx.x < 32) {
        locate_keys(p, gradient, S::TILE, blockIdx.x, sm.t);
    } else if (threadIdx.x == 32) {
        for (int i = 0; i < S::SLOTS; i++) {
            barrier_init(sm.full[i], 2); /* the copies, and the warp of the sums */
            barrier_init(sm.empty[i], S::CONSUMING_WARPS);
        }
        fence_barrier_init();
    }
    __syncthreads(); /* the tile may be read, barriers be used */
    if (!sm.t.exists)
        return;
    if (threadIdx.x < GROUP_THREADS) {
        give_registers<S::PRODUCER_REGISTERS>();
        const QueryWalk<S> walk(sm.t); /* by whole warps */
        if (threadIdx.x == 0)
            produce_rows<S>(p, q_map, dout_map, sm, walk);
        else if (threadIdx.x / 32 == 1)
            produce_sums<S>(p, sums, sm, walk);
    } else {
        take_registers<S::CONSUMER_REGISTERS>();
        HopperKeyGradient<S>(p, gradient, sm).run();
    }
}

template <class S> static HopperBackwardKernel hopper_backward_keys_of() {
    static_assert(sizeof(HopperKeyGradientShared<S>) <= 227 * 1024, "more shared memory than a thread block can have");
    return {S::D, S::TILE, S::THREADS, S::ROWS, sizeof(HopperKeyGradientShared<S>), hopper_backward_keys<S>};
}

#endif
