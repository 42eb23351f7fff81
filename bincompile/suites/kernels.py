"""Suite `kernels`: one operator each, compiled, against torch's float form of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from bincompile.api import optimize
from bincompile.compiled import CompiledModel
from bincompile.config import Binary
from bincompile.nn import BinaryLinear
from bincompile.ops.binary_attention import VALUES, binary_attention
from bincompile.runtime.bound import Bound
from bincompile.suites import limits
from bincompile.suites.peers import peers
from bincompile.suites.rows import EAGER, KERNEL, OURS, Case, Row, row, timed, times_of

SIZES, ROWS = (768, 4096), (512, 1)
HEADS, HEAD_DIM, LENGTHS = 12, 64, (128, 512, 1024)
# Forms that a float linear is compiled to, and the sizes of it.
LOSSY = {"w1a32": (Binary("w1a32"), SIZES), "w1a8": (Binary("w1a8"), SIZES),
         **{f"w{bases}a8": (Binary("w1a8", bases=bases), SIZES[:1]) for bases in (2, 3, 4)}}


def cases() -> list[Case]:
    """Limits of the machine, linears of each precision, and attention cores."""
    linears = [Case(f"w1a1 {size} -> {size}, {_rows(rows)}", partial(_w1a1, size, rows))
               for size in SIZES for rows in ROWS]
    linears += [Case(f"{name} {size} -> {size}, {_rows(rows)}",
                     partial(_lossy, name, form, size, rows))
                for name, (form, sizes) in LOSSY.items() for size in sizes for rows in ROWS]
    cores = [Case(f"attention core, {length} tokens", partial(_core, length))
             for length in LENGTHS]
    return [*limits.cases(), *linears, *cores]


def _rows(rows: int) -> str:
    return f"{rows} row{'s' if rows > 1 else ''}"


def bare(compiled: CompiledModel, x: torch.Tensor) -> Callable[[], Any]:
    """The one kernel of a compiled model on one input, without the model around it.

    It writes into memory that is there, where it can.
    """
    (kernel,) = compiled.executable.bound.values()
    return partial(kernel.into, x, *kernel.fresh(x)) if isinstance(kernel, Bound) \
        else partial(kernel, x)


def _w1a1(size: int, rows: int) -> Iterator[Row]:
    """Beside the float linears: the same kernel without the model's call, and the peak."""
    x = torch.randn(rows, size)
    compiled = optimize(BinaryLinear(size, size, bias=True).eval(), (torch.randn(4, size),),
                        choices={})
    floats = peers(nn.Linear(size, size).eval(), x, inductor=False)
    times = times_of({OURS: partial(compiled, x), KERNEL: bare(compiled, x), **floats,
                      **limits.at_peak(rows * size * size)})
    yield row(f"w1a1 {size} -> {size}, {_rows(rows)}", times,
              values={"kernel_speedup": times[EAGER] / times[KERNEL]})


def _lossy(name: str, form: Binary, size: int, rows: int) -> Iterator[Row]:
    x, plain = torch.randn(rows, size), nn.Linear(size, size).eval()
    compiled = optimize(plain, (torch.randn(4, size),), binary=form, guard=None, choices={})
    yield timed(f"{name} {size} -> {size}, {_rows(rows)}",
                {OURS: partial(compiled, x), **peers(plain, x, inductor=False)})


class _Core(nn.Module):
    """Attention of 1-bit queries and keys."""

    def __init__(self, values: str, probabilities: str) -> None:
        super().__init__()
        self.values, self.probabilities = values, probabilities

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return binary_attention.overload(q, k, v, None, None, None, None, HEAD_DIM ** -0.5, False,
                                         self.probabilities, self.values)[0]


def _core(length: int) -> Iterator[Row]:
    """Heads are views of (batch, tokens, features), as projections give them."""
    inputs = tuple(torch.randn(1, length, HEADS * HEAD_DIM).unflatten(-1, (HEADS, -1))
                   .transpose(1, 2) for _ in range(3))
    candidates: dict[str, Callable[[], Any]] = {EAGER: partial(F.scaled_dot_product_attention,
                                                               *inputs)}
    for values in VALUES:
        core = _Core(values, "uint8" if values == "binary" else "float").eval()
        candidates[values] = partial(optimize(core, inputs, choices={}), *inputs)
    times = times_of(candidates)
    for values in VALUES:
        yield row(f"attention core, {length} tokens, {values} values", times, ours=values,
                  others=set(VALUES) - {values})
