"""Every schedule of the mma family on a GPU, for tests that prove that none changes a bit."""

from cuda_tools import (
    assert_same,
    attention,
    poisoned,
)

from flash_attn_det import _schedule

# Tiles of 16 rows are the decode kernels'; 64 and 128 are those of prompts; None is the kernel's own choice. Clusters
# share splits that are spilled, or the only one; those that may choose fold a few splits.
KERNELS = {
    **{f"generic {rows or 'auto'}": {"kernel": "generic", "tile_rows": rows} for rows in (None, 16, 64, 128)},
    **{f"hopper {rows or 'auto'}": {"kernel": "hopper", "tile_rows": rows} for rows in (None, 16, 128)},
    "cluster 16": {"kernel": "cluster", "tile_rows": 16},
}
SCHEDULES = {
    f"{name} {'spilled' if split_parallel else 'folded'}": {**kernel, "split_parallel": split_parallel}
    for name, kernel in KERNELS.items()
    for split_parallel in (False, True)
} | {"cluster 16 that may fold": KERNELS["cluster 16"]}


def every_schedule(*qkv, **keywords):
    """(name, out and lse) under each schedule, with memory that starts as NaN."""
    for name, schedule in SCHEDULES.items():
        with _schedule.forced(**schedule), poisoned():
            result = attention(*qkv, **keywords)
        yield name, result


def assert_same_in_every_schedule(*qkv, **keywords):
    """Returns out and lse of the automatic choice."""
    with poisoned():
        want = attention(*qkv, **keywords)
    for name, got in every_schedule(*qkv, **keywords):
        assert_same(got, want, name)
    return want
