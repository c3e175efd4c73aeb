/* The split-KV kernel of the mma family for few query rows: 16 packed rows a thread block.
 *
 * A chunk of up to four blocks of 64 keys is computed in two phases. Scores and probabilities: one or two warps take a
 * block. Values: each warp takes a slice of the value dims over all keys of the chunk. Because references are integers, those
 * of all blocks of a chunk can be found at once in between (N6), so that few barriers a chunk are enough. Every warp
 * copies exactly what it reads itself, rows of K and its slice of V, through a ring of its own: the stream from memory
 * does not wait for other warps. Loops are not unrolled more than needed: a split is short, and code that runs once is
 * fetched at the speed of memory. */
#ifndef FAD_CUDA_MMA_DECODE_CUH
#define FAD_CUDA_MMA_DECODE_CUH

#include "mma_kernel.cuh"
#include "mma_output.cuh"
#include "mma_values.cuh"
#include "work.cuh"

template <fad_dtype T_, int D_, int WARPS_, int STAGES_, int RESIDENT_> struct MmaDecodeShape {
    static constexpr fad_dtype T = T_;
    static constexpr int D = D_, STAGES = STAGES_, RESIDENT = RESIDENT_; /* D: of q, k and v, zero-padded */
    static constexpr int WARPS = WARPS_, THREADS = WARPS * 32, ROWS = 16;
    static constexpr int CHUNKS = D / 8;             /* of 16 bytes, in a row of q or k */
    static constexpr int SLICE = D / WARPS;          /* value dims of a warp, */
    static constexpr int SLICE_CHUNKS = SLICE / 8;   /* in chunks = n8 tiles */
    static constexpr int BLOCKS = 4;                 /* of a chunk of keys */
    static constexpr int PER_BLOCK = WARPS / BLOCKS; /* warps that share a block: its keys, then its rows */
    static constexpr int HALVES = 2 / PER_BLOCK;     /* eights of rows whose softmax is a warp's */
    static constexpr int KEYS = 16 / PER_BLOCK;      /* rows of k that a warp copies at a time, four times a block: */
    static constexpr int GRANULE = KEYS * D * 2;     /* bytes; the same as a block of the warp's slice of v */
};

template <class S> struct MmaDecodeShared {
    //static_assert(BLOCK_KEYS * S::SLICE * 2 == S::GRANULE, "one size for k and v");
    alignas(128) char ring[S::WARPS][S::STAGES][S::GRANULE];
    char q[S::ROWS * S::D * 2];                  /* and out, staged */
    char x[S::BLOCKS][S::ROWS * BLOCK_KEYS * 4]; /* scores, then probabilities of 16 bits in the first half of a row */
    float x_max[S::BLOCKS][S::ROWS];             /* largest score */
    float sum[S::BLOCKS][S::ROWS][4];            /* b_t */
    float l[S::ROWS];
    float m[S::WARPS][S::BLOCKS][S::ROWS];     /* reference after a block, each warp's own copy, */
    float alpha[S::WARPS][S::BLOCKS][S::ROWS]; /* and the rescale factor before it */
    float4 rest[S::SLICE_CHUNKS][S::THREADS];  /* the running O of the splits before */
    RowTable<S::ROWS> rows;
    Tile t;
    KeyRange range;
    int64_t number;
};

/* A range's blocks in chunks that never cross a split (N3). */
struct Chunk {
    int first, blocks; /* no blocks: the end */
    int to_split_end;

    __device__ Chunk(const KeyRange &range, int most) : first(0), to_split_end(range.to_split_end) {
        blocks = min(min(range.blocks, to_split_end), most);
    }
    __device__ __forceinline__ bool ends_split(const KeyRange &range) const {
        return blocks == to_split_end || first + blocks == range.blocks;
    }
    __device__ __forceinline__ void advance(const KeyRange &range, int most) {
        first += blocks;
        to_split_end -= blocks;
        if (to_split_end == 0)
            to_split_end = range.split_blocks;
        blocks = min(min(range.blocks - first, to_split_end), most);
    }
};

/* The stream of granules of a warp: of each chunk, its keys in four parts, then its slice of V block by block. */
template <class S> struct GranuleStream {
    const KeyRange &range;
    const Keys k, v;
    const int warp = threadIdx.x / 32;
    Chunk chunk;
    int index = 0; /* of the granule within the chunk */

    __device__ GranuleStream(const fad_attn_problem &p, const Tile &t, const KeyRange &keys)
        : range(keys), k(p.k, t.seq.k, t, keys.first, p.D), v(p.v, t.seq.v, t, keys.first, p.Dv),
          chunk(keys, S::BLOCKS) {}

    /* Starts the copy of the next granule, if there is one; a group of copies in any case. */
    __device__ __forceinline__ void issue(char *to) {
        const int lane = threadIdx.x % 32;
        if (chunk.blocks > 0) {
            const int of_k = warp / S::PER_BLOCK < chunk.blocks ? 4 : 0;
            if (index < of_k)
                k.template load<S::KEYS, S::CHUNKS, 32>(
                    to, chunk.first * BLOCK_KEYS + warp * (BLOCK_KEYS / S::PER_BLOCK) + index * S::KEYS, range.lo,
                    range.hi, 0, lane);
            else
                v.template load<BLOCK_KEYS, S::SLICE_CHUNKS, 32>(to, (chunk.first + index - of_k) * BLOCK_KEYS,
                                                                 range.lo, range.hi, warp * S::SLICE, lane);
            if (++index == of_k + chunk.blocks) {
                index = 0;
                chunk.advance(range, S::BLOCKS);
            }
        }
        cp_async_commit();
    }
};

template <class S> struct MmaDecode {
    const fad_attn_problem &p;
    MmaDecodeShared<S> &sm;
    const ScoreRule rule;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    GranuleStream<S> stream;
    int stage = 0;               /* of the ring, next to be read */
    float o[S::SLICE_CHUNKS][4]; /* O of the split: this warp's dims */
    float m = FAD_F32_SENTINEL;  /* lanes 0..15: reference of row `lane` */
    float l[2];                  /* warp 0: l_t of row lane % 16, t = lane / 16 * 2 and the next */

    __device__ MmaDecode(const fad_attn_problem &problem, MmaDecodeShared<S> &shared)
        : p(problem), sm(shared), rule(problem), stream(problem, shared.t, shared.range) {}

    __device__ __forceinline__ void clear() {
        m = FAD_F32_SENTINEL;
        l[0] = l[1] = 0;
#pragma unroll
        for (int n = 0; n < S::SLICE_CHUNKS; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                o[n][e] = 0;
    }

    __device__ __forceinline__ void prefetch() {
#pragma unroll 1
        for (int i = 0; i < S::STAGES - 1; i++)
            stream.issue(sm.ring[warp][i]);
    }

    /* The next granule, ready to be read until the next call; the one read before makes room for another. */
    __device__ __forceinline__ const char *next() {
        cp_async_wait<S::STAGES - 2>();
        __syncwarp(); /* the granule may be read, the one before it overwritten */
        stream.issue(sm.ring[warp][stage == 0 ? S::STAGES - 1 : stage - 1]);
        const char *granule = sm.ring[warp][stage];
        stage = stage + 1 == S::STAGES ? 0 : stage + 1;
        return granule;
    }

    /* Where a warp's scores of row r and keys 8 n + 2 t, + 1 lie; tiles are permuted against bank conflicts. */
    __device__ __forceinline__ float2 *score_pair(int nth, int r, int n) const {
        return (float2 *)(sm.x[nth] + r * BLOCK_KEYS * 4 + (n ^ r % 8) * 32 + lane % 4 * 8);
    }
    /* Chunk n, of 8 keys, of row r's probabilities. */
    __device__ __forceinline__ char *probability_chunk(int nth, int r, int n) const {
        return sm.x[nth] + r * BLOCK_KEYS * 4 + (n ^ r % 8) * 16;
    }

    /* N7: the dot products of this warp's keys, in block nth of the chunk. */
    __device__ __forceinline__ void scores(int nth) {
#pragma unroll 1
        for (int i = 0; i < 4; i++) {
            const char *k = next();
            constexpr int TILES = S::KEYS / 8;
            float s[TILES][4] = {};
#pragma unroll
            for (int d = 0; d < S::D / 16; d += 2 / TILES) {
                unsigned a[4], b[4];
                load_fragment<S::CHUNKS>(a, sm.q, 0, d);
                if constexpr (TILES == 2) {
                    load_key_fragment<S::CHUNKS>(b, k, 0, d);
                    mma_step<S::T>(s[0], a, b[0], b[1]);
                    mma_step<S::T>(s[1], a, b[2], b[3]);
                } else { /* eight keys, two steps */
                    ldmatrix(b, k + swizzled<S::CHUNKS>(lane % 8, 2 * d + lane / 8));
                    mma_step<S::T>(s[0], a, b[0], b[1]);
                    load_fragment<S::CHUNKS>(a, sm.q, 0, d + 1);
                    mma_step<S::T>(s[0], a, b[2], b[3]);
                }
            }
#pragma unroll
            for (int n = 0; n < TILES; n++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    *score_pair(nth, lane / 4 + 8 * half, (warp % S::PER_BLOCK * 4 + i) * TILES + n) =
                        make_float2(s[n][2 * half], s[n][2 * half + 1]);
        }
    }

    /* The first of the rows whose softmax is this warp's. */
    __device__ __forceinline__ int first_row() const { return warp % S::PER_BLOCK * 8; }

    /* N5, N4: from dot products to scores, and their maxima. */
    __device__ __forceinline__ void finish_scores(ScoreTile &s, int nth, int block) {
        float x_max[S::HALVES];
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
            for (int half = 0; half < S::HALVES; half++) {
                const float2 pair = *score_pair(nth, first_row() + lane / 4 + 8 * half, n);
                s[n][2 * half] = pair.x;
                s[n][2 * half + 1] = pair.y;
            }
        if (!rule.plain)
            sm.rows.template apply_options<S::HALVES>(s, rule, first_row(), block);
        if (sm.range.partial(block))
            sm.rows.template mask<S::HALVES>(s, first_row(), block);
        row_maxima(s, x_max);
#pragma unroll
        for (int half = 0; half < S::HALVES; half++)
            if (lane % 4 == 0)
                sm.x_max[nth][first_row() + lane / 4 + 8 * half] = x_max[half];
    }

    /* N6: the references of a chunk's blocks, one row a lane. */
    __device__ __forceinline__ void advance(int blocks) {
        if (lane < S::ROWS)
#pragma unroll 1
            for (int b = 0; b < blocks; b++) {
                const float now = fad_f32_reference(m, sm.x_max[b][lane], rule.c);
                sm.alpha[warp][b][lane] = fad_f32_pow2(fad_f32_sub(m, now));
                sm.m[warp][b][lane] = m = now;
            }
        __syncwarp(); /* m and alpha may be read */
    }

    /* N6, N7: p of one block, rounded to where all warps read it, and this lane's b_t. */
    __device__ __forceinline__ void publish(ScoreTile &s, int nth) {
        const int row = first_row() + lane / 4, t = lane % 4;
        float reference[S::HALVES];
        ProbabilityFragments a;
#pragma unroll
        for (int half = 0; half < S::HALVES; half++)
            reference[half] = sm.m[warp][nth][row + 8 * half];
        exponentiate<S::HALVES>(s, [&](float x, int half) { return far_argument(x, rule.c, reference[half]); }, [](int) {});
        round_probabilities<S::T, S::HALVES>(a, s);
#pragma unroll
        for (int half = 0; half < S::HALVES; half++) {
            sm.sum[nth][row + 8 * half][t] = lane_sum<S::T>(a, half);
#pragma unroll
            for (int n = 0; n < KEY_TILES; n++)
                *(unsigned *)(probability_chunk(nth, row + 8 * half, n) + t * 4) = a[n / 2][n % 2 * 2 + half];
        }
    }

    /* N7: O += P V over one block, for this warp's dims. */
    __device__ __forceinline__ void values(int nth, int block) {
        const char *v = next();
        const float alpha[2] = {sm.alpha[warp][nth][lane / 4], sm.alpha[warp][nth][lane / 4 + 8]};
        ProbabilityFragments a;
        if (__any_sync(~0u, (alpha[0] != 1) | (alpha[1] != 1)))
            rescale(o, alpha);
#pragma unroll
        for (int k = 0; k < BLOCK_KEYS / 16; k++)
            ldmatrix(a[k], probability_chunk(nth, lane % 16, 2 * k + lane / 16));
        if (sm.range.partial(block) && values_not_finite<S::T, S::SLICE_CHUNKS>(v)) {
            add_values_guarded<S::T, S::SLICE_CHUNKS>(o, a, v, [&](int r) { return sm.rows.seen(r, block); });
            return;
        }
#pragma unroll
        for (int k = 0; k < BLOCK_KEYS / 16; k++)
#pragma unroll
            for (int n = 0; n < S::SLICE_CHUNKS / 2; n++) {
                unsigned b[4];
                load_value_fragment<S::SLICE_CHUNKS>(b, v, 16 * k, n);
                mma_step<S::T>(o[2 * n], a[k], b[0], b[1]);
                mma_step<S::T>(o[2 * n + 1], a[k], b[2], b[3]);
            }
    }

    __device__ __forceinline__ void run(const Chunk &chunk) {
        ScoreTile s;
        const int nth = warp / S::PER_BLOCK;
        const bool mine = nth < chunk.blocks;
        if (mine)
            scores(nth);
        if (S::PER_BLOCK > 1)
            __syncthreads(); /* the scores of the block's other warp may be read */
        else
            __syncwarp();
        if (mine)
            finish_scores(s, nth, chunk.first + nth);
        __syncthreads(); /* all maxima may be read, scores overwritten */
        advance(chunk.blocks);
        if (mine)
            publish(s, nth);
        __syncthreads(); /* probabilities and sums may be read, maxima overwritten */
#pragma unroll 1
        for (int b = 0; b < chunk.blocks; b++)
            values(b, chunk.first + b);
        if (warp == 0)
#pragma unroll 1
            for (int b = 0; b < chunk.blocks; b++) /* N7: l_t */
#pragma unroll
                for (int i = 0; i < 2; i++)
                    l[i] = fad_f32_add(fad_f32_mul(l[i], sm.alpha[0][b][lane % 16]),
                                       sm.sum[b][lane % 16][lane / 16 * 2 + i]);
        __syncthreads(); /* scores and sums may be overwritten */
    }

    /* The end of a split: its m and l for rows g and g + 8. */
    __device__ __forceinline__ RowPair close_split() {
        if (warp == 0) {
            const float pair = fad_f32_add(l[0], l[1]);
            const float sum = fad_f32_add(pair, __shfl_xor_sync(~0u, pair, 16));
            if (lane < S::ROWS)
                sm.l[lane] = sum;
        }
        __syncthreads(); /* l may be read */
        const int g = lane / 4;
        const RowPair part = {{__shfl_sync(~0u, m, g), __shfl_sync(~0u, m, g + 8)}, {sm.l[g], sm.l[g + 8]}};
        __syncthreads(); /* l may be overwritten */
        return part;
    }
};

/* One item of work: a tile with all its splits, or (spill) one split of it. */
template <class S>
static __device__ __forceinline__ void mma_decode_item(const fad_attn_problem &p, const Work &work,
                                                       MmaDecodeShared<S> &sm) {
    const Tile &t = sm.t;
    const fad_partials &partials = work.partials;
    MmaDecode<S> decode(p, sm);
    load_queries<S::ROWS, S::CHUNKS, S::THREADS>(sm.q, p, t, threadIdx.x);
    cp_async_commit();
    decode.prefetch();
    sm.rows.fill(p, t, sm.range, threadIdx.x, S::THREADS);
    decode.clear();
    RowPair total = {{FAD_F32_SENTINEL, FAD_F32_SENTINEL}, {0, 0}};
    float4 *rest = &sm.rest[0][threadIdx.x];
    bool resting = false;
    int64_t split = sm.range.split;
    const int first_dim = decode.warp * S::SLICE;
    cp_async_wait<S::STAGES - 1>();
    __syncthreads(); /* q and the rows' table may be read */
#pragma unroll 1
    for (Chunk chunk(sm.range, S::BLOCKS); chunk.blocks > 0; chunk.advance(sm.range, S::BLOCKS)) {
        decode.run(chunk);
        if (chunk.ends_split(sm.range)) {
            RowPair part = decode.close_split();
            if (partials.o)
                spill_rows(p, t, partials, split++, 0, part, decode.o, first_dim, decode.warp == 0);
            else if (resting)
                fold_into(total, [&](int n) { return rest[n * S::THREADS]; }, part, decode.o);
            total = part;
            if (chunk.first + chunk.blocks < sm.range.blocks) {
                if (!partials.o)
                    rest_state(rest, S::THREADS, decode.o);
                resting = true;
                decode.clear();
            }
        }
    }
    cp_async_wait<0>(); /* nothing is on its way */
    __syncthreads();    /* q may be overwritten */
    if (partials.o) {
        spill_empty(p, t, partials, sm.range.from, sm.range.split, threadIdx.x, S::THREADS);
        spill_empty(p, t, partials, split, sm.range.to, threadIdx.x, S::THREADS);
        return;
    }
    finish_rows<S::T, S::CHUNKS>(p, t, 0, total, decode.o, sm.q, first_dim, decode.warp == 0);
    __syncthreads(); /* out is staged */
    store_staged<S::ROWS, S::CHUNKS, S::THREADS>(p, t, sm.q, threadIdx.x);
}

template <class S>
__global__ void __launch_bounds__(S::THREADS, S::RESIDENT)
    mma_decode_kernel(const __grid_constant__ fad_attn_problem p, const __grid_constant__ Work work) {
    extern __shared__ __align__(128) char shared_memory[];
    MmaDecodeShared<S> &sm = *(MmaDecodeShared<S> *)shared_memory;
    for (int64_t number = first_item(work); number < work.n_items; number = next_item(work, &sm.number)) {
        if (share_item(p, work, S::ROWS, number, sm.t, sm.range))
            mma_decode_item<S>(p, work, sm);
    }
}

template <class S> static MmaKernel mma_decode_of() {
    return {S::ROWS, S::D, S::THREADS, sizeof(MmaDecodeShared<S>), 0, mma_decode_kernel<S>};
}

#endif
