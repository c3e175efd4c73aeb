/* What a launch has to do, and which thread block does which part: nothing that bits depend on (N1). */
#ifndef FAD_CUDA_WORK_CUH
#define FAD_CUDA_WORK_CUH

#include "locate.cuh"
#include "pages.cuh"
#include "score_rule.cuh"

/* No offsets of rows or positions, which only the device can read. */
static inline bool is_dense(const fad_attn_problem &p) { return !p.cu_seqlens_q && !p.cu_seqlens_k && !p.k_pos; }

/* What finds items of dense calls of ordinary size fast: nothing is as slow as the first thousand instructions of a thread
 * block, which come from memory. */
struct DenseWork {
    bool valid; /* is_dense(), and 32 bits hold all numbers */
    int n_tiles, head_tiles, item_splits, group_size;
    int n_heads; /* kv heads of a sequence */
    HeadTiles order;
    Divisor tiles, heads, group, split;
    int left, right, split_keys; /* as in fad_attn_problem; unbounded is more than any sequence */

    static constexpr int64_t MOST = INT64_C(1) << 29;
    static int bounded(int64_t x) { return x < 0 || x > MOST ? (int)MOST : (int)x; }

    __host__ DenseWork(const fad_attn_problem &p, int rows, int64_t n_items, int64_t tiles_, int64_t item_splits_,
                       int most_heads = INT32_MAX)
        : n_tiles(bounded(tiles_)), head_tiles((int)(n_tiles / max(p.B * p.Hk, (int64_t)1))),
          item_splits(bounded(item_splits_)), group_size(bounded(fad_group(&p))), n_heads(bounded(p.Hk)),
          order(p, bounded(p.B * p.Hk), head_tiles, most_heads), tiles(max(n_tiles, 1)), heads(max(n_heads, 1)),
          group(group_size), split(bounded(p.split_size)), left(bounded(p.window_left)),
          right(p.causal ? 0 : bounded(p.window_right)), split_keys(bounded(p.split_size)) {
        valid = is_dense(p) && n_items < MOST && p.Sk < MOST && p.Sq * fad_group(&p) + rows < MOST;
    }
};

/* n_items items: the tiles with all their splits; or, if n_splits is not 0, the tiles of each run of item_splits of so many
 * splits, tile = item % n_tiles. With a counter, which starts at 0, a thread block takes the next item whenever it has
 * finished one; without, block i takes item i. */
struct Work {
    int64_t n_items, n_tiles, item_splits, n_splits;
    unsigned long long *counter;
    void *rest;            /* where a thread block's running O rests between splits */
    fad_partials partials; /* null unless the states of splits are spilled */
    bool keys_by_warp;     /* keys are in pages that the copy engine does not serve */
    ScoreRule rule;
    DenseWork dense;
    int cluster_splits = 1; /* items of a cluster: all splits of a tile, or one item */
    Divisor cluster = Divisor(cluster_splits);
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
    range.to_split_end = /* HopperConsumer::begin_item adds 1 */
        (int)min((split + 1) * split_blocks - range.first / FAD_MMA_BLOCK_KV, (int64_t)INT32_MAX - 1);
}

/* An item of a dense call: a run of splits, and a tile, which begins with row row0 of a sequence and kv head. */
struct DenseItem {
    int nth, b, head, row0;
    __device__ __forceinline__ DenseItem(const DenseWork &dense, int rows, unsigned number) {
        nth = dense.tiles.quotient(number);
        const unsigned tile = number - nth * dense.n_tiles;
        int of_batch, nth_tile;
        dense.order.find((int)tile, of_batch, nth_tile);
        b = dense.heads.quotient(of_batch);
        head = of_batch - b * dense.n_heads;
        row0 = (dense.head_tiles - 1 - nth_tile) * rows; /* as in locate_tile */
    }
};

/* Where the keys of an item are going to be, for who waits while it is being found, if that is easy to tell. */
struct ExpectedKeys {
    int row = -1; /* of the sequence's rows of k and v, the first key's; -1: not easy */
    int b, head;
    __device__ __forceinline__ ExpectedKeys(const fad_attn_problem &p, const DenseWork &dense, int rows,
                                            unsigned number) {
        if (!dense.valid || p.leftpad_k || p.window_left >= 0)
            return;
        const DenseItem item(dense, rows, number);
        row = item.nth * dense.item_splits * dense.split_keys;
        b = item.b;
        head = item.head;
    }
    /* Rows of the sequence that hold keys. */
    __device__ __forceinline__ int length(const fad_attn_problem &p) const {
        return p.seqused_k ? p.seqused_k[b] : (int)p.Sk;
    }
    /* Where a row lies in pages; any place if it is past the block table's end. */
    __device__ __forceinline__ PagePlace find(const fad_attn_problem &p, int at) const {
        return find_place(p.block_table + b * p.block_table_stride, (unsigned)p.page_size, at, at < (int)p.Sk);
    }
};

/* fad_get_sequence() where DenseWork holds: what the compiler knows of the call makes it short. */
static __device__ __forceinline__ fad_sequence dense_sequence(const fad_attn_problem &p, int b) {
    fad_attn_problem plain = p;
    plain.cu_seqlens_q = plain.cu_seqlens_k = plain.k_pos = nullptr;
    plain.B = INT64_MAX;
    return fad_get_sequence(&plain, b);
}

/* find_item() where DenseWork holds, in few instructions: which rows a tile has, by any thread for itself; */
static __device__ __forceinline__ void find_dense_rows(const fad_attn_problem &p, const DenseWork &dense, int rows,
                                                       const DenseItem &item, Tile &t) {
    const int i0 = dense.group.quotient(item.row0), group = dense.group_size;
    t.head_k = item.head;
    t.i0 = i0;
    t.g0 = item.row0 - i0 * group;
    t.group = group;
    t.n_rows = min(rows, (int)p.Sq * group - item.row0);
}
/* all of it, by one thread; */
static __device__ void find_dense_tile(const fad_attn_problem &p, const DenseWork &dense, int rows, unsigned number,
                                       Tile &t) {
    const DenseItem item(dense, rows, number);
    find_dense_rows(p, dense, rows, item, t);
    t.seq = dense_sequence(p, item.b);
    t.exists = true;
    t.n_active = min(max((int)t.seq.span.n_q * dense.group_size - item.row0, 0), t.n_rows);
}

/* and its keys, as in fad_get_sequence and set_key_range. */
static __device__ void find_dense_keys(const fad_attn_problem &p, const Work &work, int rows, unsigned number,
                                       KeyRange &range) {
    const DenseWork &dense = work.dense;
    const DenseItem item(dense, rows, number);
    const int keys = (int)p.Sk - (p.leftpad_k ? min(max(p.leftpad_k[item.b], 0), (int)p.Sk) : 0);
    const int n_k = p.seqused_k ? min(max(p.seqused_k[item.b], 0), keys) : keys;
    const int n_q = p.seqused_q ? min(max(p.seqused_q[item.b], 0), (int)p.Sq) : (int)p.Sq;
    const int end = min(item.row0 + rows, n_q * dense.group_size);      /* of the active rows */
    const int first = n_k - n_q + (int)dense.group.quotient(item.row0), /* positions */
        last = n_k - n_q + (int)dense.group.quotient(end - 1);
    const int from = item.nth * dense.item_splits;
    int lo = max(max(first - dense.left, 0), from * dense.split_keys), hi = min(last + dense.right + 1, n_k);
    range.split = range.from = from;
    range.to = MOST_SPLITS;
    if (work.n_splits) {
        const int to = min(from + dense.item_splits, (int)work.n_splits);
        hi = min(hi, to * dense.split_keys);
        range.to = to;
    }
    range.first = range.blocks = 0;
    if (hi <= lo || end <= item.row0)
        return;
    const int split = dense.split.quotient(lo), first_block = lo / FAD_MMA_BLOCK_KV,
              first_key = first_block * FAD_MMA_BLOCK_KV;
    range.first = first_key;
    range.lo = lo - first_key;
    range.hi = hi - first_key;
    range.blocks = (range.hi + FAD_MMA_BLOCK_KV - 1) / FAD_MMA_BLOCK_KV;
    const int whole_lo = min(max(last - dense.left - first_key, 0), range.hi),
              whole_hi = min(max(min(first + dense.right + 1, n_k) - first_key, 0), range.hi);
    range.whole = (whole_lo + FAD_MMA_BLOCK_KV - 1) / FAD_MMA_BLOCK_KV;
    range.n_whole = max(whole_hi / FAD_MMA_BLOCK_KV - range.whole, 0);
    range.split_blocks = dense.split_keys / FAD_MMA_BLOCK_KV;
    range.to_split_end = (split + 1) * range.split_blocks - first_block;
    range.split = split;
}

/* Which tile and keys an item is, into shared memory, by one warp; false if there is nothing in it. */
static __device__ bool find_item(const fad_attn_problem &p, const Work &work, int rows, int64_t number, Tile &shared,
                                 KeyRange &range) {
    if (work.dense.valid) {
        if (threadIdx.x % 32 == 0) {
            find_dense_tile(p, work.dense, rows, (unsigned)number, shared);
            find_dense_keys(p, work, rows, (unsigned)number, range);
        }
        return true;
    }
    const int64_t nth = fad_quotient(number, work.n_tiles); /* run of splits */
    const bool exists = locate_tile(p, rows, number - nth * work.n_tiles, shared);
    if (exists && threadIdx.x % 32 == 0) {
        const int64_t from = nth * work.item_splits;
        set_key_range(p, shared, from, work.n_splits ? min(from + work.item_splits, work.n_splits) : MOST_SPLITS,
                      range);
    }
    return exists;
}

/* The same for a whole thread block, two warps of which share the work where they can. */
static __device__ bool share_item(const fad_attn_problem &p, const Work &work, int rows, int64_t number, Tile &t,
                                  KeyRange &range) {
    if (work.dense.valid) {
        if (threadIdx.x == 0)
            find_dense_tile(p, work.dense, rows, (unsigned)number, t);
        else if (threadIdx.x == 32)
            find_dense_keys(p, work, rows, (unsigned)number, range);
    } else if (threadIdx.x < 32) {
        find_item(p, work, rows, number, t, range);
    }
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
