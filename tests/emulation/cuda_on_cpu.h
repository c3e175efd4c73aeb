/* CUDA C++ as a CPU's compiler understands it, and the functions of ptx.cuh and hopper_ptx.cuh on the emulated thread block:
 * to be included before the kernels' sources, which it keeps from including those two. */
#ifndef EMULATION_CUDA_ON_CPU_H
#define EMULATION_CUDA_ON_CPU_H
#define FAD_CUDA_PTX_CUH
#define FAD_CUDA_HOPPER_PTX_CUH

#include "flash_attn_det.h"
#include "machine.h"
#include "numerics/half.h"
#include "numerics/tensor_core.h"

#include <cmath>
#include <type_traits>

#define __device__
#define __host__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(n) __attribute__((aligned(n)))
#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define gridDim emulation::grid_size

struct alignas(8) float2 {
    float x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <class A, class B> inline std::common_type_t<A, B> min(A a, B b) {
    const std::common_type_t<A, B> x = a, y = b;
    return y < x ? y : x;
}
template <class A, class B> inline std::common_type_t<A, B> max(A a, B b) {
    const std::common_type_t<A, B> x = a, y = b;
    return x < y ? y : x;
}
inline int __vimax3_s32(int x, int y, int z) { return max(max(x, y), z); }
inline float __uint_as_float(unsigned u) { return fad_f32_from_bits(u); }
inline int __ffs(unsigned x) { return __builtin_ffs((int)x); }
inline unsigned long long atomicAdd(unsigned long long *, unsigned long long) { return emulation::counter.take(); }

/* ---- warps ---- */

inline void expect_all(unsigned mask) {
    if (mask != ~0u)
        emulation::fail("a warp's lanes are not all named");
}
inline void __syncwarp() {
    emulation::meet("__syncwarp", nullptr, [](void **) {});
}
/* Each lane gets the value of the lane it names. */
template <class V> inline V exchange(const char *kind, V value, int from) {
    struct Lane {
        V value;
        int from;
        V got;
    } lane = {value, from, V()};
    emulation::meet(kind, &lane, [](void **of) {
        for (int i = 0; i < 32; i++)
            ((Lane *)of[i])->got = ((const Lane *)of[((const Lane *)of[i])->from & 31])->value;
    });
    return lane.got;
}
template <class V> inline V __shfl_sync(unsigned mask, V value, int from) {
    expect_all(mask);
    return exchange("__shfl_sync", value, from);
}
template <class V> inline V __shfl_xor_sync(unsigned mask, V value, int with) {
    expect_all(mask);
    return exchange("__shfl_xor_sync", value, (int)(threadIdx.x % 32) ^ with);
}
template <class V> inline V __shfl_up_sync(unsigned mask, V value, int by) {
    expect_all(mask);
    const int lane = (int)(threadIdx.x % 32);
    return exchange("__shfl_up_sync", value, lane < by ? lane : lane - by);
}
inline unsigned __ballot_sync(unsigned mask, bool value) {
    expect_all(mask);
    struct Lane {
        bool value;
        unsigned all;
    } lane = {value, 0};
    emulation::meet("vote", &lane, [](void **of) {
        unsigned all = 0;
        for (int i = 0; i < 32; i++)
            all |= (unsigned)((const Lane *)of[i])->value << i;
        for (int i = 0; i < 32; i++)
            ((Lane *)of[i])->all = all;
    });
    return lane.all;
}
inline bool __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }
inline bool __all_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) == ~0u; }

/* ---- ptx.cuh ---- */

template <class T> inline T opaque(T x) { return x; }
template <class T> inline void set_to_anything(T &x) { memset(&x, 0xff, sizeof x); } /* NaN */
inline int opaque_lane() { return (int)(threadIdx.x % 32); }
inline unsigned shared_address(const void *p) { return (unsigned)((const char *)p - shared_memory); }
inline uint64_t keep_as_usual() { return 0; }
inline uint64_t read_once() { return 0; }
inline void cp_async16(void *to, const void *from, int bytes) { emulation::copy16(to, from, bytes); }
inline void cp_async16(unsigned to, const void *from, int bytes, uint64_t) {
    emulation::copy16(shared_memory + to, from, bytes);
}
struct AsUsual {};
inline void cp_async16(unsigned to, const void *from, int bytes, AsUsual) {
    emulation::copy16(shared_memory + to, from, bytes);
}
inline void cp_async_commit() { emulation::commit_copies(); }
template <int PENDING> inline void cp_async_wait() { emulation::wait_copies(PENDING); }
typedef uint64_t MemoryBarrier;
inline void barrier_init(MemoryBarrier &barrier, int count) { emulation::barrier_init(barrier, count); }
inline void barrier_arrive(MemoryBarrier &barrier) { emulation::barrier_arrive(barrier, 0); }
inline void barrier_arrive_copied(MemoryBarrier &barrier) { emulation::arrive_copied(barrier); }
inline void barrier_wait(MemoryBarrier &barrier, unsigned parity) { emulation::barrier_wait(barrier, parity); }
inline void named_barrier_sync(int id, int threads) { emulation::named_barrier(id, threads, false); }
inline void named_barrier_arrive(int id, int threads) { emulation::named_barrier(id, threads, true); }
inline void __syncthreads() { named_barrier_sync(0, emulation::block_threads); }

inline void allow_next_kernel() {}
inline uint4 load_shared(const uint4 *from) { return *from; }

inline void load_matrices(unsigned (&r)[4], const void *row, bool transposed) {
    struct Lane {
        const uint16_t *row;
        bool transposed;
        unsigned *r;
    } lane = {(const uint16_t *)row, transposed, r};
    emulation::meet("ldmatrix", &lane, [](void **of) {
        auto at = [&](int matrix, int row, int column) {
            return (unsigned)((const Lane *)of[matrix * 8 + row])->row[column];
        };
        for (int i = 0; i < 32; i++)
            for (int m = 0; m < 4; m++) {
                const int r = i / 4, c = i % 4 * 2;
                Lane &to = *(Lane *)of[i];
                to.r[m] = to.transposed ? at(m, c, r) | at(m, c + 1, r) << 16 : at(m, r, c) | at(m, r, c + 1) << 16;
            }
    });
}
inline void ldmatrix(unsigned (&r)[4], const void *row) { load_matrices(r, row, false); }
inline void ldmatrix_transposed(unsigned (&r)[4], const void *row) { load_matrices(r, row, true); }

template <fad_dtype T> inline void mma_step(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    struct Lane {
        float *d;
        const unsigned *a;
        unsigned b[2];
    } lane = {d, a, {b0, b1}};
    emulation::meet("mma", &lane, [](void **of) {
        float *d_of[32];
        const unsigned *a_of[32], *b_of[32];
        for (int i = 0; i < 32; i++) {
            const Lane &lane = *(const Lane *)of[i];
            d_of[i] = lane.d, a_of[i] = lane.a, b_of[i] = lane.b;
        }
        emulation::multiply(T == FAD_BFLOAT16, d_of, a_of, b_of);
    });
}
inline float ex2(float x) { return fad_ex2(x); }
template <fad_dtype T> inline unsigned round_half(float x) {
    return x != x ? 0x7fffu : T == FAD_BFLOAT16 ? fad_bf16_round(x) : fad_f16_round(x);
}
template <fad_dtype T> inline unsigned pack2(float low, float high) {
    return round_half<T>(low) | round_half<T>(high) << 16;
}
template <fad_dtype T> inline float low_half(unsigned u) {
    return T == FAD_BFLOAT16 ? fad_bf16_widen((uint16_t)u) : fad_f16_widen((uint16_t)u);
}
template <fad_dtype T> inline float high_half(unsigned u) { return low_half<T>(u >> 16); }
template <fad_dtype T> inline unsigned add2(unsigned a, unsigned b) {
    return pack2<T>(low_half<T>(a) + low_half<T>(b), high_half<T>(a) + high_half<T>(b));
}
template <fad_dtype T> inline unsigned add_zero_times(unsigned sum, unsigned a) {
    return pack2<T>(low_half<T>(sum) + 0 * low_half<T>(a), high_half<T>(sum) + 0 * high_half<T>(a));
}
template <fad_dtype T> inline unsigned exponents_full(unsigned pair) {
    constexpr unsigned ALL = T == FAD_BFLOAT16 ? 0x7f80u : 0x7c00u;
    return ((pair & ALL) == ALL ? 0x8000u : 0) | ((pair >> 16 & ALL) == ALL ? 0x80000000u : 0);
}

/* ---- hopper_ptx.cuh ---- */

inline void fence_barrier_init() {}
inline void barrier_arrive_expect(MemoryBarrier &barrier, int bytes) { emulation::barrier_arrive(barrier, bytes); }
inline bool barrier_test(MemoryBarrier &barrier, unsigned parity) { return emulation::barrier_test(barrier, parity); }
inline bool barrier_done(MemoryBarrier &barrier, unsigned parity) { return emulation::barrier_test(barrier, parity); }
inline void fence_async_proxy() {}
inline void prefetch_map(const CUtensorMap &) {}
inline void copy_box(void *to, const CUtensorMap &map, MemoryBarrier &barrier, int dim, int row, int head, int batch,
                     uint64_t) {
    emulation::copy_box(to, map, barrier, dim, row, head, batch);
}
template <int REGISTERS> inline void give_registers() {}
template <int REGISTERS> inline void take_registers() {}
inline void prefetch_line(const void *) {}
inline void prefetch_box(const CUtensorMap &, int, int, int, int, uint64_t) {}
inline void cluster_arrive() { emulation::cluster_arrive(); }
inline void cluster_wait() { emulation::cluster_wait(); }
constexpr int RANK = 1 << 24; /* bytes between the shared memories of two thread blocks, as they see each other's */
inline unsigned remote_address(const void *here, int rank) { return (unsigned)rank * RANK + shared_address(here); }
template <class X> inline void send_remote(unsigned to, const X &x, unsigned barrier) {
    if (to / RANK != barrier / RANK)
        emulation::fail("bytes and barrier are of different thread blocks");
    emulation::send((int)(to / RANK), (int)(to % RANK), &x, sizeof x, (int)(barrier % RANK));
}
inline void barrier_wait_cluster(MemoryBarrier &barrier, unsigned parity) { barrier_wait(barrier, parity); }
inline void wgmma_fence() {}
inline void wgmma_commit() { emulation::commit_matrices(); }
template <int PENDING> inline void wgmma_wait() { emulation::wait_matrices(PENDING); }

inline uint64_t matrix_descriptor(const void *start, int across) {
    return (uint64_t)(shared_address(start) >> 4 & 0x3fff) | (uint64_t)(across >> 4) << 16 |
           (uint64_t)(1024 >> 4) << 32 | UINT64_C(1) << 62;
}
inline uint64_t matrix_at(uint64_t descriptor, int bytes) {
    return (descriptor >> 32) << 32 | (unsigned)((unsigned)descriptor + (unsigned)(bytes >> 4));
}

struct MatrixLane {
    emulation::MatrixStep step;
    float *d;
    const unsigned *a;
};
inline void start_wgmma(const emulation::MatrixStep &step, float *d, const unsigned *a) {
    MatrixLane lane = {step, d, a};
    emulation::meet("wgmma", &lane, [](void **of) {
        emulation::MatrixStep step = ((const MatrixLane *)of[0])->step;
        for (int i = 0; i < 32; i++) {
            step.d_of[i] = ((const MatrixLane *)of[i])->d;
            step.a_of[i] = ((const MatrixLane *)of[i])->a;
        }
        emulation::start_matrix(step);
    });
}
template <fad_dtype T> inline void wgmma_scores(float (&s)[16][4], const unsigned (&a)[4], uint64_t b, int accumulate) {
    start_wgmma({T == FAD_BFLOAT16, true, false, accumulate != 0, 16, 0, b, {}, {}}, &s[0][0], a);
}
template <fad_dtype T> inline void wgmma_scores(float (&s)[16][4], uint64_t a, uint64_t b, int accumulate) {
    start_wgmma({T == FAD_BFLOAT16, false, false, accumulate != 0, 16, a, b, {}, {}}, &s[0][0], nullptr);
}
template <fad_dtype T, int N>
inline void wgmma_values(float (&o)[N][4], const unsigned (&a)[4], uint64_t b, int accumulate = 1) {
    start_wgmma({T == FAD_BFLOAT16, true, true, accumulate != 0, N, 0, b, {}, {}}, &o[0][0], a);
}
#endif
