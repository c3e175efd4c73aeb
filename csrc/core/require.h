/* Checks that return from the calling function, with a message that names the argument, its value and what was
 * expected. */
#ifndef FAD_CORE_REQUIRE_H
#define FAD_CORE_REQUIRE_H

#include "core.h"

#define REQUIRE(condition, ...)                                                                                        \
    do {                                                                                                               \
        if (!(condition))                                                                                              \
            return fad_fail(FAD_INVALID_ARGUMENT, __VA_ARGS__);                                                        \
    } while (0)
#define TRY(call)                                                                                                      \
    do {                                                                                                               \
        const fad_status status_ = (call);                                                                             \
        if (status_ != FAD_OK)                                                                                         \
            return status_;                                                                                            \
    } while (0)
#define LL(x) ((long long)(x))

/* Elements of a tensor, at most: offsets and counts of anything in it cannot overflow. */
#define FAD_MAX_ELEMENTS 0x1p56

#endif
