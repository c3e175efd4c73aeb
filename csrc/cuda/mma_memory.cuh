/* Tiles of 16-bit rows in shared memory, for ldmatrix: 16-byte chunks are permuted so that eight rows' chunks of one
 * column lie in different banks. */
#ifndef FAD_CUDA_MMA_MEMORY_CUH
#define FAD_CUDA_MMA_MEMORY_CUH

#include "locate.cuh"
#include "pages.cuh"
#include "ptx.cuh"

/* Bytes from the start of a tile whose rows have CHUNKS chunks (a power of two) to a chunk of a row. */
template <int CHUNKS> static __device__ __forceinline__ int swizzled(int row, int chunk) {
    constexpr int ROWS_A_LINE = CHUNKS < 8 ? 8 / CHUNKS : 1, MASK = CHUNKS < 8 ? CHUNKS - 1 : 7;
    return (row * CHUNKS + (chunk ^ (row / ROWS_A_LINE & MASK))) * 16;
}

/* The packed rows of a tile from a view of q's shape, zeros past the active ones; first_element: where the tile's
 * sequence starts. Numbers come by reference, so that they are read where they lie and no register holds them. Here and
 * below the scheduler has made sure that rows can be read 16 bytes at a time. */
template <int ROWS, int CHUNKS, int THREADS>
static __device__ __forceinline__ void load_tile_rows(char *to, const fad_view &view, const int64_t &first_element,
                                                      const int64_t &dims, const Tile &t, int thread) {
#pragma unroll 2
    for (int at = thread; at < ROWS * CHUNKS; at += THREADS) {
        const int r = at / CHUNKS, chunk = at % CHUNKS;
        const Row row = row_of(t, r);
        const int64_t first = first_element + row.i * view.stride_s + row.h * view.stride_h;
        cp_async16(to + swizzled<CHUNKS>(r, chunk), (const char *)view.data + 2 * (first + chunk * 8),
                   r < t.n_active && chunk * 8 < dims ? 16 : 0);
    }
}
template <int ROWS, int CHUNKS, int THREADS>
static __device__ __forceinline__ void load_queries(char *to, const fad_attn_problem &p, const Tile &t, int thread) {
    load_tile_rows<ROWS, CHUNKS, THREADS>(to, p.q, t.seq.q, p.D, t, thread);
}

/* K or V of one sequence and kv head. */
struct Keys {
    const fad_view &view;
    const fad_sequence &seq;
    const char
        *data;      /* of key 0 of a KeyRange, which may lie before the buffer; of the pool, where keys are in pages */
    int64_t stride; /* bytes from key to key */
    int dims;       /* that exist */
    int first;      /* key 0 of the range, counted from the sequence's first */

    __device__ Keys(const fad_view &view, int64_t first_element, const Tile &t, int64_t first_key, int64_t D)
        : view(view), seq(t.seq), stride(2 * view.stride_s), dims((int)D), first((int)(first_key - t.seq.span.k_pos)) {
        data = (const char *)view.data + 2 * (first_element + t.head_k * view.stride_h);
        if (!seq.pages)
            data += first * stride;
    }

    /* ROWS keys from number `key` on, CHUNKS chunks from dim first_dim on, by THREADS threads of which this is number
     * `thread`. Keys outside lo .. hi - 1 become zeros, and so do dims that do not exist: nothing is read there, so
     * that what nobody sees cannot matter (N4, N11). */
    template <int ROWS, int CHUNKS, int THREADS>
    __device__ __forceinline__ void load(char *to, int key, int lo, int hi, int first_dim, int thread) const {
        if (seq.pages)
            load_paged<ROWS, CHUNKS, THREADS>(to, key, lo, hi, first_dim, thread);
        else
            load_rows<ROWS, CHUNKS, THREADS>(to, key, lo, hi, first_dim, thread);
    }
    /* The same where keys are not in pages. */
    template <int ROWS, int CHUNKS, int THREADS>
    __device__ __forceinline__ void load_rows(char *to, int key, int lo, int hi, int first_dim, int thread) const {
        static_assert(THREADS % CHUNKS == 0, "a thread stays in one column of chunks");
        constexpr int STEP = THREADS / CHUNKS;
        const int chunk = thread % CHUNKS, r = thread / CHUNKS, d = first_dim + chunk * 8;
        const char *from = data + (key + r) * stride + 2 * d;
        const int below = d < dims ? hi : lo; /* no key where there is no dim */
#pragma unroll
        for (int i = 0; i < ROWS / STEP; i++, from += STEP * stride) {
            const int number = key + r + i * STEP;
            cp_async16(to + swizzled<CHUNKS>(r + i * STEP, chunk), from, number >= lo && number < below ? 16 : 0);
        }
    }

    /* The place of a key in pages, any if it is outside lo .. hi - 1. */
    __device__ __forceinline__ PagePlace find(int key, int lo, int hi) const {
        return find_place(seq.pages, seq.page_size, sequence_row(key), key >= lo && key < hi);
    }
    /* Which of the sequence's rows of k and v a key in pages is. */
    __device__ __forceinline__ unsigned sequence_row(int key) const { return (unsigned)(seq.k_row + first + key); }
    /* Elements from `data` to a key. */
    __device__ __forceinline__ int64_t offset(const PagePlace &place) const {
        return fad_key_offset(&view, 0, {clamp_page(place.page, seq.n_pages), place.row});
    }

    /* 32 keys in pages, number `key` on, of which each lane has found one, CHUNKS chunks from first_dim on, by a warp, to rows
     * first_row on, a multiple of 8, of pieces of ROWS rows and ROW_CHUNKS chunks. Zeros as in load. LANES copy a row, and ask
     * the lane that has found it. */
    template <int ROWS, int CHUNKS, int LANES, int ROW_CHUNKS = 8, class Policy>
    __device__ __forceinline__ void copy_found(char *to, const PagePlace &found, int key, int lo, int hi, int first_row,
                                               int first_dim, Policy policy) const {
        constexpr int STEP = 32 / LANES, LINE = 8 / ROW_CHUNKS; /* keys at a time, and in 128 bytes */
        static_assert(LANES <= ROW_CHUNKS && CHUNKS % LANES == 0 && STEP % LINE == 0, "else chunks go to wrong places");
        const int lane = opaque_lane(), chunk = lane % LANES, r = lane / LANES, d = first_dim + chunk * 8;
        const char *const row = data + 2 * offset(found);
        const unsigned exist = __ballot_sync(~0u, key + lane >= lo && key + lane < hi) >> r;
        /* Its row, hidden from ptxas 13.0, which writes an illegal instruction where it finds that all lanes share a part of it;
         * and its place there. That of other rows and chunks is an exclusive or away, because r < STEP and chunk < LANES. */
        const unsigned piece = opaque(shared_address(to) + (first_row + r) * ROW_CHUNKS * 16);
        const int column = swizzled<ROW_CHUNKS>(r, chunk) - r * ROW_CHUNKS * 16;
#pragma unroll
        for (int i = 0; i < 32; i += STEP) {
            const char *const from = (const char *)__shfl_sync(~0u, (uint64_t)row, i + r) + 2 * d;
#pragma unroll
            for (int c = 0; c < CHUNKS; c += LANES)
                cp_async16(piece + (c / ROW_CHUNKS * ROWS + i) * ROW_CHUNKS * 16 +
                               (column ^ (c ^ i / LINE) % ROW_CHUNKS * 16),
                           from + c * 16, exist >> i & 1 && d + c * 8 < dims ? 16 : 0, policy);
        }
    }

    /* load() of keys in pages. A warp finds each of its rows once, a lane one of them, and the lanes that copy the row's chunks
     * ask that lane. The block table is asked for all of them at once, because memory is late. */
    template <int ROWS, int CHUNKS, int THREADS>
    __device__ __forceinline__ void load_paged(char *to, int key, int lo, int hi, int first_dim, int thread) const {
        constexpr int STEP = THREADS / CHUNKS, WARP_STEP = 32 / CHUNKS, WARP_ROWS = ROWS / STEP * WARP_STEP;
        static_assert(WARP_ROWS <= 32, "a lane for each");
        thread = opaque(thread);
        const int lane = thread % 32, r = thread / 32 * WARP_STEP, chunk = lane % CHUNKS, d = first_dim + chunk * 8;
        const int below = d < dims ? hi : lo, mine = key + r + lane / WARP_STEP * STEP + lane % WARP_STEP;
        const int64_t place = offset(find(mine, lane < WARP_ROWS ? lo : hi, hi));
#pragma unroll 4
        for (int i = 0; i < WARP_ROWS / WARP_STEP; i++) {
            const int row = r + i * STEP + lane / CHUNKS, number = key + row;
            const char *from = data + 2 * (__shfl_sync(~0u, place, i * WARP_STEP + lane / CHUNKS) + d);
            cp_async16(to + swizzled<CHUNKS>(row, chunk), from, number >= lo && number < below ? 16 : 0);
        }
    }
};

/* A fragment of 16 rows by 16 values, rows first .. first + 15 and chunks 2 * k and 2 * k + 1. */
template <int CHUNKS>
static __device__ __forceinline__ void load_fragment(unsigned (&r)[4], const char *tile, int first, int k) {
    const int lane = threadIdx.x % 32;
    ldmatrix(r, tile + swizzled<CHUNKS>(first + lane % 16, 2 * k + lane / 16));
}
/* The same, stored. */
template <int CHUNKS>
static __device__ __forceinline__ void store_fragment(const unsigned (&r)[4], char *tile, int first, int k) {
    const int lane = threadIdx.x % 32;
#if __CUDA_ARCH__ >= 900
    stmatrix(r, tile + swizzled<CHUNKS>(first + lane % 16, 2 * k + lane / 16));
#else
#pragma unroll
    for (int i = 0; i < 4; i++)
        *(unsigned *)(tile + swizzled<CHUNKS>(first + lane / 4 + i % 2 * 8, 2 * k + i / 2) + lane % 4 * 4) = r[i];
#endif
}
/* The b operands of 16 keys and 16 dims, from rows that are keys: [0], [1] of keys 0..7, [2], [3] of keys 8..15. */
template <int CHUNKS>
static __device__ __forceinline__ void load_key_fragment(unsigned (&r)[4], const char *tile, int first, int k) {
    const int lane = threadIdx.x % 32;
    ldmatrix(r, tile + swizzled<CHUNKS>(first + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
}
/* The b operands of 16 values by 16 keys: [0], [1] of dims 16 n .. + 7, [2], [3] of the next eight. */
template <int CHUNKS>
static __device__ __forceinline__ void load_value_fragment(unsigned (&r)[4], const char *tile, int first, int n) {
    const int lane = threadIdx.x % 32;
    ldmatrix_transposed(r, tile + swizzled<CHUNKS>(first + lane % 16, 2 * n + lane / 16));
}

#endif
