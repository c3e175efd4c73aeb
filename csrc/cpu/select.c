#include "kernel.h"

#include <stdlib.h>

#define RUNS(name, condition)                                                                                          \
    static int runs_##name(void) { return condition; }
FAD_CPU_ISAS(RUNS)

static const struct {
    const fad_cpu_kernel *kernel;
    int (*runs)(void);
} kernels[] = {
#define ROW(name, condition) {&fad_cpu_kernel_##name, runs_##name},
    FAD_CPU_ISAS(ROW)};
enum { N_KERNELS = sizeof kernels / sizeof kernels[0] };

static const fad_cpu_kernel *runnable(int32_t index) {
    for (int i = 0; i < N_KERNELS; i++)
        if (kernels[i].runs() && index-- == 0)
            return kernels[i].kernel;
    return NULL;
}

const char *fad_cpu_isa(int32_t index) {
    const fad_cpu_kernel *kernel = index >= 0 ? runnable(index) : NULL;
    return kernel ? kernel->isa : NULL;
}

fad_status fad_cpu_select(fad_dtype dtype, const fad_cpu_kernel **kernel) {
    const char *forced = fad_forced_schedule()->isa, *wanted = forced ? forced : getenv("FLASH_ATTN_DET_ISA");
    if (dtype == FAD_FLOAT64 || !wanted || !*wanted) {
        *kernel = dtype == FAD_FLOAT64 ? &fad_cpu_kernel_f64 : runnable(0);
        return FAD_OK;
    }
    for (int32_t i = 0; (*kernel = runnable(i)); i++)
        if (!strcmp((*kernel)->isa, wanted))
            return FAD_OK;
    return fad_fail(FAD_INVALID_ARGUMENT,
                    "instruction set '%s' (from %s) is unknown or not available here, the best one is '%s'", wanted,
                    forced ? "the forced schedule" : "FLASH_ATTN_DET_ISA", runnable(0)->isa);
}

fad_status fad_cpu_select_backend(const fad_attn_problem *problem, const fad_backend **backend) {
    const fad_cpu_kernel *kernel;
    const fad_status status = fad_cpu_select(problem->dtype, &kernel);
    if (status == FAD_OK)
        *backend =
            fad_is_emulated(problem) && kernel == &fad_cpu_kernel_scalar ? &fad_cpu_mma_backend : &fad_cpu_backend;
    return status;
}

fad_status fad_cpu_fma_flops(int64_t iterations, double *flops) {
    const fad_cpu_kernel *kernel;
    if (!flops)
        return fad_fail(FAD_INVALID_ARGUMENT, "flops is null, expected an address");
    const fad_status status = fad_cpu_select(FAD_FLOAT32, &kernel);
    if (status == FAD_OK)
        *flops = kernel->fma_flops(iterations);
    return status;
}
