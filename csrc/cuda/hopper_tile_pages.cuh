/* Keys and values in pages that the copy engine does not serve: the producing warps copy them. */
#ifndef FAD_CUDA_HOPPER_TILE_PAGES_CUH
#define FAD_CUDA_HOPPER_TILE_PAGES_CUH

#include "hopper_ptx.cuh"
#include "mma_memory.cuh"
#include "work.cuh"

/* ROWS keys by PIECES times 64 dims at a time, as KeyCopier. A warp waits for its copies to a slot when those to the next
 * one are under way. */
template <int ROWS, int PIECES, int PIECE_ROWS> struct PageCopier {
    MemoryBarrier *under_way = nullptr; /* `full` of the slot whose copies have not been waited for */

    /* policy: of the L2 cache. */
    __device__ __forceinline__ void copy(const Keys &from, const KeyRange &range, uint64_t policy, int key,
                                         int first_dim, char *to, MemoryBarrier &empty, unsigned round,
                                         MemoryBarrier &full) {
        auto find = [&](int row) { return from.find(key + row + (int)threadIdx.x % 32, range.lo, range.hi); };
        PagePlace next = find(0); /* asked for ahead of its use, because memory is late */
        if (!__all_sync(~0u, barrier_done(empty, round))) {
            finish(); /* or who is to empty the slot might wait for the last one */
            barrier_wait(empty, round);
        }
#pragma unroll 1 /* this is inlined in several places */
        for (int row = 0; row < ROWS; row += 32) {
            const PagePlace found = next;
            next = find(row + 32);
            from.copy_found<PIECE_ROWS, PIECES * 8, 4>(to, found, key + row, range.lo, range.hi, row, first_dim,
                                                       policy);
        }
        cp_async_commit();
        if (under_way)
            arrive<1>();
        under_way = &full;
    }
    /* All copies have been waited for. */
    __device__ __forceinline__ void finish() {
        if (under_way)
            arrive<0>();
        under_way = nullptr;
    }

  private:
    template <int PENDING> __device__ __forceinline__ void arrive() const {
        cp_async_wait<PENDING>();
        fence_async_proxy();
        __syncwarp();
        if (threadIdx.x % 32 == 0)
            barrier_arrive(*under_way);
        __syncwarp();
    }
};

#endif
