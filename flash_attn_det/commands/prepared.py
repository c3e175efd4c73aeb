"""What the GPU benchmark times."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Prepared(NamedTuple):
    """A call that is ready to be timed, and what turns its result into out in our layout."""

    call: Callable[[], torch.Tensor]
    rows: Callable[[torch.Tensor], torch.Tensor] = lambda out: out
