/* What the warps of the Hopper tile kernel (hopper_tile.cuh) share: its shapes, its shared memory, its barriers. */
#ifndef FAD_CUDA_HOPPER_TILE_SHARED_CUH
#define FAD_CUDA_HOPPER_TILE_SHARED_CUH

#include "hopper_group.cuh"
#include "mma_softmax.cuh"
#include "work.cuh"

template <fad_dtype T_, int D_, int CONSUMERS_, int SLOTS_, int PRODUCER_REGISTERS_, int CONSUMER_REGISTERS_>
struct HopperShape {
    static constexpr fad_dtype T = T_;
    static constexpr int D = D_; /* of q, k and v, zero-padded */
    static constexpr int CONSUMERS = CONSUMERS_, SLOTS = SLOTS_;
    static constexpr int PRODUCER_REGISTERS = PRODUCER_REGISTERS_, CONSUMER_REGISTERS = CONSUMER_REGISTERS_;
    static_assert(PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS <=
                      (CONSUMERS + 1) * (65536 / (CONSUMERS + 1) / GROUP_THREADS / 8 * 8),
                  "a warpgroup would wait for registers for ever");
    static constexpr int THREADS = (CONSUMERS + 1) * GROUP_THREADS, ROWS = CONSUMERS * GROUP_ROWS;
    static constexpr int CONSUMING_WARPS = CONSUMERS * GROUP_WARPS;
    static constexpr int N = D / 8;                                   /* n8 tiles of O */
    static constexpr int PARTS = D > 128 ? 2 : 1, PART_N = N / PARTS; /* of a block of K or V: its dims, a slot each */
    static constexpr int PIECES = D / PARTS / 64;                     /* of 64 dims = 128 bytes, the width of a box */
    static constexpr int BOX = BLOCK_KEYS * 128, SLOT = PIECES * BOX; /* bytes: a block's piece; all of a part's */
    static constexpr int Q_BOX = GROUP_ROWS * 128, Q_TILE = D / 64 * Q_BOX;
    /* Where there is room: q in registers once an item has begun; the scores of the next block besides O and P; and in
     * shared memory the O of the splits that have ended. */
    static constexpr bool Q_IN_REGISTERS = D == 128, OVERLAP = D <= 128, REST_IN_SHARED = D <= 128;
    static constexpr int Q_BUFFERS = D == 64 ? 2 : 1;
    static constexpr bool INTEGER_MAXIMA = D == 128; /* faster, where there are registers for it */
};

/* One item of work that has blocks of keys. */
struct HopperItem {
    Tile t;
    KeyRange range;
    TileSeenKeys seen;
    bool exists; /* false: there is no further one */
};

constexpr int ITEMS = 3;     /* the one in work, the next, and the one after it */
constexpr int KEY_WARPS = 2; /* keep K and V coming */

/* A warp's 16 rows by N n8 tiles of O at rest in shared memory, as its lanes hold them. */
template <int N> using RestTile = float4[N][32];

template <class S> struct HopperShared {
    /* Parts of K and V, in the order in which the consumers' steps use them, of each item: K0 - K1 V0 K2 V1 .. with OVERLAP,
     * else - K0 V0 K1 V1 ..; in the place of -, the values that the first step has not, is anything. */
    alignas(1024) char ring[S::SLOTS][S::SLOT];
    char q[S::Q_BUFFERS][S::CONSUMERS][S::Q_TILE];
    RestTile<S::N> rest[S::REST_IN_SHARED ? S::CONSUMING_WARPS : 0]; /* each consuming warp's */
    HopperItem items[ITEMS];
    float2 totals[S::ROWS]; /* m and l of the splits that have ended */
    /* N11: blocks of which some row does not see all, in the order of their use: whether there is Inf or NaN among the
     * values that each key warp has copied. No barrier says that it may be overwritten: the values of SLOTS checks later lie
     * so far on in the ring that every consumer has released those of this one. */
    bool not_finite[S::SLOTS][KEY_WARPS];
    /* full: the copies have arrived. empty: every consuming warp is done with it. */
    MemoryBarrier full[S::SLOTS], empty[S::SLOTS];
    MemoryBarrier q_full[S::Q_BUFFERS], q_empty[S::Q_BUFFERS], item_full[ITEMS], item_empty[ITEMS];
    MemoryBarrier check_done[S::SLOTS];
};

template <class S> static __device__ void init_barriers(HopperShared<S> &sm) {
    for (int i = 0; i < S::SLOTS; i++) {
        barrier_init(sm.full[i], KEY_WARPS);
        barrier_init(sm.empty[i], S::CONSUMING_WARPS);
        barrier_init(sm.check_done[i], KEY_WARPS);
    }
    for (int i = 0; i < S::Q_BUFFERS; i++) {
        barrier_init(sm.q_full[i], 32);
        barrier_init(sm.q_empty[i], S::CONSUMING_WARPS);
    }
    for (int i = 0; i < ITEMS; i++) {
        barrier_init(sm.item_full[i], 1);
        barrier_init(sm.item_empty[i], S::CONSUMING_WARPS + KEY_WARPS + 1);
    }
    fence_barrier_init();
}

/* Arrives for a warp that is done with what the barrier guards. */
static __device__ __forceinline__ void warp_arrive(MemoryBarrier &barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0)
        barrier_arrive(barrier);
}

/* Waits for the next item; null: there is none. */
template <class S> static __device__ __forceinline__ const HopperItem *wait_for_item(HopperShared<S> &sm, Ring slot) {
    barrier_wait(sm.item_full[slot.index], slot.round);
    return sm.items[slot.index].exists ? &sm.items[slot.index] : nullptr;
}

#endif
