/* flash_attn_det - the public C API.
 *
 * Deterministic, batch-invariant attention. Scheduling is free, arithmetic is fixed: the bits of one query row depend
 * only on that row, on the keys and values it may see, on their positions within its own sequence, and on the static
 * configuration. The arithmetic is written down in numerics/contract.h; this header only says how to ask for it.
 *
 * Conventions
 *   - Letters: B sequences, Hq query heads, Hk key/value heads (Hq = G * Hk; query head h reads kv head h / G),
 *     Sq / Sk rows, D head dim of q and k, Dv head dim of v and out. Indices b h i (query) j (key) d.
 *   - Strides and lengths count elements, sizes whose name ends in _bytes count bytes. All offsets are 64-bit.
 *   - No function allocates, prints, aborts, or keeps a pointer after it returns. The caller brings the workspace.
 *   - Every function that returns fad_status checks all its arguments before any work; when the status is not FAD_OK,
 *     no output was touched and fad_last_error() says which argument had which value and what was expected. Arrays of
 *     lengths, entries and pages on a CUDA device cannot be checked; wrong ones are clamped to what the buffers hold.
 *   - Outputs overlap neither inputs nor each other; a cache that is appended to is an output.
 *   - Thread-safe: there is no mutable global state except the thread-local error text and forced schedule.
 */
#ifndef FLASH_ATTN_DET_H
#define FLASH_ATTN_DET_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FAD_API __attribute__((visibility("default")))

/* Pinned: a value is never reused or renumbered. */
typedef enum fad_status {
    FAD_OK = 0,
    FAD_INVALID_ARGUMENT = 1, /* the call can never be right: shapes, strides, ranges */
    FAD_UNSUPPORTED = 2,      /* a sensible request that this build or this device cannot serve */
    FAD_DEVICE_ERROR = 3      /* the device refused a launch */
} fad_status;

typedef enum fad_dtype { FAD_FLOAT32 = 0, FAD_FLOAT16 = 1, FAD_BFLOAT16 = 2, FAD_FLOAT64 = 3 } fad_dtype;
typedef enum fad_device { FAD_CPU = 0, FAD_CUDA = 1 } fad_device;

/* The family of roundings (clause N7). AUTO is FMA on the CPU and for fp32 and fp64 inputs, MMA otherwise. The last two
 * are MMA as compute capability 9.0 and 8.0 round it, emulated on the CPU for fp16 and bf16: for audits, and slow. Pinned. */
typedef enum fad_arithmetic {
    FAD_ARITHMETIC_AUTO = 0,
    FAD_ARITHMETIC_FMA = 1,
    FAD_ARITHMETIC_MMA = 2,
    FAD_ARITHMETIC_MMA_SM90 = 3,
    FAD_ARITHMETIC_MMA_SM80 = 4
} fad_arithmetic;

/* [b, s, h, :] view of a buffer; the last dimension is contiguous, the other strides are arbitrary (also 0 or < 0). */
typedef struct fad_view {
    void *data;
    int64_t stride_b, stride_s, stride_h; /* elements; stride_b is ignored when the sequences are packed, and is from
                                             page to page when they are paged */
} fad_view;

/* One attention call. Zero-initialise, then fill; a null pointer switches the optional part off.
 *
 * Dense (cu_seqlens_* null):  q [B, Sq, Hq, D], k [B, Sk, Hk, D], v [B, Sk, Hk, Dv], out [B, Sq, Hq, Dv], lse [B, Hq, Sq].
 * Packed (both non-null):     q [Sq, Hq, D], k [Sk, Hk, D], ...: Sq and Sk count the rows of the whole buffer; sequence b
 *                             owns rows cu_seqlens[b] .. cu_seqlens[b + 1] - 1. lse [Hq, Sq].
 * Paged (block_table):        k [Bk, page_size, Hk, D], v [Bk, page_size, Hk, Dv] are a pool of Bk pages, and Sk is what a
 *                             sequence can hold: Sk / page_size columns of block_table [B, columns]. Row r of sequence b
 *                             is row r % page_size of page block_table[b][r / page_size]. q is dense, or packed by
 *                             cu_seqlens_q alone, and then seqused_k is needed. Entries behind the last key are not read.
 * Cached (cache_batch_idx):   dense, but k [Bk, Sk, Hk, D], v [Bk, Sk, Hk, Dv]: sequence b reads entry cache_batch_idx[b].
 *
 * Sequence b has n_k keys, numbered by their position in the sequence: pos = k_pos[b] + 0 .. n_k - 1. Its n_q query rows
 * are aligned to the end of the keys (bottom-right): row i has position k_pos[b] + n_k - n_q + i. Query rows past n_q
 * get out = 0 and lse = -inf. */
typedef struct fad_attn_problem {
    fad_device device;
    fad_dtype
        dtype; /* of q, k, v and out. Scores, lse and partials: fp64 for FAD_FLOAT64, fp32 otherwise ("compute type") */
    fad_arithmetic arithmetic;

    int64_t B, Sq, Sk, Hq, Hk, D, Dv; /* D, Dv in 1..256; Hq a positive multiple of Hk; any other may be 0 */
    fad_view q, k, v, out;
    fad_view lse; /* compute type; data may be null when lse is not wanted */

    const int32_t *cu_seqlens_q, *cu_seqlens_k; /* [B + 1] each, ascending from 0, or both null; with
                                                   block_table cu_seqlens_q alone, or none */
    const int32_t *seqused_q, *seqused_k;       /* [B] rows in use, <= the rows that the sequence owns; null: all */
    const int32_t *leftpad_k;                   /* [B] rows to skip before the first key (not for packed k); null: 0.
                                                   seqused_k counts from there: n_k = seqused_k, or Sk - leftpad_k */
    const int32_t *k_pos;                       /* [B] position of the first key in its sequence, >= 0; null: 0 */

    int64_t Bk;                     /* pages or entries of k and v, for the next two only */
    const int32_t *cache_batch_idx; /* [B] entries of k and v, may repeat; null: entry b */
    const int32_t *block_table;     /* [B, Sk / page_size] pages, may repeat; null: not paged */
    int64_t block_table_stride;     /* elements from the row of a sequence to the next */
    int64_t page_size;              /* rows of a page, at least 1 */

    double scale;                      /* finite; multiplies q.k */
    int32_t causal;                    /* 0 or 1: row i sees positions <= its own */
    int64_t window_left, window_right; /* row i sees positions in [pos - left, pos + right]; -1: unbounded; <= 2^40 */
    double softcap;                    /* > 0: scores become softcap * tanh(score / softcap); 0: off */
    const void *alibi_slopes;          /* compute type; adds -slope * |pos_q - pos_k| to the score; null: off. Only for
                                          positions below FAD_MAX_ALIBI_KEYS */
    int64_t alibi_stride_b;            /* slopes are [B, Hq] with this batch stride; 0 shares [Hq] */
    const void *sinks;                 /* [Hq] compute type: one more logit per head, with no value; null: off */

    int64_t split_size; /* keys per split, a positive multiple of FAD_MMA_BLOCK_KV; changes bits (clause N3) */
} fad_attn_problem;

/* How the caller's machine runs things. None of it can change a bit. */
typedef void (*fad_range_fn)(int64_t begin, int64_t end, void *ctx);
typedef struct fad_runtime {
    int32_t num_threads; /* >= 1; workspace must have been sized for as many */
    /* Calls fn over [0, n) in disjoint ranges, each exactly once, and returns when all are done. Null: serial. */
    void (*parallel_for)(int64_t n, fad_range_fn fn, void *ctx);
    void *workspace; /* fad_attn_workspace() bytes, 64-byte aligned; contents on entry and exit are meaningless */
    size_t workspace_bytes;
    void *stream; /* CUDA stream handle; unused on the CPU */
} fad_runtime;

/* One unfinished state per split, in ascending order of position (clause N8), contiguous, compute type:
 * o [n_splits, B, Sq, Hq, Dv], m and l [n_splits, B, Hq, Sq]. With sinks, one more state at the end holds the sink. */
typedef struct fad_partials {
    void *o, *m, *l;
    int64_t n_splits;
} fad_partials;

/* What fad_attn_backward reads and writes beside a problem, whose out and lse are inputs there (clauses N13, N14). */
typedef struct fad_attn_gradients {
    fad_view dout;       /* gradient of out: its shape and dtype */
    fad_view dlse;       /* gradient of lse: its shape and dtype; null: zero */
    fad_view dq, dk, dv; /* written: shapes and dtype of q, k, v. Rows out of use become 0 */
    void *d_sinks;       /* written: [Hq] compute type; null: not wanted */
} fad_attn_gradients;

/* Rotary embedding (clause N12) of the first `dim` values of a row, by row `position` of two tables. */
typedef struct fad_rotary {
    const void *cos, *sin; /* [n_positions, dim / 2], contiguous; null: no rotation */
    fad_dtype dtype;       /* of the tables: that of the rows, or their compute type */
    int64_t n_positions, dim;
    int32_t interleaved; /* 1: pairs are values (2 i, 2 i + 1); 0: (i, i + dim / 2) */
} fad_rotary;

/* Writes new rows behind the keys and values of a cache: row i of sequence b to row cache_seqlens[b] + i, which is also
 * its position for the rotation of k. k and v are a cache as in fad_attn_problem: dense [B, Sk, ...], one entry for each
 * cache_batch_idx, or paged. Two rows that go to the same place are the caller's mistake: what is left there is any
 * mixture of them. Rows that the cache has no room for are refused before anything is written; on a CUDA device they are
 * skipped, and positions behind the tables' last count as that. */
typedef struct fad_cache_append {
    fad_device device;
    fad_dtype dtype;              /* of all four tensors */
    int64_t B, S, Hk, D, Dv;      /* S new rows a sequence */
    fad_view k_new, v_new;        /* [B, S, Hk, D] and [B, S, Hk, Dv] */
    fad_view k, v;                /* written */
    const int32_t *cache_seqlens; /* [B] rows of the cache in use, left padding among them; null: 0 */
    int64_t Sk, Bk;               /* as in fad_attn_problem, and so on: */
    const int32_t *cache_batch_idx, *block_table;
    int64_t block_table_stride, page_size;
    fad_rotary rotary;
} fad_cache_append;

/* out = x, rotated: x and out [B, S, H, D]. Row i of sequence b is at position offsets[b] + i, or offsets[b]. */
typedef struct fad_rotation {
    fad_device device;
    fad_dtype dtype;
    int64_t B, S, H, D;
    fad_view x, out;
    const int32_t *offsets; /* [B]; null: 0 */
    int32_t advance;        /* 1: positions count up along a sequence; 0: all its rows are at offsets[b] */
    fad_rotary rotary;      /* positions behind its last are refused; on a CUDA device they count as its last */
} fad_rotation;

FAD_API fad_status fad_attn_check(const fad_attn_problem *problem);

/* Bytes of workspace for a forward; never of the order of Sq * Sk. On the CPU: tiles for each of num_threads threads,
 * B + 2 offsets and, where there are fewer tiles than the threads can use, states of the compute type for about eight
 * splits a thread. On a CUDA device num_threads does not count. Where few rows meet a long cache:
 * one state per split and row; in the mma family never more than K and V, in the fma family with head dims of 128 and the
 * default split size at most half of them. Else, for 16-bit out with several splits: fma, fp32 [rows, Hq, Dv]; mma, at
 * most one fp32 tile of 64 or 128 rows for each thread block that the device holds at once. The mma family takes 64 bytes
 * more. Else next to nothing. */
FAD_API fad_status fad_attn_workspace(const fad_attn_problem *problem, int32_t num_threads, size_t *bytes);
FAD_API fad_status fad_attn_forward(const fad_attn_problem *problem, const fad_runtime *runtime);

/* The backward of a forward that left out and lse, of the same arithmetic; caches (block_table, cache_batch_idx) have
 * none. Slopes get no gradient. The workspace is of the order of B * Hq * Sq elements of the compute type; on the CPU also
 * tiles for each thread: packed rows and keys, and sums of dq for the rows of a tile, at most 4 MiB where that saves
 * work. */
FAD_API fad_status fad_attn_backward_workspace(const fad_attn_problem *problem, int32_t num_threads, size_t *bytes);
FAD_API fad_status fad_attn_backward(const fad_attn_problem *problem, const fad_attn_gradients *gradients,
                                     const fad_runtime *runtime);

/* The split-KV form that a user can see. Dense problems with k_pos == null only. out and lse are ignored.
 * count = ceil(Sk / split_size), and one more with sinks; needs the same workspace as a forward. */
FAD_API fad_status fad_attn_partials_count(const fad_attn_problem *problem, int64_t *count);
FAD_API fad_status fad_attn_partials(const fad_attn_problem *problem, const fad_partials *partials,
                                     const fad_runtime *runtime);

/* Neither needs a workspace. */
FAD_API fad_status fad_append_to_cache(const fad_cache_append *append, const fad_runtime *runtime);
FAD_API fad_status fad_rotate(const fad_rotation *rotation, const fad_runtime *runtime);

/* Detail of this thread's last status that was not FAD_OK; never null, valid until the thread's next call. */
FAD_API const char *fad_last_error(void);

/* The contract's constants by name ("BLOCK_KV", "DEFAULT_SPLIT_SIZE", ...); FAD_INVALID_ARGUMENT for an unknown name. */
FAD_API fad_status fad_constant(const char *name, int64_t *value);
/* Name of constant number index, or null past the end: the list that Python reads. */
FAD_API const char *fad_constant_name(int32_t index);

/* Instruction sets compiled in and runnable on this CPU, best first: name of number index, or null past the end.
 * Chosen at run time; FLASH_ATTN_DET_ISA=<name> in the environment overrides. */
FAD_API const char *fad_cpu_isa(int32_t index);

/* For benchmarks: runs independent fp32 fmas from registers on this thread and returns how many operations they were;
 * over the time it took, the peak that the forward can be held against. */
FAD_API fad_status fad_cpu_fma_flops(int64_t iterations, double *flops);

/* For tests: force what the scheduler would choose, on the calling thread, until changed. Bits must not notice. */
typedef struct fad_schedule {
    const char *isa;        /* a name from fad_cpu_isa(), fp64 ignores it; null: best. Must outlive the setting */
    int32_t layout;         /* CPU. 0: auto, 1: a lane is a query row ("rows"), 2: a lane is a key ("keys") */
    int32_t tile_rows;      /* 0: auto; query rows of one work item, 1 .. 256. Backward: CPU, in whole blocks */
    int32_t split_parallel; /* 0: auto, 1: never (splits folded in place), 2: always (partials in the workspace).
                               Backward: CPU. 1: all gradients in one pass over the keys, 2: dk and dv, then dq */
    int32_t kernel;         /* CUDA, mma family. 0: auto, 1: generic, 2: Hopper's, and generic where it cannot run,
                               3: Hopper's for few rows whose clusters share a split, and 2 where it cannot run */
} fad_schedule;
FAD_API fad_status fad_force_schedule(const fad_schedule *schedule); /* null: back to automatic */

#ifdef __cplusplus
}
#endif
#endif
