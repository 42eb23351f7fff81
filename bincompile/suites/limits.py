"""What the machine can do at most: 1-bit products on registers, and copies of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from bincompile.config import Target
from bincompile.runtime.tvm import Recipe, load, obstacle
from bincompile.suites.rows import COPY, OURS, PEAK, Case, Row, row, times_of

# Words of 32 bits in a vector, and accumulators that fit beside what else the loop holds.
REGISTERS = {"avx512-vpopcntdq": (16, 24), "avx2": (8, 6), "x86-64": (4, 6),
             "neon-dotprod": (4, 12), "neon": (4, 12)}
WORD = 32
PRODUCTS = 2 << 30  # of the row that shows the peak itself
COPIED = {"last-level cache": 2 << 20, "memory": 256 << 20}  # bytes that are read


def at_peak(products: int) -> dict[str, Callable[[], object]]:
    """The candidate that does as many 1-bit products on registers alone; none without TVM."""
    target = Target.host()
    if target.isa not in REGISTERS:
        return {}
    lanes, accumulators = REGISTERS[target.isa]
    recipe = Recipe("register_peak", {"lanes": lanes, "accumulators": accumulators})
    if obstacle(recipe, target) is not None:
        return {}
    threads = torch.get_num_threads()
    rounds = max(1, products // (lanes * accumulators * WORD * threads))
    return {PEAK: partial(load(recipe, target)["peak"], rounds,
                          torch.zeros(threads, dtype=torch.int32))}


def copying(size: int) -> dict[str, Callable[[], object]]:
    """The candidate that copies so many bytes into memory that was written before."""
    source = torch.ones(max(1, size // 4))
    return {COPY: partial(torch.empty_like(source).fill_(0.0).copy_, source)}


def cases() -> list[Case]:
    """The limits themselves, in products and bytes per second."""
    return [Case("limits", _limits)]


def _limits() -> Iterator[Row]:
    peak = at_peak(PRODUCTS)
    if peak:
        ms = times_of(peak)[PEAK]
        yield row("1-bit products on registers", {OURS: ms}, values={"gmacs": PRODUCTS / ms / 1e6})
    for place, size in COPIED.items():
        ms = times_of(copying(size))[COPY]
        yield row(f"copy in {place}", {OURS: ms}, values={"gigabytes": 2 * size / ms / 1e6})
