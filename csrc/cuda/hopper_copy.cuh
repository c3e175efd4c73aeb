/* Keys or values of one sequence and kv head to shared memory by the copy engine, from one buffer or from pages. */
#ifndef FAD_CUDA_HOPPER_COPY_CUH
#define FAD_CUDA_HOPPER_COPY_CUH

#include "hopper_kernel.cuh"
#include "hopper_ptx.cuh"

/* The pages of 32 boxes of keys, one in each lane: asked for together, because memory is late. */
struct PageCache {
    int first = -32; /* box */
    int page;
};

/* ROWS keys by PIECES times 64 dims at a time, into pieces that lie one behind the other. */
template <int ROWS, int PIECES> struct KeyCopier {
    static constexpr int PIECE = ROWS * 128, BYTES = PIECES * PIECE;
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
     * from number `key` on as soon as `to` is empty; their bytes arrive at `full`. By one warp, of which one lane calls
     * `each`, or all do where every page is a copy of its own. */
    template <class Each>
    __device__ __forceinline__ void run(const CUtensorMap &k_map, const CUtensorMap &v_map, Each each) const {
        start(k_map, v_map, each);
        __syncwarp();
    }
    /* The same; lanes that call nothing do not wait for the one that does. */
    template <class Each>
    __device__ __forceinline__ void start(const CUtensorMap &k_map, const CUtensorMap &v_map, Each each) const {
        if (p.block_table) {
            PageCache k, v;
            each([&](auto &&...slot) { copy_pages(k, k_map, slot...); },
                 [&](auto &&...slot) { copy_pages(v, v_map, slot...); });
        } else if (threadIdx.x % 32 == 0) {
            const int head = (int)t.head_k, entry = (int)fad_cache_entry(&p, t.seq.index);
            each([&](auto &&...slot) { copy_rows(head, entry, k_map, slot...); },
                 [&](auto &&...slot) { copy_rows(head, entry, v_map, slot...); });
        }
    }

  private:
    /* Rows outside the buffer become zeros. */
    __device__ __forceinline__ void copy_rows(int head, int entry, const CUtensorMap &map, int key, int first_dim,
                                              char *to, MemoryBarrier &empty, unsigned round,
                                              MemoryBarrier &full) const {
        barrier_wait(empty, round);
        barrier_arrive_expect(full, BYTES);
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++)
            copy_box(to + piece * PIECE, map, full, first_dim + piece * 64, first_row + key, head, entry, policy);
    }

    /* The page of a box; past the last one, where there are zeros, if nothing of it is seen. */
    __device__ __forceinline__ int page_of(int key, int box) const {
        if (key >= range.hi || key + box <= range.lo)
            return (int)p.Bk;
        return (int)fad_clamp(t.seq.pages[(unsigned)(first_row + key) / (unsigned)p.page_size], 0, p.Bk - 1);
    }

    /* A lane copies a box: boxes have eight rows or more. */
    __device__ __forceinline__ void copy_pages(PageCache &cache, const CUtensorMap &map, int key, int first_dim,
                                               char *to, MemoryBarrier &empty, unsigned round,
                                               MemoryBarrier &full) const {
        const int lane = threadIdx.x % 32, box = box_rows(p, ROWS), number = key / box, row = lane * box;
        if (number - cache.first >= 32) {
            cache.first = number & ~31; /* the boxes of ROWS keys never lie on both sides of a multiple of 32 */
            cache.page = page_of((cache.first + lane) * box, box);
        }
        const int page = __shfl_sync(~0u, cache.page, number - cache.first + lane);
        barrier_wait(empty, round);
        if (lane == 0)
            barrier_arrive_expect(full, BYTES);
        __syncwarp(); /* no bytes before they are expected; nor may a lane fall a round behind */
        if (row >= ROWS)
            return;
        const int row_of_page = (int)((unsigned)(first_row + key + row) % (unsigned)p.page_size);
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++)
            copy_box(to + piece * PIECE + row * 128, map, full, first_dim + piece * 64, row_of_page, (int)t.head_k,
                     page, policy);
    }
};

#endif
