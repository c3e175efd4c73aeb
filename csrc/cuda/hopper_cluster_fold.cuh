/* N8 in a cluster that has all splits of a tile: the thread blocks of each split send its state to those of the first. */
#ifndef FAD_CUDA_HOPPER_CLUSTER_FOLD_CUH
#define FAD_CUDA_HOPPER_CLUSTER_FOLD_CUH

#include "hopper_ptx.cuh"
#include "mma_kernel.cuh"

/* To the same place in the shared memory of thread block `rank` of the cluster, where it arrives at a barrier. */
template <class X>
static __device__ __forceinline__ void send(const X *to, const X &x, const MemoryBarrier &there, int rank) {
    send_remote(remote_address(to, rank), x, remote_address(&there, rank));
}

/* The state of a split in shared memory, in a thread block's dims: O as THREADS threads hold it, TILES n8 tiles each. m and
 * l below: of row lane % 16. */
template <int TILES, int THREADS> struct SplitState {
    uint4 o_of[TILES][THREADS];
    float m_of[DECODE_ROWS], l_of[DECODE_ROWS];

    /* By these threads. */
    __device__ __forceinline__ void send_to(int rank, const MemoryBarrier &there, const float (&o)[TILES][4], float m,
                                            float l) const {
        const int thread = threadIdx.x;
#pragma unroll
        for (int n = 0; n < TILES; n++)
            send(&o_of[n][thread],
                 make_uint4(fad_f32_bits(o[n][0]), fad_f32_bits(o[n][1]), fad_f32_bits(o[n][2]), fad_f32_bits(o[n][3])),
                 there, rank);
        if (thread < DECODE_ROWS) {
            send(&m_of[thread], m, there, rank);
            send(&l_of[thread], l, there, rank);
        }
    }

    /* Onto that of the splits before, by as many threads. */
    __device__ __forceinline__ void fold_onto(float (&o)[TILES][4], float &m, float &l) const {
        const int lane = threadIdx.x % 32;
        const float part_m = m_of[lane % DECODE_ROWS], now = fad_f32_max(part_m, m),
                    a = fad_f32_pow2(fad_f32_sub(m, now)), b = fad_f32_pow2(fad_f32_sub(part_m, now));
        l = fad_f32_fold(l, a, l_of[lane % DECODE_ROWS], b);
        m = now;
        float of_row[2][2]; /* [rows g and g + 8][a, b] */
#pragma unroll
        for (int half = 0; half < 2; half++) {
            of_row[half][0] = __shfl_sync(~0u, a, lane / 4 + half * 8);
            of_row[half][1] = __shfl_sync(~0u, b, lane / 4 + half * 8);
        }
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            const uint4 x = o_of[n][threadIdx.x];
            const unsigned bits[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
            for (int e = 0; e < 4; e++)
                o[n][e] = fad_f32_fold(o[n][e], of_row[e / 2][0], fad_f32_from_bits(bits[e]), of_row[e / 2][1]);
        }
    }
};

#endif
