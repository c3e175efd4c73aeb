// The torch-free core for NumPy: the contract's scalar functions, bound one by one, and the public C API. For tests only.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/flash_attn_det.h"
#include "../../csrc/numerics/contract.h"
#include "../../csrc/numerics/tensor_core.h"
#include "scan.h"

namespace py = pybind11;
using Ints = std::optional<py::array_t<int32_t, py::array::c_style>>;

namespace {

void require_ok(fad_status status) {
    if (status != FAD_OK)
        throw std::runtime_error(std::to_string(status) + ": " + fad_last_error());
}

const int32_t *data_of(const Ints &x) { return x ? x->data() : nullptr; }

fad_dtype dtype_of(const std::string &name) {
    const char *names[] = {"float32", "float16", "bfloat16", "float64"};
    for (int i = 0; i < 4; i++)
        if (name == names[i])
            return static_cast<fad_dtype>(i);
    throw std::invalid_argument("unknown dtype " + name);
}

// [B, S, H, D], or [T, H, D] when packed; 16-bit types arrive as uint16.
fad_view view_of(const py::array &x, bool packed) {
    const int64_t size = x.itemsize(), s = packed ? 0 : 1;
    return {const_cast<void *>(x.data()), packed ? 0 : x.strides(0) / size, x.strides(s) / size,
            x.strides(s + 1) / size};
}

// One thread per range: any partition must do.
void parallel_for(int64_t n, fad_range_fn fn, void *ctx) {
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < n; i++)
        threads.emplace_back(fn, i, i + 1, ctx);
    for (auto &thread : threads)
        thread.join();
}

// Every byte 0xa5, so that what a call leaves unwritten shows.
py::array poisoned(const py::dtype &dtype, const std::vector<py::ssize_t> &shape) {
    py::array x(dtype, shape);
    memset(x.mutable_data(), 0xa5, static_cast<size_t>(x.nbytes()));
    return x;
}

py::tuple attention(const py::array &q, const py::array &k, const py::array &v, const std::string &dtype, double scale,
                    bool causal, int64_t left, int64_t right, double softcap,
                    const std::optional<py::array> &alibi_slopes, const std::optional<py::array> &sinks,
                    const Ints &cu_seqlens_q, const Ints &cu_seqlens_k, const Ints &seqused_q, const Ints &seqused_k,
                    const Ints &leftpad_k, const Ints &k_pos, int64_t split_size, int32_t num_threads,
                    const std::optional<std::string> &isa, int32_t layout, int32_t tile_rows, int32_t split_parallel,
                    bool partials) {
    const bool packed = cu_seqlens_q.has_value();
    const int s = packed ? 0 : 1;
    const py::dtype compute = py::dtype::from_args(py::str(dtype == "float64" ? "float64" : "float32"));
    fad_attn_problem p = {};
    p.dtype = dtype_of(dtype);
    p.B = packed ? cu_seqlens_q->size() - 1 : q.shape(0);
    p.Sq = q.shape(s), p.Sk = k.shape(s), p.Hq = q.shape(s + 1), p.Hk = k.shape(s + 1), p.D = q.shape(s + 2),
    p.Dv = v.shape(s + 2);
    p.q = view_of(q, packed), p.k = view_of(k, packed), p.v = view_of(v, packed);
    p.cu_seqlens_q = data_of(cu_seqlens_q), p.cu_seqlens_k = data_of(cu_seqlens_k);
    p.seqused_q = data_of(seqused_q), p.seqused_k = data_of(seqused_k);
    p.leftpad_k = data_of(leftpad_k), p.k_pos = data_of(k_pos);
    p.scale = scale, p.causal = causal, p.window_left = left, p.window_right = right, p.softcap = softcap;
    p.alibi_slopes = alibi_slopes ? alibi_slopes->data() : nullptr;
    p.alibi_stride_b =
        alibi_slopes && alibi_slopes->ndim() == 2 ? alibi_slopes->strides(0) / alibi_slopes->itemsize() : 0;
    p.sinks = sinks ? sinks->data() : nullptr;
    p.split_size = split_size;

    py::array out = packed ? poisoned(q.dtype(), {p.Sq, p.Hq, p.Dv}) : poisoned(q.dtype(), {p.B, p.Sq, p.Hq, p.Dv});
    py::array lse = packed ? poisoned(compute, {p.Hq, p.Sq}) : poisoned(compute, {p.B, p.Hq, p.Sq});
    p.out = {out.mutable_data(), p.Sq * p.Hq * p.Dv, p.Hq * p.Dv, p.Dv};
    p.lse = {lse.mutable_data(), p.Hq * p.Sq, 1, p.Sq};

    const fad_schedule schedule = {isa ? isa->c_str() : nullptr, layout, tile_rows, split_parallel, 0};
    require_ok(fad_force_schedule(&schedule));
    struct Automatic {
        ~Automatic() { fad_force_schedule(nullptr); }
    } automatic;
    size_t bytes = 0;
    require_ok(fad_attn_workspace(&p, num_threads, &bytes));
    std::unique_ptr<void, void (*)(void *)> workspace(aligned_alloc(64, (bytes + 63) / 64 * 64), free);
    memset(workspace.get(), 0xa5, bytes);
    const fad_runtime runtime = {num_threads, num_threads > 1 ? parallel_for : nullptr, workspace.get(), bytes,
                                 nullptr};
    if (!partials) {
        fad_status status;
        {
            py::gil_scoped_release released;
            status = fad_attn_forward(&p, &runtime);
        }
        require_ok(status);
        return py::make_tuple(out, lse);
    }
    int64_t n = 0;
    require_ok(fad_attn_partials_count(&p, &n));
    py::array o = poisoned(compute, {n, p.B, p.Sq, p.Hq, p.Dv}), m = poisoned(compute, {n, p.B, p.Hq, p.Sq});
    py::array l = poisoned(compute, {n, p.B, p.Hq, p.Sq});
    const fad_partials states = {o.mutable_data(), m.mutable_data(), l.mutable_data(), n};
    require_ok(fad_attn_partials(&p, &states, &runtime));
    return py::make_tuple(o, m, l);
}

using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;

// c [n] plus the products of a and b [n, up to 16], as a tensor core (products, fraction bits, least exponent) rounds it.
Floats tensor_core_step(std::tuple<int, int, int> rule, const Floats &a, const Floats &b, const Floats &c) {
    const fad_tensor_core core = {std::get<0>(rule), std::get<1>(rule), std::get<2>(rule)};
    if (a.ndim() != 2 || b.ndim() != 2 || a.size() != b.size() || c.size() != a.shape(0) || a.shape(1) > 16)
        throw std::invalid_argument("expected a and b [n, at most 16] and c [n]");
    Floats d(c.size());
    for (py::ssize_t i = 0; i < c.size(); i++)
        d.mutable_at(i) = fad_tensor_core_step(core, a.data(i, 0), b.data(i, 0), (int)a.shape(1), c.at(i));
    return d;
}

py::tuple scan(double (*error)(uint32_t), uint32_t first, uint32_t last, uint32_t stride) {
    fad_scan_result result;
    {
        py::gil_scoped_release released;
        result = fad_scan(error, first, last, stride);
    }
    return py::make_tuple(result.worst, result.at, result.count);
}

} // namespace

#define BIND_REAL(type)                                                                                                \
    m.def("exp2_" #type, py::vectorize(fad_##type##_exp2));                                                            \
    m.def("tanh_" #type, py::vectorize(fad_##type##_tanh));                                                            \
    m.def("log2_" #type, py::vectorize(fad_##type##_log2));                                                            \
    m.def("pow2_" #type, py::vectorize(fad_##type##_pow2));                                                            \
    m.def("fma_" #type, py::vectorize(fad_##type##_fma));                                                              \
    m.def("max_" #type, py::vectorize(fad_##type##_max));                                                              \
    m.def("canonical_" #type, py::vectorize(fad_##type##_canonical));                                                  \
    m.def("scaled_score_" #type, py::vectorize(fad_##type##_scaled_score));                                            \
    m.def("reference_" #type, py::vectorize(fad_##type##_reference));                                                  \
    m.def("probability_" #type, py::vectorize(fad_##type##_probability));                                              \
    m.def("probability_near_" #type, py::vectorize(fad_##type##_probability_near));                                    \
    m.def("fold_" #type, py::vectorize(fad_##type##_fold));                                                            \
    m.def("score_factor_" #type, [](double scale, bool options) {                                                      \
        int plain;                                                                                                     \
        const auto c = fad_##type##_score_factor(scale, options, &plain);                                              \
        return py::make_tuple(c, plain != 0);                                                                          \
    });                                                                                                                \
    m.def("finish_out_" #type, py::vectorize(fad_##type##_finish_out));                                                \
    m.def("finish_lse_" #type, py::vectorize(fad_##type##_finish_lse))

PYBIND11_MODULE(fad_native, m) {
    BIND_REAL(f32);
    BIND_REAL(f64);
    m.def("sink_state_f32", [](float z) {
        float l;
        const float reference = fad_f32_sink_state(z, &l);
        return py::make_tuple(reference, l);
    });
    m.def("sink_state_f64", [](double z) {
        double l;
        const double reference = fad_f64_sink_state(z, &l);
        return py::make_tuple(reference, l);
    });
    m.def("bf16_widen", py::vectorize(fad_bf16_widen));
    m.def("bf16_round", py::vectorize(fad_bf16_round));
    m.def("f16_widen", py::vectorize(fad_f16_widen));
    m.def("f16_round", py::vectorize(fad_f16_round));

    m.def("ex2", py::vectorize(fad_ex2));
    m.def("ex2_significand", py::vectorize(fad_ex2_significand));
    m.def("tensor_core", [](int sm, int format_exponent) {
        const fad_tensor_core core = fad_tensor_core_of(sm, format_exponent);
        return py::make_tuple(core.products, core.fraction_bits, core.least_exponent);
    });
    m.def("tensor_core_step", tensor_core_step);

    // (largest error, bits where, floats tried) over the floats whose patterns are first, first + stride, ... <= last
    m.def("scan_exp2", [](uint32_t a, uint32_t z, uint32_t stride) { return scan(fad_error_exp2, a, z, stride); });
    m.def("scan_tanh", [](uint32_t a, uint32_t z, uint32_t stride) { return scan(fad_error_tanh, a, z, stride); });
    m.def("scan_log2", [](uint32_t a, uint32_t z, uint32_t stride) { return scan(fad_error_log2, a, z, stride); });
    m.def("scan_log2_absolute",
          [](uint32_t a, uint32_t z, uint32_t stride) { return scan(fad_error_log2_absolute, a, z, stride); });
    m.def("error_exp2_f64", py::vectorize(fad_error_exp2_f64));
    m.def("error_tanh_f64", py::vectorize(fad_error_tanh_f64));
    m.def("error_log2_f64", py::vectorize(fad_error_log2_f64));

    m.def("query_position", [](int64_t n_q, int64_t n_k, int64_t k_pos, int64_t i) {
        const fad_span s = {n_q, n_k, k_pos, -1, -1};
        return fad_query_position(&s, i);
    });
    m.def("visible", [](int64_t n_q, int64_t n_k, int64_t k_pos, int64_t left, int64_t right, int64_t i) {
        const fad_span s = {n_q, n_k, k_pos, left, right};
        const fad_interval v = fad_visible(&s, i);
        return py::make_tuple(v.lo, v.hi);
    });
    m.def("tile_kind", [](int64_t n_q, int64_t n_k, int64_t k_pos, int64_t left, int64_t right, int64_t first,
                          int64_t last, int64_t lo, int64_t hi) {
        const char *names[] = {"skip", "partial", "full"};
        const fad_span s = {n_q, n_k, k_pos, left, right};
        return names[fad_tile_kind(&s, first, last, lo, hi)];
    });
    m.def("partition_first", fad_partition_first);
    m.def("partition_end", fad_partition_end);

    m.def("constants", [] {
        py::dict all;
        for (int32_t i = 0; const char *name = fad_constant_name(i); i++) {
            int64_t value;
            require_ok(fad_constant(name, &value));
            all[name] = value;
        }
        return all;
    });
    m.def("isas", [] {
        std::vector<std::string> all;
        for (int32_t i = 0; const char *name = fad_cpu_isa(i); i++)
            all.emplace_back(name);
        return all;
    });
    m.def("attention", attention, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("dtype"), py::kw_only(),
          py::arg("scale"), py::arg("causal") = false, py::arg("left") = -1, py::arg("right") = -1,
          py::arg("softcap") = 0.0, py::arg("alibi_slopes") = py::none(), py::arg("sinks") = py::none(),
          py::arg("cu_seqlens_q") = py::none(), py::arg("cu_seqlens_k") = py::none(), py::arg("seqused_q") = py::none(),
          py::arg("seqused_k") = py::none(), py::arg("leftpad_k") = py::none(), py::arg("k_pos") = py::none(),
          py::arg("split_size") = +FAD_DEFAULT_SPLIT_SIZE, py::arg("num_threads") = 1, py::arg("isa") = py::none(),
          py::arg("layout") = 0, py::arg("tile_rows") = 0, py::arg("split_parallel") = 0, py::arg("partials") = false);
}
