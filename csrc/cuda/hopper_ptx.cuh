/* Hopper's own instructions, one a function: the copy engine (TMA), matrix instructions of a warpgroup (wgmma),
 * registers. Compute capability 9.0a. */
#ifndef FAD_CUDA_HOPPER_PTX_CUH
#define FAD_CUDA_HOPPER_PTX_CUH

#include "ptx.cuh"

#include <cuda.h>

/* Makes initialised barriers known to the copy engine, and to the other thread blocks of a cluster. */
static __device__ __forceinline__ void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
/* The phase completes when all expected bytes are there as well. */
static __device__ __forceinline__ void barrier_arrive_expect(MemoryBarrier &barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
                 : "memory");
}
/* Whether it has completed; waits a little. */
static __device__ __forceinline__ bool barrier_test(MemoryBarrier &barrier, unsigned parity) {
    unsigned done;
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, done;\n"
                 "}"
                 : "=r"(done)
                 : "r"(shared_address(&barrier)), "r"(parity)
                 : "memory");
    return done;
}
/* The same; does not wait. */
static __device__ __forceinline__ bool barrier_done(MemoryBarrier &barrier, unsigned parity) {
    unsigned done;
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, done;\n"
                 "}"
                 : "=r"(done)
                 : "r"(shared_address(&barrier)), "r"(parity)
                 : "memory");
    return done;
}
/* What this thread wrote to shared memory becomes visible to the copy engine and to wgmma. */
static __device__ __forceinline__ void fence_async_proxy() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* Fetches a description of the copy engine's before its first use. */
static __device__ __forceinline__ void prefetch_map(const CUtensorMap &map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
/* Asks for the line of `address` to be in the L2 cache soon. */
static __device__ __forceinline__ void prefetch_line(const void *address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}
/* Starts the copy of a box at coordinates (dim, row, head, batch); its bytes arrive at the barrier. */
static __device__ __forceinline__ void copy_box(void *to, const CUtensorMap &map, MemoryBarrier &barrier, int dim,
                                                int row, int head, int batch, uint64_t policy) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
                 "[%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared_address(to)),
                 "l"(&map), "r"(shared_address(&barrier)), "r"(dim), "r"(row), "r"(head), "r"(batch), "l"(policy)
                 : "memory");
}

/* Asks for a box to be in the L2 cache soon. */
static __device__ __forceinline__ void prefetch_box(const CUtensorMap &map, int dim, int row, int head, int batch,
                                                    uint64_t policy) {
    asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global.L2::cache_hint [%0, {%1, %2, %3, %4}], %5;" ::"l"(&map),
                 "r"(dim), "r"(row), "r"(head), "r"(batch), "l"(policy)
                 : "memory");
}

/* A cluster: thread blocks that run together and reach each other's shared memory. Its barrier, in two halves, for all
 * threads. Of what was written before, only barriers behind fence_barrier_init() may be used by others afterwards: to order
 * all writes is a fence of the whole device. */
static __device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
static __device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
/* Where a place of this thread block's shared memory lies in that of thread block `rank`. */
static __device__ __forceinline__ unsigned remote_address(const void *here, int rank) {
    unsigned there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(here)), "r"(rank));
    return there;
}
/* Starts a store there, whose bytes arrive at a barrier of that thread block. */
static __device__ __forceinline__ void send_remote(unsigned to, float x, unsigned barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to), "f"(x),
                 "r"(barrier)
                 : "memory");
}
static __device__ __forceinline__ void send_remote(unsigned to, const uint4 &x, unsigned barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
                 "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(barrier)
                 : "memory");
}
/* barrier_wait() for what other thread blocks have sent. */
static __device__ __forceinline__ void barrier_wait_cluster(MemoryBarrier &barrier, unsigned parity) {
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}" ::"r"(shared_address(&barrier)),
                 "r"(parity)
                 : "memory");
}

static __device__ __forceinline__ bool named_barrier_or(int id, int threads, bool value) {
    unsigned any;
    asm volatile("{\n"
                 ".reg .pred in, out;\n"
                 "setp.ne.u32 in, %1, 0;\n"
                 "barrier.cta.red.or.pred out, %2, %3, in;\n"
                 "selp.u32 %0, 1, 0, out;\n"
                 "}"
                 : "=r"(any)
                 : "r"((unsigned)value), "r"(id), "r"(threads)
                 : "memory");
    return any;
}

template <int REGISTERS> static __device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS> static __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

/* Before wgmma reads registers that have been written since the last one. */
static __device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
static __device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> static __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

/* A matrix in shared memory: rows of 128 bytes, permuted as the copy engine's 128-byte swizzle does, in groups of eight
 * rows. across: bytes from one piece of 64 columns to the next, for matrices whose columns are contiguous in n. */
static __device__ __forceinline__ uint64_t matrix_descriptor(const void *start, int across) {
    return (uint64_t)(shared_address(start) >> 4 & 0x3fff) | (uint64_t)(across >> 4) << 16 |
           (uint64_t)(1024 >> 4) << 32 | UINT64_C(1) << 62;
}

/* The descriptor of what lies `bytes` further on. Addresses of shared memory leave room for the sum. */
static __device__ __forceinline__ uint64_t matrix_at(uint64_t descriptor, int bytes) {
    return (descriptor >> 32) << 32 | (unsigned)((unsigned)descriptor + (unsigned)(bytes >> 4));
}

#define FAD_REGISTERS_32                                                                                               \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "                 \
    "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"

#define FAD_REGISTERS_64                                                                                               \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "                 \
    "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, "             \
    "%41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, "             \
    "%61, %62, %63}"

#define FAD_TILE(x, n) "+f"(x[n][0]), "+f"(x[n][1]), "+f"(x[n][2]), "+f"(x[n][3])
#define FAD_TILES_8(x, n)                                                                                              \
    FAD_TILE(x, n), FAD_TILE(x, n + 1), FAD_TILE(x, n + 2), FAD_TILE(x, n + 3), FAD_TILE(x, n + 4),                    \
        FAD_TILE(x, n + 5), FAD_TILE(x, n + 6), FAD_TILE(x, n + 7)
#define FAD_TILES_16(x, n) FAD_TILES_8(x, n), FAD_TILES_8(x, n + 8)

/* N7, one step for 64 rows by 128 keys: s (+)= a [64, 16] b [16, 128], a from registers. Lanes hold s and a as for
 * mma_step, warp w of the group the rows 16 w to 16 w + 15; b: keys are rows of 64 dims. accumulate: 0 starts a chain. */
template <fad_dtype T>
static __device__ __forceinline__ void wgmma_scores(float (&s)[16][4], const unsigned (&a)[4], uint64_t b,
                                                    int accumulate) {
#define FAD_WGMMA(type)                                                                                                \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"                                                          \
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " FAD_REGISTERS_64                     \
                 ", {%64, %65, %66, %67}, %68, p, 1, 1, 0;\n}"                                                         \
                 : FAD_TILES_16(s, 0)                                                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))
    if constexpr (T == FAD_BFLOAT16)
        FAD_WGMMA("bf16");
    else
        FAD_WGMMA("f16");
#undef FAD_WGMMA
}
/* The same with a from shared memory; and for 64 keys. */
template <fad_dtype T>
static __device__ __forceinline__ void wgmma_scores(float (&s)[16][4], uint64_t a, uint64_t b, int accumulate) {
#define FAD_WGMMA(type)                                                                                                \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                                          \
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " FAD_REGISTERS_64                     \
                 ", %64, %65, p, 1, 1, 0, 0;\n}"                                                                       \
                 : FAD_TILES_16(s, 0)                                                                                  \
                 : "l"(a), "l"(b), "r"(accumulate))
    if constexpr (T == FAD_BFLOAT16)
        FAD_WGMMA("bf16");
    else
        FAD_WGMMA("f16");
#undef FAD_WGMMA
}

template <fad_dtype T>
static __device__ __forceinline__ void wgmma_scores(float (&s)[8][4], uint64_t a, uint64_t b, int accumulate) {
#define FAD_WGMMA(type)                                                                                                \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                                          \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " FAD_REGISTERS_32                      \
                 ", %32, %33, p, 1, 1, 0, 0;\n}"                                                                       \
                 : FAD_TILES_8(s, 0)                                                                                   \
                 : "l"(a), "l"(b), "r"(accumulate))
    if constexpr (T == FAD_BFLOAT16)
        FAD_WGMMA("bf16");
    else
        FAD_WGMMA("f16");
#undef FAD_WGMMA
}

/* N7, one step for 64 rows by 8 * N values: o (+)= a [64, 16] b [16, 8 N]; b: keys are rows of values, 64 to a piece.
 * accumulate: 0 starts a chain. */
template <fad_dtype T, int N>
static __device__ __forceinline__ void wgmma_values(float (&o)[N][4], const unsigned (&a)[4], uint64_t b,
                                                    int accumulate = 1) {
    static_assert(N == 8 || N == 16, "64 or 128 values");
#define FAD_WGMMA(type, n, registers, tiles, a0, a1, a2, a3, b0, accumulate0)                                          \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" accumulate0 ", 0;\n"                                             \
                 "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " " registers ", {%" a0 ", %" a1       \
                 ", %" a2 ", %" a3 "}, %" b0 ", p, 1, 1, 1;\n}"                                                        \
                 : tiles(o, 0)                                                                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))
#define FAD_WGMMA_OF(type)                                                                                             \
    if constexpr (N == 8)                                                                                              \
        FAD_WGMMA(type, "64", FAD_REGISTERS_32, FAD_TILES_8, "32", "33", "34", "35", "36", "37");                      \
    else                                                                                                               \
        FAD_WGMMA(type, "128", FAD_REGISTERS_64, FAD_TILES_16, "64", "65", "66", "67", "68", "69")
    if constexpr (T == FAD_BFLOAT16) {
        FAD_WGMMA_OF("bf16");
    } else {
        FAD_WGMMA_OF("f16");
    }
#undef FAD_WGMMA_OF
#undef FAD_WGMMA
}

#endif
