/* Which tile a thread block works on. Dense calls compute it; packed ones search the prefix sums of the lengths, which
 * only the device can read. */
#ifndef FAD_CUDA_LOCATE_CUH
#define FAD_CUDA_LOCATE_CUH

#include "../core/sequence.h"

/* A tile: packed rows i * G + g of one sequence and kv head, as on the CPU (cpu/kernel.h). Its first is query row i0 of
 * query head g0 of the kv head's group. */
struct Tile {
    fad_sequence seq;
    int64_t head_k, i0;
    unsigned g0, group;
    int n_rows, n_active; /* rows owned; rows below n_q */
    bool exists;          /* false: the grid's bound was larger than the work */
};

/* Query row of the sequence and query head of a tile's row r. */
struct Row {
    int64_t i, h;
};
__device__ inline Row row_of(const Tile &t, int r) {
    const unsigned at = t.g0 + (unsigned)r;
    if (t.group == 1) /* a division takes a while */
        return {t.i0 + at, t.head_k};
    return {t.i0 + at / t.group, t.head_k * t.group + at % t.group};
}
/* Rows r, r + STEP, .. of a tile in a view of q's shape, 16-bit values, without a division or a shuffle for each. */
template <int STEP_> struct RowWalk {
    static constexpr int STEP = STEP_;
    int64_t at; /* bytes from the view's first element to the row; first_element: where the tile's sequence starts */
    unsigned h;
    const unsigned group, step_h;
    const int64_t step, next_row;

    __device__ __forceinline__ RowWalk(const fad_view &view, int64_t first_element, const Tile &t, int r)
        : group(t.group), step_h(group == 1 ? 0 : STEP % group),
          step(2 * ((group == 1 ? STEP : STEP / group) * view.stride_s + step_h * view.stride_h)),
          next_row(2 * (view.stride_s - group * view.stride_h)) {
        const Row row = row_of(t, r);
        h = (unsigned)(row.h - t.head_k * group);
        at = 2 * (first_element + row.i * view.stride_s + row.h * view.stride_h);
    }
    __device__ __forceinline__ void advance() {
        at += step;
        h += step_h;
        if (h >= group)
            h -= group, at += next_row;
    }
};
/* The sequence's row that the tile's last active row belongs to. */
__device__ inline int64_t last_row(const Tile &t) { return row_of(t, t.n_active - 1).i; }

/* Division of numbers below 2^31 by one that the host knows: a product and a shift. */
struct Divisor {
    uint32_t multiplier, shift;
    __host__ explicit Divisor(int64_t d) : shift(31) { /* d: 1 .. 2^31 - 1 */
        while (INT64_C(1) << (shift - 31) < d)
            shift++;
        multiplier = (uint32_t)(((UINT64_C(1) << shift) + d - 1) / d);
    }
    __device__ __forceinline__ unsigned quotient(unsigned n) const {
        return (unsigned)((uint64_t)n * multiplier >> shift);
    }
};

/* The order of tiles: of some heads in turn, the first of each, the second of each, and so on, and then of the next heads.
 * Heads are the kv heads of a packed sequence, or of all sequences of a dense call. Where later rows see more keys, the first
 * tiles are the longest of all these heads, and the shortest come last, so that thread blocks that take one tile after the
 * other end together. All heads at once would do that as well, but drive each other's K and V out of the L2 cache. */
constexpr int TILES_IN_TURN = 256; /* before the next heads begin: about two for each multiprocessor */
/* As many heads as that takes; 1, head by head, where one has so many tiles, or they are equally long. */
FAD_FN int heads_in_turn(const fad_attn_problem &p, int64_t n_heads, int64_t tiles_of_head) {
    const bool uneven = (p.causal || p.window_right >= 0) && p.window_left < 0; /* as rows see ever more keys */
    if (!uneven || tiles_of_head >= TILES_IN_TURN || tiles_of_head == 0)
        return 1;
    const int tiles = (int)tiles_of_head; /* a division of 64 bits takes a while */
    return (int)max(min(n_heads, (int64_t)((TILES_IN_TURN + tiles - 1) / tiles)), (int64_t)1);
}
struct HeadTile {
    int64_t head, nth; /* its nth tile in this order */
};
/* Tile `number` of n_heads. */
static __device__ HeadTile find_head_tile(const fad_attn_problem &p, int64_t n_heads, int64_t tiles_of_head,
                                          int64_t number) {
    const int64_t heads = heads_in_turn(p, n_heads, tiles_of_head),
                  first = fad_quotient(number, tiles_of_head * heads) * heads, /* of the turn */
        in_turn = number - first * tiles_of_head, heads_here = min(heads, n_heads - first),
                  nth = fad_quotient(in_turn, heads_here);
    return {first + in_turn - nth * heads_here, nth};
}
/* The same where 31 bits hold all numbers; of `most` heads in turn at most. */
struct HeadTiles {
    int of_head, heads, whole_turns, last_heads; /* tiles of a head; heads of a turn, and of the last if it has fewer */
    Divisor turn, by_heads, by_last_heads;
    __host__ HeadTiles(const fad_attn_problem &p, int n_heads, int tiles_of_head, int most = INT32_MAX)
        : of_head(tiles_of_head), heads(min(heads_in_turn(p, n_heads, tiles_of_head), most)),
          whole_turns(n_heads / heads), last_heads(n_heads % heads), turn(max(of_head * heads, 1)), by_heads(heads),
          by_last_heads(max(last_heads, 1)) {}
    __device__ __forceinline__ void find(int number, int &head, int &nth) const {
        const int nth_turn = turn.quotient(number), first = nth_turn * heads, in_turn = number - first * of_head;
        const bool whole = nth_turn < whole_turns;
        nth = (whole ? by_heads : by_last_heads).quotient(in_turn);
        head = first + in_turn - nth * (whole ? heads : last_heads);
    }
};

/* Tiles that a grid must hold: exact for dense calls, an upper bound for packed ones (each sequence rounds up once). */
static inline int64_t tile_bound(const fad_attn_problem &p, int rows) {
    const int64_t group = fad_group(&p);
    if (!p.cu_seqlens_q)
        return p.B * p.Hk * ((p.Sq * group + rows - 1) / rows);
    return p.Hk * (p.Sq * group / rows + fad_sequence_count(&p));
}

/* First index b with number < sum of per(0 .. b), searched by one warp, 32 sequences at a time; the rest of number
 * within b is returned in number. -1: past the end. Every thread of the block gets the result. */
template <class PerSequence> __device__ int find_sequence(int count, int64_t &number, PerSequence per) {
    const int lane = threadIdx.x % 32;
    for (int base = 0; base < count; base += 32) {
        const int b = base + lane;
        int64_t sum = b < count ? per(b) : 0;
        for (int step = 1; step < 32; step *= 2) {
            const int64_t below = __shfl_up_sync(~0u, sum, step);
            sum += lane >= step ? below : 0;
        }
        const unsigned past = __ballot_sync(~0u, sum > number);
        if (past) {
            const int found = __ffs(past) - 1;
            const int64_t before = found ? __shfl_sync(~0u, sum, found - 1) : 0;
            number -= before;
            return base + found;
        }
        number -= __shfl_sync(~0u, sum, 31);
    }
    return -1;
}

/* Tile number `number`, by a whole warp, into shared memory, where its parts go as soon as they are known: registers are
 * scarce where this happens. Returns whether it exists. */
static __device__ bool locate_tile(const fad_attn_problem &p, int rows, int64_t number, Tile &t) {
    const int64_t group = fad_group(&p);
    const bool dense = !p.cu_seqlens_q;
    int b = 0;
    int64_t per_head;
    if (dense) {
        per_head = fad_quotient(p.Sq * group + rows - 1, rows);
        if (number >= p.B * p.Hk * per_head)
            b = -1;
    } else {
        auto tiles = [&](int s) {
            int64_t first;
            return p.Hk * ((fad_owned_rows(p.cu_seqlens_q, p.B, s, p.Sq, &first) * group + rows - 1) / rows);
        };
        b = find_sequence((int)fad_sequence_count(&p), number, tiles);
        per_head = b < 0 ? 1 : fad_quotient(tiles(b), p.Hk);
    }
    if (threadIdx.x % 32 == 0) {
        t.exists = b >= 0;
        if (b >= 0) {
            HeadTile tile = find_head_tile(p, dense ? p.B * p.Hk : p.Hk, per_head, number);
            if (dense)
                b = (int)fad_quotient(tile.head, p.Hk), tile.head -= b * p.Hk;
            /* last rows first: under a causal mask they are the longest */
            const int64_t row0 = (per_head - 1 - tile.nth) * rows, i0 = fad_quotient(row0, group);
            t.head_k = tile.head;
            t.i0 = i0;
            t.g0 = (unsigned)(row0 - i0 * group);
            t.group = (unsigned)group;
            t.seq = fad_get_sequence(&p, b);
            t.n_rows = (int)min((int64_t)rows, t.seq.q_rows * group - row0);
            t.n_active = (int)fad_clamp(t.seq.span.n_q * group - row0, 0, t.n_rows);
        }
    }
    return b >= 0;
}

/* The same for a whole thread block. */
static __device__ bool share_tile(const fad_attn_problem &p, int rows, int64_t number, Tile &shared) {
    if (threadIdx.x < 32)
        locate_tile(p, rows, number, shared);
    __syncthreads(); /* the tile may be read */
    return shared.exists;
}

/* Positions that some active row of the tile sees. */
static __device__ fad_interval seen_positions(const Tile &t) {
    fad_interval seen = {0, 0};
    if (t.n_active) {
        seen.lo = fad_visible(&t.seq.span, t.i0).lo;
        seen.hi = fad_visible(&t.seq.span, last_row(t)).hi;
    }
    return seen;
}

#endif
