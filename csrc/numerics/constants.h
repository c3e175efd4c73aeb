/* The contract's constants, as one list: C expands it to an enum, the library serves it to Python by name. */
#ifndef FAD_NUMERICS_CONSTANTS_H
#define FAD_NUMERICS_CONSTANTS_H

#define FAD_CONSTANTS(X)                                                                                               \
    X(CONTRACT_VERSION, 1)          /* other bits need another version */                                              \
    X(BLOCK_KV, 64)                 /* keys per block of the fma family (N3) */                                        \
    X(MMA_BLOCK_KV, 128)            /* of the mma family; a split is a multiple of it in both */                       \
    X(DEFAULT_SPLIT_SIZE, 512)      /* keys per split (N3) unless the user says otherwise */                           \
    X(MMA_DEFAULT_SPLIT_SIZE, 1024) /* the same of the mma family */                                                   \
    X(MAX_HEAD_DIM, 256)            /* largest D and Dv */                                                             \
    X(MAX_ALIBI_KEYS, 16777216)     /* positions below this are exact in fp32, as ALiBi's distance must be (N5) */

enum {
#define FAD_CONSTANT_ENUM(name, value) FAD_##name = (value),
    FAD_CONSTANTS(FAD_CONSTANT_ENUM)
#undef FAD_CONSTANT_ENUM
};

#endif
