#include "core.h"

static const struct {
    const char *name;
    int64_t value;
} constants[] = {
#define FAD_CONSTANT_ROW(name, value) {#name, value},
    FAD_CONSTANTS(FAD_CONSTANT_ROW)
#undef FAD_CONSTANT_ROW
};
enum { N_CONSTANTS = sizeof constants / sizeof constants[0] };

const char *fad_constant_name(int32_t index) {
    return index >= 0 && index < N_CONSTANTS ? constants[index].name : NULL;
}

fad_status fad_constant(const char *name, int64_t *value) {
    if (!name || !value)
        return fad_fail(FAD_INVALID_ARGUMENT,
                        "fad_constant needs a name and a place for the value, got a null pointer");
    for (int i = 0; i < N_CONSTANTS; i++)
        if (!strcmp(name, constants[i].name)) {
            *value = constants[i].value;
            return FAD_OK;
        }
    return fad_fail(FAD_INVALID_ARGUMENT, "no constant is named '%s'; fad_constant_name lists them", name);
}
