/* Kernels over GradientStep: delta and weight of rows; dk and dv of keys; dq of rows; the gradient of the sinks. Every
 * gradient has one owner, which adds its blocks in ascending order. */
#ifndef FAD_CUDA_FMA_GRADIENT_CUH
#define FAD_CUDA_FMA_GRADIENT_CUH

#include "fma_gradient_step.cuh"
#include "output.cuh"

/* Zeros in [entries, rows, heads, n] of a view: what no sequence uses has no other owner. A warp a row and head. */
static __global__ void clear_gradient(fad_view view, int64_t bytes, int64_t entries, int64_t rows, int64_t heads,
                                      int64_t n) {
    const int64_t warps = (int64_t)gridDim.x * (THREADS / 32), end = entries * rows * heads;
    for (int64_t at = (int64_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32; at < end; at += warps) {
        const int64_t row = fad_quotient(at, heads), entry = fad_quotient(row, rows);
        char *to =
            (char *)view.data +
            (entry * view.stride_b + (row - entry * rows) * view.stride_s + (at - row * heads) * view.stride_h) * bytes;
        for (int64_t d = threadIdx.x % 32; d < n; d += 32)
            if (bytes == 4)
                ((float *)to)[d] = 0;
            else
                ((uint16_t *)to)[d] = 0;
    }
}

/* A row of a gradient: its dtype, and where row i of the tile's sequence and head h lie. */
static __device__ OutRow gradient_row(const fad_view &view, fad_dtype dtype, int64_t first, int64_t i, int64_t h) {
    return {(char *)view.data + (first + i * view.stride_s + h * view.stride_h) * (dtype == FAD_FLOAT32 ? 4 : 2),
            dtype};
}

/* The e of a row's sink (N13). */
static __device__ float sink_exponential(const fad_attn_problem &p, int64_t h, float lse) {
    return fad_f32_saved_exponential(((const float *)p.sinks)[h], (float)FAD_LOG2E, fad_f32_saved_reference(lse));
}

/* Keys that some row of a tile sees. */
static __device__ fad_interval seen_by_rows(const GradientTile &t) {
    const int64_t last = min(t.block * BLOCK + BLOCK, t.seq.span.n_q) - 1;
    return {fad_visible(&t.seq.span, t.block * BLOCK).lo, fad_visible(&t.seq.span, last).hi};
}

/* delta of row threadIdx.x, but for dlse: a chain over d. */
static __device__ float chain_delta(const GradientStep &step, const GradientMatrix &dout, const GradientMatrix &out) {
    float sum = 0;
    for (int chunk = 0; chunk < chunks_of(out.n); chunk++) {
        step.load_rows_of(dout, chunk);
        out.load(step.sm.b, chunk, step.first_row, [&](int r) { return step.sm.present[r] != 0; });
        __syncthreads(); /* a and b may be read */
        if (threadIdx.x < BLOCK)
            for (int d = 0; d < BLOCK; d++)
                sum = fad_f32_fma(step.sm.a[threadIdx.x * CHUNK_LD + d], step.sm.b[threadIdx.x * CHUNK_LD + d], sum);
        __syncthreads(); /* a and b may be overwritten */
    }
    return sum;
}

/* N13: delta and weight of a tile of rows. */
static __global__ void __launch_bounds__(THREADS, 2) weigh_rows(const __grid_constant__ GradientCall call) {
    extern __shared__ __align__(16) int64_t shared_memory[];
    __shared__ GradientTile t;
    const fad_attn_problem &p = call.p;
    if (!share_gradient_tile<ByRows>(call, blockIdx.x, t))
        return;
    const GradientMatrix q = matrix_of(p.q, p.dtype, p.D, t.seq.q, t.head);
    const GradientMatrix out = matrix_of(p.out, p.dtype, p.Dv, t.seq.out, t.head);
    const GradientMatrix k = matrix_of(p.k, p.dtype, p.D, t.seq.k, t.head / fad_group(&p));
    const GradientMatrix dout = matrix_of(call.g.out, p.dtype, p.Dv, t.gradient.out, t.head);
    GradientStep step(call, t, shared_memory, ScoresOver::KEYS);
    step.set_rows(t.block * BLOCK, t.head, false);
    __syncthreads(); /* the rows may be read */
    const float delta = chain_delta(step, dout, out);
    const fad_interval seen = seen_by_rows(t);
    float l = 0; /* of row threadIdx.x */
    for (int64_t lo = seen.lo / BLOCK * BLOCK; lo < seen.hi; lo += BLOCK) {
        float e[EDGE][EDGE], sum = 0;
        step.set_keys(lo);
        step.dot(q, k, e);
        step.exponentials(e);
        step.publish_by_key(e);
        __syncthreads(); /* x may be read; it is overwritten behind the barrier of the next set_keys */
        if (threadIdx.x < BLOCK)
            for (int j = 0; j < BLOCK; j++)
                sum = fad_f32_add(sum, step.sm.x[j * CHUNK_LD + threadIdx.x]);
        l = fad_f32_add(l, sum);
    }
    const int64_t i = step.first_row + threadIdx.x, saved = t.saved + t.head * p.Sq + i;
    if (threadIdx.x >= BLOCK || i >= t.seq.span.n_q)
        return;
    const fad_view &dlse = call.g.lse;
    const int64_t at = t.gradient.lse + i * dlse.stride_s + t.head * dlse.stride_h;
    call.delta[saved] =
        step.sm.present[threadIdx.x] ? fad_f32_sub(delta, dlse.data ? ((const float *)dlse.data)[at] : 0) : 0;
    if (p.sinks)
        l = fad_f32_add(l, sink_exponential(p, t.head, step.saved_lse(i, t.head)));
    call.weight[saved] = fad_f32_saved_weight(l);
}

/* N13: dk and dv of a tile of keys: over the query heads of its kv head, ascending, then over rows in blocks. */
static __global__ void __launch_bounds__(THREADS, 2) key_gradients(const __grid_constant__ GradientCall call) {
    extern __shared__ __align__(16) int64_t shared_memory[];
    __shared__ GradientTile t;
    __shared__ GradientMatrix k, v, q, dout; /* shared, because registers are scarce */
    const fad_attn_problem &p = call.p;
    const int slice = (int)(blockIdx.x % call.slices);
    if (!share_gradient_tile<ByKeys>(call, blockIdx.x / call.slices, t))
        return;
    if (threadIdx.x == 0) {
        k = matrix_of(p.k, p.dtype, p.D, t.seq.k, t.head);
        v = matrix_of(p.v, p.dtype, p.Dv, t.seq.v, t.head);
    }
    GradientStep step(call, t, shared_memory, ScoresOver::KEYS);
    GradientSums dk(step.sm.sums, p.D, slice, call.slices);
    GradientSums dv(step.sm.sums + BLOCK * dk.ld, p.Dv, slice, call.slices);
    const fad_span &span = t.seq.span;
    const int64_t group = fad_group(&p), lo = t.block * BLOCK;
    dk.clear();
    dv.clear();
    __syncthreads(); /* k, v and the sums may be read */
    for (int64_t h = t.head * group; h < (t.head + 1) * group; h++) {
        if (threadIdx.x == 0) { /* they are read between the barriers of a step */
            q = matrix_of(p.q, p.dtype, p.D, t.seq.q, h);
            dout = matrix_of(call.g.out, p.dtype, p.Dv, t.gradient.out, h);
        }
        for (int64_t first = 0; first < span.n_q; first += BLOCK) {
            const int64_t last = min(first + BLOCK, span.n_q) - 1;
            if (fad_tile_kind(&span, first, last, lo, lo + BLOCK) == FAD_TILE_SKIP)
                continue;
            float s[EDGE][EDGE], dp[EDGE][EDGE];
            step.set_rows(first, h, true);
            step.set_keys(lo);
            step.dot(q, k, s);
            step.dot(dout, v, dp);
            step.score_gradients(s, dp);
            step.publish_by_row(s);
            __syncthreads(); /* x may be read: p */
            step.add_to_keys(dv, dout, chunks_of(p.Dv) - 1);
            step.publish_by_row(dp);
            __syncthreads(); /* x may be read: ds */
            step.add_to_keys(dk, q, -1);
        }
    }
    const int64_t from = lo - span.k_pos; /* key number of the block's first */
    auto exists = [&](int j) { return from + j >= 0 && from + j < span.n_k; };
    dk.for_each(p.D, [&](int j, int d, float sum) {
        if (exists(j))
            gradient_row(call.g.k, p.dtype, t.gradient.k, from + j, t.head)
                .store(d, fad_f32_finish_gradient(sum, (float)p.scale));
    });
    dv.for_each(p.Dv, [&](int j, int d, float sum) {
        if (exists(j))
            gradient_row(call.g.v, p.dtype, t.gradient.v, from + j, t.head).store(d, fad_f32_finish_gradient(sum, 1));
    });
}

/* N13: dq of a tile of rows, over keys in blocks. */
static __global__ void __launch_bounds__(THREADS, 2) row_gradients(const __grid_constant__ GradientCall call) {
    extern __shared__ __align__(16) int64_t shared_memory[];
    __shared__ GradientTile t;
    const fad_attn_problem &p = call.p;
    const int slice = (int)(blockIdx.x % call.slices);
    if (!share_gradient_tile<ByRows>(call, blockIdx.x / call.slices, t))
        return;
    const int64_t head_k = t.head / fad_group(&p);
    const GradientMatrix q = matrix_of(p.q, p.dtype, p.D, t.seq.q, t.head);
    const GradientMatrix k = matrix_of(p.k, p.dtype, p.D, t.seq.k, head_k);
    const GradientMatrix v = matrix_of(p.v, p.dtype, p.Dv, t.seq.v, head_k);
    const GradientMatrix dout = matrix_of(call.g.out, p.dtype, p.Dv, t.gradient.out, t.head);
    GradientStep step(call, t, shared_memory, ScoresOver::ROWS);
    GradientSums dq(step.sm.sums, p.D, slice, call.slices);
    dq.clear();
    step.set_rows(t.block * BLOCK, t.head, true);
    __syncthreads(); /* rows and sums may be read */
    const fad_interval seen = seen_by_rows(t);
    for (int64_t lo = seen.lo / BLOCK * BLOCK; lo < seen.hi; lo += BLOCK) {
        float s[EDGE][EDGE], dp[EDGE][EDGE];
        step.set_keys(lo);
        step.dot(dout, v, dp);
        step.dot(q, k, s);
        step.score_gradients(s, dp);
        step.publish_by_key(dp);
        __syncthreads(); /* x may be read: ds */
        step.add_to_rows(dq, k, chunks_of(p.D) - 1);
    }
    dq.for_each(p.D, [&](int r, int d, float sum) {
        if (step.first_row + r < t.seq.span.n_q)
            gradient_row(call.g.q, p.dtype, t.gradient.q, step.first_row + r, t.head)
                .store(d, fad_f32_finish_gradient(sum, (float)p.scale));
    });
}

/* N13: the part of sequence b and head h, thread block b * Hq + h, in the gradient of a sink: blocks of rows ascending. A
 * thread owns a block's chain. */
static __global__ void __launch_bounds__(THREADS) sink_parts(const __grid_constant__ GradientCall call) {
    __shared__ float parts[THREADS];
    const fad_attn_problem &p = call.p;
    const int64_t b = fad_quotient(blockIdx.x, p.Hq), h = blockIdx.x - b * p.Hq;
    const fad_sequence seq = fad_get_sequence(&p, b);
    int64_t first;
    fad_owned_rows(p.cu_seqlens_q, p.B, b, p.Sq, &first);
    const int64_t saved = (p.cu_seqlens_q ? first : b * p.Hq * p.Sq) + h * p.Sq, n_q = seq.span.n_q;
    const float *lse = (const float *)p.lse.data + seq.lse + h * p.lse.stride_h;
    float sum = 0;
    for (int64_t base = 0; base < n_q; base += THREADS * BLOCK) {
        const int64_t from = base + threadIdx.x * BLOCK;
        float part = 0;
        for (int64_t i = from; i < min(from + BLOCK, n_q); i++) {
            const float of_row = lse[i * p.lse.stride_s];
            if (of_row == -INFINITY)
                continue;
            const float e = sink_exponential(p, h, of_row);
            part = fad_f32_fma(-fad_f32_mul(e, call.weight[saved + i]), call.delta[saved + i], part);
        }
        parts[threadIdx.x] = part;
        __syncthreads(); /* parts may be read */
        if (threadIdx.x == 0)
            for (int n = 0; n < THREADS && base + n * BLOCK < n_q; n++)
                sum = fad_f32_add(sum, parts[n]);
        __syncthreads(); /* parts may be overwritten */
    }
    if (threadIdx.x == 0)
        call.sinks[blockIdx.x] = sum;
}

/* N13: sequences ascending; a thread a head. */
static __global__ void sum_sinks(const float *parts, int64_t sequences, int64_t heads, float *d_sinks) {
    const int64_t h = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (h >= heads)
        return;
    float sum = 0;
    for (int64_t b = 0; b < sequences; b++)
        sum = fad_f32_add(sum, parts[b * heads + h]);
    d_sinks[h] = fad_f32_finish_gradient(sum, 1);
}

#endif
