/* What a launch has to do, and which thread block does which part: nothing that bits depend on (N1). */
#ifndef FAD_CUDA_WORK_CUH
#define FAD_CUDA_WORK_CUH

#include "locate.cuh"
#include "score_rule.cuh"

/* What finds items of dense calls of ordinary size fast: nothing is as slow as the first thousand instructions of a thread
 * block, which come from memory. */
struct DenseWork {
    bool valid; /* no offsets of rows or positions, and 32 bits hold all numbers */
    int n_tiles, sequence_tiles, head_tiles, item_splits, group_size;
    Divisor tiles, sequence, head, group, split;
    int left, right, split_keys; /* as in fad_attn_problem; unbounded is more than any sequence */

    static constexpr int64_t MOST = INT64_C(1) << 29;
    static int bounded(int64_t x) { return x < 0 || x > MOST ? (int)MOST : (int)x; }

    __host__ DenseWork(const fad_attn_problem &p, int rows, int64_t n_items, int64_t tiles_, int64_t item_splits_)
        : n_tiles(bounded(tiles_)), sequence_tiles(n_tiles / (int)max(p.B, (int64_t)1)),
          head_tiles(sequence_tiles / (int)max(p.Hk, (int64_t)1)), item_splits(bounded(item_splits_)),
          group_size(bounded(fad_group(&p))), tiles(max(n_tiles, 1)), sequence(max(sequence_tiles, 1)),
          head(max(head_tiles, 1)), group(group_size), split(bounded(p.split_size)), left(bounded(p.window_left)),
          right(p.causal ? 0 : bounded(p.window_right)), split_keys(bounded(p.split_size)) {
        valid = !p.cu_seqlens_q && !p.cu_seqlens_k && !p.k_pos && n_items < MOST && p.Sk < MOST &&
                p.Sq * fad_group(&p) + rows < MOST;
    }
};

/* n_items items: the tiles, or with partials.o the tiles of each run of item_splits splits, tile = item % n_tiles. With
 * a counter, which starts at 0, a thread block takes the next item whenever it has finished one; without, block i takes
 * item i. */
struct Work {
    int64_t n_items, n_tiles, item_splits;
    unsigned long long *counter;
    void *rest;            /* where a thread block's running O rests between splits */
    fad_partials partials; /* null unless splits are spilled */
    ScoreRule rule;
    DenseWork dense;
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

/* find_item() where DenseWork holds, by one thread: the same in few instructions. */
static __device__ void find_dense_item(const fad_attn_problem &p, const Work &work, int rows, unsigned number, Tile &t,
                                       KeyRange &range) {
    const DenseWork &dense = work.dense;
    const unsigned nth = dense.tiles.quotient(number), tile = number - nth * dense.n_tiles; /* run of splits */
    const unsigned b = dense.sequence.quotient(tile), of_sequence = tile - b * dense.sequence_tiles;
    const unsigned head = dense.head.quotient(of_sequence), of_head = of_sequence - head * dense.head_tiles;
    const unsigned row0 = (dense.head_tiles - 1 - of_head) * rows, i0 = dense.group.quotient(row0);
    const int group = dense.group_size;
    if (p.cu_seqlens_q || p.cu_seqlens_k || p.k_pos)
        __builtin_unreachable(); /* a shorter fad_get_sequence */
    t.seq = fad_get_sequence(&p, b);
    const int n_q = (int)t.seq.span.n_q, n_k = (int)t.seq.span.n_k;
    t.exists = true;
    t.head_k = head;
    t.i0 = i0;
    t.g0 = row0 - i0 * group;
    t.group = group;
    t.n_rows = min(rows, (int)p.Sq * group - (int)row0);
    t.n_active = min(max(n_q * group - (int)row0, 0), t.n_rows);
    /* as in set_key_range */
    const int from = nth * dense.item_splits,
              to = min(from + dense.item_splits, (int)min(work.partials.n_splits, dense.MOST));
    const int first = n_k - n_q + (int)i0, last = n_k - n_q + (int)dense.group.quotient(row0 + t.n_active - 1);
    int lo = max(first - dense.left, from * dense.split_keys), hi = min(last + dense.right + 1, n_k);
    const int whole_from = max(last - dense.left, 0), whole_to = min(first + dense.right + 1, n_k);
    range.split = range.from = from;
    range.to = work.partials.o ? to : MOST_SPLITS;
    if (work.partials.o)
        hi = min(hi, to * dense.split_keys);
    lo = max(lo, 0);
    range.first = range.blocks = 0;
    if (hi <= lo || t.n_active == 0)
        return;
    const unsigned split = dense.split.quotient(lo), first_block = lo / FAD_MMA_BLOCK_KV;
    const int first_key = first_block * FAD_MMA_BLOCK_KV;
    range.first = first_key;
    range.lo = lo - first_key;
    range.hi = hi - first_key;
    range.blocks = (range.hi + FAD_MMA_BLOCK_KV - 1) / FAD_MMA_BLOCK_KV;
    range.whole = (min(max(whole_from - first_key, 0), range.hi) + FAD_MMA_BLOCK_KV - 1) / FAD_MMA_BLOCK_KV;
    range.n_whole = max(min(max(whole_to - first_key, 0), range.hi) / FAD_MMA_BLOCK_KV - range.whole, 0);
    range.split_blocks = dense.split_keys / FAD_MMA_BLOCK_KV;
    range.to_split_end = (split + 1) * range.split_blocks - first_block;
    range.split = split;
}

/* Which tile and keys an item is, into shared memory, by one warp; false if there is nothing in it. */
static __device__ bool find_item(const fad_attn_problem &p, const Work &work, int rows, int64_t number, Tile &shared,
                                 KeyRange &range) {
    if (work.dense.valid) {
        if (threadIdx.x % 32 == 0)
            find_dense_item(p, work, rows, (unsigned)number, shared, range);
        return true;
    }
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
