/* dq of the mma family for compute capability 9.0: copy engine and wgmma, the bits of mma_backward_rows.cuh.
 *
 * A thread block takes a tile of 128 packed query rows, 64 for each consuming warpgroup, which holds their dq in
 * registers. The producer keeps K and V of the keys coming that some row sees, KEYS at a time. */
#ifndef FAD_CUDA_HOPPER_BACKWARD_ROWS_CUH
#define FAD_CUDA_HOPPER_BACKWARD_ROWS_CUH

#include "hopper_backward_tile.cuh"
#include "mma_backward_rows.cuh"

template <fad_dtype T_, int D_, int KEYS_, int K_SLOTS_, int V_SLOTS_>
struct HopperRowGradientShape : BackwardRoles<2> {
    static constexpr fad_dtype T = T_;
    static constexpr int TILE = 2 * GROUP_ROWS;
    static constexpr int D = D_, DIMS = D / 8; /* of all four tensors, zero-padded; n8 tiles of sums */
    static constexpr int KEYS = KEYS_, N = KEYS / 8, STEPS = KEYS / 16; /* keys at a time; n8 tiles of scores */
    static constexpr int K_SLOTS = K_SLOTS_, V_SLOTS = V_SLOTS_;        /* k is in use for longer */
    static_assert(BLOCK_KEYS % KEYS == 0, "a block of keys is whole or partial as one");
};

template <class S> struct HopperRowGradientShared {
    Matrix<S::KEYS, S::D> k[S::K_SLOTS], v[S::V_SLOTS];
    Matrix<GROUP_ROWS, S::D> q[S::CONSUMERS], dout[S::CONSUMERS]; /* q: and dq, staged */
    RowTable<S::TILE> rows;
    bool has_terms[S::TILE]; /* of a row: ROW_HAS_TERMS; false past the active ones */
    Tile t;
    fad_sequence gradient; /* where the tile's sequence lies in gradients */
    KeyRange range;
    MemoryBarrier k_full[S::K_SLOTS], k_empty[S::K_SLOTS], v_full[S::V_SLOTS], v_empty[S::V_SLOTS];
};

/* What the steps need of a lane's two rows; e may be a number that the compiler does not know. */
struct RowRegisters {
    float l[2], d[2];
    __device__ __forceinline__ float log2_sum(int e) const { return e < 2 ? l[0] : l[1]; }
    __device__ __forceinline__ float delta(int e) const { return e < 2 ? d[0] : d[1]; }
    __device__ __forceinline__ const RowRegisters &at(int, int) const { return *this; }
};
/* And where scores are not plain: `row` is its first in the tile, `key` its column 0. */
template <int ROWS> struct RowsWithOptions {
    const RowRegisters mine;
    const RowTable<ROWS> &rows;
    int row, key;

    __device__ __forceinline__ void move(int n) { key += 8 * n; } /* n8 tile n becomes the first */
    __device__ __forceinline__ const RowsWithOptions &at(int, int) const { return *this; }
    __device__ __forceinline__ float log2_sum(int e) const { return mine.log2_sum(e); }
    __device__ __forceinline__ float delta(int e) const { return mine.delta(e); }
    __device__ __forceinline__ float slope(int e) const { return rows.slope[row + e / 2 * 8]; }
    __device__ __forceinline__ int distance(int e) const { return rows.pos[row + e / 2 * 8] - key - e % 2; }
};

/* The steps of a tile, KEYS keys each. By whole warps. */
template <class S> static __device__ __forceinline__ int count_steps(const KeyRange &range) {
    return uniform(range.blocks > 0 ? (range.hi + S::KEYS - 1) / S::KEYS : 0);
}

/* The producer, one warp. */
template <class S>
static __device__ __forceinline__ void produce_blocks(const fad_attn_problem &p, const CUtensorMap &k_map,
                                                      const CUtensorMap &v_map, HopperRowGradientShared<S> &sm) {
    /* Other tiles of the head read the same. */
    const KeyCopier<S::KEYS, Matrix<S::KEYS, S::D>::PIECES> copier(p, sm.t, sm.range, keep_as_usual());
    const int steps = count_steps<S>(sm.range);
    copier.run_rows(k_map, v_map, [&](auto copy_k, auto copy_v) {
        Ring k, v;
#pragma unroll 1
        for (int step = 0; step < steps; step++, k.advance(S::K_SLOTS), v.advance(S::V_SLOTS)) {
            const int key = step * S::KEYS;
            copy_k(key, 0, sm.k[k.index].piece[0], sm.k_empty[k.index], k.round ^ 1, sm.k_full[k.index]);
            copy_v(key, 0, sm.v[v.index].piece[0], sm.v_empty[v.index], v.round ^ 1, sm.v_full[v.index]);
        }
    });
}

/* What a consumer loads of a tile's rows, as soon as it is known which they are. */
template <class S> struct RowLoads {
    static constexpr int CHUNKS = S::D / 8, STEP = GROUP_THREADS / CHUNKS; /* rows of a chunk's column are STEP apart */
    RowRegisters mine;
    int state; /* of the row that is this thread's, if there is one */

    static __device__ __forceinline__ int group() { return (int)threadIdx.x / GROUP_THREADS - 1; }
    static __device__ __forceinline__ int first_row() {
        return group() * GROUP_ROWS + (int)threadIdx.x % GROUP_THREADS / CHUNKS;
    }

    /* The active rows of tile t, which is of sequence b, whose rows begin with elements q_first and dout_first; the others are
     * taken for zeros, without terms. */
    __device__ __forceinline__ void start(const fad_attn_problem &p, const fad_attn_problem &gradient,
                                          const RowSums &sums, HopperRowGradientShared<S> &sm, const Tile &t, int64_t b,
                                          int64_t q_first, int64_t dout_first) {
        const int thread = threadIdx.x - GROUP_THREADS;
        load(sm.q[group()], p.q, q_first, p.D, t);
        load(sm.dout[group()], gradient.out, dout_first, p.Dv, t);
        cp_async_commit();
        /* Where row r is in RowSums, or -1. */
        auto sum_of = [&](int r) {
            const Row row = row_of(t, r);
            return r < t.n_active ? first_row_sum(p, b, row.h) + row.i : -1;
        };
        static_assert(S::TILE <= S::CONSUMER_THREADS, "a thread for each row");
        const int64_t own = thread < S::TILE ? sum_of(thread) : -1;
        state = own >= 0 ? sums.state[own] : 0; /* asked for before it is needed, as what follows */
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int64_t at =
                sum_of(group() * GROUP_ROWS + thread % GROUP_THREADS / 32 * 16 + thread % 32 / 4 + half * 8);
            mine.l[half] = at >= 0 ? sums.log2_sum[at] : 0;
            mine.d[half] = at >= 0 ? sums.delta[at] : 0;
        }
    }

  private:
    static __device__ __forceinline__ void load(Matrix<GROUP_ROWS, S::D> &to, const fad_view &view,
                                                int64_t first_element, int64_t dims, const Tile &t) {
        const int chunk = threadIdx.x % CHUNKS, end = chunk * 8 < dims ? t.n_active - group() * GROUP_ROWS : 0;
        RowWalk<STEP> walk(view, first_element, t, first_row());
#pragma unroll 8
        for (int r = first_row() % GROUP_ROWS; r < GROUP_ROWS; r += STEP, walk.advance())
            cp_async16(to.chunk(r, chunk), (const char *)view.data + walk.at + chunk * 16, r < end ? 16 : 0);
    }
};

/* The 64 rows of a warpgroup. */
template <class S> struct HopperRowGradient {
    const fad_attn_problem &p;
    const fad_attn_problem &gradient;
    HopperRowGradientShared<S> &sm;
    const ScoreRule &rule;
    const int group = uniform(threadIdx.x / GROUP_THREADS - 1), lane = threadIdx.x % 32;
    const int first_of_warp = uniform(threadIdx.x % GROUP_THREADS / 32 * 16); /* row of the group */
    const uint64_t q = rows_of(sm.q[group]), k = rows_of(sm.k[0]), v = rows_of(sm.v[0]);
    const int whole = uniform(sm.range.whole), n_whole = uniform(sm.range.n_whole);
    const int steps = count_steps<S>(sm.range);
    Ring keys, values; /* where the step's are */
    RowRegisters mine;
    Fragments<1, S::DIMS> dq;

    __device__ HopperRowGradient(const fad_attn_problem &problem, const fad_attn_problem &of_gradient,
                                 const ScoreRule &of_call, HopperRowGradientShared<S> &shared)
        : p(problem), gradient(of_gradient), sm(shared), rule(of_call) {
        clear<1, S::DIMS>(dq);
    }

    __device__ __forceinline__ int row() const { return group * GROUP_ROWS + first_of_warp + lane / 4; }

    /* Everything about the tile's rows, once their loads have been started. */
    __device__ __forceinline__ void take(const RowLoads<S> &loads) {
        const int r = threadIdx.x - GROUP_THREADS;
        mine = loads.mine;
        sm.rows.fill(p, sm.t, sm.range, r, S::CONSUMER_THREADS);
        if (r < S::TILE)
            sm.has_terms[r] = loads.state & ROW_HAS_TERMS;
        cp_async_wait<0>();
        fence_async_proxy();
        named_barrier_sync(ALL_CONSUMERS, S::CONSUMER_THREADS); /* rows and what is known of them may be read */
    }

    /* By its distance from q, of which the compiler must not know that it is the same in every step. */
    __device__ __forceinline__ uint64_t dout() const {
        return matrix_at(
            q, opaque((int)(offsetof(HopperRowGradientShared<S>, dout) - offsetof(HopperRowGradientShared<S>, q))));
    }

    /* K and V of the step, once they have arrived; in use until released. */
    __device__ __forceinline__ void start_scores(Fragments<1, S::N> &s) {
        barrier_wait(sm.k_full[keys.index], keys.round);
        start_product<S::T, S::D, S::N>(s, q, matrix_at(k, keys.index * (int)sizeof sm.k[0]));
    }
    __device__ __forceinline__ void start_dp(Fragments<1, S::N> &dp) { /* opaque as in dout() */
        barrier_wait(sm.v_full[values.index], values.round);
        start_product<S::T, S::D, S::N>(dp, dout(), matrix_at(v, opaque(values.index) * (int)sizeof sm.v[0]));
    }

    __device__ __forceinline__ bool is_partial(int step) const {
        return (unsigned)(step * S::KEYS / BLOCK_KEYS - whole) >= (unsigned)n_whole;
    }
    __device__ __forceinline__ bool sees(int r, int key) const { return key >= sm.rows.lo[r] && key < sm.rows.hi[r]; }

    /* A step whose every pair is a term: dp becomes dS (N13), P beside the second product. */
    __device__ __forceinline__ void find_plain(Fragments<1, S::N> &s, Fragments<1, S::N> &dp) const {
        wgmma_wait<1>();
        find_probabilities<S::N>(s, rule.c, mine);
        wgmma_wait<0>();
        find_gradients<S::N>(s, dp, mine);
    }

    /* Any step: what is no term is 0 and reaches nothing. */
    __device__ __forceinline__ void find_any(Fragments<1, S::N> &s, Fragments<1, S::N> &dp, int step) {
        const int number = step * S::KEYS, key = number + lane % 4 * 2;
        wgmma_wait<0>();
        if (rule.plain) {
            find_probabilities<S::N>(s, rule.c, mine);
            find_gradients<S::N>(s, dp, mine);
        } else {
            const RowsWithOptions<S::TILE> rows = {mine, sm.rows, row(), key};
            find_with_options<S::N>(s, dp, rule, rows);
        }
        if (!is_partial(step))
            return;
        clear_others<1, S::N>(s, dp, [&](int, int n, int e) { return sees(row() + e / 2 * 8, key + 8 * n + e % 2); });
        if (has_not_finite<S::T>(sm.k[keys.index], group)) {
            const FragmentsApart<S::T, S::STEPS> a(dp);
            a.add_to(dq, sm.k[keys.index],
                     [&](int r, int j) { return sees(group * GROUP_ROWS + first_of_warp + r, number + j); });
            zero_matrix<S>(sm.k[keys.index]);
            clear<1, S::N>(dp); /* what is left of the step changes nothing */
        }
    }

    /* From the products that are on their way to dS, in dp. */
    __device__ __forceinline__ void find(Fragments<1, S::N> &s, Fragments<1, S::N> &dp, int step) {
        if (rule.plain && !is_partial(step))
            find_plain(s, dp);
        else
            find_any(s, dp, step);
        warp_arrives(sm.v_empty[values.index]);
        values.advance(S::V_SLOTS);
    }
    __device__ __forceinline__ void start_dq(const unsigned (&a)[S::STEPS][4], int slot) {
        start_sum<S::T, S::STEPS, S::DIMS>(dq, a, steps_of<S::KEYS, S::D>(matrix_at(k, slot * (int)sizeof sm.k[0])));
    }

    __device__ __forceinline__ void run_steps() {
        Fragments<1, S::N> s, dp;
        unsigned a[S::STEPS][4]; /* in use until the sum is complete: not written again before */
        start_scores(s);
        start_dp(dp);
        find(s, dp, 0);
#pragma unroll 1
        for (int step = 1; step < steps; step++) {
            const int slot = keys.index;
            round_fragments<S::T, S::N>(a, dp);
            start_dq(a, slot);
            keys.advance(S::K_SLOTS);
            start_scores(s);
            wgmma_wait<1>();
            warp_arrives(sm.k_empty[slot]);
            start_dp(dp);
            find(s, dp, step);
        }
        round_fragments<S::T, S::N>(a, dp);
        start_dq(a, keys.index);
        wgmma_wait<0>();
    }

    /* The group's dq, by way of where its q lay, to rows of the buffer. */
    __device__ __forceinline__ void store_sums() const {
        const int first = group * GROUP_ROWS;
        const bool not_finite = stage<S::T, S::DIMS>(sm.q[group], first_of_warp, dq, (float)p.scale,
                                                     [&](int r) { return sm.has_terms[first + r]; });
        const RowWalk<RowLoads<S>::STEP> walk(gradient.q, sm.gradient.q, sm.t, RowLoads<S>::first_row());
        store<S::T>(gradient.q, walk, sm.t.n_rows - first, p.D,
                    named_barrier_or(1 + group, GROUP_THREADS, not_finite) /* dq is staged */, sm.q[group]);
    }

    __device__ __forceinline__ void run(const RowLoads<S> &loads) {
        take(loads);
        if (steps > 0)
            run_steps();
        named_barrier_sync(1 + group, GROUP_THREADS); /* the group's q may be overwritten */
        store_sums();
    }
};

template <class S>
__global__ void __launch_bounds__(S::THREADS, 1)
    hopper_backward_rows(const __grid_constant__ fad_attn_problem p, const __grid_constant__ fad_attn_problem gradient,
                         const __grid_constant__ RowSums sums, const __grid_constant__ Work tiles,
                         const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map) {
    extern __shared__ __align__(1024) char hopper_memory[];
    HopperRowGradientShared<S> &sm = *(HopperRowGradientShared<S> *)hopper_memory;
    if (threadIdx.x == 96) {
        for (int i = 0; i < S::K_SLOTS; i++) {
            barrier_init(sm.k_full[i], 1);
            barrier_init(sm.k_empty[i], S::CONSUMING_WARPS);
        }
        for (int i = 0; i < S::V_SLOTS; i++) {
            barrier_init(sm.v_full[i], 1);
            barrier_init(sm.v_empty[i], S::CONSUMING_WARPS);
        }
        fence_barrier_init();
    }
    const bool consumes = threadIdx.x >= GROUP_THREADS, expected = tiles.dense.valid && !p.seqused_q;
    RowLoads<S> loads;
    if (consumes && expected) { /* before the tile has been found */
        const DenseItem item(tiles.dense, S::TILE, blockIdx.x);
        Tile t;
        find_dense_rows(p, tiles.dense, S::TILE, item, t);
        t.n_active = t.n_rows;
        loads.start(p, gradient, sums, sm, t, item.b, item.b * p.q.stride_b, item.b * gradient.out.stride_b);
    }
    const bool exists =
        share_row_tile(p, gradient, tiles, S::TILE, sm.t, sm.range, sm.gradient); /* and barriers may be used */
    if (exists && consumes && !expected)
        loads.start(p, gradient, sums, sm, sm.t, sm.t.seq.index, sm.t.seq.q, sm.gradient.out);
    if (exists && !consumes) {
        give_registers<S::PRODUCER_REGISTERS>();
        if (threadIdx.x < 32)
            produce_blocks<S>(p, k_map, v_map, sm);
    } else if (exists) {
        take_registers<S::CONSUMER_REGISTERS>();
        HopperRowGradient<S>(p, gradient, tiles.rule, sm).run(loads);
    }
    end_behind_last_kernel();
}

template <class S> static HopperBackwardKernel<Work> hopper_backward_rows_of() {
    static_assert(sizeof(HopperRowGradientShared<S>) <= 227 * 1024, "more shared memory than a thread block can have");
    return {S::D, S::TILE, S::THREADS, S::KEYS, sizeof(HopperRowGradientShared<S>), hopper_backward_rows<S>};
}

#endif
