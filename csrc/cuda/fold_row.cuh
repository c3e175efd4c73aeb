/* Which row of out, and which of its splits, a warp of the fold (fold.cuh) has. */
#ifndef FAD_CUDA_FOLD_ROW_CUH
#define FAD_CUDA_FOLD_ROW_CUH

#include "work.cuh"

/* What finds a warp's row, and the splits that it sees, in few instructions, if the call is dense and of ordinary size. Rows are
 * then numbered as their m and l lie in a split: [B, Hq, Sq]. */
struct FoldWork {
    bool dense;
    int64_t parts; /* warps of a row */
    Divisor by_parts, by_rows, by_heads, by_split;

    __host__ FoldWork(const fad_attn_problem &p, int64_t parts_)
        : dense(is_dense(p) && tile_bound(p, 1) * parts_ < DenseWork::MOST && p.Sk < DenseWork::MOST), parts(parts_),
          by_parts(parts), by_rows(dense ? DenseWork::bounded(max(p.Sq, (int64_t)1)) : 1),
          by_heads(dense ? DenseWork::bounded(p.Hq) : 1), by_split(DenseWork::bounded(p.split_size)) {}
};

/* A row of out as a tile, not for its keys: head_k may be the query head, as if none were grouped. And its splits, n from
 * `begin` on, counted from the sequence's first. */
struct FoldedRow {
    Tile t;
    int64_t begin;
    int n, part; /* part: which of the row's warps this is, in the order of dims */

    /* By a warp; shared: its own. */
    __device__ __forceinline__ FoldedRow(const fad_attn_problem &p, const FoldWork &work, int64_t number,
                                         Tile &shared) {
        if (work.dense)
            find_dense(p, work, (unsigned)number);
        else
            find(p, work, number, shared);
    }

  private:
    __device__ __forceinline__ fad_interval seen() const {
        const fad_interval nothing = {0, 0};
        return t.n_active ? fad_visible(&t.seq.span, row_of(t, 0).i) : nothing;
    }
    __device__ __forceinline__ void find_dense(const fad_attn_problem &p, const FoldWork &work, unsigned number) {
        const unsigned row = work.by_parts.quotient(number), head = work.by_rows.quotient(row), /* of all sequences */
            b = work.by_heads.quotient(head);
        part = (int)(number - row * (unsigned)work.parts);
        t.exists = b < p.B;
        if (!t.exists)
            return;
        t.seq = dense_sequence(p, (int)b);
        t.head_k = head - b * (unsigned)p.Hq;
        t.group = 1;
        t.g0 = 0;
        t.i0 = row - head * (unsigned)p.Sq;
        t.n_rows = 1;
        t.n_active = t.i0 < t.seq.span.n_q;
        const fad_interval keys = seen();
        begin = work.by_split.quotient((unsigned)keys.lo);
        n = keys.hi > keys.lo ? (int)(work.by_split.quotient((unsigned)keys.hi - 1) + 1 - begin) : 0;
    }
    __device__ void find(const fad_attn_problem &p, const FoldWork &work, int64_t number, Tile &shared) {
        const int64_t row = fad_quotient(number, work.parts);
        part = (int)(number - row * work.parts);
        t.exists = locate_tile(p, 1, row, shared);
        if (!t.exists)
            return;
        __syncwarp(); /* the tile may be read */
        t = shared;
        const fad_interval keys = seen();
        const int64_t first = fad_partition_first(t.seq.span.k_pos, p.split_size);
        begin = fad_partition_first(keys.lo, p.split_size) - first;
        n = keys.hi > keys.lo ? (int)(fad_partition_end(keys.hi, p.split_size) - first - begin) : 0;
    }
};

#endif
