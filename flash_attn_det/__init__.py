"""Deterministic, batch-invariant attention. Scheduling is free, arithmetic is fixed."""

from . import distributed, integrations
from ._version import __version__
from .attention import attn, attn_partials, attn_varlen
from .audit import AuditError, AuditReport, AuditSummary, audit, audited
from .compat import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from .compat_packed import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from .determinism import (
    contract,
    get_deterministic_mode,
    get_split_size,
    set_deterministic_mode,
    set_split_size,
    split_size,
)
from .kvcache import append_kvcache, apply_rotary, attn_with_kvcache
from .merge import Partials, merge_partials
from .sdpa import sdpa

__all__ = [
    "AuditError",
    "AuditReport",
    "AuditSummary",
    "Partials",
    "__version__",
    "append_kvcache",
    "apply_rotary",
    "attn",
    "attn_partials",
    "attn_varlen",
    "attn_with_kvcache",
    "audit",
    "audited",
    "contract",
    "distributed",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "get_deterministic_mode",
    "get_split_size",
    "merge_partials",
    "sdpa",
    "set_deterministic_mode",
    "set_split_size",
    "split_size",
]

integrations.install()
