"""Caches for tests: the same keys in a contiguous buffer, in pages, and in entries that an index names."""

from typing import NamedTuple

import torch
from cases import integers

WRONG_PAGES = (-1, 2**31 - 1, -(2**31))  # what may stand in a table behind the last key


class Pages(NamedTuple):
    k: torch.Tensor  # [pages, page_size, Hk, D]
    v: torch.Tensor
    block_table: torch.Tensor  # [B, columns] int32


def shuffled(n: int, seed: int) -> torch.Tensor:
    """A permutation of 0 .. n - 1, the same on every machine."""
    return integers(n, 0, 1 << 30, seed).argsort(stable=True)


def in_pages(k, v, page_size, lengths=None, *, spare_columns=0, spare_pages=3, seed=5, unused=float("nan")) -> Pages:
    """Rows 0 .. lengths[b] - 1 of k and v [B, Sk, ...] in shuffled pages. All other rows of the pool are `unused`, and
    the entries that no key needs are no pages."""
    batch, rows = k.shape[:2]
    lengths = [rows] * batch if lengths is None else [int(n) for n in lengths]
    columns = -(-rows // page_size) + spare_columns
    needed = [-(-n // page_size) for n in lengths]
    order = iter(shuffled(sum(needed) + spare_pages, seed).tolist())
    pools = [torch.full((sum(needed) + spare_pages, page_size, *x.shape[2:]), unused, dtype=x.dtype) for x in (k, v)]
    table = torch.tensor(WRONG_PAGES, dtype=torch.int32).repeat(batch * columns)[: batch * columns].view(batch, columns)
    for b in range(batch):
        for column in range(needed[b]):
            page = table[b, column] = next(order)
            first, end = column * page_size, min((column + 1) * page_size, lengths[b])
            for pool, x in zip(pools, (k, v)):
                pool[page, : end - first] = x[b, first:end]
    return Pages(*pools, table)


def gathered(pages: Pages, b: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows 0 .. n - 1 of sequence b's keys and values, as a batch of one."""
    page_size, row = pages.k.shape[1], torch.arange(n)
    page = pages.block_table[b, row // page_size].long()
    return pages.k[page, row % page_size][None], pages.v[page, row % page_size][None]
