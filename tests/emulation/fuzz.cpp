/* Random calls on the emulated Hopper kernels, compared bit by bit with the CPU's emulation of compute capability 9.0:
 * fuzz tile|decode FIRST COUNT [DIMS [FAILURES]], calls FIRST .. FIRST + COUNT - 1 of the tile kernel, or of those for few rows;
 * DIMS those of the kernel, 0: any; up to so many failures. */
#include "calls.h"
#include "kernels.h"

#include "core/sequence.h"

#include <climits>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

int calls_of[DECODE_KERNELS], folding_calls;

static void must(fad_status status) {
    if (status != FAD_OK)
        throw std::string("refused: ") + fad_last_error();
}

/* What the CPU needs to run a call. */
struct Reference {
    fad_attn_problem p;
    std::vector<char> workspace;
    fad_runtime runtime;

    explicit Reference(const fad_attn_problem &problem) : p(problem) {
        p.arithmetic = FAD_ARITHMETIC_MMA_SM90;
        size_t bytes = 0;
        must(fad_attn_workspace(&p, 1, &bytes));
        workspace.resize(bytes + 64);
        runtime = {1, nullptr, (void *)(((uintptr_t)workspace.data() + 63) / 64 * 64), bytes, nullptr};
    }
};

/* Elements whose bits differ, in words; "" if none do. */
template <class V>
static std::string differences(const char *name, const std::vector<V> &actual, const std::vector<V> &expected,
                               size_t n) {
    size_t count = 0;
    for (size_t i = 0; i < n; i++)
        count += memcmp(&actual[i], &expected[i], sizeof(V)) != 0;
    return count ? std::string(name) + " " + std::to_string(count) + " of " + std::to_string(n) + " differ; " : "";
}

typedef std::string Run(const fad_attn_problem &, int, const Launch &, const emulation::Options &);

/* out and lse, and what lies between the rows of out. */
static std::string compare_results(Call &call, Run *run, const Launch &launch, const emulation::Options &options) {
    Reference reference(call.p);
    std::vector<uint16_t> out = call.out.buffer;
    std::vector<float> lse = call.lse;
    reference.p.out.data = out.data() + call.out.start;
    if (reference.p.lse.data)
        reference.p.lse.data = lse.data();
    must(fad_attn_forward(&reference.p, &reference.runtime));
    const std::string failure = run(call.p, call.dims, launch, options);
    return failure.empty()
               ? differences("out", call.out.buffer, out, out.size()) + differences("lse", call.lse, lse, lse.size())
               : failure;
}

/* The state of every split. */
static std::string compare_states(Call &call, Run *run, Launch launch, const emulation::Options &options) {
    Reference reference(call.p);
    int64_t count;
    must(fad_attn_partials_count(&reference.p, &count));
    const size_t rows = (size_t)(call.p.B * call.p.Sq * call.p.Hq), values = rows * (size_t)call.p.Dv,
                 n = (size_t)launch.n_splits; /* count has one more for sinks, which is not the kernel's */
    struct States {
        std::vector<float> o, m, l;
    } wanted, got;
    for (States *s : {&wanted, &got})
        s->o.assign((size_t)count * values, NAN), s->m.assign((size_t)count * rows, NAN), s->l = s->m;
    const fad_partials partials = {wanted.o.data(), wanted.m.data(), wanted.l.data(), count};
    must(fad_attn_partials(&reference.p, &partials, &reference.runtime));
    if (n == 0)
        return "";
    launch.partials = {got.o.data(), got.m.data(), got.l.data(), launch.n_splits};
    const std::string failure = run(call.p, call.dims, launch, options);
    return failure.empty()
               ? differences("o", got.o, wanted.o, n * values) + differences("m", got.m, wanted.m, n * rows) +
                     differences("l", got.l, wanted.l, n * rows)
               : failure;
}

/* "", or what went wrong. */
static std::string run_call(Call &call, uint64_t seed) {
    const int64_t n_splits = fad_partition_end(call.p.Sk, call.p.split_size) + (call.p.k_pos ? 1 : 0);
    const Launch launch = {{},
                           n_splits,
                           between(1, n_splits > 0 ? n_splits : 1),
                           (int)between(1, 3),
                           call.few ? (DecodeKernel)between(0, DECODE_KERNELS - 1) : BY_WARPS};
    using emulation::Timing;
    const emulation::Options options = {seed, any({Timing::EARLY, Timing::LATE, Timing::RANDOM}),
                                        any({Timing::EARLY, Timing::LATE, Timing::RANDOM})};
    const bool bf16 = call.p.dtype == FAD_BFLOAT16;
    Run *const run = call.few ? bf16 ? run_decode_bf16 : run_decode_fp16 : bf16 ? run_tile_bf16 : run_tile_fp16;
    try {
        return call.spill ? compare_states(call, run, launch, options) : compare_results(call, run, launch, options);
    } catch (const std::string &refusal) {
        return refusal;
    }
}

int main(int argc, char **argv) {
    const bool few = argc > 1 && strcmp(argv[1], "decode") == 0;
    if (argc < 4 || !(few || strcmp(argv[1], "tile") == 0)) {
        fprintf(stderr, "usage: %s tile|decode FIRST COUNT [DIMS [FAILURES]]\n", argv[0]);
        return 2;
    }
    const uint64_t first = strtoull(argv[2], nullptr, 10), n = strtoull(argv[3], nullptr, 10);
    const int dims = argc > 4 ? atoi(argv[4]) : 0, most = argc > 5 ? atoi(argv[5]) : INT_MAX;
    std::map<std::string, int> of_kind;
    int failed = 0, ran = 0;
    for (uint64_t seed = first; seed < first + n && failed < most; seed++, ran++) {
        Call call(seed, dims, few);
        const std::string result = run_call(call, seed);
        of_kind[std::to_string(call.dims) + (call.p.dtype == FAD_BFLOAT16 ? " bf16" : " fp16") +
                (call.spill ? " spilled" : " folded")]++;
        if (result.empty())
            continue;
        failed++;
        printf("call %llu: %s: %s\n", (unsigned long long)seed, call.text().c_str(), result.c_str());
        fflush(stdout);
    }
    for (const auto &kind : of_kind)
        printf("%s: %d calls\n", kind.first.c_str(), kind.second);
    const char *const kernels[] = {"by warps", "by engine", "large clusters", "small clusters"};
    for (int i = 0; i < DECODE_KERNELS && few; i++)
        printf("%s: %d calls\n", kernels[i], calls_of[i]);
    if (few)
        printf("folding clusters: %d calls\n", folding_calls);
    printf("%d of %d calls failed\n", failed, ran);
    return failed > 0;
}
