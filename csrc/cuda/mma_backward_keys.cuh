/* dk and dv of the mma family: mma.sync and cp.async, for compute capability 8.0 and above.
 *
 * A thread block takes a tile of KEYS keys of a kv head and walks the query rows that see one of them: heads ascending, and
 * for each its rows, ROWS at a time. Keys are the rows of its fragments, so that P and dS leave the first products as
 * what the second ones need. A team of PARTS warps owns 32 keys; each of them finds the scores of its part of the rows,
 * hands them to the others, and sums 64 dims of dk and dv. */
#ifndef FAD_CUDA_MMA_BACKWARD_KEYS_CUH
#define FAD_CUDA_MMA_BACKWARD_KEYS_CUH

#include "mma_backward_tile.cuh"

template <fad_dtype T_, int D_, int TEAMS_, int ROWS_, int RESIDENT_> struct KeyGradientShape {
    static constexpr fad_dtype T = T_;
    static constexpr int D = D_, CHUNKS = D / 8; /* of all four tensors, zero-padded */
    static constexpr int TEAMS = TEAMS_, PARTS = D / 64, RESIDENT = RESIDENT_;
    static constexpr int THREADS = TEAMS * PARTS * 32, KEYS = TEAMS * 32;
    static constexpr int ROWS = ROWS_, STEPS = ROWS / 16;  /* query rows at a time */
    static constexpr int M = 2, N = ROWS / PARTS / 8;      /* m16 and n8 tiles of a warp's scores, */
    static constexpr int OWN_STEPS = N / 2, DIMS = 64 / 8; /* and n8 tiles of its sums */
};

/* A tile of the rows of the buffer that a sequence owns, of one kv head. */
struct KeyTile {
    fad_sequence seq, gradient; /* where it lies in the tensors, and in gradients */
    int64_t head_k, first;      /* key number of the tile's first row: negative in left padding */
    int64_t sums;               /* where row 0 of head 0 is in RowSums */
    int n_rows, lo, hi;         /* rows owned; those that are keys are lo .. hi - 1 */
    int row, end_row;           /* query rows that see one of them */
    int head, end_head;         /* query heads that read the kv head */
    bool exists;                /* false: the grid's bound was larger than the work */
};

/* What follows from t.seq, and from the kv head and the number of the tile's first row among the `owned` that begin with row
 * first_owned. */
static __device__ void set_key_tile(const fad_attn_problem &p, int group, int keys, int64_t owned, int64_t first_owned,
                                    int64_t head_k, int64_t at, KeyTile &t) {
    const fad_span &span = t.seq.span;
    t.head_k = head_k;
    t.first = at - (t.seq.k_row - first_owned);
    t.n_rows = (int)min((int64_t)keys, owned - at);
    t.lo = (int)fad_clamp(-t.first, 0, t.n_rows);
    t.hi = (int)fad_clamp(span.n_k - t.first, t.lo, t.n_rows);
    const int64_t shift = span.n_q - span.n_k; /* N2: key j stands where row j + shift does */
    t.row = (int)(span.right < 0 ? 0 : fad_clamp(t.first + t.lo + shift - span.right, 0, span.n_q));
    t.end_row = (int)(span.left < 0 ? span.n_q : fad_clamp(t.first + t.hi + shift + span.left, 0, span.n_q));
    if (t.lo == t.hi)
        t.row = t.end_row = 0;
    t.sums = first_row_sum(p, t.seq.index, 0);
    t.head = (int)head_k * group;
    t.end_head = t.head + group;
}

/* Tile number `number`, by a whole warp, into shared memory. */
static __device__ void locate_keys(const fad_attn_problem &p, const fad_attn_problem &gradient, int group, int keys,
                                   int64_t number, KeyTile &t) {
    auto tiles = [&](int64_t b) {
        int64_t first;
        return (fad_owned_rows(p.cu_seqlens_k, p.B, b, p.Sk, &first) + keys - 1) / keys;
    };
    const bool dense = !p.cu_seqlens_k;
    int64_t b = 0, per_head = 1;
    if (dense) {
        per_head = tiles(0);
        if (number >= p.B * p.Hk * per_head)
            b = -1;
    } else {
        b = find_sequence((int)fad_sequence_count(&p), number, [&](int s) { return p.Hk * tiles(s); });
        if (b >= 0)
            per_head = tiles(b);
    }
    if (threadIdx.x % 32 != 0)
        return;
    t.exists = b >= 0;
    if (b >= 0) {
        HeadTile tile = find_head_tile(p, dense ? p.B * p.Hk : p.Hk, per_head, number);
        if (dense)
            b = fad_quotient(tile.head, p.Hk), tile.head -= b * p.Hk;
        int64_t first_owned;
        const int64_t owned = fad_owned_rows(p.cu_seqlens_k, p.B, b, p.Sk, &first_owned);
        t.seq = fad_get_sequence(&p, b);
        t.gradient = fad_get_sequence(&gradient, b);
        set_key_tile(p, group, keys, owned, first_owned, tile.head, tile.nth * keys, t);
    }
}

/* The thread block's tile, into shared memory; by all threads. First keys first: under a causal mask most rows see them. */
static __device__ bool share_key_tile(const fad_attn_problem &p, const fad_attn_problem &gradient,
                                      const KeyTiles &tiles, int keys, KeyTile &t) {
    if (!tiles.valid) {
        if (threadIdx.x < 32)
            locate_keys(p, gradient, tiles.group_size, keys, blockIdx.x, t);
    } else if (threadIdx.x == 0 || threadIdx.x == 32) {
        int b, head_k, nth;
        tiles.find(blockIdx.x, b, head_k, nth);
        if (threadIdx.x == 0) {
            t.exists = true;
            t.seq = dense_sequence(p, b);
            set_key_tile(p, tiles.group_size, keys, p.Sk, 0, head_k, nth * keys, t);
        } else {
            t.gradient = dense_sequence(gradient, b);
        }
    }
    __syncthreads(); /* the tile may be read */
    return t.exists;
}

/* Rows r, r + STEP, .. of a tile in a view of k's shape, as RowWalk. */
template <int STEP_> struct KeyWalk {
    static constexpr int STEP = STEP_;
    int64_t at;
    const int64_t step;

    __device__ __forceinline__ KeyWalk(const fad_view &view, int64_t first_element, const KeyTile &t, int r)
        : at(2 * (first_element + (t.first + r) * view.stride_s + t.head_k * view.stride_h)),
          step(2 * STEP * view.stride_s) {}
    __device__ __forceinline__ void advance() { at += step; }
};

/* Query rows on their way through the pipeline. */
template <class S> struct QueryStage {
    alignas(128) char q[S::ROWS * S::D * 2], dout[S::ROWS * S::D * 2];
    float log2_sum[S::ROWS], delta[S::ROWS];
    int state[S::ROWS];
};

template <class S> struct KeyGradientShared {
    alignas(128) char k[S::KEYS * S::D * 2], v[S::KEYS * S::D * 2];                        /* and dk, dv, staged */
    uint4 exchange[S::PARTS > 1 ? S::TEAMS : 1][2][S::M][S::PARTS > 1 ? S::STEPS : 1][32]; /* P and dS of a team */
    KeyTile t;
    QueryStage<S> stage[2];
};

/* What a step of the walk is: ROWS query rows of a head. */
struct QueryStep {
    int head, row;
};

/* Which of a tile's keys a, and a step's rows b, meet: low <= a - b <= high. */
struct Band {
    int low, high, distance; /* distance: position of row 0 less that of key 0 */

    __device__ Band(const KeyTile &t, const QueryStep &step) {
        constexpr int64_t FAR = 1 << 20;
        const fad_span &span = t.seq.span;
        const int64_t apart = step.row + span.n_k - span.n_q - t.first; /* N2 */
        low = (int)(span.left < 0 ? -FAR : fad_clamp(apart - span.left, -FAR, FAR));
        high = (int)(span.right < 0 ? FAR : fad_clamp(apart + span.right, -FAR, FAR));
        distance = (int)apart; /* ALiBi's are short */
    }
    __device__ __forceinline__ bool whole(int lo, int hi, int rows) const {
        return lo - (rows - 1) >= low && hi - 1 <= high;
    }
    __device__ __forceinline__ bool meets(int a, int b) const { return a - b >= low && a - b <= high; } /* N4 */
};

/* What score_gradients needs of query rows that are columns: `first` is this lane's in column 0, `key` its row 0. */
template <class Stage> struct QueryColumns {
    const Stage &stage;
    int first, key, apart;
    float negative_slope;

    struct At {
        float2 l, d;
        int away;
        float s;
        __device__ __forceinline__ float log2_sum(int e) const { return e % 2 ? l.y : l.x; }
        __device__ __forceinline__ float delta(int e) const { return e % 2 ? d.y : d.x; }
        __device__ __forceinline__ float slope(int) const { return s; }
        __device__ __forceinline__ int distance(int e) const { return away + e % 2 - e / 2 * 8; }
    };
    __device__ __forceinline__ void move(int n) { first += 8 * n; } /* n8 tile n becomes the first */
    __device__ __forceinline__ At at(int m, int n) const {
        const int b = first + 8 * n;
        return {*(const float2 *)(stage.log2_sum + b), *(const float2 *)(stage.delta + b), apart + b - key - 16 * m,
                negative_slope};
    }
};

/* The part of a warp: 32 keys from row `first` of the tile, part `part` of their team. */
template <class S> struct KeyGradientWarp {
    const fad_attn_problem &p;
    KeyGradientShared<S> &sm;
    const ScoreRule rule;
    const int team, part, first;
    Fragments<S::M, S::DIMS> dk, dv;

    __device__ KeyGradientWarp(const fad_attn_problem &problem, KeyGradientShared<S> &shared)
        : p(problem), sm(shared), rule(problem), team(threadIdx.x / 32 / S::PARTS), part(threadIdx.x / 32 % S::PARTS),
          first(team * 32) {
        clear<S::M, S::DIMS>(dk);
        clear<S::M, S::DIMS>(dv);
    }

    /* N13: P and dS of the warp's part of the rows, in fp32. */
    __device__ __forceinline__ void scores(const QueryStage<S> &stage, const QueryStep &step, const Band &band,
                                           bool partial, Fragments<S::M, S::N> &s, Fragments<S::M, S::N> &ds) const {
        const int lane = threadIdx.x % 32, row = part * S::N * 8, column = row + lane % 4 * 2, key = first + lane / 4;
        auto find_s = [&] { multiply_rows<S::T, S::CHUNKS, S::M, S::N>(s, sm.k, first, stage.q, row, [](int) {}); };
        auto find_dp = [&](auto meanwhile) {
            multiply_rows<S::T, S::CHUNKS, S::M, S::N>(ds, sm.v, first, stage.dout, row, meanwhile);
        };
        QueryColumns<QueryStage<S>> columns = {stage, column, key, band.distance, 0};
        if (rule.plain) {
            find_s();
            score_gradients<S::CHUNKS / 2, S::M, S::N>(s, ds, rule.c, find_dp, columns);
        } else {
            find_s();
            find_dp([](int) {});
            if (rule.alibi)
                columns.negative_slope =
                    -((const float *)p.alibi_slopes)[sm.t.seq.index * p.alibi_stride_b + step.head];
            score_gradients_with_options<S::M, S::N>(s, ds, rule, columns);
        }
        if (partial)
            clear_others<S::M, S::N>(s, ds, [&](int m, int n, int e) {
                const int b = column + 8 * n + e % 2;
                return band.meets(key + 16 * m + e / 2 * 8, b) && (stage.state[b] & ROW_HAS_TERMS);
            });
    }

    /* One of P (0) and dS (1), rounded, to the team. */
    __device__ __forceinline__ void hand_out(int which, const Fragments<S::M, S::N> &x) {
#pragma unroll
        for (int m = 0; m < S::M; m++)
#pragma unroll
            for (int step = 0; step < S::OWN_STEPS; step++) {
                unsigned a[4];
                round_fragment<S::T>(a, x[m], step);
                sm.exchange[team][which][m][part * S::OWN_STEPS + step][threadIdx.x % 32] =
                    make_uint4(a[0], a[1], a[2], a[3]);
            }
    }
    __device__ __forceinline__ void take(unsigned (&a)[S::M][4], int which, int step) const {
#pragma unroll
        for (int m = 0; m < S::M; m++) {
            const uint4 x = sm.exchange[team][which][m][step][threadIdx.x % 32];
            a[m][0] = x.x, a[m][1] = x.y, a[m][2] = x.z, a[m][3] = x.w;
        }
    }

    /* N13: sum += A B for all rows of the step; fragments(a, step) gets the a operands. */
    template <class GetFragments>
    __device__ __forceinline__ void add(Fragments<S::M, S::DIMS> &sum, const char *tile, const QueryStage<S> &stage,
                                        const Band &band, bool guarded, GetFragments fragments) const {
        if (guarded) {
#pragma unroll(S::PARTS > 1 ? 1 : S::STEPS)
            for (int step = 0; step < S::STEPS; step++) {
                unsigned a[S::M][4];
                fragments(a, step);
                add_step_guarded<S::T, S::CHUNKS, S::M, S::DIMS>(sum, a, tile, 16 * step, 4 * part, [&](int r, int b) {
                    return band.meets(first + r, b) && (stage.state[b] & ROW_HAS_TERMS);
                });
            }
            return;
        }
#pragma unroll
        for (int step = 0; step < S::STEPS; step++) {
            unsigned a[S::M][4];
            fragments(a, step);
            add_step<S::T, S::CHUNKS, S::M, S::DIMS>(sum, a, tile, 16 * step, 4 * part);
        }
    }

    /* One step of the walk, which is in shared memory. */
    __device__ __forceinline__ void run(const QueryStage<S> &stage, const QueryStep &step) {
        const Band band(sm.t, step);
        unsigned every = ~0u, any = 0;
#pragma unroll
        for (int r = threadIdx.x % 32; r < S::ROWS; r += 32)
            every &= stage.state[r], any |= stage.state[r];
        const bool partial = !band.whole(sm.t.lo, sm.t.hi, S::ROWS) || !__all_sync(~0u, (every & ROW_HAS_TERMS) != 0);
        const bool guarded = partial && __any_sync(~0u, (any & ROW_NOT_FINITE) != 0);
        Fragments<S::M, S::N> s, ds;
        scores(stage, step, band, partial, s, ds);
        if constexpr (S::PARTS > 1) {
            hand_out(0, s);
            hand_out(1, ds);
            named_barrier_sync(1 + team, S::PARTS * 32); /* P and dS may be read */
            add(dv, stage.dout, stage, band, guarded, [&](unsigned (&a)[S::M][4], int at) { take(a, 0, at); });
            add(dk, stage.q, stage, band, guarded, [&](unsigned (&a)[S::M][4], int at) { take(a, 1, at); });
        } else {
            auto round = [](const Fragments<S::M, S::N> &x) {
                return [&x](unsigned (&a)[S::M][4], int at) {
#pragma unroll
                    for (int m = 0; m < S::M; m++)
                        round_fragment<S::T>(a[m], x[m], at);
                };
            };
            add(dv, stage.dout, stage, band, guarded, round(s));
            add(dk, stage.q, stage, band, guarded, round(ds));
        }
    }
};

/* Starts the copy of a step's rows. */
template <class S>
static __device__ __forceinline__ void load_queries(QueryStage<S> &to, const fad_attn_problem &p,
                                                    const fad_attn_problem &gradient, const RowSums &sums,
                                                    const KeyTile &t, const QueryStep &step) {
    const int thread = threadIdx.x, rows = min(S::ROWS, (int)t.seq.span.n_q - step.row);
    auto load = [&](char *tile, const fad_view &view, int64_t first, int64_t dims) {
        load_rows<S::ROWS, S::CHUNKS, S::THREADS>(
            tile, (const char *)view.data + 2 * (first + (int64_t)step.row * view.stride_s + step.head * view.stride_h),
            2 * view.stride_s, 0, rows, (int)dims, thread);
    };
    load(to.q, p.q, t.seq.q, p.D);
    load(to.dout, gradient.out, t.gradient.out, p.Dv);
    if (thread < S::ROWS) { /* rows that do not exist get zeros, and so no terms */
        const int64_t at = t.sums + step.head * p.Sq + step.row + thread;
        const int bytes = thread < rows ? 4 : 0;
        cp_async4(to.log2_sum + thread, sums.log2_sum + at, bytes);
        cp_async4(to.delta + thread, sums.delta + at, bytes);
        cp_async4(to.state + thread, sums.state + at, bytes);
    }
    cp_async_commit();
}

template <class S>
__global__ void __launch_bounds__(S::THREADS, S::RESIDENT)
    mma_backward_keys(const __grid_constant__ fad_attn_problem p, const __grid_constant__ fad_attn_problem gradient,
                      const __grid_constant__ RowSums sums, const __grid_constant__ KeyTiles tiles, int stages) {
    extern __shared__ __align__(128) char shared_memory[];
    KeyGradientShared<S> &sm = *(KeyGradientShared<S> *)shared_memory;
    const KeyTile &t = sm.t;
    allow_next_kernel();
    if (!share_key_tile(p, gradient, tiles, S::KEYS, sm.t))
        return;
    KeyGradientWarp<S> warp(p, sm);
    auto load_keys = [&](char *to, const fad_view &view, int64_t first, int64_t dims) {
        load_rows<S::KEYS, S::CHUNKS, S::THREADS>(
            to, (const char *)view.data + 2 * (first + t.first * view.stride_s + t.head_k * view.stride_h),
            2 * view.stride_s, t.lo, t.hi, (int)dims, threadIdx.x);
    };
    if (t.row < t.end_row) {
        QueryStep step = {t.head, t.row / S::ROWS * S::ROWS};
        load_keys(sm.k, p.k, t.seq.k, p.D);
        load_keys(sm.v, p.v, t.seq.v, p.Dv);
        load_queries(sm.stage[0], p, gradient, sums, t, step);
        int at = 0;
        while (step.head < t.end_head) { /* N13: heads ascending, and the rows of each */
            QueryStep next = {step.head, step.row + S::ROWS};
            if (next.row >= t.end_row)
                next = {step.head + 1, t.row / S::ROWS * S::ROWS};
            cp_async_wait<0>();
            __syncthreads(); /* this stage may be read, the other one and the exchange overwritten */
            if (stages > 1 && next.head < t.end_head)
                load_queries(sm.stage[at ^ 1], p, gradient, sums, t, next);
            warp.run(sm.stage[at], step);
            if (stages > 1) {
                at ^= 1;
            } else if (next.head < t.end_head) {
                __syncthreads(); /* the stage may be overwritten */
                load_queries(sm.stage[0], p, gradient, sums, t, next);
            }
            step = next;
        }
    }
    __syncthreads(); /* k and v may be overwritten */
    auto is_key = [&](int r) { return r >= t.lo && r < t.hi; };
    const bool of_dk = stage_gradients<S::T, S::CHUNKS, S::M, S::DIMS>(sm.k, warp.first, S::DIMS * warp.part, warp.dk,
                                                                       (float)p.scale, is_key),
               of_dv = stage_gradients<S::T, S::CHUNKS, S::M, S::DIMS>(sm.v, warp.first, S::DIMS * warp.part, warp.dv,
                                                                       1, is_key);
    const bool not_finite = __syncthreads_or(of_dk | of_dv); /* dk and dv are staged */
    auto store = [&](const fad_view &view, int64_t first_element, int64_t dims, char *staged) {
        store_gradients<S::T, S::KEYS, S::CHUNKS, S::THREADS>(
            view, KeyWalk<S::THREADS / S::CHUNKS>(view, first_element, t, threadIdx.x / S::CHUNKS), t.n_rows, dims,
            threadIdx.x, not_finite, [&](int r, int chunk) { return staged + swizzled<S::CHUNKS>(r, chunk); });
    };
    store(gradient.k, t.gradient.k, p.D, sm.k);
    store(gradient.v, t.gradient.v, p.Dv, sm.v);
}

template <class S> static BackwardKernel<KeyTiles> mma_backward_keys_of() {
    constexpr size_t all = sizeof(KeyGradientShared<S>);
    return {S::D, S::KEYS, S::THREADS, {all - sizeof(QueryStage<S>), all}, mma_backward_keys<S>};
}

#endif
