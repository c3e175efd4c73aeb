"""Where claims are checked: a device, an arithmetic family, and the shapes and options that calls have there."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import flash_attn_det as fad

BLOCK = fad.contract()["MMA_BLOCK_KV"]  # the smallest split, and whole blocks of either family
SPLIT = 4 * BLOCK  # of every claim: less than the default, so that a few thousand keys are several splits
KEYS = 3 * SPLIT + 241  # three splits and a ragged rest
PREFILL_KEYS = SPLIT + 101


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Setting:
    """Shapes and options that checks run on. ``plain`` ones have a form in torch's attention."""

    label: str
    dtype: torch.dtype
    Sq: int
    Sk: int
    Hq: int = 2
    Hk: int = 2
    D: int = 64
    Dv: int = 64
    plain: bool = True
    device: str = "cpu"

    def tensors(self, B: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v of normal noise, the same numbers on every device."""
        generator = torch.Generator().manual_seed(1)
        shapes = [(B, self.Sq, self.Hq, self.D), (B, self.Sk, self.Hk, self.D), (B, self.Sk, self.Hk, self.Dv)]
        q, k, v = (torch.randn(shape, generator=generator).to(self.device, self.dtype) for shape in shapes)
        return q, k, v

    def int32(self, values: list[int]) -> torch.Tensor:
        """Lengths or positions, on the device."""
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def options(self) -> dict[str, object]:
        """Arguments of ``attn``: causal always, and every feature at once where the setting is not plain."""
        if self.plain:
            return {"causal": True}
        compute = torch.float64 if self.dtype == torch.float64 else torch.float32
        return {
            "causal": True,
            "window": (SPLIT + 100, -1),
            "softcap": 20.0,
            "alibi_slopes": torch.linspace(0.001, 0.01, self.Hq, dtype=compute, device=self.device),
            "sinks": torch.linspace(-1.0, 1.0, self.Hq, dtype=compute, device=self.device),
        }


@dataclass(frozen=True)
class Backend:
    """One device and arithmetic family. ``dtypes`` are those that it computes, for the accuracy table."""

    device: str
    arithmetic: str
    dtypes: tuple[torch.dtype, ...]
    decode: tuple[Setting, ...]
    prefill: tuple[Setting, ...]
    everything: tuple[Setting, ...]  # window, softcap, ALiBi and sinks at once

    @property
    def name(self) -> str:
        """The family and its dtypes, in words."""
        return f"{self.arithmetic} family ({', '.join(map(dtype_name, self.dtypes))})"

    @property
    def all(self) -> tuple[Setting, ...]:
        """Every setting."""
        return self.decode + self.prefill + self.everything


def _decode(device: str, dtype: torch.dtype, **shape: int) -> Setting:
    return Setting(f"decode, {dtype_name(dtype)}", dtype, 1, device=device, **{"Sk": KEYS, "Hq": 16, "Hk": 4, **shape})


def _prefill(device: str, dtype: torch.dtype, **shape: int) -> Setting:
    label = f"prefill, {dtype_name(dtype)}" + "".join(f", {name} {value}" for name, value in shape.items())
    return Setting(label, dtype, PREFILL_KEYS, PREFILL_KEYS, device=device, **shape)


def _everything(device: str, dtype: torch.dtype, Sq: int) -> Setting:
    label = f"window, softcap, ALiBi, sinks, {dtype_name(dtype)}"
    return Setting(label, dtype, Sq, SPLIT + 300, 6, 3, 40, 24, plain=False, device=device)


def _cpu() -> Backend:
    floats = (torch.float32, torch.float16, torch.bfloat16)
    return Backend(
        device="cpu",
        arithmetic="fma",
        dtypes=(torch.float64, *floats),
        decode=tuple(_decode("cpu", dtype) for dtype in floats),
        prefill=tuple(_prefill("cpu", dtype) for dtype in floats),
        everything=(
            _everything("cpu", torch.float32, 1),
            _everything("cpu", torch.bfloat16, 100),
            _everything("cpu", torch.float64, 100),
        ),
    )


def _cuda(arithmetic: str, dtypes: tuple[torch.dtype, ...]) -> Backend:
    """The last of the dtypes also meets the head dims that have kernels of their own, and a long ragged cache."""
    last = dtypes[-1]
    return Backend(
        device="cuda",
        arithmetic=arithmetic,
        dtypes=dtypes,
        decode=(
            *(_decode("cuda", dtype, Hq=32, Hk=8, D=128, Dv=128) for dtype in dtypes),
            _decode("cuda", last, Sk=19802, Hq=14, Hk=2),  # where a neighbour has moved a row of another library
        ),
        prefill=(
            *(_prefill("cuda", dtype) for dtype in dtypes),
            _prefill("cuda", last, Hq=4, D=128, Dv=128),
            _prefill("cuda", last, D=256, Dv=256),
        ),
        everything=(_everything("cuda", dtypes[0], 1), _everything("cuda", last, 100)),
    )


CPU = _cpu()
CUDA_MMA = _cuda("mma", (torch.float16, torch.bfloat16))
CUDA_FMA = _cuda("fma", (torch.float16, torch.bfloat16, torch.float32))

BACKENDS = {"cpu": (CPU,), "cuda": (CUDA_MMA, CUDA_FMA)}
