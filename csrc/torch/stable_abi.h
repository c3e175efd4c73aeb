/* The part of PyTorch's stable C ABI that the shim uses, declared again in C.
 *
 * PyTorch's own declarations (torch/csrc/inductor/aoti_torch/c/shim.h and torch/csrc/stable/c/shim.h, torch >= 2.10) sit
 * in C++ headers, but the symbols are plain C. Declaring them here means that no torch is needed to build, and one binary
 * serves every torch >= 2.10. The list is an X-macro: a test includes the real headers, expands it to static_asserts, and
 * so proves that every type below is the real one; stub.c expands it to the library that the linker sees.
 * FAD_TORCH_CUDA_FUNCTION lists what only CUDA builds of torch have, in another library: stream.c looks it up. */
#ifndef FAD_TORCH_STABLE_ABI_H
#define FAD_TORCH_STABLE_ABI_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct AtenTensorOpaque *AtenTensorHandle;
typedef struct TorchLibraryOpaque *TorchLibraryHandle;
typedef struct DeviceGuardOpaque *DeviceGuardHandle;
typedef uint64_t StableIValue;  /* tensor: handle; int: its bits; float: the bits of the double; bool: the low byte */
typedef int32_t AOTITorchError; /* 0: success */

#ifndef FAD_TORCH_FUNCTION
#define FAD_TORCH_FUNCTION(result, name, ...) result name(__VA_ARGS__);
#endif
#ifndef FAD_TORCH_CUDA_FUNCTION
#define FAD_TORCH_CUDA_FUNCTION(result, name, ...) typedef result (*name##_fn)(__VA_ARGS__);
#endif

FAD_TORCH_FUNCTION(int32_t, aoti_torch_device_type_cpu, void)
FAD_TORCH_FUNCTION(int32_t, aoti_torch_dtype_uint8, void)
FAD_TORCH_FUNCTION(int32_t, aoti_torch_dtype_int32, void)
FAD_TORCH_FUNCTION(int32_t, aoti_torch_dtype_float16, void)
FAD_TORCH_FUNCTION(int32_t, aoti_torch_dtype_bfloat16, void)
FAD_TORCH_FUNCTION(int32_t, aoti_torch_dtype_float32, void)
FAD_TORCH_FUNCTION(int32_t, aoti_torch_dtype_float64, void)

/* Sizes and strides are borrowed: valid while the handle is. */
FAD_TORCH_FUNCTION(AOTITorchError, aoti_torch_get_data_ptr, AtenTensorHandle tensor, void **data)
FAD_TORCH_FUNCTION(AOTITorchError, aoti_torch_get_dim, AtenTensorHandle tensor, int64_t *ndim)
FAD_TORCH_FUNCTION(AOTITorchError, aoti_torch_get_numel, AtenTensorHandle tensor, int64_t *numel)
FAD_TORCH_FUNCTION(AOTITorchError, aoti_torch_get_sizes, AtenTensorHandle tensor, int64_t **sizes)
FAD_TORCH_FUNCTION(AOTITorchError, aoti_torch_get_strides, AtenTensorHandle tensor, int64_t **strides)
FAD_TORCH_FUNCTION(AOTITorchError, aoti_torch_get_dtype, AtenTensorHandle tensor, int32_t *dtype)
FAD_TORCH_FUNCTION(AOTITorchError, aoti_torch_get_device_type, AtenTensorHandle tensor, int32_t *device_type)
FAD_TORCH_FUNCTION(AOTITorchError, aoti_torch_get_device_index, AtenTensorHandle tensor, int32_t *device_index)

/* The new handle is owned by the caller. */
FAD_TORCH_FUNCTION(AOTITorchError, aoti_torch_empty_strided, int64_t ndim, const int64_t *sizes, const int64_t *strides,
                   int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle *tensor)
FAD_TORCH_FUNCTION(AOTITorchError, aoti_torch_delete_tensor_object, AtenTensorHandle tensor)

FAD_TORCH_FUNCTION(AOTITorchError, aoti_torch_library_init_impl, const char *ns, const char *dispatch_key,
                   const char *file, uint32_t line, TorchLibraryHandle *library)
FAD_TORCH_FUNCTION(AOTITorchError, torch_library_impl, TorchLibraryHandle library, const char *name,
                   void (*kernel)(StableIValue *stack, uint64_t n_arguments, uint64_t n_results),
                   uint64_t extension_build_version)

FAD_TORCH_FUNCTION(AOTITorchError, torch_get_num_threads, uint32_t *n_threads)
FAD_TORCH_FUNCTION(AOTITorchError, torch_parallel_for, int64_t begin, int64_t end, int64_t grain_size,
                   void (*range)(int64_t begin, int64_t end, void *context), void *context)

/* Makes a device of torch's accelerator current until the guard is deleted. */
FAD_TORCH_FUNCTION(AOTITorchError, aoti_torch_create_device_guard, int32_t device_index, DeviceGuardHandle *guard)
FAD_TORCH_FUNCTION(AOTITorchError, aoti_torch_delete_device_guard, DeviceGuardHandle guard)

FAD_TORCH_CUDA_FUNCTION(AOTITorchError, aoti_torch_get_current_cuda_stream, int32_t device_index, void **stream)

/* Throws a C++ exception when condition is false: callers are compiled with -fexceptions and hold nothing to release. */
FAD_TORCH_FUNCTION(void, aoti_torch_check, bool condition, const char *function, const char *file, uint32_t line,
                   const char *message)

#ifdef __cplusplus
}
#endif
#endif
