#include "core.h"

static _Thread_local fad_schedule forced;

const fad_schedule *fad_forced_schedule(void) { return &forced; }

fad_status fad_force_schedule(const fad_schedule *schedule) {
    static const fad_schedule automatic;
    const fad_schedule s = schedule ? *schedule : automatic;
    if (s.layout < 0 || s.layout > 2)
        return fad_fail(FAD_INVALID_ARGUMENT, "layout is %d, expected 0 (auto), 1 (rows) or 2 (keys)", s.layout);
    if (s.tile_rows < 0 || s.tile_rows > 256)
        return fad_fail(FAD_INVALID_ARGUMENT, "tile_rows is %d, expected 0 (auto) to 256", s.tile_rows);
    if (s.split_parallel < 0 || s.split_parallel > 2)
        return fad_fail(FAD_INVALID_ARGUMENT, "split_parallel is %d, expected 0 (auto), 1 (never) or 2 (always)",
                        s.split_parallel);
    if (s.kernel < 0 || s.kernel > 3)
        return fad_fail(FAD_INVALID_ARGUMENT, "kernel is %d, expected 0 (auto), 1 (generic), 2 (hopper) or 3 (cluster)",
                        s.kernel);
    forced = s;
    return FAD_OK;
}
