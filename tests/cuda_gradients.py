"""What the tests of the backward on a GPU share: the families, each with the CPU that is its reference; gradients."""

import dataclasses

import pytest
import torch
from cases import normal
from cuda_tools import moved
from gradients import NAMES, differing, gradients, upstream

from flash_attn_det.testing import assert_bits_equal


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of arithmetic: its names on the GPU and on the CPU that is its reference, and its dtypes."""

    on_gpu: str
    on_cpu: str
    dtypes: dict[str, torch.dtype]
    by_default: tuple[str, ...]  # dtypes that "auto" gives the family on a GPU

    def __hash__(self):
        return hash(self.on_gpu)

    @property
    def dtype(self) -> torch.dtype:
        """For tests that need one."""
        return next(iter(self.dtypes.values()))


FAMILIES = {
    "fma": Family(
        "fma", "fma", {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}, by_default=("fp32",)
    ),
    "mma": Family("mma", "mma_sm90", {"fp16": torch.float16, "bf16": torch.bfloat16}, by_default=("fp16", "bf16")),
}
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
OF_FAMILIES = [(f"{name} {dtype}", family, dtype) for name, family in FAMILIES.items() for dtype in family.dtypes]
every_dtype = pytest.mark.parametrize(
    ("family", "dtype"), [(f, f.dtypes[d]) for _, f, d in OF_FAMILIES], ids=[name for name, *_ in OF_FAMILIES]
)


def tensors(B=2, Sq=100, Sk=200, Hq=4, Hk=2, D=16, Dv=24, dtype=torch.float32, seed=4):
    """q, k, v and a gradient of out, on the CPU."""
    shapes = ((B, Sq, Hq, D), (B, Sk, Hk, D), (B, Sk, Hk, Dv))
    q, k, v = (normal(shape, 10 * seed + i, dtype) for i, shape in enumerate(shapes))
    return q, k, v, upstream(q, v)


def on_the_cpu(family, *inputs, **keywords):
    """dq, dk, dv and, with sinks, d_sinks, of q, k, v, dout and maybe dlse."""
    return gradients(*inputs, arithmetic=family.on_cpu, **keywords)


def on_the_gpu(family, *inputs, **keywords):
    """The same, computed on the GPU from tensors that may be anywhere."""
    return gradients(*moved(inputs), arithmetic=family.on_gpu, **moved(keywords))


def assert_same(actual, expected, name=""):
    assert len(actual) == len(expected)
    for got, want, part in zip(actual, expected, NAMES):
        assert got.device.type == "cuda"
        assert_bits_equal(got, want, f"{part} {name}")


def assert_noticed(family, q, k, v, dout, **keywords):
    """The negative control: dk and dv of the rows in two calls, added, are sums of the same terms in another order."""
    whole = on_the_gpu(family, q, k, v, dout, **keywords)
    halves = []
    for rows in (slice(None, q.shape[1] // 3), slice(q.shape[1] // 3, None)):
        part = torch.zeros_like(dout)
        part[:, rows] = dout[:, rows]
        halves.append(on_the_gpu(family, q, k, v, part, **keywords))
    assert differing([a + b for a, b in zip(*halves)][1:3], whole[1:3]) > 0
