/* One instruction a function. */
#ifndef FAD_CUDA_PTX_CUH
#define FAD_CUDA_PTX_CUH

#include "../flash_attn_det.h"

static __device__ __forceinline__ unsigned shared_address(const void *p) {
    return (unsigned)__cvta_generic_to_shared(p);
}

/* The same, of which the compiler knows nothing from here on: neither where it comes from, nor that it is the same each time. No
 * instruction. The compiler would otherwise compute before a loop what rare code in it makes of a number, and spill what the
 * common path keeps in registers; or read the register of the thread's number again for every use, which takes longer than a
 * sum. */
static __device__ __forceinline__ int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}
static __device__ __forceinline__ unsigned opaque(unsigned x) {
    asm volatile("" : "+r"(x));
    return x;
}
static __device__ __forceinline__ float opaque(float x) {
    asm volatile("" : "+f"(x));
    return x;
}
/* Gives x any value, and tells the compiler that what it was is not needed: an operand that is read and written, of which
 * only what is written matters, would have to stay in the same registers wherever it is used. */
static __device__ __forceinline__ void set_to_anything(float &x) { asm volatile("" : "=f"(x)); }
static __device__ __forceinline__ void set_to_anything(unsigned &x) { asm volatile("" : "=r"(x)); }
/* The number of the lane. */
static __device__ __forceinline__ int opaque_lane() { return opaque((int)(threadIdx.x % 32)); }

/* How long the L2 cache should keep what a copy reads. */
static __device__ __forceinline__ uint64_t keep_as_usual() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
static __device__ __forceinline__ uint64_t read_once() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
/* Starts the copy of 16 bytes from global to shared memory; the last 16 - bytes of them become zeros. */
static __device__ __forceinline__ void cp_async16(void *to, const void *from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                 : "memory");
}
/* The same; to: shared_address(). With a policy of the L2 cache, */
static __device__ __forceinline__ void cp_async16(unsigned to, const void *from, int bytes, uint64_t policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from), "r"(bytes),
                 "l"(policy)
                 : "memory");
}
/* or without. */
struct AsUsual {};
static __device__ __forceinline__ void cp_async16(unsigned to, const void *from, int bytes, AsUsual) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
/* The same of 4 bytes, or of none. */
static __device__ __forceinline__ void cp_async4(void *to, const void *from, int bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                 : "memory");
}
/* Closes the group of copies that this thread has started. */
static __device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/* Waits until at most PENDING of this thread's groups are unfinished. Other threads see them after a barrier. */
template <int PENDING> static __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

/* A barrier in shared memory: a phase completes with its `count`th arrival. */
typedef uint64_t MemoryBarrier;

static __device__ __forceinline__ void barrier_init(MemoryBarrier &barrier, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(count) : "memory");
}
static __device__ __forceinline__ void barrier_arrive(MemoryBarrier &barrier) {
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(shared_address(&barrier))
                 : "memory");
}
/* Arrives when the copies that this thread has started so far are there. */
static __device__ __forceinline__ void barrier_arrive_copied(MemoryBarrier &barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
/* Waits until the phase of this parity has completed; the phase before the first counts as one of parity 1. */
static __device__ __forceinline__ void barrier_wait(MemoryBarrier &barrier, unsigned parity) {
#if __CUDA_ARCH__ >= 900
#define FAD_WAIT "mbarrier.try_wait" /* sleeps a while */
#else
#define FAD_WAIT "mbarrier.test_wait"
#endif
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n" FAD_WAIT ".parity.shared.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}" ::"r"(shared_address(&barrier)),
                 "r"(parity)
                 : "memory");
#undef FAD_WAIT
}
/* A barrier of some warps; id 0 is __syncthreads. */
static __device__ __forceinline__ void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
/* The same for warps that do not wait. */
static __device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/* The next kernel in the stream may start once every thread block has come here or ended, if it waits for this one where it
 * must: both do nothing where they have been compiled for less than compute capability 9.0, and nothing unless it has been
 * launched that way. */
static __device__ __forceinline__ void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
static __device__ __forceinline__ void wait_for_last_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* 16 bytes, read where this stands in the code. */
static __device__ __forceinline__ uint4 load_shared(const uint4 *from) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(shared_address(from))
                 : "memory");
    return x;
}

/* Four 8x8 matrices of 16-bit values; lane i gives the address of row i % 8 of matrix i / 8, 16 bytes. */
static __device__ __forceinline__ void ldmatrix(unsigned (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
static __device__ __forceinline__ void ldmatrix_transposed(unsigned (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

#if __CUDA_ARCH__ >= 900
/* Stores what ldmatrix loads. */
static __device__ __forceinline__ void stmatrix(const unsigned (&r)[4], void *row) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}
#endif

/* N7, one step: d [16, 8] += a [16, 16] b [16, 8]. Lane 4g + t holds, of d, rows g (0, 1) and g + 8 (2, 3), columns
 * 2t and 2t + 1. */
template <fad_dtype T>
static __device__ __forceinline__ void mma_step(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    if constexpr (T == FAD_BFLOAT16)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                     "{%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                     "{%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* N7: the exp2 of the mma family. */
static __device__ __forceinline__ float ex2(float x) {
    float y;
    asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* Two values rounded to nearest even, low half first. NaN has other bits than the contract's canonical one. */
template <fad_dtype T> static __device__ __forceinline__ unsigned pack2(float low, float high) {
    unsigned u;
    if constexpr (T == FAD_BFLOAT16)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(u) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(u) : "f"(high), "f"(low));
    return u;
}
/* The sum of two such words, half by half. */
template <fad_dtype T> static __device__ __forceinline__ unsigned add2(unsigned a, unsigned b) {
    unsigned u;
    if constexpr (T == FAD_BFLOAT16) /* its addition is of 9.0, a * 1 + b of 8.0 */
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(u) : "r"(a), "r"(0x3f803f80u), "r"(b));
    else
        asm("add.rn.f16x2 %0, %1, %2;" : "=r"(u) : "r"(a), "r"(b));
    return u;
}
/* The first of two such words plus 0 times the second: what is finite changes nothing, Inf and NaN leave NaN. */
template <fad_dtype T> static __device__ __forceinline__ unsigned add_zero_times(unsigned sum, unsigned a) {
    if constexpr (T == FAD_BFLOAT16)
        asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(a), "r"(0));
    else
        asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(a), "r"(0));
    return sum;
}
/* Two 16-bit values: not 0 if any is Inf or NaN. Adding its lowest bit to an exponent carries if all bits are set. */
template <fad_dtype T> static __device__ __forceinline__ unsigned exponents_full(unsigned pair) {
    constexpr unsigned EXPONENTS = T == FAD_BFLOAT16 ? 0x7f807f80u : 0x7c007c00u;
    constexpr unsigned LOWEST = T == FAD_BFLOAT16 ? 0x00800080u : 0x04000400u;
    return ((pair & EXPONENTS) + LOWEST) & 0x80008000u;
}
/* The halves of such a word, exactly. */
template <fad_dtype T> static __device__ __forceinline__ float low_half(unsigned u) {
    if constexpr (T == FAD_BFLOAT16)
        return __uint_as_float(u << 16);
    float x;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low;}" : "=f"(x) : "r"(u));
    return x;
}
template <fad_dtype T> static __device__ __forceinline__ float high_half(unsigned u) {
    if constexpr (T == FAD_BFLOAT16)
        return __uint_as_float(u & 0xffff0000u);
    float x;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high;}" : "=f"(x) : "r"(u));
    return x;
}

#endif
