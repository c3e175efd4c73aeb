#include "machine.h"

#include "flash_attn_det.h"
#include "numerics/half.h"
#include "numerics/tensor_core.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>

alignas(1024) char shared_memory[SHARED_BYTES];

namespace emulation {

Dim thread_index, block_index, grid_size;
int block_threads;
Counter counter;

/* ---- fibers ---- */

extern "C" void emulation_switch(void **save, void *load);
asm(".text\n.globl emulation_switch\nemulation_switch:\n"
    "push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15\n"
    "mov %rsp, (%rdi); mov %rsi, %rsp\n"
    "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret\n");

struct Copy16 {
    void *to;
    const void *from;
    int bytes, group;
    uint64_t *arrives; /* at this barrier, instead of a copy */
};
struct Fiber {
    void *sp;
    char *stack;
    bool done;
    std::string waits; /* for what; empty: it can go on */
    const uint64_t *barrier;
    int named;                  /* barrier it waits at, else -1 */
    std::vector<Copy16> copies; /* in the order in which they were started */
    int copy_group;             /* the open one */
    int cluster_phase;          /* of the cluster's barrier that it has arrived for */
};
struct Warp {
    int arrived;
    const char *kind;
    void *of_lanes[32];
    std::vector<std::vector<MatrixStep>> groups; /* not yet done; the last one is open */
    bool slow;
};
struct NamedBarrier {
    int arrived, threads;
    bool here[1024];
};
struct BoxCopy {
    char *to;
    CUtensorMap map;
    uint64_t *barrier;
    int dim, row, head, entry;
    int rank; /* the thread block's */
};
struct Send {
    int rank, place, bytes, barrier;
    char data[16];
};

constexpr size_t STACK = 256 * 1024;
static std::vector<Fiber> fibers(2048);
static std::vector<Warp> warps;
static std::vector<int> ready;
static std::vector<BoxCopy> boxes;
static std::vector<Send> sends;
static std::vector<std::vector<char>> memories; /* of the thread blocks that are not running */
static int running;                             /* the one whose memory is in shared_memory */
static int cluster_arrived, cluster_phase;
static std::vector<NamedBarrier> named; /* 16 for each thread block */
static void *scheduler_sp;
static int current;
static Options options;
static std::mt19937_64 generator;
static std::string failure;
static const std::function<void()> *fiber_body;

uint64_t random_number() { return generator(); }
static bool one_in(unsigned n) { return generator() % n == 0; }
static int rank_of(int fiber) { return fiber / block_threads; }

/* Brings a thread block's memory to where its pointers point. */
static void enter(int rank) {
    if (rank == running)
        return;
    memcpy(memories[(size_t)running].data(), shared_memory, SHARED_BYTES);
    memcpy(shared_memory, memories[(size_t)rank].data(), SHARED_BYTES);
    running = rank;
}

static void to_scheduler() { emulation_switch(&fibers[current].sp, scheduler_sp); }
[[noreturn]] void fail(const std::string &what) {
    failure = "thread " + std::to_string(current) + ": " + what;
    for (;;)
        to_scheduler();
}
static void block(const std::string &what) {
    fibers[current].waits = what;
    to_scheduler();
}
static void wake(int fiber) {
    fibers[fiber].waits.clear();
    ready.push_back(fiber);
}
static void yield() {
    ready.push_back(current);
    to_scheduler();
}
static void fiber_main() {
    (*fiber_body)();
    /* of its groups; a copy that a barrier waits for is its waiter's affair */
    if (!fibers[current].copies.empty() && fibers[current].copies.front().group < fibers[current].copy_group)
        fail("a thread ends while its copies are on their way");
    fibers[current].done = true;
    for (;;)
        to_scheduler();
}

void meet(const char *kind, void *mine, void (*action)(void **)) {
    Warp &warp = warps[current / 32];
    const int lane = current % 32;
    if (warp.arrived == 0)
        warp.kind = kind;
    else if (strcmp(warp.kind, kind) != 0)
        fail(std::string("a warp diverges: ") + warp.kind + " and " + kind);
    warp.of_lanes[lane] = mine;
    if (++warp.arrived < 32) {
        block(std::string("warp ") + kind);
        return;
    }
    warp.arrived = 0;
    action(warp.of_lanes);
    const int first = current - lane;
    for (int i = 0; i < 32; i++)
        if (i != lane)
            wake(first + i);
    if (one_in(2))
        yield();
}

/* ---- barriers ---- */

struct Barrier { /* in the 64 bits that the kernel keeps for it */
    int32_t bytes;
    uint16_t pending;
    uint16_t count : 15, phase : 1;
};
static_assert(sizeof(Barrier) == 8);
static Barrier load(const uint64_t &barrier) {
    Barrier b;
    memcpy(&b, &barrier, 8);
    return b;
}
static void update(uint64_t &barrier, Barrier b) {
    const bool completes = b.pending == 0 && b.bytes == 0;
    if (completes)
        b.pending = b.count, b.phase ^= 1;
    memcpy(&barrier, &b, 8);
    if (completes)
        for (int i = running * block_threads; i < (running + 1) * block_threads; i++)
            if (fibers[(size_t)i].barrier == &barrier) {
                fibers[(size_t)i].barrier = nullptr;
                wake(i);
            }
}
void barrier_init(uint64_t &barrier, int count) {
    Barrier b = {0, (uint16_t)count, (uint16_t)count, 0};
    memcpy(&barrier, &b, 8);
}
void barrier_arrive(uint64_t &barrier, int expected_bytes) {
    Barrier b = load(barrier);
    if (b.pending == 0)
        fail("more arrivals than a barrier expects");
    b.pending--;
    b.bytes += expected_bytes;
    update(barrier, b);
}
static bool completed(const uint64_t &barrier, unsigned parity) { return load(barrier).phase != (parity & 1); }
bool barrier_test(uint64_t &barrier, unsigned parity) {
    return completed(barrier, parity) && !one_in(8); /* it may have been asked a little earlier */
}
void barrier_wait(uint64_t &barrier, unsigned parity) {
    if (parity > 1)
        fail("parity " + std::to_string(parity));
    if (one_in(4))
        yield();
    while (!completed(barrier, parity)) { /* who wakes up late sees later phases */
        fibers[current].barrier = &barrier;
        block("barrier at " + std::to_string((const char *)&barrier - shared_memory) + " parity " +
              std::to_string(parity));
    }
}
void named_barrier(int id, int threads, bool arrive_only) {
    id += running * 16;
    NamedBarrier &b = named[(size_t)id];
    if (b.arrived == 0)
        b = {}, b.threads = threads;
    if (b.threads != threads || b.here[current % block_threads])
        fail("named barrier " + std::to_string(id) + ": wrong count, or arrives twice");
    b.here[current % block_threads] = true;
    if (++b.arrived == threads) {
        b.arrived = 0;
        for (size_t i = 0; i < warps.size() * 32; i++)
            if (fibers[i].named == id) {
                fibers[i].named = -1;
                wake((int)i);
            }
        return;
    }
    if (arrive_only)
        return;
    fibers[current].named = id;
    block("named barrier " + std::to_string(id));
}

/* ---- clusters ---- */

void cluster_arrive() {
    fibers[current].cluster_phase = cluster_phase + 1;
    if (++cluster_arrived < (int)warps.size() * 32)
        return;
    cluster_arrived = 0, cluster_phase++;
    for (size_t i = 0; i < warps.size() * 32; i++)
        if (fibers[i].waits == "cluster")
            wake((int)i);
}
void cluster_wait() {
    if (cluster_phase < fibers[current].cluster_phase)
        block("cluster");
}
void send(int rank, int place, const void *from, int bytes, int barrier) {
    if (cluster_phase == 0)
        fail("sends to a thread block that may not have begun");
    Send s = {rank, place, bytes, barrier, {}};
    memcpy(s.data, from, (size_t)bytes);
    sends.push_back(s);
}
static bool run_some_send() {
    if (sends.empty())
        return false;
    const size_t i = options.copies == Timing::EARLY ? 0 : generator() % sends.size();
    const Send s = sends[i];
    sends.erase(sends.begin() + (long)i);
    bool there = false; /* a thread block must not end before all has come that is for it */
    for (int t = s.rank * block_threads; t < (s.rank + 1) * block_threads; t++)
        there |= !fibers[(size_t)t].done;
    if (!there) {
        failure = "bytes for a thread block that has ended";
        return true;
    }
    enter(s.rank);
    memcpy(shared_memory + s.place, s.data, (size_t)s.bytes);
    uint64_t &barrier = *(uint64_t *)(shared_memory + s.barrier);
    Barrier b = load(barrier);
    b.bytes -= s.bytes;
    update(barrier, b);
    return true;
}

/* ---- copies ---- */

static void run_copy16(const Copy16 &c) {
    if (c.arrives) {
        barrier_arrive(*c.arrives, 0);
        return;
    }
    memset(c.to, 0, 16);
    memcpy(c.to, c.from, (size_t)c.bytes);
}
void copy16(void *to, const void *from, int bytes) {
    const Copy16 c = {to, from, bytes, fibers[current].copy_group, nullptr};
    if (options.copies == Timing::EARLY)
        run_copy16(c);
    else
        fibers[current].copies.push_back(c);
}
void arrive_copied(uint64_t &barrier) {
    if (options.copies == Timing::EARLY)
        barrier_arrive(barrier, 0);
    else
        fibers[current].copies.push_back({nullptr, nullptr, 0, fibers[current].copy_group, &barrier});
}
/* The copies of some thread up to those that a barrier waits for. */
static bool run_some_arrival() {
    const int n = (int)warps.size() * 32, from = (int)(generator() % (unsigned)n);
    for (int i = 0; i < n; i++) {
        const int fiber = (from + i) % n;
        std::vector<Copy16> &copies = fibers[(size_t)fiber].copies;
        for (size_t last = 0; last < copies.size(); last++)
            if (copies[last].arrives) {
                enter(rank_of(fiber));
                for (size_t c = 0; c <= last; c++)
                    run_copy16(copies[c]);
                copies.erase(copies.begin(), copies.begin() + (long)last + 1);
                return true;
            }
    }
    return false;
}
void commit_copies() { fibers[current].copy_group++; }
void wait_copies(int groups) {
    if (one_in(2))
        yield();
    std::vector<Copy16> &copies = fibers[current].copies;
    size_t done = 0;
    for (; done < copies.size() && copies[done].group < fibers[current].copy_group - groups; done++)
        run_copy16(copies[done]);
    copies.erase(copies.begin(), copies.begin() + (long)done);
}
static int swizzled_address(int at) { return at ^ (at >> 7 & 7) << 4; }
static void run_box(const BoxCopy &c) {
    const int64_t *sizes = c.map.sizes, *strides = c.map.strides;
    const int start = (int)(c.to - shared_memory);
    for (int r = 0; r < c.map.box_rows; r++)
        for (int d = 0; d < 64; d++) {
            const int64_t at[4] = {c.dim + d, c.row + r, c.head, c.entry};
            bool inside = true;
            int64_t place = 0;
            for (int i = 0; i < 4; i++)
                inside &= at[i] >= 0 && at[i] < sizes[i], place += at[i] * strides[i];
            const uint16_t value = inside ? c.map.data[place] : 0;
            memcpy(shared_memory + swizzled_address(start + r * 128 + d * 2), &value, 2);
        }
    Barrier b = load(*c.barrier);
    b.bytes -= c.map.box_rows * 128;
    update(*c.barrier, b);
}
void copy_box(void *to, const CUtensorMap &map, uint64_t &barrier, int dim, int row, int head, int entry) {
    if (((char *)to - shared_memory) % 128 != 0)
        fail("a box's place is not aligned");
    boxes.push_back({(char *)to, map, &barrier, dim, row, head, entry, running});
}
static bool run_some_box() {
    if (boxes.empty())
        return false;
    const size_t i = options.copies == Timing::EARLY ? 0 : generator() % boxes.size();
    const BoxCopy c = boxes[i];
    boxes.erase(boxes.begin() + (long)i);
    enter(c.rank);
    run_box(c);
    return true;
}
/* Something that is under way without anybody's doing. Late copies are later than all else. */
static bool run_something() {
    if (options.copies != Timing::LATE && one_in(2) && run_some_arrival())
        return true;
    return (one_in(2) && run_some_box()) || run_some_send() || run_some_box() || run_some_arrival();
}

/* ---- matrices ---- */

static float widen(bool bf16, unsigned h) { return bf16 ? fad_bf16_widen((uint16_t)h) : fad_f16_widen((uint16_t)h); }
static void add_products(bool bf16, float &d, const float *a, const float *b) {
    d = fad_tensor_core_step(fad_tensor_core_of(90, bf16 ? -126 : -14), a, b, 16, d);
    if (d != d)
        d = fad_f32_from_bits(0x7fffffffu);
}
static void widen_a(bool bf16, const unsigned *const *a_of, float (&a)[16][16]) {
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++)
            for (int high = 0; high < 2; high++)
                a[lane / 4 + i % 2 * 8][lane % 4 * 2 + i / 2 * 8 + high] =
                    widen(bf16, a_of[lane][i] >> 16 * high & 0xffff);
}
void multiply(bool bf16, float *const *d_of, const unsigned *const *a_of, const unsigned *const *b_of) {
    float a[16][16], b[8][16];
    widen_a(bf16, a_of, a);
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 2; i++)
            for (int high = 0; high < 2; high++)
                b[lane / 4][lane % 4 * 2 + i * 8 + high] = widen(bf16, b_of[lane][i] >> 16 * high & 0xffff);
    for (int lane = 0; lane < 32; lane++)
        for (int e = 0; e < 4; e++)
            add_products(bf16, d_of[lane][e], a[lane / 4 + e / 2 * 8], b[lane % 4 * 2 + e % 2]);
}

/* A 16-bit number of a matrix in shared memory; `contiguous` counts along the rows of 128 bytes. */
static float element(bool bf16, uint64_t descriptor, int row, int contiguous) {
    const int start = (int)(descriptor & 0x3fff) << 4, across = (int)(descriptor >> 16 & 0x3fff) << 4,
              group = (int)(descriptor >> 32 & 0x3fff) << 4;
    const int at =
        swizzled_address(start + contiguous / 64 * across + row / 8 * group + row % 8 * 128 + contiguous % 64 * 2);
    uint16_t h;
    memcpy(&h, shared_memory + at, 2);
    return widen(bf16, h);
}
static void run_step(const MatrixStep &step, int warp) {
    float a[16][16];
    if (step.a_in_registers)
        widen_a(step.bf16, step.a_of, a);
    else
        for (int r = 0; r < 16; r++)
            for (int k = 0; k < 16; k++)
                a[r][k] = element(step.bf16, step.a, warp % 4 * 16 + r, k);
    for (int n = 0; n < step.tiles; n++) {
        float b[8][16];
        for (int j = 0; j < 8; j++)
            for (int k = 0; k < 16; k++)
                b[j][k] = step.b_transposed ? element(step.bf16, step.b, k, n * 8 + j)
                                            : element(step.bf16, step.b, n * 8 + j, k);
        for (int lane = 0; lane < 32; lane++)
            for (int e = 0; e < 4; e++) {
                float &d = step.d_of[lane][n * 4 + e];
                if (!step.accumulate)
                    d = 0;
                add_products(step.bf16, d, a[lane / 4 + e / 2 * 8], b[lane % 4 * 2 + e % 2]);
            }
    }
}
static void run_oldest_group(int warp) {
    auto &groups = warps[warp].groups;
    for (const MatrixStep &step : groups.front())
        run_step(step, warp);
    groups.erase(groups.begin());
}
void start_matrix(const MatrixStep &step) {
    if ((step.b | step.a) & 0xc000)
        fail("a descriptor's address overflows");
    auto &groups = warps[current / 32].groups;
    if (groups.empty())
        groups.push_back({});
    if (options.matrices == Timing::EARLY)
        run_step(step, current / 32);
    else
        groups.back().push_back(step);
}
void commit_matrices() {
    meet("wgmma_commit", nullptr, [](void **) { warps[current / 32].groups.push_back({}); });
}
void wait_matrices(int pending) {
    meet("wgmma_wait", &pending, [](void **of_lanes) {
        while ((int)warps[current / 32].groups.size() - 1 > *(const int *)of_lanes[0])
            run_oldest_group(current / 32);
    });
}

/* ---- scheduler ---- */

static std::string describe_deadlock() {
    std::string text = "deadlock:";
    std::string last;
    for (size_t i = 0; i < warps.size() * 32; i++)
        if (!fibers[i].done && fibers[i].waits != last) {
            last = fibers[i].waits;
            text += " [" + std::to_string(i) + "] " + last;
        }
    return text;
}

/* Warps are slow or fast for a while; matrices and copies go on in between. A thread block mostly goes on for a while, because
 * its memory has to be brought. */
static int choose() {
    size_t i = generator() % ready.size();
    const bool stay = memories.size() > 1 && !one_in(64);
    for (int tries = 0; tries < 8 && (warps[ready[i] / 32].slow || (stay && rank_of(ready[i]) != running)); tries++)
        i = generator() % ready.size();
    const int fiber = ready[i];
    ready[i] = ready.back();
    ready.pop_back();
    return fiber;
}

std::string run_cluster(unsigned first, int ranks, int threads, const Options &chosen,
                        const std::function<void()> &body) {
    options = chosen;
    generator.seed(chosen.seed);
    block_threads = threads;
    fiber_body = &body;
    failure.clear();
    ready.clear();
    boxes.clear();
    sends.clear();
    cluster_arrived = cluster_phase = 0;
    named.assign((size_t)ranks * 16, NamedBarrier{});
    warps.assign((size_t)(ranks * threads) / 32, Warp{});
    for (int i = 0; i < SHARED_BYTES; i++)
        shared_memory[i] = (char)(generator() % 3 ? 0xff : generator());
    memories.assign((size_t)ranks, std::vector<char>(shared_memory, shared_memory + SHARED_BYTES));
    running = 0;
    for (int i = 0; i < ranks * threads; i++) {
        Fiber &f = fibers[(size_t)i];
        char *stack = f.stack;
        if (!stack)
            stack = (char *)mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        f = Fiber{};
        f.stack = stack;
        f.named = -1;
        void **top = (void **)(stack + STACK);
        top[-1] = nullptr;
        top[-2] = (void *)fiber_main;
        f.sp = top - 8;
        ready.push_back(i);
    }
    const unsigned box_rate = options.copies == Timing::EARLY  ? 4
                              : options.copies == Timing::LATE ? 1u << 30
                                                               : 1u << generator() % 14;
    const unsigned matrix_rate = 1u << (4 + generator() % 8);
    for (;;) {
        if (one_in(box_rate))
            run_something();
        if (options.matrices == Timing::RANDOM && one_in(matrix_rate)) {
            const int warp = (int)(generator() % warps.size());
            if (warps[warp].groups.size() > 1) {
                enter(rank_of(warp * 32));
                run_oldest_group(warp);
            }
        }
        if (one_in(4096))
            for (Warp &warp : warps)
                warp.slow = one_in(3);
        if (!failure.empty())
            return failure;
        if (ready.empty()) {
            if (run_something())
                continue;
            break;
        }
        current = choose();
        enter(rank_of(current));
        thread_index.x = (unsigned)(current % threads);
        block_index.x = first + (unsigned)running;
        emulation_switch(&scheduler_sp, fibers[current].sp);
        if (!failure.empty())
            return failure;
    }
    for (int i = 0; i < ranks * threads; i++)
        if (!fibers[(size_t)i].done)
            return describe_deadlock();
    if (!boxes.empty())
        return "copies that nobody waited for";
    return "";
}

} // namespace emulation
