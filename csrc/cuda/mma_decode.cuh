/* The split-KV kernel of the mma family for few query rows: 16 * MT packed rows.
 *
 * A range of keys is walked in chunks. Of each, a team of thread blocks computes S, every score warp for some keys; then
 * P, as soon as all maxima are known, because references are integers and those of all blocks of a chunk can be found at
 * once (N6); then O, every value warp for some value dims over all keys. A team is one thread block or, where there is
 * little to do, a cluster that shares keys and value dims and exchanges maxima and P: more multiprocessors work on one
 * split than its chain over keys (N7) would keep busy. There is one exchange a chunk: between two of them O meets a
 * chunk, P of the next one is made, and S of the one after that. A warp of its own keeps K and V coming, by the copy
 * engine or without. */
#ifndef FAD_CUDA_MMA_DECODE_CUH
#define FAD_CUDA_MMA_DECODE_CUH

#include "hopper_ptx.cuh"
#include "mma_kernel.cuh"
#include "mma_output.cuh"
#include "mma_values.cuh"
#include "work.cuh"

constexpr int UNIT_KEYS = 16, BLOCK_UNITS = BLOCK_KEYS / UNIT_KEYS; /* a unit: the keys of one step */
constexpr int SLOT_KEYS = 64;                                       /* keys of K in a slot */
constexpr int ROLE_WARPS = 8, ROLE_THREADS = ROLE_WARPS * 32;       /* score warps, and then as many value warps */
constexpr int DECODE_CONSUMERS = 2 * ROLE_THREADS, DECODE_THREADS = DECODE_CONSUMERS + 32;
constexpr int SUMMING_WARP = ROLE_WARPS - 1; /* the value warp that sums P */

template <fad_dtype T_, int D_, int MT_, int CHUNK_BLOCKS_, int SLOTS_, bool ENGINE_> struct MmaDecodeShape {
    static constexpr fad_dtype T = T_;
    static constexpr int D = D_; /* of q, k and v, zero-padded */
    static constexpr int MT = MT_, ROWS = 16 * MT, SLOTS = SLOTS_;
    static constexpr bool ENGINE = ENGINE_; /* K and V come by the copy engine; only then may teams be clusters */
    static constexpr int CHUNKS = D / 8;    /* of 16 bytes, in a row of q */
    static constexpr int CHUNK_BLOCKS = CHUNK_BLOCKS_, UNITS = CHUNK_BLOCKS * BLOCK_UNITS; /* of a chunk */
    static constexpr int WARP_UNITS = UNITS / ROLE_WARPS,
                         LOG_WARP_UNITS = WARP_UNITS / 2; /* of them, a warp's: 1, 2, 4 */
    static constexpr int PAIRS = D / 16;                  /* of n8 tiles of O */
    static constexpr int WARP_PAIRS = PAIRS > ROLE_WARPS ? PAIRS / ROLE_WARPS : 1;
    static constexpr int SLOT = SLOT_KEYS * D * 2; /* bytes, of K or V */
    static constexpr int LANE_ROWS = (ROWS + 31) / 32;
    static constexpr int KEY_SLOTS = UNITS * UNIT_KEYS / SLOT_KEYS; /* of a chunk, for a team of one */
    static constexpr int LARGEST_TEAM = KEY_SLOTS < PAIRS ? KEY_SLOTS : PAIRS;
    /* Score warps wait for a few slots of K only. What was in those slots before must have been there for certain, or
     * they could take one round of a slot for another: it is older than V of the chunk before, with which value warps
     * may not have begun. */
    static_assert(SLOTS >= 2 * KEY_SLOTS, "slots of V of a chunk and of K of the next are different");
};

template <class S> struct MmaDecodeShared {
    alignas(1024) char ring[S::SLOTS][S::SLOT]; /* K and V in the order in which they are used */
    uint4 p[2][S::MT][S::UNITS][32];            /* probabilities as a operands; of two chunks */
    float x_max[2][S::UNITS][S::ROWS];          /* largest scores of the keys of a warp of the team; of two chunks */
    char q[S::ROWS * S::D * 2];                 /* and out, staged */
    float l[S::ROWS];
    float alpha[ROLE_WARPS][S::CHUNK_BLOCKS][S::ROWS]; /* each value warp's own: the rescale factor before a block, */
    float total_m[ROLE_WARPS][S::ROWS], total_l[ROLE_WARPS][S::ROWS]; /* and the state of the splits before, */
    float4 rest[S::WARP_PAIRS][S::MT][2][ROLE_THREADS];               /* whose O rests here */
    RowTable<S::ROWS> rows;
    Tile t;
    KeyRange range;
    MemoryBarrier full[S::SLOTS], empty[S::SLOTS]; /* a slot has its data; the warps that use it are done with it */
    /* What the score warps of a team publish is there, and its value warps are done with what will be overwritten. Two,
     * in turns: who has passed one may already send for the next. */
    MemoryBarrier exchanged[2];
};

/* The part of one thread block: of a chunk, UNITS / size units of keys, and of O, PAIRS / size pairs of n8 tiles. */
template <class S> struct Team {
    int size, rank, log_size;

    __device__ __forceinline__ Team() : size(1), rank(0) {
        if constexpr (S::ENGINE)
            size = cluster_size(), rank = cluster_rank();
        log_size = __ffs(size) - 1;
    }
    __device__ __forceinline__ int units() const { return S::UNITS >> log_size; }
    __device__ __forceinline__ int log_warp_units() const { return max(S::LOG_WARP_UNITS - log_size, 0); }
    __device__ __forceinline__ int warp_units() const { return 1 << log_warp_units(); }
    __device__ __forceinline__ int warps() const { return min(ROLE_WARPS, units()); } /* that have units */
    __device__ __forceinline__ int pairs() const { return S::PAIRS >> log_size; }
    __device__ __forceinline__ int dims() const { return S::D >> log_size; }
    /* Slots of K and V that this thread block gets of a chunk. A slot of V has more keys if it has fewer dims. */
    __device__ __forceinline__ int key_slots(const Chunk &chunk) const {
        const int own = units() * UNIT_KEYS, keys = chunk.blocks * BLOCK_KEYS - rank * own;
        return (max(min(keys, own), 0) + SLOT_KEYS - 1) / SLOT_KEYS;
    }
    __device__ __forceinline__ int value_keys() const { return SLOT_KEYS * size; }
    __device__ __forceinline__ int value_slots(const Chunk &chunk) const {
        return (chunk.blocks * BLOCK_KEYS + value_keys() - 1) / SLOT_KEYS >> log_size;
    }
    /* Bytes of a row of V in a box of the copy engine, and from a box of 64 dims to the next. */
    __device__ __forceinline__ int row_bytes() const { return min(dims(), 64) * 2; }
    __device__ __forceinline__ int box_bytes() const { return value_keys() * 128; }
};

/* ---- producer ---- */

template <class S> struct MmaDecodeProducer {
    const fad_attn_problem &p;
    MmaDecodeShared<S> &sm;
    const Team<S> team;
    Ring ring;

    /* fill(slot, barrier) starts the copies into the next slot as soon as it is empty. By one lane with the copy engine,
     * else by the whole warp. */
    template <class Fill> __device__ __forceinline__ void next(Fill fill) {
        MemoryBarrier &full = sm.full[ring.index];
        barrier_wait(sm.empty[ring.index], ring.round ^ 1);
        fill(sm.ring[ring.index], full);
        if constexpr (!S::ENGINE)
            barrier_arrive_copied(full);
        ring.template advance<S::SLOTS>();
    }

    /* keys_of(chunk), values_of(chunk): copy what the consumers use of a chunk. */
    template <class KeysOf, class ValuesOf> __device__ __forceinline__ void run(KeysOf keys_of, ValuesOf values_of) {
        Chunk ahead(sm.range, S::CHUNK_BLOCKS);
        keys_of(ahead);
        for (Chunk now = ahead; now.blocks > 0; now.advance(sm.range, S::CHUNK_BLOCKS)) {
            ahead.advance(sm.range, S::CHUNK_BLOCKS);
            keys_of(ahead);
            values_of(now);
        }
    }

    /* Keys outside the range become zeros. */
    __device__ __forceinline__ void copy_by_warp() {
        const Keys k(p.k, sm.t.seq.k, sm.t, sm.range.first, p.D), v(p.v, sm.t.seq.v, sm.t, sm.range.first, p.Dv);
        auto copy = [&](const Keys &from, const Chunk &chunk, int slots) {
            for (int i = 0; i < slots; i++)
                next([&](char *to, MemoryBarrier &) {
#pragma unroll 1
                    for (int piece = 0; piece < S::D / 64; piece++)
                        from.template load<SLOT_KEYS, 8, 32>(to + piece * SLOT_KEYS * 128,
                                                             chunk.first * BLOCK_KEYS + i * SLOT_KEYS, sm.range.lo,
                                                             sm.range.hi, piece * 64, threadIdx.x % 32);
                });
        };
        run([&](const Chunk &chunk) { copy(k, chunk, team.key_slots(chunk)); },
            [&](const Chunk &chunk) { copy(v, chunk, team.value_slots(chunk)); });
        cp_async_wait<0>();
    }

    /* One lane. Rows outside the buffer become zeros. */
    __device__ __forceinline__ void copy_by_engine(const CUtensorMap &k_map, const CUtensorMap &v_map) {
        const fad_sequence &seq = sm.t.seq;
        const int row0 = (int)(seq.k_row + sm.range.first - seq.span.k_pos), head = (int)sm.t.head_k,
                  batch = p.cu_seqlens_k ? 0 : (int)seq.index;
        run(
            [&](const Chunk &chunk) {
                const int row = row0 + chunk.first * BLOCK_KEYS + team.rank * team.units() * UNIT_KEYS;
                for (int i = 0; i < team.key_slots(chunk); i++)
                    next([&](char *to, MemoryBarrier &full) {
                        barrier_arrive_expect(full, S::SLOT);
                        for (int piece = 0; piece < S::D / 64; piece++)
                            copy_box(to + piece * SLOT_KEYS * 128, k_map, full, piece * 64, row + i * SLOT_KEYS, head,
                                     batch);
                    });
            },
            [&](const Chunk &chunk) {
                const int row = row0 + chunk.first * BLOCK_KEYS, keys = team.value_keys(), box = min(keys, 256);
                for (int i = 0; i < team.value_slots(chunk); i++)
                    next([&](char *to, MemoryBarrier &full) {
                        barrier_arrive_expect(full, S::SLOT);
                        for (int d = 0; d < team.dims(); d += 64)
                            for (int key = 0; key < keys; key += box)
                                copy_box(to + d / 64 * team.box_bytes() + key * team.row_bytes(), v_map, full,
                                         team.rank * team.dims() + d, row + i * keys + key, head, batch);
                    });
            });
    }
};

/* ---- consumers ---- */

/* What score warps and value warps have in common. */
template <class S> struct DecodeWarp {
    const fad_attn_problem &p;
    MmaDecodeShared<S> &sm;
    const Team<S> team;
    /* warp: of its role. c: N5. ring: the next slot. exchange: the next one of the team. */
    const int warp = opaque(threadIdx.x / 32 % ROLE_WARPS), lane = opaque(threadIdx.x % 32);
    const float c;
    Ring ring;
    Ring exchange;
    float m[S::LANE_ROWS]; /* the running reference of row lane % 16, or of rows lane and lane + 32 */

    __device__ DecodeWarp(const fad_attn_problem &problem, MmaDecodeShared<S> &shared, float factor)
        : p(problem), sm(shared), c(factor) {}

    /* The compiler would read the register of the thread's number again and again, which takes longer than a sum. */
    static __device__ __forceinline__ int opaque(int x) {
        asm volatile("" : "+r"(x));
        return x;
    }

    /* The score warps have published, the value warps are done; all of the team. */
    __device__ __forceinline__ void wait_for_exchange() {
        if (team.size == 1) {
            named_barrier_sync(1, DECODE_CONSUMERS);
        } else if constexpr (S::ENGINE) {
            barrier_wait(sm.exchanged[exchange.index], exchange.round);
            exchange.template advance<2>();
        }
    }

    /* A number that lanes hold for row r, as in m. */
    __device__ __forceinline__ float of_row(const float (&x)[S::LANE_ROWS], int r) const {
        float y = __shfl_sync(~0u, x[0], r % 32);
        if constexpr (S::LANE_ROWS > 1) {
            const float z = __shfl_sync(~0u, x[1], r % 32);
            y = r < 32 ? y : z;
        }
        return y;
    }

    /* N6: the references of a chunk's blocks; each(b, i, before, now) gets that of block b and the lane's i-th row. */
    template <class Each>
    __device__ __forceinline__ void advance(const Chunk &chunk, int buffer, bool starts_split, Each each) {
        const int per_block = BLOCK_UNITS >> team.log_warp_units();
#pragma unroll
        for (int i = 0; i < S::LANE_ROWS; i++) {
            const int row = (lane + 32 * i) % S::ROWS;
            if (starts_split)
                m[i] = FAD_F32_SENTINEL;
#pragma unroll
            for (int b = 0; b < S::CHUNK_BLOCKS; b++)
                if (b < chunk.blocks) {
                    float best = -INFINITY;
                    for (int e = b * per_block; e < (b + 1) * per_block; e++)
                        best = fmaxf(best, sm.x_max[buffer][e][row]);
                    const float now = fad_f32_reference(m[i], best, c);
                    each(b, i, m[i], now);
                    m[i] = now;
                }
        }
        __syncwarp();
    }
};

/* ---- S and P ---- */

template <class S> struct ScoreWarp : DecodeWarp<S> {
    using Base = DecodeWarp<S>;
    using Base::p, Base::sm, Base::team, Base::warp, Base::lane, Base::ring, Base::exchange;
    const ScoreRule rule;
    const int first_unit = (team.rank * team.warps() + warp) << team.log_warp_units(); /* of this warp, in a chunk */
    float s[S::WARP_UNITS][S::MT][2][4]; /* scores of this warp's units: [n8 tile][as in mma_step] */
    float reference[S::LANE_ROWS];       /* as m, after the block of a chunk in which its units are */

    __device__ ScoreWarp(const fad_attn_problem &problem, MmaDecodeShared<S> &shared)
        : Base(problem, shared, ScoreRule(problem).c), rule(problem) {}

    /* Writes to the same place in every thread block of the team. */
    template <class X> __device__ __forceinline__ void publish(X &place, const X &x) const {
        if (team.size == 1) {
            place = x;
            return;
        }
        if constexpr (S::ENGINE)
            for (int rank = 0; rank < team.size; rank++)
                store_in(address_in(&place, rank), x, address_in(&sm.exchanged[exchange.index], rank));
    }
    /* What warps publish from now on is for the next exchange, in which this much comes here. All score warps arrive, so
     * that none can miss a round of the barrier. */
    __device__ __forceinline__ void expect(int bytes) {
        if constexpr (S::ENGINE) {
            if (team.size == 1)
                return;
            __syncwarp();
            if (threadIdx.x == 0)
                barrier_arrive_expect(sm.exchanged[exchange.index], bytes);
            else if (threadIdx.x % 32 == 0)
                barrier_arrive(sm.exchanged[exchange.index]);
        }
    }
    /* Bytes of a chunk's maxima, and of its P. */
    __device__ __forceinline__ int maxima_bytes(const Chunk &chunk) const {
        return (chunk.blocks * BLOCK_UNITS >> team.log_warp_units()) * S::ROWS * (int)sizeof(float);
    }
    static __device__ __forceinline__ int probability_bytes(const Chunk &chunk) {
        return chunk.blocks * BLOCK_UNITS * S::MT * 32 * (int)sizeof(uint4);
    }

    /* N7: the dot products of some units, whose keys are rows from `first` on of a slot. */
    template <int N>
    __device__ __forceinline__ void unit_scores(float (*x)[S::MT][2][4], const char *k_slot, int first) const {
#pragma unroll
        for (int u = 0; u < N; u++)
#pragma unroll
            for (int mt = 0; mt < S::MT; mt++)
#pragma unroll
                for (int e = 0; e < 8; e++)
                    x[u][mt][e / 4][e % 4] = 0;
#pragma unroll
        for (int d = 0; d < S::D / 16; d++) {
            unsigned a[S::MT][4];
#pragma unroll
            for (int mt = 0; mt < S::MT; mt++)
                load_fragment<S::CHUNKS>(a[mt], sm.q, 16 * mt, d);
#pragma unroll
            for (int u = 0; u < N; u++) {
                unsigned b[4];
                load_key_fragment<8>(b, k_slot + d / 4 * SLOT_KEYS * 128, first + u * UNIT_KEYS, d % 4);
#pragma unroll
                for (int mt = 0; mt < S::MT; mt++) {
                    mma_step<S::T>(x[u][mt][0], a[mt], b[0], b[1]);
                    mma_step<S::T>(x[u][mt][1], a[mt], b[2], b[3]);
                }
            }
        }
    }

    /* N5, N4: from dot products to scores; key: the unit's first. */
    __device__ __forceinline__ void finish_scores(float (&x)[S::MT][2][4], int key, bool partial) const {
        const int t2 = lane % 4 * 2;
#pragma unroll
        for (int mt = 0; mt < S::MT; mt++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const RowView row = sm.rows[mt * 16 + lane / 4 + half * 8];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float &y = x[mt][i / 2][half * 2 + i % 2];
                    const int at = key + i / 2 * 8 + t2 + i % 2;
                    if (!rule.plain)
                        y = score_with_options(y, rule, row, at);
                    if (partial && (at < row.lo || at >= row.hi))
                        y = -INFINITY;
                }
            }
    }

    __device__ __forceinline__ void publish_maxima(int buffer) {
#pragma unroll
        for (int mt = 0; mt < S::MT; mt++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float best = -INFINITY;
#pragma unroll
                for (int u = 0; u < S::WARP_UNITS; u++)
                    if (u < team.warp_units())
#pragma unroll
                        for (int n = 0; n < 2; n++)
                            best = fmaxf(best, fmaxf(s[u][mt][n][half * 2], s[u][mt][n][half * 2 + 1]));
                best = fmaxf(best, __shfl_xor_sync(~0u, best, 1)); /* NaN does not count */
                best = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
                if (lane % 4 == 0)
                    publish(sm.x_max[buffer][first_unit >> team.log_warp_units()][mt * 16 + half * 8 + lane / 4], best);
            }
    }

    /* A slot of K has the units of one warp or of a few, which alone wait for it and arrive for all. */
    __device__ __forceinline__ void scores(const Chunk &chunk, int buffer) {
        const int own = warp * UNIT_KEYS << team.log_warp_units(); /* its first key in this thread block's */
        if (warp < team.warps() && first_unit < chunk.blocks * BLOCK_UNITS) {
            const Ring at = ring.template after<S::SLOTS>(own / SLOT_KEYS);
            const char *k_slot = sm.ring[at.index];
            const int block = chunk.first + first_unit / BLOCK_UNITS, first = own % SLOT_KEYS,
                      sharing = SLOT_KEYS / UNIT_KEYS >> team.log_warp_units(); /* warps */
            const bool partial = sm.range.partial(block);
            barrier_wait(sm.full[at.index], at.round);
            if (team.log_warp_units() == S::LOG_WARP_UNITS)
                unit_scores<S::WARP_UNITS>(s, k_slot, first);
            else
#pragma unroll
                for (int u = 0; u < S::WARP_UNITS / 2; u++)
                    if (u < team.warp_units())
                        unit_scores<1>(s + u, k_slot, first + u * UNIT_KEYS);
            __syncwarp();
            if (lane < ROLE_WARPS / sharing)
                barrier_arrive(sm.empty[at.index]);
            if (!rule.plain || partial)
#pragma unroll
                for (int u = 0; u < S::WARP_UNITS; u++)
                    if (u < team.warp_units())
                        finish_scores(s[u], (chunk.first * BLOCK_UNITS + first_unit + u) * UNIT_KEYS, partial);
            publish_maxima(buffer);
        }
        ring = ring.template after<S::SLOTS>(team.key_slots(chunk));
    }

    /* N6, N7: P of this warp's units. */
    __device__ __forceinline__ void probabilities(const Chunk &chunk, int buffer, bool starts_split) {
        Base::advance(chunk, buffer, starts_split, [&](int b, int i, float, float now) {
            if (b == first_unit / BLOCK_UNITS)
                reference[i] = now;
        });
        if (warp >= team.warps() || first_unit >= chunk.blocks * BLOCK_UNITS)
            return;
#pragma unroll
        for (int mt = 0; mt < S::MT; mt++) {
            const float now[2] = {Base::of_row(reference, mt * 16 + lane / 4),
                                  Base::of_row(reference, mt * 16 + lane / 4 + 8)};
            const bool far = __any_sync(~0u, (fabsf(now[0]) > FAD_F32_LIMIT) | (fabsf(now[1]) > FAD_F32_LIMIT));
#pragma unroll
            for (int u = 0; u < S::WARP_UNITS; u++)
                if (u < team.warp_units()) {
                    unsigned a[4];
#pragma unroll
                    for (int i = 0; i < 4; i++) { /* tile i / 2, row g or g + 8 */
                        const float *x = &s[u][mt][i / 2][i % 2 * 2];
                        float y[2] = {fad_f32_fma(x[0], rule.c, -now[i % 2]), fad_f32_fma(x[1], rule.c, -now[i % 2])};
                        if (far)
                            y[0] = far_argument(x[0], rule.c, now[i % 2]),
                            y[1] = far_argument(x[1], rule.c, now[i % 2]);
                        a[i] = pack2<S::T>(ex2(y[0]), ex2(y[1]));
                    }
                    publish(sm.p[buffer][mt][first_unit + u][lane], make_uint4(a[0], a[1], a[2], a[3]));
                }
        }
    }

    __device__ __forceinline__ void run() {
        Chunk ahead(sm.range, S::CHUNK_BLOCKS), now = ahead; /* whose S and P are to be computed */
        int values = 0;                                      /* slots of V between those of K */
        bool starts_split = true;
        expect(maxima_bytes(ahead));
        scores(ahead, 0);
        ahead.advance(sm.range, S::CHUNK_BLOCKS);
#pragma unroll 1
        for (int buffer = 0; now.blocks > 0; buffer ^= 1) { /* S of now is in s and in this buffer */
            Base::wait_for_exchange();
            expect(probability_bytes(now) + maxima_bytes(ahead));
            probabilities(now, buffer, starts_split);
            ring = ring.template after<S::SLOTS>(values);
            scores(ahead, buffer ^ 1);
            values = team.value_slots(now);
            starts_split = now.ends_split(sm.range);
            now = ahead;
            ahead.advance(sm.range, S::CHUNK_BLOCKS);
        }
        if (team.size == 1)
            Base::wait_for_exchange(); /* of the last P: the value warps count on it */
    }
};

/* ---- O ---- */

template <class S> struct ValueWarp : DecodeWarp<S> {
    using Base = DecodeWarp<S>;
    using Base::p, Base::sm, Base::team, Base::warp, Base::lane, Base::ring, Base::exchange, Base::m, Base::of_row;
    const int whole = sm.range.whole, n_whole = sm.range.n_whole;
    const int value_lane;                /* of this lane's row in a fragment of V of pair 0: bytes */
    float o[S::WARP_PAIRS][S::MT][2][4]; /* O of the split, at last of all: this warp's pairs of n8 tiles */
    float l[S::MT][2];                   /* the summing warp's lanes: l_t of rows g and g + 8 */

    __device__ ValueWarp(const fad_attn_problem &problem, MmaDecodeShared<S> &shared)
        : Base(problem, shared, ScoreRule(problem).c), value_lane(value_offset(warp)) {}

    __device__ __forceinline__ bool is_partial(int block) const {
        return (unsigned)(block - whole) >= (unsigned)n_whole;
    }
    __device__ __forceinline__ int thread() const { return warp * 32 + lane; }
    __device__ __forceinline__ void sync() const { named_barrier_sync(2, ROLE_THREADS); } /* the value warps */

    /* Before the next exchange: this warp is done with what score warps overwrite after it. */
    __device__ __forceinline__ void done() const {
        if constexpr (S::ENGINE) {
            __syncwarp();
            if (team.size > 1 && lane < team.size)
                barrier_arrive_in(address_in(&sm.exchanged[exchange.index], lane));
        }
    }

    __device__ __forceinline__ bool sums() const { return warp == SUMMING_WARP; }
    __device__ __forceinline__ bool has_pair(int i) const { return warp + i * ROLE_WARPS < team.pairs(); }
    /* The first value dim of a pair. */
    __device__ __forceinline__ int pair_dim(int i) const {
        return team.rank * team.dims() + (warp + i * ROLE_WARPS) * 16;
    }

    /* N6: the rescale before block b of a chunk. */
    __device__ __forceinline__ void rescale_all(int b) {
#pragma unroll
        for (int mt = 0; mt < S::MT; mt++) {
            const float *alpha = &sm.alpha[warp][b][mt * 16 + lane / 4], a[2] = {alpha[0], alpha[8]};
            if (!__any_sync(~0u, (a[0] != 1) | (a[1] != 1)))
                continue;
#pragma unroll
            for (int i = 0; i < S::WARP_PAIRS; i++)
                rescale(o[i][mt], a);
            l[mt][0] = fad_f32_mul(l[mt][0], a[0]);
            l[mt][1] = fad_f32_mul(l[mt][1], a[1]);
        }
    }

    /* Bytes from a unit's first row in a slot of V to what this lane loads of a pair of n8 tiles, as in
     * load_value_fragment; rows are swizzled by their width, alike in every unit. */
    __device__ __forceinline__ int value_offset(int pair) const {
        const int d = pair * 16, bytes = team.row_bytes(), at = lane % 16 * bytes + (d % 64 / 8 + lane / 16) * 16;
        return d / 64 * team.box_bytes() + (at ^ (at >> 3 & (bytes - 16)));
    }

    /* N11 where a value is Inf or NaN: each row meets only the values that it sees. */
    __device__ __forceinline__ void guarded_step(int i, int mt, const uint4 &a, const unsigned (&b)[4], int key) {
        const unsigned fragment[4] = {a.x, a.y, a.z, a.w};
#pragma unroll 1
        for (int r = 0; r < 16; r++) {
            const int lo = sm.rows.lo[mt * 16 + r] - key - lane % 4 * 2,
                      hi = sm.rows.hi[mt * 16 + r] - key - lane % 4 * 2;
            float row[2][4];
            unsigned seen[4];
#pragma unroll
            for (int n = 0; n < 4; n++) /* keys n % 2 * 8 and + 1, from the lane's first */
                seen[n] = b[n] & ((n % 2 * 8 >= lo && n % 2 * 8 < hi ? 0xffffu : 0) |
                                  (n % 2 * 8 + 1 >= lo && n % 2 * 8 + 1 < hi ? 0xffff0000u : 0));
#pragma unroll
            for (int e = 0; e < 8; e++)
                row[e / 4][e % 4] = o[i][mt][e / 4][e % 4];
            mma_step<S::T>(row[0], fragment, seen[0], seen[1]);
            mma_step<S::T>(row[1], fragment, seen[2], seen[3]);
#pragma unroll
            for (int e = 0; e < 8; e++)
                if (lane / 4 + e % 4 / 2 * 8 == r)
                    o[i][mt][e / 4][e % 4] = row[e / 4][e % 4];
        }
    }

    /* N7: O += P V over one unit; v: its first row. */
    template <bool PARTIAL>
    __device__ __forceinline__ void unit_values(const char *v, const uint4 (*p_unit)[S::UNITS][32], int key) {
        unsigned b[S::WARP_PAIRS][4];
#pragma unroll
        for (int i = 0; i < S::WARP_PAIRS; i++)
            if (i == 0 || has_pair(i))
                ldmatrix_transposed(b[i], v + (i == 0 ? value_lane : value_offset(warp + i * ROLE_WARPS)));
#pragma unroll
        for (int mt = 0; mt < S::MT; mt++) {
            const uint4 a = p_unit[mt][0][lane];
            const unsigned fragment[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
            for (int i = 0; i < S::WARP_PAIRS; i++) {
                if (i > 0 && !has_pair(i))
                    continue;
                if (PARTIAL && __any_sync(~0u, (exponents_full<S::T>(b[i][0]) | exponents_full<S::T>(b[i][1]) |
                                                exponents_full<S::T>(b[i][2]) | exponents_full<S::T>(b[i][3])) != 0)) {
                    guarded_step(i, mt, a, b[i], key);
                } else {
                    mma_step<S::T>(o[i][mt][0], fragment, b[i][0], b[i][1]);
                    mma_step<S::T>(o[i][mt][1], fragment, b[i][2], b[i][3]);
                }
            }
        }
    }

    /* N7: l += b_t of a block, whose P is p_block. */
    __device__ __forceinline__ void sum_block(const uint4 (*p_block)[S::UNITS][32]) {
#pragma unroll
        for (int mt = 0; mt < S::MT; mt++) {
            float sum[2];
#pragma unroll
            for (int unit = 0; unit < BLOCK_UNITS; unit++) {
                const uint4 a = p_block[mt][unit][lane];
                const unsigned fragment[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
                for (int i = 0; i < 4; i++) { /* n8 tile i / 2, row g or g + 8 */
                    const float both = fad_f32_add(low_half<S::T>(fragment[i]), high_half<S::T>(fragment[i]));
                    sum[i % 2] = unit == 0 && i < 2 ? both : fad_f32_add(sum[i % 2], both);
                }
            }
            l[mt][0] = fad_f32_add(l[mt][0], sum[0]);
            l[mt][1] = fad_f32_add(l[mt][1], sum[1]);
        }
    }

    __device__ __forceinline__ void values(const Chunk &chunk, int buffer) {
        const int slots = team.value_slots(chunk), units = chunk.blocks * BLOCK_UNITS,
                  slot_units = team.value_keys() / UNIT_KEYS, unit_bytes = UNIT_KEYS * team.row_bytes();
        constexpr int STEP = SLOT_KEYS / UNIT_KEYS; /* units that certainly lie in one slot and one block */
        for (int i = 0, unit = 0; i < slots; i++, ring.template advance<S::SLOTS>()) {
            const char *v = sm.ring[ring.index];
            barrier_wait(sm.full[ring.index], ring.round);
#pragma unroll 1
            for (const int end = min((i + 1) * slot_units, units); unit < end; unit += STEP, v += STEP * unit_bytes) {
                const int block = unit / BLOCK_UNITS;
                if (unit % BLOCK_UNITS == 0) {
                    rescale_all(block);
                    if (sums())
                        sum_block((const uint4(*)[S::UNITS][32]) & sm.p[buffer][0][unit]);
                }
                if (!has_pair(0))
                    continue;
                const int key = (chunk.first * BLOCK_UNITS + unit) * UNIT_KEYS;
                const auto p_unit = (const uint4(*)[S::UNITS][32]) & sm.p[buffer][0][unit];
                if (is_partial(chunk.first + block)) {
#pragma unroll 1
                    for (int u = 0; u < STEP; u++)
                        unit_values<true>(v + u * unit_bytes, (const uint4(*)[S::UNITS][32]) & p_unit[0][u],
                                          key + u * UNIT_KEYS);
                } else {
#pragma unroll
                    for (int u = 0; u < STEP; u++)
                        unit_values<false>(v + u * unit_bytes, (const uint4(*)[S::UNITS][32]) & p_unit[0][u], key);
                }
            }
            __syncwarp();
            if (lane == 0)
                barrier_arrive(sm.empty[ring.index]);
        }
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int mt = 0; mt < S::MT; mt++) {
            l[mt][0] = l[mt][1] = 0;
#pragma unroll
            for (int i = 0; i < S::WARP_PAIRS; i++)
#pragma unroll
                for (int e = 0; e < 8; e++)
                    o[i][mt][e / 4][e % 4] = 0;
        }
    }

    /* ---- splits ---- */

    __device__ __forceinline__ RowPair total(int mt) const {
        const float *m_of = &sm.total_m[warp][mt * 16 + lane / 4], *l_of = &sm.total_l[warp][mt * 16 + lane / 4];
        return {{m_of[0], m_of[8]}, {l_of[0], l_of[8]}};
    }
    __device__ __forceinline__ void set_total(int mt, const RowPair &state) const {
        __syncwarp(); /* it has been read */
        if (lane % 4 == 0)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                sm.total_m[warp][mt * 16 + lane / 4 + half * 8] = state.m[half];
                sm.total_l[warp][mt * 16 + lane / 4 + half * 8] = state.l[half];
            }
        __syncwarp(); /* it may be read */
    }

    /* N8, N9: the end of the nth split of the range; o and total become those of all splits so far. */
    __device__ __forceinline__ void close_split(const fad_partials &partials, int nth) {
        const int g = lane / 4;
        if (sums())
#pragma unroll
            for (int mt = 0; mt < S::MT; mt++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const float sum = sum_lanes(l[mt][half]);
                    if (lane % 4 == 0)
                        sm.l[mt * 16 + g + half * 8] = sum;
                }
        sync(); /* l may be read; it is written again after wait_for_exchange() */
#pragma unroll
        for (int mt = 0; mt < S::MT; mt++) {
            const RowPair part = {{of_row(m, mt * 16 + g), of_row(m, mt * 16 + g + 8)},
                                  {sm.l[mt * 16 + g], sm.l[mt * 16 + g + 8]}};
            RowPair sum = part;
#pragma unroll
            for (int i = 0; i < S::WARP_PAIRS; i++) {
                if (!has_pair(i))
                    continue;
                sum = part;
                if (partials.o)
                    spill_rows(p, sm.t, partials, sm.range.split + nth, 16 * mt, part, o[i][mt], pair_dim(i),
                               pair_dim(i) == 0);
                else if (nth > 0)
                    fold_into(total(mt), [&](int n) { return sm.rest[i][mt][n][thread()]; }, sum, o[i][mt]);
            }
            set_total(mt, sum);
        }
    }

    /* Between two splits. */
    __device__ __forceinline__ void start_split() {
#pragma unroll
        for (int i = 0; i < S::WARP_PAIRS; i++)
#pragma unroll
            for (int mt = 0; mt < S::MT; mt++)
                if (has_pair(i))
                    rest_state(&sm.rest[i][mt][0][thread()], ROLE_THREADS, o[i][mt]);
        clear();
    }

    /* Every chunk of the range. Returns the number of splits. */
    __device__ __forceinline__ int run_chunks(const fad_partials &partials) {
        Chunk now(sm.range, S::CHUNK_BLOCKS), before = now; /* of which P is made meanwhile, and O is to be computed */
        int splits = 0;
        bool starts_split = true;
        before.blocks = 0;
        done();
        ring = ring.template after<S::SLOTS>(team.key_slots(now));
#pragma unroll 1
        for (int buffer = 0; now.blocks > 0 || before.blocks > 0; buffer ^= 1) { /* maxima of now are in this buffer */
            Chunk ahead = now;
            ahead.advance(sm.range, S::CHUNK_BLOCKS);
            Base::wait_for_exchange();
            if (before.blocks > 0) {
                values(before, buffer ^ 1);
                if (before.ends_split(sm.range)) {
                    close_split(partials, splits++);
                    if (now.blocks > 0)
                        start_split();
                }
            }
            if (now.blocks > 0) {
                Base::advance(now, buffer, starts_split, [&](int b, int i, float last, float next) {
                    sm.alpha[warp][b][(lane + 32 * i) % S::ROWS] = fad_f32_pow2(fad_f32_sub(last, next));
                });
                done();
            }
            ring = ring.template after<S::SLOTS>(team.key_slots(ahead));
            starts_split = now.ends_split(sm.range);
            before = now;
            now = ahead;
        }
        return splits;
    }

    /* N8 (sink), N9: out of this thread block's dims. */
    __device__ __forceinline__ void finish() {
#pragma unroll
        for (int i = 0; i < S::WARP_PAIRS; i++)
#pragma unroll
            for (int mt = 0; mt < S::MT; mt++)
                if (has_pair(i))
                    finish_rows<S::T, S::CHUNKS>(p, sm.t, 16 * mt, total(mt), o[i][mt], sm.q, pair_dim(i),
                                                 pair_dim(i) == 0);
        sync(); /* out is staged */
        const int chunks = team.dims() / 8, first = team.rank * chunks;
        for (int at = thread(); at < S::ROWS * chunks; at += ROLE_THREADS) {
            const int r = at / chunks, chunk = first + at % chunks;
            if (r < sm.t.n_rows && chunk * 8 < p.Dv)
                *(uint4 *)((uint16_t *)out_row(p, sm.t, r).data + chunk * 8) =
                    *(const uint4 *)(sm.q + swizzled<S::CHUNKS>(r, chunk));
        }
    }

    __device__ __forceinline__ void run(const fad_partials &partials) {
        clear();
#pragma unroll
        for (int mt = 0; mt < S::MT; mt++)
            set_total(mt, {{FAD_F32_SENTINEL, FAD_F32_SENTINEL}, {0, 0}});
        const int splits = sm.range.blocks > 0 ? run_chunks(partials) : 0;
        if (!partials.o) {
            finish();
        } else if (team.rank == 0) {
            spill_empty(p, sm.t, partials, sm.range.from, sm.range.split, thread(), ROLE_THREADS);
            spill_empty(p, sm.t, partials, sm.range.split + splits, sm.range.to, thread(), ROLE_THREADS);
        }
    }
};

template <class S>
static __device__ __forceinline__ void consume(const fad_attn_problem &p, MmaDecodeShared<S> &sm,
                                               const fad_partials &partials) {
    load_queries<S::ROWS, S::CHUNKS, DECODE_CONSUMERS>(sm.q, p, sm.t, threadIdx.x);
    sm.rows.fill(p, sm.t, sm.range, threadIdx.x, DECODE_CONSUMERS);
    cp_async_commit();
    cp_async_wait<0>();
    named_barrier_sync(1, DECODE_CONSUMERS); /* q and the rows' table may be read */
    if (threadIdx.x >= ROLE_THREADS)
        ValueWarp<S>(p, sm).run(partials);
    else if (sm.range.blocks > 0)
        ScoreWarp<S>(p, sm).run();
}

template <class S> static __device__ void init_barriers(MmaDecodeShared<S> &sm, int team) {
    for (int i = 0; i < S::SLOTS; i++) {
        barrier_init(sm.full[i], S::ENGINE ? 1 : 32);
        barrier_init(sm.empty[i], ROLE_WARPS);
    }
    for (MemoryBarrier &exchanged : sm.exchanged)
        barrier_init(exchanged, ROLE_WARPS * (1 + team)); /* this thread block's score warps, the team's value warps */
    if constexpr (S::ENGINE)
        fence_barrier_init();
}

/* One item of work a team: a tile with all its splits, or (spill) a run of splits. */
template <class S>
static __device__ __forceinline__ void mma_decode(const fad_attn_problem &p, const Work &work, const CUtensorMap *k_map,
                                                  const CUtensorMap *v_map) {
    extern __shared__ __align__(1024) char shared_memory[];
    MmaDecodeShared<S> &sm = *(MmaDecodeShared<S> *)shared_memory;
    const Team<S> team;
    allow_next_kernel();
    if (threadIdx.x == 0)
        init_barriers(sm, team.size);
    const bool exists = share_item(p, work, S::ROWS, blockIdx.x / team.size, sm.t, sm.range);
    if constexpr (S::ENGINE)
        cluster_sync(); /* the others' barriers may be used */
    if (!exists)
        return;
    if (threadIdx.x < DECODE_CONSUMERS) {
        consume(p, sm, work.partials);
        return;
    }
    if (sm.range.blocks == 0)
        return;
    MmaDecodeProducer<S> producer = {p, sm, team, {}};
    if constexpr (S::ENGINE) {
        if (threadIdx.x % 32 == 0)
            producer.copy_by_engine(*k_map, *v_map);
    } else {
        producer.copy_by_warp();
    }
}

template <class S>
__global__ void __launch_bounds__(DECODE_THREADS, 1)
    mma_decode_kernel(const __grid_constant__ fad_attn_problem p, const __grid_constant__ Work work) {
    mma_decode<S>(p, work, nullptr, nullptr);
}

template <class S> static MmaKernel mma_decode_of() {
    return {S::ROWS, S::D, DECODE_THREADS, S::LARGEST_TEAM, sizeof(MmaDecodeShared<S>), 0, mma_decode_kernel<S>};
}

#endif
