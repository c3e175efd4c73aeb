/* What a launch has to do, and which thread block does which part: nothing that bits depend on (N1). */
#ifndef FAD_CUDA_WORK_CUH
#define FAD_CUDA_WORK_CUH

#include "locate.cuh"
#include "score_rule.cuh"

/* n_items items: the tiles, or with partials.o the tiles of each run of item_splits splits, tile = item % n_tiles. With
 * a counter, which starts at 0, a thread block takes the next item whenever it has finished one; without, block i takes
 * item i. */
struct Work {
    int64_t n_items, n_tiles, item_splits;
    unsigned long long *counter;
    void *rest;            /* where a thread block's running O rests between splits */
    fad_partials partials; /* null unless splits are spilled */
    ScoreRule rule;
};

/* The next item of this thread block, taken by one warp. */
static __device__ __forceinline__ int64_t take_item(const Work &work) {
    unsigned long long taken = 0;
    if (!work.counter)
        return work.n_items;
    if (threadIdx.x % 32 == 0)
        taken = atomicAdd(work.counter, 1ull);
    return (int64_t)__shfl_sync(~0u, taken, 0) + gridDim.x;
}

/* The next item of this thread block. shared: one value in shared memory. */
static __device__ __forceinline__ int64_t next_item(const Work &work, int64_t *shared) {
    if (!work.counter)
        return work.n_items;
    __syncthreads(); /* nobody reads the item before, or anything else of it */
    if (threadIdx.x == 0)
        *shared = (int64_t)atomicAdd(work.counter, 1ull) + gridDim.x;
    __syncthreads(); /* the number may be read */
    return *shared;
}

/* The blocks of keys that an item walks. Numbers of keys count from `first`, a multiple of BLOCK_KV: 32 bits hold them,
 * because the scheduler refuses longer buffers. */
struct KeyRange {
    int64_t first;      /* position */
    int blocks;         /* how many */
    int lo, hi;         /* keys that some row sees */
    int whole, n_whole; /* the first block that every row sees all of, and how many follow each other */
    int split_blocks;   /* blocks of a whole split, */
    int to_split_end;   /* and up to the end of the first */
    int64_t split;      /* the first split, counted from the sequence's first, */
    int64_t from, to;   /* and those that the item is to spill */

    __device__ __forceinline__ bool partial(int block) const { return (unsigned)(block - whole) >= (unsigned)n_whole; }
};

/* More than any sequence has: positions are below 2^33. */
constexpr int64_t MOST_SPLITS = INT64_C(1) << 27;

/* Writes to shared memory what some row of the tile sees, of all splits, or of those from .. to - 1, counted from the
 * sequence's first. */
static __device__ void set_key_range(const fad_attn_problem &p, const Tile &t, int64_t from, int64_t to,
                                     KeyRange &range) {
    const int64_t first_split = fad_partition_first(t.seq.span.k_pos, p.split_size);
    range.from = range.split = from;
    range.to = to;
    fad_interval seen = {0, 0}, full = {0, 0};
    if (t.n_active) {
        const fad_interval first = fad_visible(&t.seq.span, t.i0);
        const fad_interval last = fad_visible(&t.seq.span, last_row(t));
        seen = {first.lo, last.hi};
        full = {last.lo, first.hi};
    }
    seen.lo = max(seen.lo, (first_split + from) * p.split_size);
    if (to < MOST_SPLITS) /* else the product could overflow */
        seen.hi = min(seen.hi, (first_split + to) * p.split_size);
    range.first = range.blocks = 0;
    if (seen.hi <= seen.lo)
        return;
    range.first = seen.lo / FAD_MMA_BLOCK_KV * FAD_MMA_BLOCK_KV;
    range.lo = (int)(seen.lo - range.first);
    range.hi = (int)(seen.hi - range.first);
    range.blocks = (range.hi + FAD_MMA_BLOCK_KV - 1) / FAD_MMA_BLOCK_KV;
    range.whole = (int)((fad_clamp(full.lo - range.first, 0, range.hi) + FAD_MMA_BLOCK_KV - 1) / FAD_MMA_BLOCK_KV);
    range.n_whole = max((int)(fad_clamp(full.hi - range.first, 0, range.hi) / FAD_MMA_BLOCK_KV) - range.whole, 0);
    const int64_t split_blocks = p.split_size / FAD_MMA_BLOCK_KV;
    range.split_blocks = (int)min(split_blocks, (int64_t)INT32_MAX);
    const int64_t split = fad_partition_first(seen.lo, p.split_size);
    range.split = split - first_split;
    range.to_split_end = (int)min((split + 1) * split_blocks - range.first / FAD_MMA_BLOCK_KV, (int64_t)INT32_MAX);
}

/* Which tile and keys an item is, into shared memory, by one warp; false if there is nothing in it. */
static __device__ bool find_item(const fad_attn_problem &p, const Work &work, int rows, int64_t number, Tile &shared,
                                 KeyRange &range) {
    const int64_t nth = fad_quotient(number, work.n_tiles); /* run of splits */
    const bool exists = locate_tile(p, rows, number - nth * work.n_tiles, shared);
    if (exists && threadIdx.x % 32 == 0) {
        const int64_t from = nth * work.item_splits;
        set_key_range(p, shared, from,
                      work.partials.o ? min(from + work.item_splits, work.partials.n_splits) : MOST_SPLITS, range);
    }
    return exists;
}

/* The same for a whole thread block. */
static __device__ bool share_item(const fad_attn_problem &p, const Work &work, int rows, int64_t number, Tile &t,
                                  KeyRange &range) {
    if (threadIdx.x < 32)
        find_item(p, work, rows, number, t, range);
    __syncthreads(); /* tile and range may be read */
    return t.exists;
}

/* A position in a ring of buffers, and whether it has gone round an odd number of times. */
struct Ring {
    int index = 0;
    unsigned round = 0;
    __device__ __forceinline__ void advance(int size) {
        if (++index == size)
            index = 0, round ^= 1;
    }
    /* steps: at most size */
    __device__ __forceinline__ Ring after(int steps, int size) const {
        const int at = index + steps;
        return at < size ? Ring{at, round} : Ring{at - size, round ^ 1};
    }
};

#endif
