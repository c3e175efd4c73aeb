/* The warps of the split-KV kernel that compute O: over all keys, every warp some value dims. They fold and spill splits,
 * and write out. */
#ifndef FAD_CUDA_MMA_DECODE_VALUES_CUH
#define FAD_CUDA_MMA_DECODE_VALUES_CUH

#include "mma_decode_shared.cuh"

/* Thread blocks allow the fold of spilled splits to start so many blocks of keys before their range ends: it finds its rows and
 * its code meanwhile. Much earlier it would be in their way. */
constexpr int FOLD_LEAD = 2;

template <class S> struct ValueWarp : DecodeWarp<S> {
    using Base = DecodeWarp<S>;
    using Base::p, Base::sm, Base::warp, Base::lane, Base::ring, Base::buffer, Base::m, Base::of_row;
    const int first_dim = warp * S::N * 8;
    const int half = warp % 2; /* of the rows, whose P this warp adds up: g, or g + 8 */
    int value_lane[S::N / 2];  /* bytes from a unit's first row to what this lane loads of 16 dims */
    float o[S::N][4];          /* O of the split, at last of all: of this warp's dims */
    float l;                   /* this lane's l_t */

    __device__ ValueWarp(const fad_attn_problem &problem, const ScoreRule &rule, MmaDecodeShared<S> &shared)
        : Base(problem, shared, rule.c) {
#pragma unroll
        for (int i = 0; i < S::N / 2; i++) { /* as in load_value_fragment; every unit is swizzled alike */
            const int dim = first_dim + i * 16;
            value_lane[i] = dim / 64 * S::SLOT_KEYS * 128 + swizzled<8>(lane % 16, dim % 64 / 8 + lane / 16);
        }
    }

    __device__ __forceinline__ int thread() const { return warp * 32 + lane; }
    __device__ __forceinline__ void sync() const { named_barrier_sync(2, ROLE_THREADS); } /* the value warps */

    /* N6: the rescale before a block; alpha: of row lane % 16. */
    __device__ __forceinline__ void rescale_all(float alpha) {
        if (!__any_sync(~0u, alpha != 1))
            return;
        const float a[2] = {of_row(alpha, lane / 4), of_row(alpha, lane / 4 + 8)};
        rescale(o, a);
        l = fad_f32_mul(l, half ? a[1] : a[0]);
    }

    /* N7: O += P V over one unit, and sum goes on; v: the unit's first row in its slot, key: its number. */
    template <bool PARTIAL>
    __device__ __forceinline__ void multiply(const char *v, const uint4 &p_lane, float &sum, int key) {
        const unsigned a[4] = {p_lane.x, p_lane.y, p_lane.z, p_lane.w};
        sum = add_up<S::T>(sum, half ? make_uint2(p_lane.y, p_lane.w) : make_uint2(p_lane.x, p_lane.z));
#pragma unroll
        for (int i = 0; i < S::N / 2; i++) {
            unsigned b[4];
            ldmatrix_transposed(b, v + value_lane[i]);
            if (PARTIAL && __any_sync(~0u, (exponents_full<S::T>(b[0]) | exponents_full<S::T>(b[1]) |
                                            exponents_full<S::T>(b[2]) | exponents_full<S::T>(b[3])) != 0)) {
                guarded_step<S::T>(sm.rows, o[2 * i], a, {b[0], b[1]}, key, lane);
                guarded_step<S::T>(sm.rows, o[2 * i + 1], a, {b[2], b[3]}, key, lane);
            } else {
                mma_step<S::T>(o[2 * i], a, b[0], b[1]);
                mma_step<S::T>(o[2 * i + 1], a, b[2], b[3]);
            }
        }
    }

    __device__ __forceinline__ void values(int block) {
        constexpr int SLOT_UNITS = S::SLOT_KEYS / UNIT_KEYS, UNIT_BYTES = UNIT_KEYS * 128;
        const auto &p_block = sm.p[buffer];
        int slots[S::BLOCK_SLOTS];
        float sum = 0; /* b_t */
#pragma unroll
        for (int i = 0; i < S::BLOCK_SLOTS; i++, ring.advance(S::SLOTS)) {
            slots[i] = ring.index;
            barrier_wait(sm.full[ring.index], ring.round);
        }
        if (sm.range.partial(block)) {
#pragma unroll
            for (int i = 0; i < S::BLOCK_SLOTS; i++)
#pragma unroll 1
                for (int u = 0; u < SLOT_UNITS; u++)
                    multiply<true>(sm.ring[slots[i]] + u * UNIT_BYTES, p_block[i * SLOT_UNITS + u][lane], sum,
                                   (block * BLOCK_UNITS + i * SLOT_UNITS + u) * UNIT_KEYS);
        } else {
#pragma unroll
            for (int i = 0; i < S::BLOCK_SLOTS; i++)
#pragma unroll
                for (int u = 0; u < SLOT_UNITS; u++)
                    multiply<false>(sm.ring[slots[i]] + u * UNIT_BYTES, p_block[i * SLOT_UNITS + u][lane], sum, 0);
        }
        __syncwarp();
        if (lane == 0)
#pragma unroll
            for (int i = 0; i < S::BLOCK_SLOTS; i++)
                barrier_arrive(sm.empty[slots[i]]);
        l = fad_f32_add(l, sum);
    }

    __device__ __forceinline__ void clear() {
        l = 0;
#pragma unroll
        for (int n = 0; n < S::N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                o[n][e] = 0;
    }

    /* ---- splits ---- */

    __device__ __forceinline__ RowPair total() const {
        const float *m_of = &sm.total_m[warp][lane / 4], *l_of = &sm.total_l[warp][lane / 4];
        return {{m_of[0], m_of[8]}, {l_of[0], l_of[8]}};
    }
    __device__ __forceinline__ void set_total(const RowPair &state) const {
        __syncwarp(); /* it has been read */
        if (lane % 4 == 0)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                sm.total_m[warp][lane / 4 + half * 8] = state.m[half];
                sm.total_l[warp][lane / 4 + half * 8] = state.l[half];
            }
        __syncwarp(); /* it may be read */
    }

    /* N8, N9: the end of the nth split of the range, which is spilled; or o and total become those of all so far. */
    __device__ __forceinline__ void close_split(const fad_partials &partials, int nth) {
        const int g = lane / 4;
        const float sum = sum_lanes(l);
        if (warp < 2 && lane % 4 == 0)
            sm.l[g + half * 8] = sum;
        sync(); /* l may be read; it is written again after an exchange */
        RowPair state = {{of_row(m, g), of_row(m, g + 8)}, {sm.l[g], sm.l[g + 8]}};
        if (partials.o) {
            spill_rows(p, sm.t, partials, sm.range.split + nth, 0, state, o, first_dim);
            return;
        }
        if (nth > 0)
            fold_into<S::N>(total(), [&](int n) { return sm.rest[n][thread()]; }, state, o);
        set_total(state);
        rest_state(&sm.rest[0][thread()], ROLE_THREADS, o);
    }

    /* Every block of the range. Returns the number of splits. */
    __device__ __forceinline__ int run_blocks(const fad_partials &partials) {
        const int blocks = sm.range.blocks;
        int to_split_end = sm.range.to_split_end, splits = 0;
        bool starts_split = true;
        Base::skip_block(); /* K of the first block */
        Base::exchange();
#pragma unroll 1
        for (int block = 0; block < blocks; block++, buffer ^= 1) {
            if (block == max(blocks - FOLD_LEAD, 0))
                allow_next_kernel();
            const float before = Base::advance(starts_split);
            if (starts_split)
                clear();
            else
                rescale_all(fad_f32_pow2(fad_f32_sub(before, m)));
            if (block + 1 < blocks)
                Base::skip_block(); /* K of the next */
            Base::exchange();
            values(block);
            starts_split = --to_split_end == 0;
            if (!starts_split && block + 1 < blocks)
                continue;
            close_split(partials, splits++);
            to_split_end = sm.range.split_blocks;
        }
        return splits;
    }

    /* N8 (sink), N9: from what rests to out and lse. A lane finishes eight values of a row at a time: a loop, because it
     * runs once and its code comes at the speed of memory. */
    __device__ __forceinline__ void finish() {
        const Tile &t = sm.t;
        __syncwarp(); /* what rests may be read */
#pragma unroll 1
        for (int at = lane; at < t.n_rows * S::N; at += 32) {
            const int r = at / S::N, n = at % S::N, dim = first_dim + n * 8;
            const float2 *from = (const float2 *)&sm.rest[n][warp * 32 + r % 8 * 4] + r / 8;
            float x[8];
#pragma unroll
            for (int i = 0; i < 4; i++)
                x[2 * i] = from[2 * i].x, x[2 * i + 1] = from[2 * i].y;
            const uint4 out = finish_chunk<S::T>(p, t, r, sm.total_m[warp][r], sm.total_l[warp][r], x, dim == 0);
            if (dim < p.Dv)
                *(uint4 *)((uint16_t *)out_row(p, t, r).data + dim) = out;
        }
    }

    __device__ __forceinline__ void run(const fad_partials &partials) {
        const KeyRange &range = sm.range;
        int splits = 0;
        if (range.blocks > 0) {
            splits = run_blocks(partials);
        } else { /* nothing is seen */
            clear();
            set_total({{FAD_F32_SENTINEL, FAD_F32_SENTINEL}, {0, 0}});
            rest_state(&sm.rest[0][thread()], ROLE_THREADS, o);
        }
        if (!partials.o) {
            finish();
        } else {
            spill_empty(p, sm.t, partials, range.from, range.split, thread(), ROLE_THREADS);
            spill_empty(p, sm.t, partials, range.split + splits, range.to, thread(), ROLE_THREADS);
        }
    }
};

#endif
