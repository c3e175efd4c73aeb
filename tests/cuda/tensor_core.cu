// Compares csrc/numerics/tensor_core.h with what a GPU gives: mma.sync.m16n8k16 and ex2.approx.ftz.f32, on classes of
// operands that have told models apart. Exit code 1 if a result differs. For compute capability 9.0:
//
// nvcc -std=c++17 -O2 -fmad=false -Xcompiler -ffp-contract=off -arch=sm_90 -o tensor_core tensor_core.cu && ./tensor_core
#include "../../csrc/numerics/half.h"
#include "../../csrc/numerics/tensor_core.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace {

constexpr int PRODUCTS = 16; // of one step
constexpr int SAMPLES = 200000;

void check(cudaError_t error, int line) {
    if (error != cudaSuccess) {
        fprintf(stderr, "line %d: %s\n", line, cudaGetErrorString(error));
        exit(2);
    }
}
#define CHECK(call) check((call), __LINE__)

template <class T> class device_array {
  public:
    explicit device_array(const std::vector<T> &v) {
        CHECK(cudaMalloc(&data, v.size() * sizeof(T)));
        CHECK(cudaMemcpy(data, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
    }
    ~device_array() { cudaFree(data); }
    device_array(const device_array &) = delete;
    void read(std::vector<T> &v) const {
        CHECK(cudaMemcpy(v.data(), data, v.size() * sizeof(T), cudaMemcpyDeviceToHost));
    }
    T *data = nullptr;
};

struct fp16 {
    static constexpr const char *name = "fp16";
    static constexpr int least_exponent = -14, largest_exponent = 15;
    static constexpr uint16_t infinity = 0x7c00, subnormal = 0x83ff;
    static float widen(uint16_t x) { return fad_f16_widen(x); }
    static uint16_t narrow(float x) { return fad_f16_round(x); }
};

struct bf16 {
    static constexpr const char *name = "bf16";
    static constexpr int least_exponent = -126, largest_exponent = 127;
    static constexpr uint16_t infinity = 0x7f80, subnormal = 0x807f;
    static float widen(uint16_t x) { return fad_bf16_widen(x); }
    static uint16_t narrow(float x) { return fad_bf16_round(x); }
};

__device__ void matrix_step(fp16, float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ void matrix_step(bf16, float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// One sample a warp: every row of the matrix A is a [16], every column of B is b [16].
template <class T> __global__ void steps(const uint16_t *a, const uint16_t *b, const float *c, float *d) {
    const int first = blockIdx.x * PRODUCTS + 2 * (threadIdx.x % 4);
    const auto pair = [=](const uint16_t *x, int i) { return x[first + i] | (unsigned)x[first + i + 1] << 16; };
    const unsigned rows[4] = {pair(a, 0), pair(a, 0), pair(a, 8), pair(a, 8)}, columns[2] = {pair(b, 0), pair(b, 8)};
    float sums[4] = {c[blockIdx.x], c[blockIdx.x], c[blockIdx.x], c[blockIdx.x]};
    matrix_step(T{}, sums, rows, columns);
    if (threadIdx.x == 0)
        d[blockIdx.x] = sums[0];
}

__global__ void powers_of_two(const float *x, float *y, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n)
        asm volatile("ex2.approx.ftz.f32 %0,%1;" : "=f"(y[i]) : "f"(x[i]));
}

struct operands {
    std::vector<uint16_t> a, b; // [n][16]
    std::vector<float> c;       // [n]
};

// Any NaN is as good as another: the contract stores the canonical one.
bool same(float x, float y) { return (std::isnan(x) && std::isnan(y)) || fad_f32_bits(x) == fad_f32_bits(y); }

template <class T> long compare(const char *what, const operands &x) {
    const int n = (int)x.c.size();
    std::vector<float> gpu(n);
    const device_array<uint16_t> a(x.a), b(x.b);
    const device_array<float> c(x.c), d(gpu);
    steps<T><<<n, 32>>>(a.data, b.data, c.data, d.data);
    CHECK(cudaGetLastError());
    d.read(gpu);
    const fad_tensor_core core = fad_tensor_core_of(90, T::least_exponent);
    long differing = 0;
    for (int i = 0; i < n; i++) {
        float p[PRODUCTS], q[PRODUCTS];
        for (int k = 0; k < PRODUCTS; k++) {
            p[k] = T::widen(x.a[i * PRODUCTS + k]);
            q[k] = T::widen(x.b[i * PRODUCTS + k]);
        }
        const float cpu = fad_tensor_core_step(core, p, q, PRODUCTS, x.c[i]);
        if (!same(cpu, gpu[i]) && differing++ == 0)
            printf("%s %s, sample %d: the GPU gives %a, tensor_core.h %a\n", T::name, what, i, gpu[i], cpu);
    }
    printf("%s %s: %ld of %d differ\n", T::name, what, differing, n);
    return differing;
}

// One class of operands: pair(a, b) draws two factors, sum() the accumulator.
template <class T, class Pair, class Sum> long sampled(const char *what, Pair pair, Sum sum) {
    operands x{std::vector<uint16_t>(SAMPLES * PRODUCTS), std::vector<uint16_t>(SAMPLES * PRODUCTS),
               std::vector<float>(SAMPLES)};
    for (int i = 0; i < SAMPLES * PRODUCTS; i++)
        pair(x.a[i], x.b[i]);
    for (float &c : x.c)
        c = sum();
    return compare<T>(what, x);
}

// Subnormal and zero accumulators and results, signs of zero, exponents of zeros and of subnormal factors.
template <class T> long singles() {
    struct single {
        std::vector<float> a, b;
        float c;
    };
    const float tiny = ldexpf(1, -149), huge = 60000;
    std::vector<single> all = {{{}, {}, tiny},
                               {{}, {}, -0.0f},
                               {{-0.0f}, {1}, -0.0f},
                               {{1, -1}, {1, 1}, 0},
                               {{1}, {1}, -1},
                               {{}, {}, -1e-40f},
                               {{0x1p-24f}, {0x1p15f}, -(0x1p-9f + 0x1p-28f)},
                               {{0}, {huge}, 0x1p-40f},
                               {{0, 0x1p-12f}, {huge, 0x1p-12f}, 0x1p-48f}};
    if (T::least_exponent == -126) {
        all.push_back({{0x1p-70f}, {-0x1p-70f}, 0x1p-140f});
        all.push_back({{0x1p-75f}, {-0x1p-75f}, 0});
        all.push_back({{0x1p-23f, 0x1p-24f}, {0x1p-126f, -0x1p-126f}, 0});
        all.push_back({{0x1p-80f, 0x1p-80f}, {0x1p-80f, 1}, 0});
        all.push_back({{0x1.8p-74f, 0x1.8p-74f, 0x1.8p-74f}, {0x1p-76f, 0x1p-76f, 0x1p-76f}, 0});
        all.push_back({{0x1p-74f, 0x1p-79f}, {0x1p-74f, -0x1p-80f}, 0});
    }
    operands x;
    for (single &s : all) {
        s.a.resize(PRODUCTS);
        s.b.resize(PRODUCTS);
        for (int k = 0; k < PRODUCTS; k++) {
            x.a.push_back(T::narrow(s.a[k]));
            x.b.push_back(T::narrow(s.b[k]));
        }
        x.c.push_back(s.c);
    }
    return compare<T>("single sums", x);
}

template <class T> long compare_steps() {
    std::mt19937_64 random(1);
    std::normal_distribution<float> bell;
    const auto below = [&](unsigned n) { return (int)(random() % n); };
    const auto any = [&](float scale) { return T::narrow(bell(random) * scale); };
    const auto ordinary = [&] { return ldexpf(bell(random), below(40) - 20); };
    const auto finite_bits = [&] {
        uint16_t x;
        do
            x = (uint16_t)random();
        while (!std::isfinite(T::widen(x)));
        return x;
    };
    const auto finite_sum = [&] {
        float c;
        do
            c = fad_f32_from_bits((uint32_t)random());
        while (!std::isfinite(c));
        return c;
    };
    const auto normal = [&](uint16_t &a, uint16_t &b) { a = any(1), b = any(1); };
    const auto bits = [&](uint16_t &a, uint16_t &b) { a = finite_bits(), b = finite_bits(); };
    const auto subnormal = [&](uint16_t &a, uint16_t &b) {
        a = (uint16_t)random() & T::subnormal;
        b = any(ldexpf(1, below(T::largest_exponent - 1)));
    };
    const auto zeros = [&](uint16_t &a, uint16_t &b) { // beside large factors
        a = below(3) ? 0 : any(0x1p-12f);
        b = a ? any(0x1p-10f) : T::narrow(T::least_exponent == -126 ? 1e30f : 60000.f);
    };
    const auto large = [&](uint16_t &a, uint16_t &b) {
        const int e = T::least_exponent == -126 ? 63 : 15;
        a = T::narrow(ldexpf(fabsf(bell(random)), e)), b = T::narrow(ldexpf(fabsf(bell(random)), e));
    };
    const auto special = [&] {
        const uint16_t infinity = (uint16_t)(T::infinity | (random() & 0x8000)), values[] = {infinity, 0x7fff, 0};
        return values[below(3)];
    };
    const auto not_finite = [&](uint16_t &a, uint16_t &b) {
        a = below(12) ? any(1) : special(), b = below(12) ? any(1) : special();
    };
    const auto tiny = [&](uint16_t &a, uint16_t &b) { // products around fp32's smallest number
        a = any(ldexpf(1, -70 - below(12))), b = any(ldexpf(1, -70 - below(6)));
    };
    const auto tiny_sum = [&] { return below(2) ? 0 : ldexpf(bell(random), -149 + below(12)); };
    long differing = sampled<T>("normal", normal, ordinary);
    differing += sampled<T>("any finite bits", bits, finite_sum);
    differing += sampled<T>("subnormal", subnormal, ordinary);
    differing += sampled<T>("zeros beside large factors", zeros, [&] { return ldexpf(bell(random), -below(140)); });
    differing += sampled<T>("overflow", large, [&] { return ldexpf(1 + fabsf(bell(random)), 126); });
    differing += sampled<T>("infinity and NaN", not_finite, ordinary);
    if (T::least_exponent == -126)
        differing += sampled<T>("tiny products", tiny, tiny_sum);
    return differing + singles<T>();
}

// Every 509th bit pattern, and the ends of the ranges in which ex2 behaves differently.
long compare_ex2() {
    std::vector<float> x = {-126.f, -127.f, -125.99999f, -126.00001f, 128.f,    127.99999f,
                            0.f,    -0.f,   1e-45f,      -1e-45f,     INFINITY, -INFINITY};
    for (uint64_t bits = 0; bits < 1ull << 32; bits += 509)
        x.push_back(fad_f32_from_bits((uint32_t)bits));
    const int n = (int)x.size();
    std::vector<float> gpu(n);
    const device_array<float> arguments(x), results(gpu);
    powers_of_two<<<(n + 255) / 256, 256>>>(arguments.data, results.data, n);
    CHECK(cudaGetLastError());
    results.read(gpu);
    long differing = 0;
    for (int i = 0; i < n; i++)
        if (!same(fad_ex2(x[i]), gpu[i]) && differing++ == 0)
            printf("ex2(%a): the GPU gives %a, tensor_core.h %a\n", x[i], gpu[i], fad_ex2(x[i]));
    printf("ex2: %ld of %d differ\n", differing, n);
    return differing;
}

} // namespace

int main() {
    long differing = compare_steps<fp16>();
    differing += compare_steps<bf16>();
    differing += compare_ex2();
    return differing > 0;
}
