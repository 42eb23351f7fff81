"""Suite `calls`: what a compiled model of one kernel costs over the kernel itself."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from bincompile.api import optimize
from bincompile.nn import BinaryEmbedding, BinaryLinear
from bincompile.suites.kernels import bare
from bincompile.suites.rows import KERNEL, OURS, Case, Row, row, times_of

SIZES = (64, 768)
ROWS_OF_TABLE, INDICES = 1000, 4


def cases() -> list[Case]:
    """Linears of one row, and a look-up."""
    found = [Case(f"call of a linear {size} -> {size}", partial(_linear, size)) for size in SIZES]
    return [*found, Case("call of a look-up", _look_up)]


def _linear(size: int) -> Iterator[Row]:
    yield _call(f"call of a linear {size} -> {size}", BinaryLinear(size, size, bias=True),
                torch.randn(1, size))


def _look_up() -> Iterator[Row]:
    yield _call("call of a look-up", BinaryEmbedding(ROWS_OF_TABLE, SIZES[0]),
                torch.randint(ROWS_OF_TABLE, (INDICES,)))


def _call(case: str, model: nn.Module, x: torch.Tensor) -> Row:
    """What a call takes over the kernel, its fresh result included, in microseconds."""
    compiled = optimize(model.eval(), (x,), choices={})
    times = times_of({OURS: partial(compiled, x), KERNEL: bare(compiled, x)})
    return row(case, times, values={"overhead_us": 1e3 * (times[OURS] - times[KERNEL])})
