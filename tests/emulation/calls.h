/* Random calls for the emulated Hopper kernels: shapes, masks, options, layouts and numbers. */
#ifndef EMULATION_CALLS_H
#define EMULATION_CALLS_H

#include "flash_attn_det.h"

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

/* Inclusive. */
int64_t between(int64_t lo, int64_t hi);
template <class V> V any(std::initializer_list<V> of) { return of.begin()[between(0, (int64_t)of.size() - 1)]; }

/* A view of 16-bit numbers, its data at a multiple of 16 bytes in a larger buffer. */
struct Tensor {
    std::vector<uint16_t> buffer;
    size_t start;
    fad_view view;
};

enum Layout { DENSE, PAGED, PACKED, CACHED, LAYOUTS };
enum Numbers { NORMAL, LARGE, HUGE_LOGITS, NEGATIVE, SPECIAL, ZEROS, TINY, GROWING, ALL_NUMBERS };

struct Call {
    fad_attn_problem p;
    int dims;   /* of the kernel: 64, 128 or 256 */
    bool few;   /* rows: for the kernels of decode */
    bool spill; /* splits are spilled */
    Layout layout;
    Numbers numbers;
    Tensor q, k, v, out;
    std::vector<float> lse, slopes, sinks;
    std::vector<int32_t> cu_q, cu_k, used_q, used_k, pad_k, pos_k, entries, pages;

    Call(const Call &) = delete; /* p points into the others */
    /* Call number `seed`, of a kernel with these dims, or (0) of any. */
    Call(uint64_t seed, int dims, bool few);
    std::string text() const;

  private:
    void choose_shape();
    void choose_few_rows();
    void choose_options();
    void page_keys(int64_t *entries, int64_t *rows);
    void pack_sequences();
    void choose_lengths();
    void fill_tensors();
    void hide_unused_keys();
    void spoil_last_values();
};

#endif
