/* What the thread blocks of a cluster (hopper_cluster.cuh) share, and the warps of each: shapes, shared memory, barriers. */
#ifndef FAD_CUDA_HOPPER_CLUSTER_SHARED_CUH
#define FAD_CUDA_HOPPER_CLUSTER_SHARED_CUH

#include "hopper_cluster_fold.cuh"
#include "mma_decode_units.cuh"
#include "work.cuh"

constexpr int CLUSTER_WARPS = 8, CLUSTER_THREADS = CLUSTER_WARPS * 32; /* of a thread block */
constexpr int SUM_WARPS = 2; /* those behind the value warps add up l: of rows g, of rows g + 8 */
constexpr int COPY_WARPS = CLUSTER_WARPS / 2, COPY_THREADS = COPY_WARPS * 32; /* of K; the others copy q and V */
constexpr int HALF_KEYS = CLUSTER_KEYS / 2;                                   /* values are there in two halves */

/* DIMS: of O, a thread block's. PAGES: whether keys are in pages, or in one buffer: code of the other, though it is not run,
 * costs 1 to 4 % (what a thread block runs once comes from memory). FOLDS: whether a cluster has all splits of a tile, at most
 * SPLITS, or one split. */
template <fad_dtype T_, int D_, int DIMS_, bool PAGES_, bool FOLDS_> struct ClusterShape {
    static constexpr fad_dtype T = T_;
    static constexpr int D = D_; /* of q, k and v, zero-padded */
    static constexpr bool PAGES = PAGES_, FOLDS = FOLDS_;
    static constexpr int CHUNKS = D / 8;                      /* of 16 bytes, in a row of q */
    static constexpr int DIMS = DIMS_, DIM_CHUNKS = DIMS / 8; /* of 16 bytes, in a row of V */
    static constexpr int VALUE_WARPS = DIM_CHUNKS < 4 ? DIM_CHUNKS : 4;
    static constexpr int TILES = DIM_CHUNKS / VALUE_WARPS; /* n8 tiles of O that are a value warp's */
    static constexpr int RANKS = D / DIMS;                 /* thread blocks that share a split */
    static constexpr int SPLITS = FOLDS ? CLUSTER_THREAD_BLOCKS / RANKS : 1;
    static constexpr int KEYS = CLUSTER_KEYS / RANKS;              /* a thread block's share of S */
    static constexpr int UNITS = KEYS / UNIT_KEYS / CLUSTER_WARPS; /* a warp's share of them */
    static constexpr int PARTS = BLOCK_UNITS / UNITS;              /* warps that share a block */
    static constexpr int ALL_PARTS = CLUSTER_KEY_BLOCKS * PARTS;   /* warps of the split */
    static constexpr int HALF_BYTES = HALF_KEYS * DIMS * 2;        /* of half of V */
    static constexpr int RESIDENT = DIMS <= 32 ? 2 : 1;            /* thread blocks that fit on a multiprocessor */
    static constexpr int COPY_KEYS = KEYS / COPY_WARPS;            /* of K, a copying warp's */
};

template <class S> struct ClusterShared {
    union {
        alignas(1024) char k[S::KEYS * S::D * 2]; /* in pieces of 64 dims; later, */
        struct {
            uint4 p[CLUSTER_KEYS / UNIT_KEYS][32]; /* P of all keys as a operands, */
            char second[S::HALF_BYTES];            /* and the second half of V */
        };
    };
    char first[S::HALF_BYTES];
    union {
        char q[DECODE_ROWS * S::D * 2];
        float4 o[S::TILES][S::VALUE_WARPS * 32]; /* to be finished */
    };
    float references[DECODE_ROWS][S::ALL_PARTS + 4]; /* of the largest score, of every warp; rows in different banks */
    float alpha[CLUSTER_KEY_BLOCKS]
               [DECODE_ROWS]; /* N6: what O and l are multiplied by before each block but the first */
    float l[DECODE_ROWS];
    SplitState<S::TILES, S::VALUE_WARPS * 32>
        sent[S::FOLDS ? S::SPLITS - 1 : 1]; /* to the first split, by the others */
    RowTable<DECODE_ROWS> rows;
    Tile t;
    KeyRange range;
    /* References and P of the split's thread blocks may be read; the second half of V may; states may. Each is used once. */
    MemoryBarrier references_there, p_there, second_there, sent_there;

    /* This thread block's dims of the values of a block. */
    __device__ __forceinline__ const char *values(int block) const {
        constexpr int HALF = CLUSTER_KEY_BLOCKS / 2;
        return (block < HALF ? first : second) + block % HALF * BLOCK_KEYS * S::DIMS * 2;
    }
};

#endif
