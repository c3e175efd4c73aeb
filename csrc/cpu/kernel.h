/* What a CPU kernel offers the scheduler (attention.c): one table of functions per instruction set, all built from
 * tile.inc, all with the same bits.
 *
 * A tile is up to 256 query rows that share a kv head: the rows of a sequence and the heads of a group, packed as
 * r = i * G + g. Its life: load it into scratch, run splits into states, fold the states in ascending order, finish. */
#ifndef FAD_CPU_KERNEL_H
#define FAD_CPU_KERNEL_H

#include <fenv.h>

#include "../core/core.h"
#include "../numerics/tensor_core.h"

/* What a vector lane stands for: a query row (many rows: K and V are broadcast) or a key, then a value dim (few rows:
 * K and V are the vectors). */
typedef enum fad_layout { FAD_LAYOUT_ROWS = 1, FAD_LAYOUT_KEYS = 2 } fad_layout;

enum {
    FAD_TILE_ROWS_MAX = 256,
    FAD_GRADIENT_BLOCKS_MAX = FAD_TILE_ROWS_MAX / FAD_BLOCK_KV /* of keys that a tile of the backward packs together */
};

typedef struct fad_cpu_tile {
    const fad_attn_problem *problem;
    fad_sequence seq;
    fad_layout layout;
    int64_t head_k, row0; /* kv head; first packed row */
    int64_t n_rows;       /* packed rows owned: all are written */
    int64_t n_active;     /* of these, rows below n_q: only they are computed */
} fad_cpu_tile;

/* A tile of the backward (N13): rows of some query heads of one group, against blocks of their keys. What is wanted must
 * be summed in one tile: dq needs all keys of the sequence; dk and dv all its rows, and all heads of the group. */
typedef struct fad_cpu_gradient_tile {
    const fad_attn_problem *problem;
    const fad_attn_problem *gradient; /* the same call, with dq, dk, dv, dout and dlse in the places of q .. lse */
    fad_sequence seq, gradient_seq;   /* the sequence in either */
    int64_t head_k, head, end_head;   /* kv head; query heads */
    int64_t row, end_row;             /* query rows, from a multiple of FAD_BLOCK_KV on */
    int64_t block, end_block;         /* blocks of keys, counted from position 0 */
    int64_t blocks_at_once;           /* of these: what is packed together */
    int want_q, want_kv;
    void *delta, *weight; /* [Hq][rows_h] compute type: of the sequence's rows */
    int64_t rows_h;
} fad_cpu_gradient_tile;

typedef struct fad_cpu_kernel {
    const char *isa;
    size_t (*scratch_bytes)(const fad_attn_problem *problem, int64_t tile_rows);
    /* layout 0: enough for either, chosen tile by tile */
    size_t (*state_bytes)(const fad_attn_problem *problem, int64_t tile_rows, fad_layout layout);
    void (*load)(const fad_cpu_tile *tile, void *scratch);
    void (*clear)(const fad_cpu_tile *tile, void *state);
    void (*run_split)(const fad_cpu_tile *tile, void *scratch, int64_t split,
                      void *state); /* state: any -> the split's */
    void (*fold)(const fad_cpu_tile *tile, void *state, const void *part);
    void (*finish)(const fad_cpu_tile *tile, void *state); /* adds the sink; writes out and lse */
    void (*store)(const fad_cpu_tile *tile, const void *state, const fad_partials *partials, int64_t index);
    double (*fma_flops)(int64_t iterations); /* see fad_cpu_fma_flops */
    /* Scratch of a gradient tile that sums dq of dq_rows rows, whole blocks of every head. */
    size_t (*gradient_bytes)(const fad_attn_problem *problem, int64_t blocks_at_once, int64_t dq_rows);
    void (*weigh_rows)(const fad_cpu_gradient_tile *tile, void *scratch);     /* delta and weight of one head's rows, */
    void (*tile_gradients)(const fad_cpu_gradient_tile *tile, void *scratch); /* then dq, or dk and dv, or all, */
    void (*sink_gradient)(const fad_cpu_gradient_tile *tile, void *sum); /* and the sequence's part of a head's sink */
} fad_cpu_kernel;

/* Instruction sets of this build, best first: X(name, condition under which this CPU runs it). Every CPU with AVX2 has
 * F16C, for which not every compiler has a query. */
#if defined(__x86_64__)
#define FAD_CPU_ISAS(X)                                                                                                \
    X(avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))    \
    X(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))                                           \
    X(scalar, 1)
#elif defined(__aarch64__)
#define FAD_CPU_ISAS(X) X(neon, 1) X(scalar, 1)
#else
#define FAD_CPU_ISAS(X) X(scalar, 1)
#endif

#define FAD_CPU_KERNEL_DECLARE(name, runs) extern const fad_cpu_kernel fad_cpu_kernel_##name;
FAD_CPU_ISAS(FAD_CPU_KERNEL_DECLARE)
#undef FAD_CPU_KERNEL_DECLARE
extern const fad_cpu_kernel fad_cpu_kernel_f64; /* fp64, one lane */

/* The kernel to run: the forced or environment's instruction set, else the best. FAD_INVALID_ARGUMENT for a name that
 * is unknown or cannot run here. */
fad_status fad_cpu_select(fad_dtype dtype, const fad_cpu_kernel **kernel);

/* The floating-point environment is part of the contract: round to nearest, subnormals kept, whatever the caller has
 * set and gets back by fesetenv. */
static inline fenv_t fad_cpu_enter_contract(void) {
    fenv_t caller;
    fegetenv(&caller);
    fesetenv(FE_DFL_ENV);
    return caller;
}

/* One unit of work of a call on one thread's memory. */
typedef void (*fad_cpu_item)(const void *call, int64_t item, char *memory);

/* Runs each of n_items once, on threads that have memory_bytes of memory each. */
void fad_cpu_run(const fad_runtime *runtime, fad_cpu_item item, const void *call, int64_t n_items, char *memory,
                 size_t memory_bytes);

/* N8: the sink of each head as one more state, behind the splits; empty for rows past n_q. */
void fad_cpu_store_sinks(const fad_attn_problem *problem, const fad_partials *partials);

/* The problem, with gradients in the places of tensors: dq, dk, dv, dout and dlse in those of q .. lse. */
static inline fad_attn_problem fad_cpu_gradient_problem(const fad_attn_problem *p, const fad_attn_gradients *g) {
    fad_attn_problem gradient = *p;
    gradient.q = g->dq, gradient.k = g->dk, gradient.v = g->dv;
    gradient.out = g->dout, gradient.lse = g->dlse;
    return gradient;
}

/* The backward of emulated tensor cores, one row at a time (mma_gradient.c). */
fad_status fad_cpu_mma_backward_workspace(const fad_attn_problem *problem, int32_t num_threads, size_t *bytes);
fad_status fad_cpu_mma_backward(const fad_attn_problem *problem, const fad_attn_gradients *gradients,
                                const fad_runtime *runtime);

/* Zeros in the rows of dq, dk and dv that no sequence uses. */
void fad_cpu_clear_unused(const fad_attn_problem *gradient);

/* N13: d_sinks [Hq] from the sums [sequences][Hq] of each sequence, ascending. */
void fad_cpu_sum_sinks(const fad_attn_problem *problem, const void *sums, void *d_sinks);

/* The tensor core that an emulated call asks for. */
static inline fad_tensor_core fad_cpu_tensor_core(const fad_attn_problem *p) {
    return fad_tensor_core_of(p->arithmetic == FAD_ARITHMETIC_MMA_SM90 ? 90 : 80, p->dtype == FAD_FLOAT16 ? -14 : -126);
}

#endif
