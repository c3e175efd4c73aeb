/* dk and dv of the mma family for compute capability 9.0: copy engine and wgmma, the bits of mma_backward_keys.cuh.
 *
 * A thread block takes a tile of keys of a kv head and walks the query rows that see one of them. A consuming warpgroup owns
 * 64 keys, whose dk and dv it holds in registers; of wide heads those are too many for one, and two share 64 keys: the
 * first finds S, hands it over and sums dv, the second finds dP and sums dk, with P once more from S. A consumer starts the
 * score products of a step behind the sums of the step before, so that they run while it works on exp2. */
#ifndef FAD_CUDA_HOPPER_BACKWARD_KEYS_CUH
#define FAD_CUDA_HOPPER_BACKWARD_KEYS_CUH

#include "hopper_backward_walk.cuh"

template <fad_dtype T_, int D_, int CONSUMERS_, int ROWS_, int SLOTS_>
struct HopperKeyGradientShape : BackwardRoles<CONSUMERS_> {
    static constexpr fad_dtype T = T_;
    static constexpr int D = D_, DIMS = D / 8; /* of all four tensors, zero-padded; n8 tiles of sums */
    static constexpr bool PAIRED = D > 128;    /* two warpgroups share 64 keys */
    static constexpr int OWNERS = PAIRED ? CONSUMERS_ / 2 : CONSUMERS_, TILE = OWNERS * GROUP_ROWS; /* keys */
    static constexpr int ROWS = ROWS_, N = ROWS / 8, STEPS = ROWS / 16; /* query rows at a time; n8 tiles of scores */
    static constexpr int SLOTS = SLOTS_;
    /* P and dS as operands have registers of their own where there are enough. */
    static constexpr int OPERANDS = D == 128 ? 2 : 1;
    static_assert(!PAIRED || CONSUMERS_ == 2, "one pair: its rows leave no room for the keys of another");
};

/* S of a step on its way from one warpgroup of a pair to the other, as lanes hold it. A slot of the ring is reused when
 * both have released it, and so its scores when they have been taken. */
template <class S, bool PAIRED = S::PAIRED> struct HandedScores {};
template <class S> struct HandedScores<S, true> {
    float4 tile[S::SLOTS][S::N][GROUP_THREADS];
    MemoryBarrier full[S::SLOTS];
};

template <class S> struct HopperKeyGradientShared {
    Matrix<S::ROWS, S::D> q[S::SLOTS], dout[S::SLOTS];
    Matrix<GROUP_ROWS, S::D> k[S::OWNERS], v[S::OWNERS]; /* and dv, dk, staged */
    HandedScores<S> scores;
    StepSums<S::ROWS> sums[S::SLOTS];
    KeyTile t;
    MemoryBarrier full[S::SLOTS], empty[S::SLOTS]; /* full: rows and their sums are there */
};

/* What a consumer does of its 64 keys: everything, or a part of a pair's. */
enum KeyGradientPart { DK_AND_DV, DV_OF_PAIR, DK_OF_PAIR };

template <class S, KeyGradientPart PART> struct HopperKeyGradient {
    static constexpr bool OF_DV = PART != DK_OF_PAIR, OF_DK = PART != DV_OF_PAIR; /* S and dv; dP and dk */
    const fad_attn_problem &p;
    const fad_attn_problem &gradient;
    HopperKeyGradientShared<S> &sm;
    const ScoreRule &rule;
    const int group = uniform(threadIdx.x / GROUP_THREADS - 1), lane = threadIdx.x % 32;
    const int owner = S::PAIRED ? 0 : group;
    const int first_of_warp = uniform(threadIdx.x % GROUP_THREADS / 32 * 16); /* of the owner's keys */
    const uint64_t k = rows_of(sm.k[owner]), q = rows_of(sm.q[0]);
    int left;  /* steps, the current one included */
    Ring ring; /* the slot of that */
    int kind;  /* of it */
    Fragments<1, S::DIMS> dk, dv;

    __device__ HopperKeyGradient(const fad_attn_problem &problem, const fad_attn_problem &of_gradient,
                                 const ScoreRule &of_call, HopperKeyGradientShared<S> &shared)
        : p(problem), gradient(of_gradient), sm(shared), rule(of_call), left(count_steps<S>(shared.t)) {
        clear<1, S::DIMS>(dk);
        clear<1, S::DIMS>(dv);
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

    /* S to the other of the pair, or from it. */
    __device__ __forceinline__ void hand_over(Fragments<1, S::N> &s) const {
        const int thread = threadIdx.x % GROUP_THREADS;
        if constexpr (PART == DV_OF_PAIR) {
#pragma unroll
            for (int n = 0; n < S::N; n++)
                sm.scores.tile[ring.index][n][thread] = make_float4(s[0][n][0], s[0][n][1], s[0][n][2], s[0][n][3]);
            warp_arrives(sm.scores.full[ring.index]);
        } else if constexpr (PART == DK_OF_PAIR) {
            barrier_wait(sm.scores.full[ring.index], ring.round);
#pragma unroll
            for (int n = 0; n < S::N; n++) {
                const float4 x = sm.scores.tile[ring.index][n][thread];
                s[0][n][0] = x.x, s[0][n][1] = x.y, s[0][n][2] = x.z, s[0][n][3] = x.w;
            }
        }
    }

    /* A step whose every pair is a term: s becomes P and dp dS (N13), the first beside the second product. */
    __device__ __forceinline__ void find_plain(Fragments<1, S::N> &s, Fragments<1, S::N> &dp) const {
        const auto columns = columns_at(lane, 0, 0);
        if constexpr (OF_DV)
            wgmma_wait<OF_DK ? 1 : 0>();
        hand_over(s);
        find_probabilities<S::N>(s, rule.c, columns);
        if constexpr (OF_DK) {
            wgmma_wait<0>();
            find_gradients<S::N>(s, dp, columns);
        }
    }

    /* Any step: what is no term is 0 and reaches nothing. */
    __device__ __forceinline__ void find_any(Fragments<1, S::N> &s, Fragments<1, S::N> &dp) {
        const StepSums<S::ROWS> &of_rows = sm.sums[ring.index];
        const Band band(sm.t, of_rows.step);
        const int first = opaque(owner * GROUP_ROWS + first_of_warp), of_lane = opaque(lane), key = first + of_lane / 4;
        auto columns = columns_at(of_lane, key, band.distance);
        wgmma_wait<0>();
        hand_over(s);
        if constexpr (!OF_DK)
            clear<1, S::N>(dp);
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
        if constexpr (OF_DV)
            FragmentsApart<S::T, S::STEPS>(s).add_to(dv, sm.dout[ring.index], term);
        zero_matrix<S>(sm.dout[ring.index]);
        if constexpr (OF_DK)
            FragmentsApart<S::T, S::STEPS>(dp).add_to(dk, sm.q[ring.index], term);
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
        if constexpr (OF_DV) {
            round_fragments<S::T, S::N>(of[0], s);
            start_dv(of[0], slot);
        }
        if constexpr (PART == DK_AND_DV && S::OPERANDS == 1)
            wgmma_wait<0>();
        if constexpr (OF_DK) {
            round_fragments<S::T, S::N>(of[S::OPERANDS - 1], dp);
            start_dk(of[S::OPERANDS - 1], slot);
        }
    }

    __device__ __forceinline__ void run_steps() {
        Fragments<1, S::N> s, dp;
        Operands of;
        wait_for_rows();
        if constexpr (OF_DV)
            start_scores(s);
        if constexpr (OF_DK)
            start_dp(dp);
        find(s, dp);
#pragma unroll 1
        while (--left > 0) {
            const int slot = ring.index;
            start_sums(of, s, dp, slot);
            ring.advance(S::SLOTS);
            wait_for_rows();
            if constexpr (OF_DV)
                start_scores(s);
            else
                start_dp(dp);
            wgmma_wait<1>();
            warp_arrives(sm.empty[slot]);
            if constexpr (PART == DK_AND_DV)
                start_dp(dp);
            find(s, dp);
        }
        start_sums(of, s, dp, ring.index);
        wgmma_wait<0>();
    }

    /* The gradients of the owner's keys, by way of where those lay, to rows of the buffer. */
    __device__ __forceinline__ void store_sums() const {
        constexpr int STEP = GROUP_THREADS / (S::D / 8);
        const KeyTile &t = sm.t;
        const int first = owner * GROUP_ROWS, of_thread = first + threadIdx.x % GROUP_THREADS / (S::D / 8);
        auto is_key = [&](int r) { return first + r >= t.lo && first + r < t.hi; };
        bool not_finite = false;
        if constexpr (OF_DV)
            not_finite |= stage<S::T, S::DIMS>(sm.k[owner], first_of_warp, dv, 1, is_key);
        if constexpr (OF_DK)
            not_finite |= stage<S::T, S::DIMS>(sm.v[owner], first_of_warp, dk, (float)p.scale, is_key);
        not_finite = named_barrier_or(1 + group, GROUP_THREADS, not_finite); /* the gradients are staged */
        if constexpr (OF_DV)
            store<S::T>(gradient.v, KeyWalk<STEP>(gradient.v, t.gradient.v, t, of_thread), t.n_rows - first, p.Dv,
                        not_finite, sm.k[owner]);
        if constexpr (OF_DK)
            store<S::T>(gradient.k, KeyWalk<STEP>(gradient.k, t.gradient.k, t, of_thread), t.n_rows - first, p.D,
                        not_finite, sm.v[owner]);
    }

    /* Once load_keys() has been called. */
    __device__ __forceinline__ void run() {
        cp_async_wait<0>();
        fence_async_proxy();
        named_barrier_sync(1 + group, GROUP_THREADS); /* the group's k and v may be read */
        if (left > 0)
            run_steps();
        named_barrier_sync(1 + group, GROUP_THREADS); /* and overwritten */
        store_sums();
    }
};

/* Starts the copies of the owner's keys by a consumer: rows lo .. hi - 1 of a tile, whose row 0 of kv head 0 begins with elements
 * k and v; the others become zeros, and nothing is read there. */
template <class S>
static __device__ __forceinline__ void load_keys(const fad_attn_problem &p, HopperKeyGradientShared<S> &sm, int64_t k,
                                                 int64_t v, int64_t head_k, int lo, int hi) {
    const int group = threadIdx.x / GROUP_THREADS - 1, owner = S::PAIRED ? 0 : group, first = owner * GROUP_ROWS;
    auto load = [&](Matrix<GROUP_ROWS, S::D> &to, const fad_view &view, int64_t at, int64_t dims) {
        const char *const from = (const char *)view.data + 2 * (at + first * view.stride_s + head_k * view.stride_h);
#pragma unroll
        for (int piece = 0; piece < to.PIECES; piece++)
            load_rows<GROUP_ROWS, 8, GROUP_THREADS>(to.piece[piece], from + piece * 128, 2 * view.stride_s, lo - first,
                                                    hi - first, (int)dims - piece * 64, threadIdx.x % GROUP_THREADS);
    };
    if (!S::PAIRED || group == 0)
        load(sm.k[owner], p.k, k, p.D);
    if (!S::PAIRED || group == 1)
        load(sm.v[owner], p.v, v, p.Dv);
    cp_async_commit();
}
/* Before the tile has been found, if all rows of the buffer are keys. Sequence b is entry b: backward calls have no block table
 * and no cache_batch_idx. */
template <class S>
static __device__ __forceinline__ void load_expected_keys(const fad_attn_problem &p, const KeyTiles &tiles,
                                                          HopperKeyGradientShared<S> &sm) {
    int b, head_k, nth;
    tiles.find(blockIdx.x, b, head_k, nth);
    const int64_t row = (int64_t)nth * S::TILE;
    load_keys(p, sm, b * p.k.stride_b + row * p.k.stride_s, b * p.v.stride_b + row * p.v.stride_s, head_k, 0,
              (int)min(p.Sk - row, (int64_t)S::TILE));
}
template <class S>
static __device__ __forceinline__ void load_keys_of(const KeyTile &t, const fad_attn_problem &p,
                                                    HopperKeyGradientShared<S> &sm) {
    load_keys(p, sm, t.seq.k + t.first * p.k.stride_s, t.seq.v + t.first * p.v.stride_s, t.head_k, t.lo, t.hi);
}

template <class S>
__global__ void __launch_bounds__(S::THREADS, 1)
    hopper_backward_keys(const __grid_constant__ fad_attn_problem p, const __grid_constant__ fad_attn_problem gradient,
                         const __grid_constant__ RowSums sums, const __grid_constant__ KeyTiles tiles,
                         const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap dout_map) {
    extern __shared__ __align__(1024) char hopper_memory[];
    HopperKeyGradientShared<S> &sm = *(HopperKeyGradientShared<S> *)hopper_memory;
    allow_next_kernel();
    if (threadIdx.x == 64) {
        for (int i = 0; i < S::SLOTS; i++) {
            barrier_init(sm.full[i], 2); /* the copies, and the warp of the sums */
            barrier_init(sm.empty[i], S::CONSUMING_WARPS);
            if constexpr (S::PAIRED)
                barrier_init(sm.scores.full[i], GROUP_WARPS);
        }
        fence_barrier_init();
    }
    const bool consumes = threadIdx.x >= GROUP_THREADS, expected = tiles.valid && !p.seqused_k && !p.leftpad_k;
    if (expected && consumes)
        load_expected_keys(p, tiles, sm);
    if (!share_key_tile(p, gradient, tiles, S::TILE, sm.t)) /* and barriers may be used */
        return;
    if (!expected && consumes)
        load_keys_of(sm.t, p, sm);
    if (threadIdx.x < GROUP_THREADS) {
        give_registers<S::PRODUCER_REGISTERS>();
        const QueryWalk<S> walk(sm.t); /* by whole warps */
        if (threadIdx.x == 0)
            produce_rows<S>(p, q_map, dout_map, sm, walk);
        else if (threadIdx.x / 32 == 1)
            produce_sums<S>(p, sums, sm, walk);
    } else {
        take_registers<S::CONSUMER_REGISTERS>();
        if constexpr (!S::PAIRED)
            HopperKeyGradient<S, DK_AND_DV>(p, gradient, tiles.rule, sm).run();
        else if (uniform(threadIdx.x / GROUP_THREADS) == 1)
            HopperKeyGradient<S, DV_OF_PAIR>(p, gradient, tiles.rule, sm).run();
        else
            HopperKeyGradient<S, DK_OF_PAIR>(p, gradient, tiles.rule, sm).run();
    }
}

template <class S> static HopperBackwardKernel<KeyTiles> hopper_backward_keys_of() {
    static_assert(sizeof(HopperKeyGradientShared<S>) <= 227 * 1024, "more shared memory than a thread block can have");
    return {S::D, S::TILE, S::THREADS, S::ROWS, sizeof(HopperKeyGradientShared<S>), hopper_backward_keys<S>};
}

#endif
