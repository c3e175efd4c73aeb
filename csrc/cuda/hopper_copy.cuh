/* Keys or values of one sequence and kv head to shared memory by the copy engine, from one buffer or from pages. */
#ifndef FAD_CUDA_HOPPER_COPY_CUH
#define FAD_CUDA_HOPPER_COPY_CUH

#include "hopper_kernel.cuh"
#include "hopper_ptx.cuh"
#include "pages.cuh"
#include "work.cuh"

constexpr int FOUND_BOXES = 32; /* at a time, one by each lane */
/* Where boxes lie, one of every FOUND_BOXES in each lane: those among which K is, those before, where V may be, a block
 * behind, and those after, which are asked for long before their use, because memory is late. The first of an item are
 * waited for. */
struct BoxCache {
    int first_row = -1;           /* of the sequence's rows of k and v, that of key 0 of box 0 */
    int first = -2 * FOUND_BOXES; /* box of `here` */
    PagePlace before, here, after;
};

/* ROWS keys by PIECES times 64 dims at a time, into pieces of PIECE_ROWS rows. */
template <int ROWS, int PIECES, int PIECE_ROWS = ROWS> struct KeyCopier {
    static constexpr int PIECE = PIECE_ROWS * 128, BYTES = PIECES * ROWS * 128;
    const fad_attn_problem &p;
    const Tile &t;
    const KeyRange &range;
    const int first_row; /* of k and v, where key 0 of the range is */
    const uint64_t policy;

    __device__ __forceinline__ KeyCopier(const fad_attn_problem &problem, const Tile &tile, const KeyRange &key_range,
                                         uint64_t l2_policy)
        : p(problem), t(tile), range(key_range),
          first_row((int)(tile.seq.k_row + key_range.first - tile.seq.span.k_pos)), policy(l2_policy) {}

    /* Copies every slot of an item, as `each` asks for: it gets two functions, for K and for V, which start the copy of keys
     * from number `key` on as soon as `to` is empty; their bytes arrive at `full`. By one warp, all lanes of which call
     * `each`. */
    template <class Each>
    __device__ __forceinline__ void run(const CUtensorMap &k_map, const CUtensorMap &v_map, Each each) const {
        if (p.block_table)
            run_pages({}, k_map, v_map, each);
        else
            run_rows(k_map, v_map, each);
    }
    /* The same where it is known which; found: where boxes lie, if they are those of this item. */
    template <class Each>
    __device__ __forceinline__ void run_pages(const BoxCache &found, const CUtensorMap &k_map, const CUtensorMap &v_map,
                                              Each each) const {
        BoxCache cache = found.first_row == first_row ? found : BoxCache();
        const int head = (int)t.head_k, shift = __ffs(box_rows(p, ROWS)) - 1;
        each([&](auto &&...slot) { copy_pages(cache, shift, head, k_map, slot...); },
             [&](auto &&...slot) { copy_pages(cache, shift, head, v_map, slot...); });
    }
    template <class Each>
    __device__ __forceinline__ void run_rows(const CUtensorMap &k_map, const CUtensorMap &v_map, Each each) const {
        const int head = (int)t.head_k, entry = (int)fad_cache_entry(&p, t.seq.index);
        each([&](auto &&...slot) { copy_rows(head, entry, k_map, slot...); },
             [&](auto &&...slot) { copy_rows(head, entry, v_map, slot...); });
    }

  private:
    /* Rows outside the buffer become zeros. */
    __device__ __forceinline__ void copy_rows(int head, int entry, const CUtensorMap &map, int key, int first_dim,
                                              char *to, MemoryBarrier &empty, unsigned round,
                                              MemoryBarrier &full) const {
        if (threadIdx.x % 32 == 0) {
            barrier_wait(empty, round);
            barrier_arrive_expect(full, BYTES);
#pragma unroll
            for (int piece = 0; piece < PIECES; piece++)
                copy_box(to + piece * PIECE, map, full, first_dim + piece * 64, first_row + key, head, entry, policy);
        }
        __syncwarp();
    }

    __device__ __forceinline__ bool seen(int key, int rows) const { return key < range.hi && key + rows > range.lo; }
    __device__ __forceinline__ PagePlace find(int key, int rows) const {
        return find_place(t.seq.pages, t.seq.page_size, first_row + key, seen(key, rows));
    }

    /* A lane copies a box: there are 32 or fewer, of 2^shift rows each. */
    __device__ __forceinline__ void copy_pages(BoxCache &cache, int shift, int head, const CUtensorMap &map, int key,
                                               int first_dim, char *to, MemoryBarrier &empty, unsigned round,
                                               MemoryBarrier &full) const {
        const int lane = threadIdx.x % 32, rows = 1 << shift, number = key >> shift, row = lane << shift;
        /* the boxes of ROWS keys never lie on both sides of a multiple of FOUND_BOXES */
        if ((unsigned)(number - cache.first + FOUND_BOXES) >= 2 * FOUND_BOXES) {
            const int first = number & -FOUND_BOXES;
            cache.before = cache.here;
            cache.here = first - cache.first == FOUND_BOXES ? cache.after : find((first + lane) << shift, rows);
            cache.after = find((first + FOUND_BOXES + lane) << shift, rows);
            cache.first = first;
        }
        const bool before = number < cache.first;
        const int page = __shfl_sync(~0u, before ? cache.before.page : cache.here.page, number % FOUND_BOXES + lane),
                  row_of_page =
                      __shfl_sync(~0u, before ? cache.before.row : cache.here.row, number % FOUND_BOXES + lane);
        /* past the last page there are zeros, if nothing of a box is seen */
        const int entry = seen(key + row, rows) ? (int)clamp_page(page, (unsigned)p.Bk) : (int)p.Bk;
        barrier_wait(empty, round);
        if (lane == 0)
            barrier_arrive_expect(full, BYTES);
        __syncwarp(); /* no bytes before they are expected; nor may a lane fall a round behind */
        if (row >= ROWS)
            return;
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++)
            copy_box(to + piece * PIECE + row * 128, map, full, first_dim + piece * 64, row_of_page, head, entry,
                     policy);
    }
};

/* The boxes of K and V that begin with a row, to the L2 cache. */
template <int D>
static __device__ __forceinline__ void prefetch_boxes(const CUtensorMap &k_map, const CUtensorMap &v_map, int row,
                                                      int head, int entry) {
    const uint64_t policy = read_once();
#pragma unroll
    for (int dim = 0; dim < D; dim += 64) {
        prefetch_box(k_map, dim, row, head, entry, policy);
        prefetch_box(v_map, dim, row, head, entry, policy);
    }
}

/* While an item with tiles of ROWS rows is being found, by one thread: asks for its first block of K and V to come to the L2
 * cache, if it is easy to tell where that will be. Not for calls in pages. */
template <int D, int ROWS, int BOX_KEYS>
static __device__ __forceinline__ void prefetch_first_rows(const fad_attn_problem &p, const Work &work, unsigned number,
                                                           const CUtensorMap &k_map, const CUtensorMap &v_map) {
    const ExpectedKeys keys(p, work.dense, ROWS, number);
    if (keys.row < 0 || keys.row >= keys.length(p))
        return;
#pragma unroll 1
    for (int at = keys.row; at < keys.row + FAD_MMA_BLOCK_KV; at += BOX_KEYS)
        prefetch_boxes<D>(k_map, v_map, at, keys.head, (int)fad_cache_entry(&p, keys.b));
}

#endif
