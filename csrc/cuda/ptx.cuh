/* One instruction a function. */
#ifndef FAD_CUDA_PTX_CUH
#define FAD_CUDA_PTX_CUH

/* Starts the copy of 16 bytes from global to shared memory; the last 16 - bytes of them become zeros. */
static __device__ __forceinline__ void cp_async16(void *to, const void *from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((unsigned)__cvta_generic_to_shared(to)),
                 "l"(from), "r"(bytes)
                 : "memory");
}
/* Closes the group of copies that this thread has started. */
static __device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/* Waits until at most PENDING of this thread's groups are unfinished. Other threads see them after a barrier. */
template <int PENDING> static __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

#endif
