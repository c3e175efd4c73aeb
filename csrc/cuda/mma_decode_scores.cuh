/* The warps of the split-KV kernel that compute S and P: of each block of keys, every warp some units. */
#ifndef FAD_CUDA_MMA_DECODE_SCORES_CUH
#define FAD_CUDA_MMA_DECODE_SCORES_CUH

#include "mma_decode_shared.cuh"

template <class S> struct ScoreWarp : DecodeWarp<S> {
    using Base = DecodeWarp<S>;
    using Base::sm, Base::warp, Base::lane, Base::ring, Base::buffer, Base::m;
    const ScoreRule rule;
    const int first_unit = warp * WARP_UNITS; /* of this warp, in a block */
    float s[WARP_UNITS][2][4];                /* scores of its units: [n8 tile][as in mma_step] */

    __device__ ScoreWarp(const fad_attn_problem &problem, MmaDecodeShared<S> &shared)
        : Base(problem, shared, ScoreRule(problem).c), rule(problem) {}

    /* N7: dot products with the keys that are rows from `first` on of a slot. */
    __device__ __forceinline__ void multiply(const char *k_slot, int first) {
#pragma unroll
        for (int u = 0; u < WARP_UNITS; u++)
#pragma unroll
            for (int e = 0; e < 8; e++)
                s[u][e / 4][e % 4] = 0;
#pragma unroll
        for (int d = 0; d < S::D / 16; d++) {
            unsigned a[4];
            load_fragment<S::CHUNKS>(a, sm.q, 0, d);
#pragma unroll
            for (int u = 0; u < WARP_UNITS; u++) {
                unsigned b[4];
                load_key_fragment<8>(b, k_slot + d / 4 * SLOT_KEYS * 128, first + u * UNIT_KEYS, d % 4);
                mma_step<S::T>(s[u][0], a, b[0], b[1]);
                mma_step<S::T>(s[u][1], a, b[2], b[3]);
            }
        }
    }

    /* N5, N4: from dot products to scores; key: the first of this warp. */
    __device__ __forceinline__ void finish(int key, bool partial) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const RowView row = sm.rows[lane / 4 + half * 8];
#pragma unroll
            for (int u = 0; u < WARP_UNITS; u++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int at = key + u * UNIT_KEYS + i / 2 * 8 + lane % 4 * 2 + i % 2;
                    float &y = s[u][i / 2][half * 2 + i % 2];
                    if (!rule.plain)
                        y = score_with_options(y, rule, row, at);
                    if (partial && (at < row.lo || at >= row.hi))
                        y = -INFINITY;
                }
        }
    }

    __device__ __forceinline__ void publish_maxima(int to) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float best = -INFINITY;
#pragma unroll
            for (int u = 0; u < WARP_UNITS; u++)
#pragma unroll
                for (int n = 0; n < 2; n++)
                    best = fmaxf(best, fmaxf(s[u][n][half * 2], s[u][n][half * 2 + 1])); /* NaN does not count */
            best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
            best = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
            if (lane % 4 == 0)
                sm.x_max[to][warp][half * 8 + lane / 4] = best;
        }
    }

    /* S of a block, whose K is next in the ring; its maxima to buffer `to`. */
    __device__ __forceinline__ void scores(int block, int to) {
        const Ring at = ring.after(warp / SLOT_WARPS, S::SLOTS);
        const bool partial = sm.range.partial(block);
        barrier_wait(sm.full[at.index], at.round);
        multiply(sm.ring[at.index], warp % SLOT_WARPS * WARP_UNITS * UNIT_KEYS);
        __syncwarp();
        if (lane < ROLE_WARPS / SLOT_WARPS) /* for all: the others do not read this slot */
            barrier_arrive(sm.empty[at.index]);
        if (!rule.plain || partial)
            finish((block * BLOCK_UNITS + first_unit) * UNIT_KEYS, partial);
        publish_maxima(to);
        Base::skip_block();
    }

    /* N6, N7: P of this warp's units. */
    __device__ __forceinline__ void probabilities(bool starts_split) {
        Base::advance(starts_split);
        const float now[2] = {Base::of_row(m, lane / 4), Base::of_row(m, lane / 4 + 8)};
        const bool far = __any_sync(~0u, (fabsf(now[0]) > FAD_F32_LIMIT) | (fabsf(now[1]) > FAD_F32_LIMIT));
#pragma unroll
        for (int u = 0; u < WARP_UNITS; u++) {
            unsigned a[4];
#pragma unroll
            for (int i = 0; i < 4; i++) { /* tile i / 2, row g or g + 8 */
                const float *x = &s[u][i / 2][i % 2 * 2];
                float y[2] = {fad_f32_fma(x[0], rule.c, -now[i % 2]), fad_f32_fma(x[1], rule.c, -now[i % 2])};
                if (far)
                    y[0] = far_argument(x[0], rule.c, now[i % 2]), y[1] = far_argument(x[1], rule.c, now[i % 2]);
                a[i] = pack2<S::T>(ex2(y[0]), ex2(y[1]));
            }
            sm.p[buffer][first_unit + u][lane] = make_uint4(a[0], a[1], a[2], a[3]);
        }
    }

    /* Between two exchanges: P of a block, and S of the next. */
    __device__ __forceinline__ void run() {
        const int blocks = sm.range.blocks;
        int to_split_end = sm.range.to_split_end;
        bool starts_split = true;
        scores(0, 0);
#pragma unroll 1
        for (int block = 0; block < blocks; block++, buffer ^= 1) {
            Base::exchange();
            probabilities(starts_split);
            starts_split = --to_split_end == 0;
            if (starts_split)
                to_split_end = sm.range.split_blocks;
            if (block > 0)
                Base::skip_block(); /* V of the block before */
            if (block + 1 < blocks)
                scores(block + 1, buffer ^ 1);
        }
        Base::exchange(); /* the last P */
    }
};

#endif
