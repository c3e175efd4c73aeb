"""The settings that change bits, and the constants of the contract. Everything else is scheduling and cannot."""

import os
import threading
from typing import NamedTuple

from . import _library
from ._version import __version__

_CONSTANTS = _library.read_constants()
_SPLIT_UNIT = _CONSTANTS["MMA_BLOCK_KV"]  # N3: the larger block, whatever the family of a call


def _checked(value: int, source: str = "split_size") -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{source} must be an int, got {type(value).__name__}")
    if value <= 0 or value % _SPLIT_UNIT != 0:
        raise ValueError(f"{source} is {value}, expected a positive multiple of {_SPLIT_UNIT}")
    return value


def _from_environment() -> int | None:
    name = "FLASH_ATTN_DET_SPLIT_SIZE"
    text = os.environ.get(name)
    if text is None:
        return None
    try:
        value = int(text)
    except ValueError:
        raise ValueError(f"{name} is {text!r}, expected a positive multiple of {_SPLIT_UNIT}") from None
    return _checked(value, name)


class _Override(threading.local):
    def __init__(self):  # runs once in every thread; torch.compile guards instance attributes, so no class attribute
        self.value = None


_process_value = _from_environment()
_override = _Override()


def get_split_size(family: str = "fma") -> int:
    """Keys per split of a call that is given none: those of this thread's `split_size` block, else the process's, else
    what the contract says of the family ("fma" or "mma"): 512 in fma, whose sums are one chain a split, so that their
    error grows with it; 1024 in mma, where prefill pays for every fold and decode lives on splits.
    Raises ValueError for another family.
    """
    if family not in ("fma", "mma"):
        raise ValueError(f"family is {family!r}, expected 'fma' or 'mma'")
    value = _process_value if _override.value is None else _override.value
    if value is None:
        return _CONSTANTS["MMA_DEFAULT_SPLIT_SIZE" if family == "mma" else "DEFAULT_SPLIT_SIZE"]
    return value


def set_split_size(n: int | None) -> None:
    """Set the split size of the whole process, for every thread that is not inside a `split_size` block.

    n: keys per split in both families, a positive multiple of MMA_BLOCK_KV (128); None: each family has its own. It is
    static: another value gives other bits (clause N3), so set it once, before work starts; to use several
    values at once, pass split_size to the call or use the `split_size` block. Every call reads the value exactly once.
    Compiled functions notice a change and recompile.
    Raises TypeError, ValueError.
    """
    global _process_value
    _process_value = None if n is None else _checked(n)


class split_size:
    """Context manager: calls from this thread inside the block use n keys per split.

    Blocks nest; other threads do not see them. Two coroutines of one thread that take turns inside blocks do share
    them, as they share torch.no_grad(): pass split_size to the call there.
    Raises TypeError or ValueError if n is not a positive multiple of MMA_BLOCK_KV (128).
    """

    def __init__(self, n: int):
        self._n = _checked(n)
        self._outer = []  # a stack: the same object may be entered again inside itself

    def __enter__(self) -> int:
        self._outer.append(_override.value)
        _override.value = self._n
        return self._n

    def __exit__(self, *exception) -> None:
        _override.value = self._outer.pop()


def resolve_split_size(n: int | None, family: str) -> int:
    """The split size of one call of a family that was given n."""
    return get_split_size(family) if n is None else _checked(n)


class DeterministicMode(NamedTuple):
    enabled: bool
    split_size: int


def set_deterministic_mode(enabled: bool, split_size: int | None = None) -> None:
    """Choose the split size under the name that users of an earlier deterministic FlashAttention fork know.

    There is no other mode here: enabled must be true (ValueError otherwise). split_size as in set_split_size; None
    leaves it as it is.
    """
    if not enabled:
        raise ValueError("flash_attn_det has no non-deterministic mode: set_deterministic_mode(False) is not possible")
    if split_size is not None:
        set_split_size(split_size)


def get_deterministic_mode() -> DeterministicMode:
    """(enabled, split_size); enabled is always True, split_size is get_split_size()."""
    return DeterministicMode(True, get_split_size())


def contract() -> dict[str, int | str]:
    """What the bits depend on besides the arguments: the contract's constants, and the package's version."""
    return {**_CONSTANTS, "PACKAGE_VERSION": __version__}
