#include "calls.h"

#include "numerics/half.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>

static std::mt19937_64 generator;
int64_t between(int64_t lo, int64_t hi) { return lo + (int64_t)(generator() % (uint64_t)(hi - lo + 1)); }
static bool one_in(int n) { return between(1, n) == 1; }
static float normal() {
    static std::normal_distribution<float> distribution;
    return distribution(generator);
}
static void add_lengths(std::vector<int32_t> &of, int64_t n, int64_t lo, int64_t hi) {
    for (int64_t i = 0; i < n; i++)
        of.push_back((int32_t)between(lo, hi));
}

/* Many items, or many blocks of keys, or neither, but not too much work. */
void Call::choose_shape() {
    p.dtype = any({FAD_BFLOAT16, FAD_FLOAT16});
    p.D = one_in(2) ? dims : 8 * between(dims == 64 ? 1 : dims / 16 + 1, dims / 8);
    p.Dv = one_in(2) ? p.D : 8 * between(1, dims / 8);
    const int64_t group = any({1, 1, 2, 4, 7}), rows = dims == 64 ? 192 : 128,
                  most = dims == 256   ? 24
                         : dims == 128 ? 36
                                       : 48; /* blocks of keys, in all items */
    const bool deep = one_in(4), wide = !deep && one_in(4);
    p.Hk = between(1, 3);
    p.B = deep ? 1 : wide ? 2 : between(1, 3);
    p.Sq = deep ? between(1, 130) : wide ? between(100, 300) : between(1, one_in(3) ? 16 : 300);
    p.Sk = deep ? between(600, 1600) : wide ? between(1, 260) : one_in(40) ? 0 : between(1, one_in(4) ? 128 : 700);
    while (p.B * p.Hk * ((p.Sq * group + rows - 1) / rows) * ((p.Sk + 127) / 128) > most) {
        if (p.B > 1 && one_in(4))
            p.B--;
        else if (p.Hk > 1 && one_in(3))
            p.Hk--;
        else if (p.Sk > 140 && !deep && one_in(2))
            p.Sk = p.Sk * 3 / 4;
        else
            p.Sq = (p.Sq + 1) / 2;
    }
    p.Hq = p.Hk * group;
}

/* Splits of up to 1024 keys, of which clusters share one. */
void Call::choose_few_rows() {
    p.dtype = any({FAD_BFLOAT16, FAD_FLOAT16});
    p.D = one_in(2) ? dims : 8 * between(dims == 64 ? 1 : dims / 16 + 1, dims / 8);
    p.Dv = one_in(2) ? p.D : 8 * between(1, dims / 8);
    const int64_t group = any({1, 1, 2, 4, 7, 8, 16});
    p.Hk = between(1, 2);
    p.B = between(1, 3);
    p.Sq = between(1, one_in(4) ? 9 : 3);
    p.Sk = one_in(40) ? 0 : between(1, any<int64_t>({150, 700, 1024, 1500, 2300}));
    const int64_t most = 16; /* blocks of keys, in all items */
    while (p.B * p.Hk * ((p.Sq * group + 15) / 16) * ((p.Sk + 127) / 128) > most) {
        if (p.B > 1)
            p.B--;
        else if (p.Hk > 1)
            p.Hk--;
        else if (p.Sq > 1)
            p.Sq = (p.Sq + 1) / 2;
        else
            p.Sk = p.Sk * 3 / 4;
    }
    p.Hq = p.Hk * group;
}

void Call::choose_options() {
    p.scale = any({1.0 / sqrt((double)p.D), 0.125, 1.0, -0.3, 0.0883883});
    p.split_size = any<int64_t>({128, 128, 256, 384, 2048});
    p.window_left = p.window_right = -1;
    const bool plain = one_in(3);
    p.causal = one_in(plain ? 4 : 2);
    if (one_in(5))
        for (int64_t h = 0; h < p.Hq; h++)
            sinks.push_back(one_in(5) ? 100.0f : normal());
    if (plain)
        return;
    if (one_in(4))
        p.window_left = any<int64_t>({0, 1, 5, 60, 128, 200, 300});
    if (one_in(5) && !p.causal)
        p.window_right = any<int64_t>({0, 1, 7, 100, 250});
    if (one_in(6))
        p.softcap = any({30.0, 5.0});
    if (one_in(6))
        for (int64_t h = 0; h < p.Hq; h++)
            slopes.push_back(0.5f * fabsf(normal()));
}

/* Pages in an order without order, some of them read twice. */
void Call::page_keys(int64_t *n_entries, int64_t *rows) {
    p.page_size = any<int64_t>({1, 3, 4, 8, 12, 16, 24, 64, 128, 192, 256});
    const int64_t columns = (p.Sk + p.page_size - 1) / p.page_size;
    p.Sk = columns * p.page_size;
    *n_entries = p.Bk = p.B * columns + 2;
    *rows = p.page_size;
    add_lengths(pages, p.B * columns + 1, 0, p.Bk - 1);
    p.block_table = pages.data();
    p.block_table_stride = columns;
    add_lengths(used_k, p.B, 0, p.Sk);
}

/* Sequences of any length, empty ones among them, and rows of q behind the last. */
void Call::pack_sequences() {
    p.B += between(0, 4);
    p.Sq = p.Sq * 2 + 2, p.Sk = p.Sk * 2 + 1;
    for (auto of : {std::make_pair(&cu_q, p.Sq - 2), std::make_pair(&cu_k, p.Sk)}) {
        of.first->push_back(0);
        for (int64_t b = 0; b + 1 < p.B; b++)
            of.first->push_back((int32_t)between(of.first->back(), of.second));
        of.first->push_back((int32_t)of.second);
    }
    p.cu_seqlens_q = cu_q.data();
    p.cu_seqlens_k = cu_k.data();
}

void Call::choose_lengths() {
    if (layout == PACKED)
        return;
    if (layout == PAGED && one_in(4))
        for (int64_t b = 0; b < p.B; b++)
            pad_k.push_back((int32_t)between(0, p.Sk - used_k[(size_t)b]));
    if (layout != PAGED && one_in(3)) {
        if (one_in(3))
            add_lengths(pad_k, p.B, 0, p.Sk);
        for (int64_t b = 0; b < p.B; b++)
            used_k.push_back((int32_t)between(0, p.Sk - (pad_k.empty() ? 0 : pad_k[(size_t)b])));
    }
    if (one_in(4))
        add_lengths(used_q, p.B, 0, p.Sq);
    if (!spill && one_in(4)) /* spilled, it would need one state more than the CPU has */
        add_lengths(pos_k, p.B, 0, 1000);
}

/* gaps: elements between heads, rows and entries. */
static Tensor make(int64_t entries, int64_t rows, int64_t heads, int64_t dims, bool gaps) {
    Tensor t;
    const int64_t h = dims + (gaps ? 8 * between(0, 2) : 0), s = heads * h + (gaps ? 8 * between(0, 2) : 0),
                  b = rows * s + (gaps ? 8 * between(0, 3) : 0);
    t.buffer.assign((size_t)(entries * b + 16), 0x7fab);
    t.start = 8 - ((uintptr_t)t.buffer.data() % 16) / 2;
    t.view = {t.buffer.data() + t.start, b, s, h};
    return t;
}
/* growth: from the first number to the last; special: one in so many is no ordinary number, 0: none is. */
static void fill(Tensor &t, fad_dtype dtype, float scale, float offset, int special, float growth) {
    const float most = dtype == FAD_FLOAT16 ? 6e4f : 1e38f;
    for (size_t i = 0; i < t.buffer.size(); i++) {
        float x = scale * normal() + offset + growth * (float)i / (float)t.buffer.size();
        x = fminf(fmaxf(x, -most), most);
        if (special && one_in(special))
            x = any<float>({NAN, INFINITY, -INFINITY, most, -NAN});
        t.buffer[i] = dtype == FAD_BFLOAT16 ? fad_bf16_round(x) : fad_f16_round(x);
    }
}

void Call::fill_tensors() {
    const float scale = numbers == LARGE ? 30 : numbers == HUGE_LOGITS ? 3000 : numbers == ZEROS ? 0 : 1;
    const int64_t where = numbers == SPECIAL ? between(1, 7) : 0; /* of q, k, v: bits */
    const bool negative = numbers == NEGATIVE;                    /* scores */
    const float of_scores = negative ? 0.2f : scale, offset = negative ? 2 : 0;
    fill(q, p.dtype, of_scores, offset, where & 1 ? 3000 : 0, 0);
    fill(k, p.dtype, of_scores, p.scale < 0 ? offset : -offset, where & 2 ? 5000 : 0, numbers == GROWING ? 20 : 0);
    const float of_values = numbers == TINY ? any({1e-36f, 1e-6f, 1e-30f}) : numbers == LARGE ? any({1e4f, 1e37f}) : 1;
    fill(v, p.dtype, of_values, 0, where & 4 || where == 1 ? any({300, 8000}) : 0, 0);
}

/* NaN behind the last key: nobody sees what is not there. */
void Call::hide_unused_keys() {
    for (Tensor *t : {&k, &v})
        for (int64_t b = 0; b < p.B; b++)
            for (int64_t r = (pad_k.empty() ? 0 : pad_k[(size_t)b]) + used_k[(size_t)b]; r < p.Sk; r++)
                for (int64_t d = 0; d < p.Dv && d < p.D; d++)
                    ((uint16_t *)t->view.data)[b * t->view.stride_b + r * t->view.stride_s + d] = 0x7fff;
}

/* NaN among the values of a key that, under a causal mask, some rows see and others do not. */
void Call::spoil_last_values() {
    for (int64_t b = 0; b < p.B; b++)
        for (int64_t h = 0; h < p.Hk; h++) {
            const int64_t first = pad_k.empty() ? 0 : pad_k[(size_t)b],
                          end = first + (used_k.empty() ? p.Sk - first : used_k[(size_t)b]),
                          key = end - 1 - between(0, p.Sq - 1);
            uint16_t *const of_head = (uint16_t *)v.view.data + b * v.view.stride_b + h * v.view.stride_h;
            if (key >= first)
                of_head[key * v.view.stride_s + between(0, p.Dv - 1)] = 0x7fff;
        }
}

template <class V> static const V *data_or_null(const std::vector<V> &of) { return of.empty() ? nullptr : of.data(); }

Call::Call(uint64_t seed, int only_dims, bool few_rows) {
    generator.seed(seed);
    memset(&p, 0, sizeof p);
    dims = only_dims ? only_dims : any({64, 64, 64, 128, 128, 128, 256});
    few = few_rows;
    spill = one_in(3);
    layout = spill ? any({DENSE, DENSE, DENSE, PAGED}) : any({DENSE, DENSE, DENSE, PAGED, PACKED, CACHED});
    if (few && one_in(3))
        layout = PAGED;
    numbers = one_in(2) ? NORMAL : (Numbers)between(0, ALL_NUMBERS - 1);
    if (few)
        choose_few_rows();
    else
        choose_shape();
    choose_options();
    if (few)
        p.split_size = any<int64_t>({128, 512, 1024, 1024, 1024, 2048});
    int64_t n_entries = p.B, rows = p.Sk;
    if (layout == PAGED) {
        page_keys(&n_entries, &rows);
    } else if (layout == PACKED) {
        pack_sequences();
        n_entries = 1, rows = p.Sk;
    } else if (layout == CACHED) {
        n_entries = p.Bk = p.B + 2;
        add_lengths(entries, p.B, 0, p.Bk - 1);
    }
    choose_lengths();
    const int64_t q_entries = layout == PACKED ? 1 : p.B;
    const bool gaps = one_in(3);
    q = make(q_entries, p.Sq, p.Hq, p.D, gaps);
    k = make(n_entries, rows, p.Hk, p.D, gaps);
    v = make(n_entries, rows, p.Hk, p.Dv, gaps);
    out = make(q_entries, p.Sq, p.Hq, p.Dv, gaps);
    fill_tensors();
    if (layout == DENSE && !used_k.empty() && one_in(2))
        hide_unused_keys();
    if (few && layout == DENSE && one_in(2))
        spoil_last_values();
    lse.assign((size_t)(q_entries * p.Hq * p.Sq), 12345);
    p.q = q.view, p.k = k.view, p.v = v.view, p.out = out.view;
    p.lse = {one_in(8) ? nullptr : lse.data(), p.Hq * p.Sq, 1, p.Sq};
    p.cache_batch_idx = data_or_null(entries);
    p.seqused_q = data_or_null(used_q);
    p.seqused_k = data_or_null(used_k);
    p.leftpad_k = data_or_null(pad_k);
    p.k_pos = data_or_null(pos_k);
    p.alibi_slopes = data_or_null(slopes);
    p.sinks = data_or_null(sinks);
}

std::string Call::text() const {
    char words[512];
    snprintf(
        words, sizeof words,
        "%s, dims %d, D %d, Dv %d, B %d, Hq %d, Hk %d, Sq %d, Sk %d, causal %d, window %d %d, split %d, layout %d, "
        "page %d, softcap %g, scale %g, numbers %d%s%s%s%s%s%s%s",
        p.dtype == FAD_BFLOAT16 ? "bf16" : "fp16", dims, (int)p.D, (int)p.Dv, (int)p.B, (int)p.Hq, (int)p.Hk, (int)p.Sq,
        (int)p.Sk, p.causal, (int)p.window_left, (int)p.window_right, (int)p.split_size, layout, (int)p.page_size,
        p.softcap, p.scale, numbers, p.seqused_q ? ", seqused_q" : "", p.seqused_k ? ", seqused_k" : "",
        p.leftpad_k ? ", leftpad_k" : "", p.k_pos ? ", k_pos" : "", p.alibi_slopes ? ", alibi" : "",
        p.sinks ? ", sinks" : "", spill ? ", spilled" : "");
    return words;
}
