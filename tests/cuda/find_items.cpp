/* The two ways to find an item (csrc/cuda/work.cuh) and a row of the fold (csrc/cuda/fold_row.cuh), on a CPU: those for dense
 * calls must agree with the general ones, of random dense calls with every mask, length and split, and nothing may be found
 * twice. A thread of a GPU is a call here: dense calls need no other lane.
 *
 * find_items [calls]: prints what it compared, or the first difference, and then exits with 1. */
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <set>
#include <type_traits>
#include <vector>

#define __device__
#define __host__
#define __forceinline__ inline
static struct {
    unsigned x;
} threadIdx, blockIdx, gridDim;
template <class T> static T __shfl_sync(unsigned, T x, int) { return x; }
template <class T> static T __shfl_up_sync(unsigned, T x, int) { return x; }
static unsigned __ballot_sync(unsigned, bool x) { return x; }
static int __ffs(unsigned x) { return __builtin_ffs((int)x); }
static void __syncthreads() {}
static void __syncwarp() {}
static unsigned long long atomicAdd(unsigned long long *to, unsigned long long x) { return (*to += x) - x; }
template <class A, class B> static std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }
template <class A, class B> static std::common_type_t<A, B> max(A a, B b) { return b > a ? b : a; }

#include "../../csrc/cuda/fold_row.cuh"
#include "../../csrc/cuda/mma_backward_kernel.cuh"
#include "../../csrc/cuda/output.cuh"

static std::mt19937_64 generator(1);
static int64_t pick(int64_t low, int64_t high) { return low + (int64_t)(generator() % (uint64_t)(high - low + 1)); }
static bool one_in(int n) { return pick(1, n) == 1; }

[[noreturn]] static void differs(const char *what, int64_t a, int64_t b) {
    printf("%s: %lld, %lld\n", what, (long long)a, (long long)b);
    exit(1);
}

static void compare_quotients(int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        const int64_t d = one_in(2) ? pick(1, 5000) : pick(1, INT64_C(1) << pick(0, 30));
        const int64_t n = one_in(2) ? pick(0, (INT64_C(1) << pick(0, 31)) - 1) : d * pick(1, INT32_MAX / d) - one_in(2);
        if (Divisor(d).quotient((unsigned)n) != n / d)
            differs("quotient", n, d);
    }
}

/* A length for each sequence, now and then one that must be clamped. */
static std::vector<int32_t> lengths(int64_t B, int64_t most) {
    std::vector<int32_t> x((size_t)B);
    for (int32_t &length : x)
        length = (int32_t)(one_in(20) ? pick(-5, most + 5) : pick(0, most));
    return x;
}

static int64_t pick_window() {
    const int64_t windows[] = {-1, -1, pick(0, 500), pick(0, 300000), INT64_C(1) << 40};
    return windows[pick(0, 4)];
}

/* Exits if the order of tiles leads out of the call: the lengths of such a sequence lie behind the end of an array. */
static void check_place(const fad_attn_problem &p, const Work &work, int rows, int64_t number) {
    int64_t head;
    if (work.dense.valid) {
        const DenseItem item(work.dense, rows, (unsigned)number);
        head = item.b * p.Hk + item.head;
    } else {
        head = find_head_tile(p, p.B * p.Hk, work.n_tiles / (p.B * p.Hk), number % work.n_tiles).head;
    }
    if (head < 0 || head >= p.B * p.Hk)
        differs("head", head, p.B * p.Hk);
}

/* Fields that nothing has written hold the same in both. */
struct Item {
    Tile t;
    KeyRange range;
    bool exists;
    Item(const fad_attn_problem &p, const Work &work, int rows, int64_t number) {
        memset((void *)&t, 0x55, sizeof t);
        memset((void *)&range, 0x55, sizeof range);
        check_place(p, work, rows, number);
        exists = find_item(p, work, rows, number, t, range);
    }
};

static void same(const char *what, int64_t a, int64_t b) {
    if (a != b)
        differs(what, a, b);
}
#define SAME(field) same(#field, (int64_t)a.field, (int64_t)b.field)

static void compare(const Item &a, const Item &b, bool endless) {
    SAME(exists), SAME(t.exists), SAME(t.head_k), SAME(t.i0), SAME(t.g0), SAME(t.group), SAME(t.n_rows);
    SAME(t.n_active), SAME(t.seq.index), SAME(t.seq.q), SAME(t.seq.k), SAME(t.seq.v), SAME(t.seq.out), SAME(t.seq.lse);
    SAME(t.seq.q_rows), SAME(t.seq.k_row), SAME(t.seq.pages), SAME(t.seq.page_size), SAME(t.seq.n_pages);
    SAME(t.seq.span.n_q), SAME(t.seq.span.n_k), SAME(t.seq.span.k_pos), SAME(t.seq.span.left), SAME(t.seq.span.right);
    SAME(range.first), SAME(range.blocks), SAME(range.split), SAME(range.from), SAME(range.to);
    if (a.range.blocks == 0)
        return;
    SAME(range.lo), SAME(range.hi), SAME(range.whole), SAME(range.n_whole);
    if (!endless) { /* splits longer than any sequence do not end */
        SAME(range.split_blocks), SAME(range.to_split_end);
    } else if (b.range.to_split_end < b.range.blocks || b.range.split_blocks < b.range.blocks) {
        differs("to_split_end", b.range.to_split_end, b.range.split_blocks);
    }
}

/* Every tile is found once, and later rows first, but where other heads take turns. */
static void compare_tiles(const fad_attn_problem &p, const Work &work, int rows, int64_t tiles) {
    std::set<std::array<int64_t, 4>> found;
    const int64_t n_heads = p.B * p.Hk, of_head = tiles / n_heads, heads = heads_in_turn(p, n_heads, of_head);
    const bool enough = heads == n_heads || heads * of_head >= 256, more = heads > 1 && (heads - 1) * of_head >= 256;
    const bool uneven = (p.causal || p.window_right >= 0) && p.window_left < 0;
    if (uneven ? !enough || more : heads != 1)
        differs("heads in turn", heads, of_head);
    int64_t turns = 0, last = INT64_MAX;
    for (int64_t number = 0; number < tiles; number++) {
        const Tile t = Item(p, work, rows, number).t;
        found.insert({t.seq.index, t.head_k, t.i0, t.g0});
        const int64_t row = t.i0 * t.group + t.g0;
        turns += number == 0 || row > last;
        last = row;
    }
    same("tiles", (int64_t)found.size(), tiles);
    if (tiles > n_heads)
        same("turns", turns, (n_heads + heads - 1) / heads);
}

/* The same of tiles of keys, for the backward. */
static void compare_key_tiles(const fad_attn_problem &p) {
    const int64_t keys = 64, of_head = (p.Sk + keys - 1) / keys, n = p.B * p.Hk * of_head;
    const KeyTiles tiles(p, (int)keys);
    same("valid", tiles.valid, 1);
    std::set<std::array<int, 3>> found;
    for (int64_t number = 0; number < n; number++) {
        std::array<int, 3> tile;
        tiles.find((int)number, tile[0], tile[1], tile[2]);
        if (tile[0] < 0 || tile[0] >= p.B || tile[1] < 0 || tile[1] >= p.Hk || tile[2] < 0 || tile[2] >= of_head)
            differs("tile of keys", number, n);
        found.insert(tile);
    }
    same("tiles of keys", (int64_t)found.size(), n);
}

/* Every row of the fold is found once in either way, with the same splits. */
static void compare_fold_rows(const fad_attn_problem &p) {
    const int64_t rows = tile_bound(p, 1), parts = pick(1, 8);
    const FoldWork dense(p, parts);
    FoldWork general = dense;
    general.dense = false;
    same("valid", dense.dense, 1);
    std::map<std::array<int64_t, 4>, FoldedRow> found;
    Tile shared;
    auto place = [](const FoldedRow &row) -> std::array<int64_t, 4> {
        const Row at = row_of(row.t, 0);
        return {row.t.seq.index, at.i, at.h, row.part};
    };
    for (int64_t number = 0; number < rows * parts; number++) {
        const FoldedRow row(p, general, number, shared);
        same("exists", row.t.exists, 1);
        found.insert({place(row), row});
    }
    same("rows of the fold", (int64_t)found.size(), rows * parts);
    for (int64_t number = 0; number < rows * parts; number++) {
        const FoldedRow b(p, dense, number, shared);
        same("exists", b.t.exists, 1);
        const auto at = found.find(place(b));
        if (at == found.end())
            differs("row of the fold, found twice or nowhere", number, rows);
        const FoldedRow &a = at->second;
        SAME(n), SAME(t.n_active), SAME(t.seq.out), SAME(t.seq.lse), SAME(t.seq.span.n_q), SAME(t.seq.span.n_k);
        if (a.n > 0) {
            SAME(begin);
            same("state", partial_row(p, a.t, 0, a.begin), partial_row(p, b.t, 0, b.begin));
            same("values", partial_values(p, a.t, 0, a.begin), partial_values(p, b.t, 0, b.begin));
        }
        found.erase(at);
    }
    same("rows of the fold left", (int64_t)found.size(), 0);
    same("row past the end", FoldedRow(p, dense, rows * parts, shared).t.exists, 0);
}

/* Some items of a random call. */
static int compare_call() {
    fad_attn_problem p;
    memset(&p, 0, sizeof p);
    p.B = pick(1, 6);
    p.Hk = pick(1, 5);
    p.Hq = p.Hk * pick(1, 9);
    p.Sq = one_in(3) ? pick(1, 300) : pick(1, 5);
    p.Sk = one_in(3) ? pick(0, 200000) : pick(1, 3000);
    p.Bk = 9;
    p.page_size = 64;
    p.scale = 1;
    for (fad_view *view : {&p.q, &p.k, &p.v, &p.out, &p.lse})
        *view = {nullptr, pick(0, INT64_C(1) << 40), pick(0, 1 << 20), pick(0, 1000)};
    const std::vector<int32_t> q = lengths(p.B, p.Sq), k = lengths(p.B, p.Sk), pad = lengths(p.B, p.Sk),
                               entries = lengths(p.B, p.Bk - 1), table(1000);
    p.seqused_q = one_in(3) ? q.data() : nullptr;
    p.seqused_k = one_in(2) ? k.data() : nullptr;
    p.leftpad_k = one_in(3) ? pad.data() : nullptr;
    p.cache_batch_idx = one_in(4) ? entries.data() : nullptr;
    p.block_table = one_in(4) ? table.data() : nullptr;
    p.block_table_stride = pick(1, 100);
    p.causal = one_in(2);
    p.window_left = pick_window();
    p.window_right = pick_window();
    p.split_size = one_in(6) ? INT64_C(1) << pick(29, 40) : FAD_MMA_BLOCK_KV * pick(1, 16);

    const int sizes[] = {1, 16, 64, 128, 192}, rows = sizes[pick(0, 4)];
    const int64_t tiles = tile_bound(p, rows), splits = fad_split_capacity(&p);
    const bool spill = splits > 0 && one_in(2);
    const int64_t run = spill ? pick(1, splits) : splits, items = tiles * (spill ? (splits + run - 1) / run : 1);
    Work dense = {items,   tiles, run,   spill ? splits : 0, nullptr,
                  nullptr, {},    false, ScoreRule(p),       DenseWork(p, rows, items, tiles, run)};
    Work general = dense;
    general.dense.valid = false;
    if (!dense.dense.valid)
        differs("valid", 0, 1);
    const int count = 6;
    for (int i = 0; i < count; i++) {
        const int64_t number = pick(0, items - 1);
        compare(Item(p, general, rows, number), Item(p, dense, rows, number), p.split_size > DenseWork::MOST / 2);
    }
    if (one_in(20)) {
        compare_tiles(p, dense, rows, tiles);
        compare_key_tiles(p);
        compare_fold_rows(p);
    }
    return count;
}

int main(int argc, char **argv) {
    const int64_t calls = argc > 1 ? atoll(argv[1]) : 20000;
    int64_t items = 0;
    compare_quotients(50 * calls);
    for (int64_t i = 0; i < calls; i++)
        items += compare_call();
    printf("%lld items found alike\n", (long long)items);
}
