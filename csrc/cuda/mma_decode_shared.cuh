/* What the warps of the split-KV kernel (mma_decode.cuh) share: its shapes, its shared memory, its barriers. */
#ifndef FAD_CUDA_MMA_DECODE_SHARED_CUH
#define FAD_CUDA_MMA_DECODE_SHARED_CUH

#include "hopper_ptx.cuh"
#include "mma_decode_units.cuh"
#include "mma_kernel.cuh"
#include "mma_output.cuh"
#include "mma_values.cuh"
#include "work.cuh"

constexpr int ROLE_WARPS = 4, ROLE_THREADS = ROLE_WARPS * 32; /* score warps; then as many value warps */
constexpr int DECODE_CONSUMERS = 2 * ROLE_THREADS;
constexpr int WARP_UNITS = BLOCK_UNITS / ROLE_WARPS; /* a score warp's */

/* Who brings K and V: warps that copy, from wherever they lie, or the copy engine, from one buffer or from pages. */
enum KeySource { COPIED_BY_WARPS, ROWS_BY_ENGINE, PAGES_BY_ENGINE };

/* RESIDENT: thread blocks of a multiprocessor, one's start and end beside the other's work. */
template <fad_dtype T_, int D_, int SLOTS_, int RESIDENT_, KeySource SOURCE_> struct MmaDecodeShape {
    static constexpr fad_dtype T = T_;
    static constexpr int D = D_; /* of q, k and v, zero-padded */
    static constexpr int SLOTS = SLOTS_, RESIDENT = RESIDENT_;
    static constexpr KeySource SOURCE = SOURCE_;
    static constexpr bool ENGINE = SOURCE != COPIED_BY_WARPS;
    /* Keys of K or V that are copied together: a slot takes a producing warp hundreds of cycles, however small it is. */
    static constexpr int SLOT_KEYS = D == 64 ? 128 : 64, BLOCK_SLOTS = BLOCK_KEYS / SLOT_KEYS;
    static constexpr int SLOT_WARPS = SLOT_KEYS / UNIT_KEYS / WARP_UNITS; /* score warps that read one slot of K */
    /* Warps that copy, each some rows of the same slots of every block; or that tell the copy engine what to copy, each its
     * rows of every slot. In pages there are many boxes to ask for; otherwise large ones are faster. */
    static constexpr int PRODUCERS = SOURCE == ROWS_BY_ENGINE ? 2 : 4,
                         SLOT_PRODUCERS = ENGINE ? PRODUCERS : PRODUCERS / BLOCK_SLOTS,
                         BOX_KEYS = SLOT_KEYS / SLOT_PRODUCERS; /* of a slot, a warp's: a box, or more of small pages */
    static constexpr int THREADS = DECODE_CONSUMERS + PRODUCERS * 32;
    static constexpr int CHUNKS = D / 8;           /* of 16 bytes, in a row of q */
    static constexpr int SLOT = SLOT_KEYS * D * 2; /* bytes */
    static constexpr int N = D / 8 / ROLE_WARPS;   /* n8 tiles of O that are a value warp's */
    /* A score warp waits for one of a block's slots only. What was in that slot before must have been there for certain,
     * or the warp could take one round of the slot for another: it is older than V of the block before, with which value
     * warps may not have begun. */
    static_assert(SLOTS >= 2 * BLOCK_SLOTS, "slots of V of a block and of K of the next are different");
};

template <class S> struct MmaDecodeShared {
    alignas(1024) char ring[S::SLOTS][S::SLOT]; /* K and V in the order in which they are used, in pieces of 64 dims */
    char q[DECODE_ROWS * S::D * 2];
    uint4 p[2][BLOCK_UNITS][32];             /* probabilities as a operands; of two blocks */
    float x_max[2][ROLE_WARPS][DECODE_ROWS]; /* largest scores of each score warp's keys; of two blocks */
    float l[DECODE_ROWS];
    float total_m[ROLE_WARPS][DECODE_ROWS],
        total_l[ROLE_WARPS][DECODE_ROWS]; /* each value warp's: the splits before, */
    float4 rest[S::N][ROLE_THREADS];      /* whose O rests here */
    RowTable<DECODE_ROWS> rows;
    Tile t;
    KeyRange range;
    MemoryBarrier full[S::SLOTS], empty[S::SLOTS]; /* a slot has its data; the warps that use it are done with it */
};

/* What score warps and value warps have in common. */
template <class S> struct DecodeWarp {
    const fad_attn_problem &p;
    MmaDecodeShared<S> &sm;
    const int warp = opaque((int)(threadIdx.x / 32 % ROLE_WARPS)), lane = opaque_lane(); /* warp: of its role */
    const float c;                                                                       /* N5 */
    Ring ring;                                                                           /* the next slot */
    int buffer = 0; /* of x_max and P of the present block */
    float m;        /* the running reference of row lane % 16 */

    __device__ DecodeWarp(const fad_attn_problem &problem, MmaDecodeShared<S> &shared, float factor)
        : p(problem), sm(shared), c(factor) {}

    __device__ __forceinline__ void skip_block() { ring = ring.after(S::BLOCK_SLOTS, S::SLOTS); }

    /* Maxima and P that score warps have written may be read, and what value warps have read be overwritten. */
    __device__ __forceinline__ void exchange() const { named_barrier_sync(1, DECODE_CONSUMERS); }

    /* N6: moves the references to the next block; returns those before. */
    __device__ __forceinline__ float advance(bool starts_split) {
        const float before = starts_split ? FAD_F32_SENTINEL : m;
        float best = -INFINITY;
#pragma unroll
        for (int w = 0; w < ROLE_WARPS; w++)
            best = fmaxf(best, sm.x_max[buffer][w][lane % DECODE_ROWS]);
        m = fad_f32_reference(before, best, c);
        return before;
    }
    /* A number that lanes hold for row r, as m. */
    static __device__ __forceinline__ float of_row(float x, int r) { return __shfl_sync(~0u, x, r); }
};

#endif
