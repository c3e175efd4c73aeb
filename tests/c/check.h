/* What the C tests share: checks that say where, and buffers between two pages that may not be touched. */
#ifndef FAD_TESTS_CHECK_H
#define FAD_TESTS_CHECK_H

#define _DEFAULT_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define CHECK(condition, ...)                                                                                          \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition);                                            \
            fprintf(stderr, __VA_ARGS__);                                                                              \
            fputc('\n', stderr);                                                                                       \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

typedef struct guarded {
    void *data; /* bytes, filled with 0xa5 */
    size_t bytes;
    char *pages;
    size_t pages_bytes;
} guarded;

enum { GUARD_END, GUARD_START }; /* which end of the buffer touches its guard page */

/* align: of data; with GUARD_END up to align - 1 bytes may lie between the buffer and the guard page, and are checked. */
static inline guarded guarded_alloc(size_t bytes, size_t align, int side) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), inside = (bytes + page - 1) / page * page;
    guarded g = {NULL, bytes, NULL, inside + 2 * page};
    g.pages = mmap(NULL, g.pages_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(g.pages != MAP_FAILED, "mmap of %zu bytes", g.pages_bytes);
    memset(g.pages, 0xa5, g.pages_bytes);
    CHECK(!mprotect(g.pages, page, PROT_NONE) && !mprotect(g.pages + page + inside, page, PROT_NONE), "mprotect");
    g.data = g.pages + page + (side == GUARD_START ? 0 : (inside - bytes) / align * align);
    return g;
}

/* Also checks that the bytes between the buffer and the pages are as they were. */
static inline void guarded_free(guarded *g) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    const char *first = g->pages + page, *last = g->pages + g->pages_bytes - page, *data = g->data;
    for (const char *at = first; at < last; at++)
        if (at < data || at >= data + g->bytes)
            CHECK(*at == (char)0xa5, "a byte %td from a buffer of %zu bytes was written", at - data, g->bytes);
    CHECK(!munmap(g->pages, g->pages_bytes), "munmap");
    g->data = NULL;
}

/* splitmix64 */
static inline uint64_t random_bits(uint64_t *state) {
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static inline int64_t random_in(uint64_t *state, int64_t low, int64_t high) {
    return low + (int64_t)(random_bits(state) % (uint64_t)(high - low + 1));
}

#endif
