"""Forces choices of the scheduler: for tests that prove that no choice changes a bit, and for audits. Not public."""

from collections.abc import Iterator
from contextlib import contextmanager

from . import _library

_LAYOUTS = {None: 0, "rows": 1, "keys": 2}
_SPLIT_PARALLEL = {None: 0, False: 1, True: 2}
_KERNELS = {None: 0, "generic": 1, "hopper": 2, "cluster": 3}


def isas() -> list[str]:
    """Instruction sets that run here, best first."""
    return _library.cpu_isas()


@contextmanager
def forced(
    isa: str | None = None,
    layout: str | None = None,
    tile_rows: int | None = None,
    split_parallel: bool | None = None,
    kernel: str | None = None,
) -> Iterator[None]:
    """Within the block, calls from this thread use these choices; None leaves one automatic. Blocks do not nest.

    isa: a name from isas(). layout: "rows" or "keys", what a vector lane stands for. tile_rows: query rows of one work
    item, 1 .. 256; in a backward on the CPU, in whole blocks of 64. split_parallel: whether splits are computed side by
    side and folded afterwards; in a backward on the CPU, whether dq has a pass of its own. kernel: "generic",
    "hopper" or "cluster", the kernels of the mma family on a GPU; one also runs where those after it cannot.
    Raises ValueError for a value out of range, and KeyError for an unknown layout or kernel.
    """
    schedule = _library.Schedule(
        isa=None if isa is None else isa.encode(),
        layout=_LAYOUTS[layout],
        tile_rows=0 if tile_rows is None else tile_rows,
        split_parallel=_SPLIT_PARALLEL[split_parallel],
        kernel=_KERNELS[kernel],
    )
    _library.force_schedule(schedule)
    try:
        yield
    finally:
        _library.force_schedule(None)
        del schedule  # lives until here: the library keeps the pointer to the name
