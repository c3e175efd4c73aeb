/* The warps of the split-KV kernel that compute S and P: of each block of keys, every warp some units. */
#ifndef FAD_CUDA_MMA_DECODE_SCORES_CUH
#define FAD_CUDA_MMA_DECODE_SCORES_CUH

#include "mma_decode_shared.cuh"

template <class S> struct ScoreWarp : DecodeWarp<S> {
    using Base = DecodeWarp<S>;
    using Base::sm, Base::warp, Base::lane, Base::ring, Base::buffer, Base::m;
    const ScoreRule &rule;
    const int first_unit = warp * WARP_UNITS; /* of this warp, in a block */
    UnitScores<S::T, S::CHUNKS, WARP_UNITS> units;

    __device__ ScoreWarp(const fad_attn_problem &problem, const ScoreRule &of_call, MmaDecodeShared<S> &shared)
        : Base(problem, shared, of_call.c), rule(of_call) {}

    __device__ __forceinline__ void publish_maxima(int to) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float best = units.maximum(half);
            if (lane % 4 == 0)
                sm.x_max[to][warp][half * 8 + lane / 4] = best;
        }
    }

    /* S of a block, whose K is next in the ring; its maxima to buffer `to`. */
    __device__ __forceinline__ void scores(int block, int to) {
        const Ring at = ring.after(warp / S::SLOT_WARPS, S::SLOTS);
        const bool partial = sm.range.partial(block);
        barrier_wait(sm.full[at.index], at.round);
        units.multiply(sm.q, sm.ring[at.index], S::SLOT_KEYS * 128, warp % S::SLOT_WARPS * WARP_UNITS * UNIT_KEYS);
        __syncwarp();
        if (lane < ROLE_WARPS / S::SLOT_WARPS) /* for all: the others do not read this slot */
            barrier_arrive(sm.empty[at.index]);
        if (!rule.plain || partial)
            units.finish(sm.rows, rule, (block * BLOCK_UNITS + first_unit) * UNIT_KEYS, partial, lane);
        publish_maxima(to);
        Base::skip_block();
    }

    /* N6, N7: P of this warp's units. */
    __device__ __forceinline__ void probabilities(bool starts_split) {
        Base::advance(starts_split);
        const float now[2] = {Base::of_row(m, lane / 4), Base::of_row(m, lane / 4 + 8)};
        units.probabilities(now, rule.c, [&](int u, const uint4 &a) { sm.p[buffer][first_unit + u][lane] = a; });
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
