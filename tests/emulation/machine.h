/* A thread block, or a cluster of them, on a CPU: every CUDA thread is a fiber, and a random scheduler decides who goes on.
 * What is asynchronous on a GPU (the copy engine, wgmma, cp.async, stores to other thread blocks) happens as late as it may, as
 * early, or at random times, so that a buffer that is read too early or written too soon shows in the bits. A state in which
 * nobody can go on is reported. */
#ifndef EMULATION_MACHINE_H
#define EMULATION_MACHINE_H

#include <cuda.h>

#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <vector>

namespace emulation {

struct Dim {
    unsigned x;
};
extern Dim thread_index, block_index, grid_size;
extern int block_threads;

/* The counter that thread blocks share: what it gives to this one, one after the other, and when there is no more. */
struct Counter {
    std::vector<unsigned long long> values;
    unsigned long long none;
    size_t taken;

    unsigned long long take() { return taken < values.size() ? values[taken++] : none; }
};
extern Counter counter;

enum class Timing { EARLY, LATE, RANDOM };
struct Options {
    uint64_t seed;
    Timing matrices, copies;
};
/* Runs `body` on `threads` fibers for each of `ranks` thread blocks, the first of which is number `first`. "" or what went
 * wrong. */
std::string run_cluster(unsigned first, int ranks, int threads, const Options &options,
                        const std::function<void()> &body);
[[noreturn]] void fail(const std::string &what);
uint64_t random_number();

/* All lanes of the warp meet; the last one runs action on what each brought. */
void meet(const char *kind, void *mine, void (*action)(void **of_lanes));

void barrier_init(uint64_t &barrier, int count);
void barrier_arrive(uint64_t &barrier, int expected_bytes);
bool barrier_test(uint64_t &barrier, unsigned parity);
void barrier_wait(uint64_t &barrier, unsigned parity);
/* Waits unless `arrive_only`. */
void named_barrier(int id, int threads, bool arrive_only);

/* cp.async of 16 bytes. */
void copy16(void *to, const void *from, int bytes);
void commit_copies();
void wait_copies(int groups);
/* Arrives when the copies that this thread has started so far are there. */
void arrive_copied(uint64_t &barrier);
void copy_box(void *to, const CUtensorMap &map, uint64_t &barrier, int dim, int row, int head, int entry);

/* The barrier of the cluster, in two halves. Bytes for the shared memory of thread block `rank`, and a barrier there, at these
 * places in it. */
void cluster_arrive();
void cluster_wait();
void send(int rank, int place, const void *from, int bytes, int barrier);

/* A step of 16 rows a warp: d [16, 8 tiles] (+)= a [16, 16] b [16, 8 tiles]. */
struct MatrixStep {
    bool bf16, a_in_registers, b_transposed, accumulate;
    int tiles;
    uint64_t a, b; /* descriptors */
    float *d_of[32];
    const unsigned *a_of[32];
};
void start_matrix(const MatrixStep &step); /* by the last lane of meet() */
void commit_matrices();
void wait_matrices(int groups);
/* The lanes' fragments as for mma.sync; b: [lane][2]. */
void multiply(bool bf16, float *const *d_of, const unsigned *const *a_of, const unsigned *const *b_of);

} // namespace emulation

/* Where the shared memory of the thread block lies that is running: the kernel declares it so. */
constexpr int SHARED_BYTES = 227 * 1024;
extern char shared_memory[];
#endif
