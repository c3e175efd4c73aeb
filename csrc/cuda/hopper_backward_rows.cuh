/* dq of the mma family for compute capability 9.0: copy engine and wgmma, the bits of mma_backward_rows.cuh.
 *
 * A thread block takes a tile of 128 packed query rows, 64 for each consuming warpgroup, which holds their dq in
 * registers. The producer keeps K and V of the blocks of keys coming that some row sees. */
#ifndef FAD_CUDA_HOPPER_BACKWARD_ROWS_CUH
#define FAD_CUDA_HOPPER_BACKWARD_ROWS_CUH

#include "hopper_backward_tile.cuh"
#include "mma_backward_rows.cuh"

template <fad_dtype T_, int D_, int SLOTS_> struct HopperRowGradientShape : BackwardRoles<2> {
    static constexpr fad_dtype T = T_;
    static constexpr int D = D_, DIMS = D / 8; /* of all four tensors, zero-padded; n8 tiles of sums */
    static constexpr int N = BLOCK_KEYS / 8, STEPS = BLOCK_KEYS / 16; /* n8 tiles of scores */
    static constexpr int SLOTS = SLOTS_;
};

template <class S> struct HopperRowGradientShared {
    Matrix<BLOCK_KEYS, S::D> ring[S::SLOTS];                      /* K and V of a block, and those of the next */
    Matrix<GROUP_ROWS, S::D> q[S::CONSUMERS], dout[S::CONSUMERS]; /* q: and dq, staged */
    RowTable<S::TILE> rows;
    float log2_sum[S::TILE], delta[S::TILE];
    int state[S::TILE];
    Tile t;
    fad_sequence gradient; /* where the tile's sequence lies in gradients */
    KeyRange range;
    MemoryBarrier full[S::SLOTS], empty[S::SLOTS];
};

/* What the plain steps need of a lane's two rows. */
struct RowRegisters {
    float l[2], d[2];
    __device__ __forceinline__ float log2_sum(int e) const { return l[e / 2]; }
    __device__ __forceinline__ float delta(int e) const { return d[e / 2]; }
    __device__ __forceinline__ const RowRegisters &at(int, int) const { return *this; }
};

/* The producer, one warp. */
template <class S>
static __device__ __forceinline__ void produce_blocks(const fad_attn_problem &p, const CUtensorMap &k_map,
                                                      const CUtensorMap &v_map, HopperRowGradientShared<S> &sm) {
    /* Other tiles of the head read the same. */
    const KeyCopier<BLOCK_KEYS, Matrix<BLOCK_KEYS, S::D>::PIECES> copier(p, sm.t, sm.range, keep_as_usual());
    copier.run(k_map, v_map, [&](auto copy_k, auto copy_v) {
        Ring ring;
        auto next = [&](auto &copy, int block) {
            const int i = ring.index;
            copy(block * BLOCK_KEYS, 0, sm.ring[i].piece[0], sm.empty[i], ring.round ^ 1, sm.full[i]);
            ring.advance(S::SLOTS);
        };
        const int blocks = sm.range.blocks;
#pragma unroll 1
        for (int block = 0; block < blocks; block++) {
            next(copy_k, block);
            next(copy_v, block);
        }
    });
}

/* The 64 rows of a warpgroup. */
template <class S> struct HopperRowGradient {
    const fad_attn_problem &p;
    const fad_attn_problem &gradient;
    HopperRowGradientShared<S> &sm;
    const ScoreRule rule;
    const int group = uniform(threadIdx.x / GROUP_THREADS - 1), lane = threadIdx.x % 32;
    const int first_of_warp = uniform(threadIdx.x % GROUP_THREADS / 32 * 16); /* row of the group */
    const uint64_t q = rows_of(sm.q[group]), dout = rows_of(sm.dout[group]), ring_rows = rows_of(sm.ring[0]);
    const int whole = uniform(sm.range.whole), n_whole = uniform(sm.range.n_whole), blocks = uniform(sm.range.blocks);
    Ring ring;        /* the next of K or V */
    int keys, values; /* where the block's are */
    RowRegisters mine;
    Fragments<1, S::DIMS> dq;

    __device__ HopperRowGradient(const fad_attn_problem &problem, const fad_attn_problem &of_gradient,
                                 HopperRowGradientShared<S> &shared)
        : p(problem), gradient(of_gradient), sm(shared), rule(problem) {
        clear<1, S::DIMS>(dq);
    }

    __device__ __forceinline__ int row() const { return group * GROUP_ROWS + first_of_warp + lane / 4; }

    __device__ __forceinline__ void load_rows_of_group(Matrix<GROUP_ROWS, S::D> &to, const fad_view &view,
                                                       int64_t first_element, int64_t dims) const {
#pragma unroll 2
        for (int at = threadIdx.x % GROUP_THREADS; at < GROUP_ROWS * to.CHUNKS; at += GROUP_THREADS) {
            const int r = at / to.CHUNKS, chunk = at % to.CHUNKS, in_tile = group * GROUP_ROWS + r;
            const Row row = row_of(sm.t, in_tile);
            const int64_t first = first_element + row.i * view.stride_s + row.h * view.stride_h;
            cp_async16(to.chunk(r, chunk), (const char *)view.data + 2 * (first + chunk * 8),
                       in_tile < sm.t.n_active && chunk * 8 < dims ? 16 : 0);
        }
    }

    /* Everything about the tile's rows. */
    __device__ __forceinline__ void load(const RowSums &sums) {
        const Tile &t = sm.t;
        load_rows_of_group(sm.q[group], p.q, t.seq.q, p.D);
        load_rows_of_group(sm.dout[group], gradient.out, sm.gradient.out, p.Dv);
        cp_async_commit();
        const int thread = threadIdx.x - GROUP_THREADS;
        sm.rows.fill(p, t, sm.range, thread, S::CONSUMER_THREADS);
#pragma unroll 1
        for (int r = thread; r < S::TILE; r += S::CONSUMER_THREADS) {
            const bool active = r < t.n_active;
            const Row row = row_of(t, r);
            const int64_t at = active ? first_row_sum(p, t.seq.index, row.h) + row.i : 0;
            sm.log2_sum[r] = active ? sums.log2_sum[at] : 0;
            sm.delta[r] = active ? sums.delta[at] : 0;
            sm.state[r] = active ? sums.state[at] : 0;
        }
        cp_async_wait<0>();
        fence_async_proxy();
        named_barrier_sync(ALL_CONSUMERS, S::CONSUMER_THREADS); /* rows and what is known of them may be read */
#pragma unroll
        for (int half = 0; half < 2; half++) {
            mine.l[half] = sm.log2_sum[row() + half * 8];
            mine.d[half] = sm.delta[row() + half * 8];
        }
    }

    /* The slot of the next K or V, which has arrived; in use until released. */
    __device__ __forceinline__ int next_slot() {
        const int slot = ring.index;
        barrier_wait(sm.full[slot], ring.round);
        ring.advance(S::SLOTS);
        return slot;
    }
    __device__ __forceinline__ void start_scores(Fragments<1, S::N> &s) {
        keys = next_slot();
        start_product<S::T, S::D, S::N>(s, q, matrix_at(ring_rows, keys * (int)sizeof sm.ring[0]));
    }
    __device__ __forceinline__ void start_dp(Fragments<1, S::N> &dp) {
        values = next_slot();
        start_product<S::T, S::D, S::N>(dp, dout, matrix_at(ring_rows, values * (int)sizeof sm.ring[0]));
    }

    __device__ __forceinline__ bool is_partial(int block) const {
        return (unsigned)(block - whole) >= (unsigned)n_whole;
    }
    __device__ __forceinline__ bool sees(int r, int key) const { return key >= sm.rows.lo[r] && key < sm.rows.hi[r]; }

    /* A block whose every pair is a term: dp becomes dS (N13), P beside the second product. */
    __device__ __forceinline__ void find_plain(Fragments<1, S::N> &s, Fragments<1, S::N> &dp) const {
        wgmma_wait<1>();
        find_probabilities<S::N>(s, rule.c, mine);
        wgmma_wait<0>();
        find_gradients<S::N>(s, dp, mine);
    }

    /* Any block: what is no term is 0 and reaches nothing. */
    __device__ __forceinline__ void find_any(Fragments<1, S::N> &s, Fragments<1, S::N> &dp, int block) {
        const int number = block * BLOCK_KEYS, key = number + lane % 4 * 2;
        wgmma_wait<0>();
        if (rule.plain) {
            find_probabilities<S::N>(s, rule.c, mine);
            find_gradients<S::N>(s, dp, mine);
        } else {
            const QueryRows<HopperRowGradientShared<S>> rows = {sm, row(), key};
            find_with_options<S::N>(s, dp, rule, rows);
        }
        if (!is_partial(block))
            return;
        clear_others<1, S::N>(s, dp, [&](int, int n, int e) { return sees(row() + e / 2 * 8, key + 8 * n + e % 2); });
        if (has_not_finite<S::T>(sm.ring[keys], group)) {
            const FragmentsApart<S::T, S::STEPS> a(dp);
            a.add_to(dq, sm.ring[keys],
                     [&](int r, int j) { return sees(group * GROUP_ROWS + first_of_warp + r, number + j); });
            zero_matrix<S>(sm.ring[keys]);
            clear<1, S::N>(dp); /* what is left of the step changes nothing */
        }
    }

    /* From the products that are on their way to dS, in dp. */
    __device__ __forceinline__ void find(Fragments<1, S::N> &s, Fragments<1, S::N> &dp, int block) {
        if (rule.plain && !is_partial(block))
            find_plain(s, dp);
        else
            find_any(s, dp, block);
        warp_arrives(sm.empty[values]);
    }
    __device__ __forceinline__ void start_dq(const unsigned (&a)[S::STEPS][4], int slot) {
        start_sum<S::T, S::STEPS, S::DIMS>(
            dq, a, steps_of<BLOCK_KEYS, S::D>(matrix_at(ring_rows, slot * (int)sizeof sm.ring[0])));
    }

    __device__ __forceinline__ void run_blocks() {
        Fragments<1, S::N> s, dp;
        unsigned a[S::STEPS][4]; /* in use until the sum is complete: not written again before */
        start_scores(s);
        start_dp(dp);
        find(s, dp, 0);
#pragma unroll 1
        for (int block = 1; block < blocks; block++) {
            const int slot = keys;
            round_fragments<S::T, S::N>(a, dp);
            start_dq(a, slot);
            start_scores(s);
            wgmma_wait<1>();
            warp_arrives(sm.empty[slot]);
            start_dp(dp);
            find(s, dp, block);
        }
        round_fragments<S::T, S::N>(a, dp);
        start_dq(a, keys);
        wgmma_wait<0>();
    }

    /* The group's dq, staged, to rows of the buffer. */
    __device__ __forceinline__ void store() const {
        const Tile &t = sm.t;
        Matrix<GROUP_ROWS, S::D> &staged = sm.q[group];
#pragma unroll 2
        for (int at = threadIdx.x % GROUP_THREADS; at < GROUP_ROWS * staged.CHUNKS; at += GROUP_THREADS) {
            const int r = at / staged.CHUNKS, chunk = at % staged.CHUNKS, in_tile = group * GROUP_ROWS + r;
            const Row row = row_of(t, in_tile);
            const int64_t to = sm.gradient.q + row.i * gradient.q.stride_s + row.h * gradient.q.stride_h;
            if (in_tile < t.n_rows && chunk * 8 < p.D)
                *(uint4 *)((uint16_t *)gradient.q.data + to + chunk * 8) = *staged.chunk(r, chunk);
        }
    }

    __device__ __forceinline__ void run(const RowSums &sums) {
        load(sums);
        if (blocks > 0)
            run_blocks();
        named_barrier_sync(1 + group, GROUP_THREADS); /* the group's q may be overwritten */
        stage<S::T, S::DIMS>(sm.q[group], first_of_warp, dq, (float)p.scale,
                             [&](int r) { return (sm.state[group * GROUP_ROWS + r] & ROW_HAS_TERMS) != 0; });
        named_barrier_sync(1 + group, GROUP_THREADS); /* dq is staged */
        store();
    }
};

template <class S>
__global__ void __launch_bounds__(S::THREADS, 1)
    hopper_backward_rows(const __grid_constant__ fad_attn_problem p, const __grid_constant__ fad_attn_problem gradient,
                         const __grid_constant__ RowSums sums, const __grid_constant__ CUtensorMap k_map,
                         const __grid_constant__ CUtensorMap v_map) {
    extern __shared__ __align__(1024) char hopper_memory[];
    HopperRowGradientShared<S> &sm = *(HopperRowGradientShared<S> *)hopper_memory;
    if (threadIdx.x < 32) {
        if (locate_tile(p, S::TILE, blockIdx.x, sm.t) && threadIdx.x == 0) {
            set_key_range(p, sm.t, 0, MOST_SPLITS, sm.range);
            sm.gradient = fad_get_sequence(&gradient, sm.t.seq.index);
        }
    } else if (threadIdx.x == 32) {
        for (int i = 0; i < S::SLOTS; i++) {
            barrier_init(sm.full[i], 1);
            barrier_init(sm.empty[i], S::CONSUMING_WARPS);
        }
        fence_barrier_init();
    }
    __syncthreads(); /* tile and range may be read, barriers be used */
    if (!sm.t.exists)
        return;
    if (threadIdx.x < GROUP_THREADS) {
        give_registers<S::PRODUCER_REGISTERS>();
        if (threadIdx.x < 32)
            produce_blocks<S>(p, k_map, v_map, sm);
    } else {
        take_registers<S::CONSUMER_REGISTERS>();
        HopperRowGradient<S>(p, gradient, sm).run(sums);
    }
}

template <class S> static HopperBackwardKernel hopper_backward_rows_of() {
    static_assert(sizeof(HopperRowGradientShared<S>) <= 227 * 1024, "more shared memory than a thread block can have");
    return {S::D, S::TILE, S::THREADS, BLOCK_KEYS, sizeof(HopperRowGradientShared<S>), hopper_backward_rows<S>};
}

#endif
