"""Finds and loads the two C libraries; the only module that knows ctypes types of the C API (csrc/flash_attn_det.h)."""

import ctypes
from pathlib import Path

import torch  # noqa: F401  the shim needs torch's libraries in the process before it is loaded

_DIRECTORY = Path(__file__).parent / "lib"


class Schedule(ctypes.Structure):
    """struct fad_schedule."""

    _fields_ = (
        ("isa", ctypes.c_char_p),
        ("layout", ctypes.c_int32),
        ("tile_rows", ctypes.c_int32),
        ("split_parallel", ctypes.c_int32),
        ("kernel", ctypes.c_int32),
    )


def _load(name: str) -> ctypes.CDLL:
    path = _DIRECTORY / name
    if not path.exists():
        raise ImportError(f"{path} is missing: `pip install .` builds it, sources alone cannot be imported")
    return ctypes.CDLL(str(path))


def _prototype(function, result, *arguments):
    function.restype = result
    function.argtypes = arguments
    return function


_core = _load("libflash_attn_det.so")
_last_error = _prototype(_core.fad_last_error, ctypes.c_char_p)
_constant = _prototype(_core.fad_constant, ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_int64))
_constant_name = _prototype(_core.fad_constant_name, ctypes.c_char_p, ctypes.c_int32)
_cpu_isa = _prototype(_core.fad_cpu_isa, ctypes.c_char_p, ctypes.c_int32)
_fma_flops = _prototype(_core.fad_cpu_fma_flops, ctypes.c_int, ctypes.c_int64, ctypes.POINTER(ctypes.c_double))
_force_schedule = _prototype(_core.fad_force_schedule, ctypes.c_int, ctypes.POINTER(Schedule))


def _check(status: int) -> None:
    if status != 0:
        raise ValueError(_last_error().decode())


def _names(function) -> list[str]:
    names = []
    while (name := function(len(names))) is not None:
        names.append(name.decode())
    return names


def read_constants() -> dict[str, int]:
    """The contract's constants by name, as the C library was compiled with them."""
    constants = {}
    for name in _names(_constant_name):
        value = ctypes.c_int64()
        _check(_constant(name.encode(), ctypes.byref(value)))
        constants[name] = value.value
    return constants


def cpu_isas() -> list[str]:
    """Instruction sets that are compiled in and run on this CPU, best first."""
    return _names(_cpu_isa)


def fma_flops(iterations: int) -> float:
    """Run independent fp32 fmas on this thread, without the GIL; returns how many operations they were."""
    flops = ctypes.c_double()
    _check(_fma_flops(iterations, ctypes.byref(flops)))
    return flops.value


def force_schedule(schedule: Schedule | None) -> None:
    """Force what the scheduler would choose, on this thread; None: back to automatic. ValueError if out of range."""
    _check(_force_schedule(None if schedule is None else ctypes.byref(schedule)))


def register_kernels() -> None:
    """Load the shim and give its kernels to torch's dispatcher. The schemas must have been defined."""
    shim = _load("libflash_attn_det_torch.so")
    if _prototype(shim.fad_torch_register, ctypes.c_int32)() != 0:
        raise ImportError("PyTorch refused the kernels of flash_attn_det; this build needs torch 2.10 or newer")
