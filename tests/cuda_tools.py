"""What the tests on a GPU share: calls and their inputs, moved there; comparisons; memory that starts as NaN."""

from contextlib import contextmanager

import pytest
import torch
from cases import normal

import flash_attn_det as fad
from flash_attn_det.testing import assert_bits_equal, bits_differ

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU (compute capability 9.0)")

# Two blocks of the mma family, and short enough that small shapes have several.
SPLIT = 2 * fad.contract()["MMA_BLOCK_KV"]

every_16_bit_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


def moved(x, device="cuda"):
    """Tensors on the device; also those of lists and dicts. Anything else as it is."""
    if isinstance(x, dict):
        return {name: moved(value, device) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [moved(value, device) for value in x]
    return x.to(device) if isinstance(x, torch.Tensor) else x


def tensors(B=2, Sq=5, Sk=300, Hq=4, Hk=2, D=64, Dv=None, dtype=torch.float32, seed=1):
    """q, k, v on the CPU."""
    shapes = ((B, Sq, Hq, D), (B, Sk, Hk, D), (B, Sk, Hk, Dv or D))
    return [normal(shape, 10 * seed + i, dtype) for i, shape in enumerate(shapes)]


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def attention(*qkv, **keywords):
    """out and lse of the device's family."""
    return fad.attn(*qkv, **{"split_size": SPLIT, "return_lse": True, **keywords})


def packed(*arguments, **keywords):
    return fad.attn_varlen(*arguments, **{"split_size": SPLIT, "return_lse": True, **keywords})


def rows(result, first, end):
    """Rows first .. end - 1 of out and lse."""
    out, lse = result
    return out[:, first:end], lse[:, :, first:end]


def sequences(result, index):
    """Sequences of out and lse."""
    return [x[index] for x in result]


def assert_same(actual, expected, name=""):
    for got, want, part in zip(actual, expected, ("out", "lse")):
        assert got.device.type == "cuda"
        assert_bits_equal(got, want, f"{part} {name}")


def differing(actual, expected):
    """Elements of out and lse whose bits differ."""
    return sum(bits_differ(got, want) for got, want in zip(actual, expected))


def assert_noticed(*qkv, **keywords):
    """The negative control: other splits of the same keys give other bits, so these inputs can tell.

    Of 16-bit results few elements show it, about one in ten of lse: give it some hundred rows and heads.
    """
    assert differing(attention(*qkv, **keywords), attention(*qkv, **{**keywords, "split_size": SPLIT // 2})) > 0


@contextmanager
def poisoned():
    """Memory that torch allocates in the block starts as NaN, as 255 where it is bytes: results and workspace."""
    torch.use_deterministic_algorithms(True)
    fill, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        True,
    )
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(False)


def busy():
    """Occupies torch's current stream for some tenths of a second."""
    torch.cuda._sleep(500_000_000)
