"""Every CUDA kernel on small shapes, for compute-sanitizer on a machine with a GPU:

compute-sanitizer --tool memcheck|initcheck|racecheck|synccheck python tests/cuda/sanitize.py KERNEL...

KERNEL: generic, hopper, cluster (the forward's), generic-backward, hopper-backward or fma; none: all. What racecheck
and synccheck report without a cause: docs/performance-*.md.
"""

import sys
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from cases import normal
from cuda_tools import poisoned
from paging import in_pages

import flash_attn_det as fad
from flash_attn_det import _schedule

HEAD_DIMS = (64, 128, 256)
PAGE_SIZES = (1, 8, 16, 20)
OPTIONS = ({}, {"causal": True}, {"causal": True, "softcap": 5.0, "window": (100, -1)})
SPLIT = 256


def inputs(B, Sq, Sk, Hq, Hk, D, dtype):
    shapes = ((B, Sq, Hq, D), (B, Sk, Hk, D), (B, Sk, Hk, D))
    return [normal(shape, seed, dtype).cuda() for seed, shape in enumerate(shapes)]


def forward(kernel, tile_rows, Sq, dtypes=(torch.bfloat16,), B=1, split_size=SPLIT, folded=False):
    """Dense calls with each option, folded and spilled, and paged ones. folded: split_parallel where not spilled."""
    for dtype, D, spilled in product(dtypes, HEAD_DIMS, (folded, True)):
        q, k, v = inputs(B, Sq, 600, 4, 2, D, dtype)
        with _schedule.forced(kernel=kernel, tile_rows=tile_rows, split_parallel=spilled), poisoned():
            for options in OPTIONS:
                fad.attn(q, k, v, split_size=split_size, **options)
            for page_size in PAGE_SIZES:
                pages = [x.cuda() for x in in_pages(k.cpu(), v.cpu(), page_size)]
                used = {"cache_seqlens": 600, "block_table": pages[2]}
                fad.attn_with_kvcache(q, *pages[:2], **used, split_size=split_size)


def backward(kernel, dtypes=(torch.bfloat16,)):
    for dtype, D, options in product(dtypes, HEAD_DIMS, OPTIONS[:2]):
        q, k, v = (x.requires_grad_() for x in inputs(1, 200, 300, 4, 2, D, dtype))
        with _schedule.forced(kernel=kernel), poisoned():
            fad.attn(q, k, v, split_size=SPLIT, **options).square().sum().backward()


def generic():
    for tile_rows, Sq in ((16, 3), (64, 30), (128, 100)):
        forward("generic", tile_rows, Sq)


def hopper():
    for tile_rows, Sq in ((16, 3), (128, 150)):
        forward("hopper", tile_rows, Sq)


def cluster():
    """Of many thread blocks, and with a larger batch of few; where not spilled, clusters fold two or three splits
    if they can."""
    for B, split_size in product((1, 16), (SPLIT, 384, 1024)):
        forward("cluster", 16, 3, B=B, split_size=split_size, folded=None)


def fma():
    for tile_rows, Sq in ((4, 1), (16, 3), (64, 30)):
        forward(None, tile_rows, Sq, (torch.float32,))
    backward(None, (torch.float32,))


KERNELS = {
    "generic": generic,
    "hopper": hopper,
    "cluster": cluster,
    "generic-backward": lambda: backward("generic"),
    "hopper-backward": lambda: backward("hopper"),
    "fma": fma,
}

if __name__ == "__main__":
    for name in sys.argv[1:] or KERNELS:
        KERNELS[name]()
        torch.cuda.synchronize()
        print(name, "ran")
