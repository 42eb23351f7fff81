"""Which index of a value a step computes, and what every stream operator asks of its arguments.

A value of rate R and delay D has its index n at step n * R + D. A step between two of its ticks
computes the next one, ahead of its time: what it writes is written again then, and only then read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import is_fake

from bincompile.errors import InputError, InputTypeError
from bincompile.op import Sample

Rows = torch.Tensor
Clock = torch.Tensor


def index_of(rows: Rows, clock: Clock, rate: int, delay: int) -> torch.Tensor:
    """The index that a step computes for each of its rows: (M,) int64, below 0 before the first.

    Args:
        rows: (M,) which rows of the state.
        clock: (N,) the steps that each row has taken.
        rate: steps between two indices.
        delay: the step of index 0.
    """
    return -((delay - clock[rows]) // rate)


def check_clock(rows: Rows, clock: Clock, rate: int = 1, delay: int = 0) -> None:
    """Raise unless these say which rows of which streams take a step.

    Raises:
        InputTypeError: a dtype other than int64.
        InputError: a shape, rate or delay that is not allowed, or a row that isn't there.
    """
    for name, value in (("rows", rows), ("clock", clock)):
        if value.dtype != torch.int64:
            raise InputTypeError(f"{name} of dtype {value.dtype}", "int64", f"{name}.long()")
        if value.ndim != 1:
            raise InputError(f"{name} of shape {tuple(value.shape)}", "one axis", name)
    if rate < 1 or delay < 0:
        raise InputError(f"rate {rate} and delay {delay}", "at least 1, and at least 0",
                         "the rate or the delay")
    if is_fake(rows) or rows.device.type == "meta" or rows.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(rows))
    if low < 0 or high >= clock.shape[0]:
        raise InputError(f"row {low if low < 0 else high} of {clock.shape[0]} streams",
                         f"0 to {clock.shape[0] - 1}", "the rows")


def check_state(name: str, state: torch.Tensor, clock: Clock, shape: tuple[int | None, ...],
                dtype: torch.dtype | None = None) -> None:
    """Raise unless a state has a row for each clock, and each row this shape.

    Args:
        name: of the argument.
        state: the state.
        clock: (N,).
        shape: of one row; None for a size that may be anything.
        dtype: its dtype, where that is fixed.
    """
    wanted = (clock.shape[0], *shape)
    fits = state.ndim == len(wanted) and all(
        w is None or s == w for s, w in zip(state.shape, wanted, strict=True))
    if not fits:
        text = ", ".join("any" if w is None else str(w) for w in wanted)
        raise InputError(f"{name} of shape {tuple(state.shape)}", f"({text})", f"the {name}")
    if dtype is not None and state.dtype != dtype:
        raise InputTypeError(f"{name} of dtype {state.dtype}", str(dtype), f"the {name}")


def check_tokens(token: torch.Tensor, rows: Rows) -> None:
    """Raise unless there is one token for each row."""
    if token.ndim < 1 or token.shape[0] != rows.shape[0]:
        raise InputError(f"tokens of shape {tuple(token.shape)} for {rows.shape[0]} rows",
                         "one token for each row", "the token")


def wide_as(flags: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Flags of the first axes of a tensor, in a shape that spreads over the others."""
    return flags.reshape(*flags.shape, *(1,) * (like.ndim - flags.ndim))


class Case(NamedTuple):
    """One step of a sample: rows in any order, clocks of their own."""

    rows: Rows
    clock: Clock
    rate: int
    delay: int

    @property
    def timing(self) -> Mapping[str, Any]:
        """The named arguments of the same meaning."""
        return {"rate": self.rate, "delay": self.delay}


CASES = (
    Case(torch.tensor([0]), torch.tensor([0]), 1, 0),
    Case(torch.tensor([2, 0]), torch.tensor([5, 3, 1]), 1, 0),
    Case(torch.tensor([1, 3, 0, 2]), torch.tensor([0, 7, 2, 40]), 1, 2),
    Case(torch.tensor([3, 1, 2]), torch.tensor([9, 11, 4, 2]), 3, 1),
    Case(torch.tensor([0, 1]), torch.tensor([2 ** 40 + 1, 12]), 2, 0),
    Case(torch.tensor([], dtype=torch.int64), torch.tensor([4, 2]), 1, 0),
)


def draw(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Random numbers of any dtype."""
    return (torch.randn(shape, generator=generator) * 3).to(dtype)


def bad_clocks() -> Iterator[tuple[Rows, Clock, Mapping[str, Any], str]]:
    """Rows, clock and timing of which something is not allowed, and a word of the message."""
    one, clock = torch.tensor([0]), torch.tensor([0, 0])
    yield one.int(), clock, {}, "int64"
    yield one, clock.double(), {}, "int64"
    yield one, clock[:, None], {}, "one axis"
    yield torch.tensor([2]), clock, {}, "row 2"
    yield torch.tensor([-1]), clock, {}, "row -1"
    yield one, clock, {"rate": 0}, "rate 0"
    yield one, clock, {"delay": -1}, "delay -1"


def bad_clock_samples(*before: Any, middle: tuple[Any, ...] = ()) -> Iterator[Sample]:
    """Bad samples of an operator `(*before, rows, clock, *middle, rate, delay)`."""
    for rows, clock, timing, error in bad_clocks():
        yield Sample((*before, rows, clock, *middle), dict(timing), error=error)


def check_latest(name: str, state: torch.Tensor, clock: Clock, token: tuple[int, ...],
                 dtype: torch.dtype | None = None) -> None:
    """Raise unless a state has two slots a row, each of this shape, for the last value and the new.

    Args:
        name: of the argument.
        state: (N, 2, *token).
        clock: (N,).
        token: the shape of a value.
        dtype: its dtype, where that is fixed.
    """
    check_state(name, state, clock, (2, *token), dtype)


def latest(state: torch.Tensor, rows: Rows, index: torch.Tensor) -> torch.Tensor:
    """The value of the index before; anything where there is none."""
    return state[rows, (index - 1) % 2]


def keep(state: torch.Tensor, rows: Rows, index: torch.Tensor, value: torch.Tensor) -> None:
    """Remember the value of an index, beside that of the one before."""
    state[rows, index % 2] = value.to(state.dtype)
