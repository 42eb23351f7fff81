"""Sweeps: operators that move along time and read some neighbouring tokens at each place.

Output i reads positions i * stride - left, ... of its input, `apart` from one another. What it
reads in front of the first is padding; what it reads behind the last is a delay: the answer waits
for the tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import sympy
from torch import fx

from bincompile.ops.stream_window import stream_window
from bincompile.passes.graph import aten, value_of
from bincompile.passes.streaming.builder import StepBuilder
from bincompile.passes.streaming.facts import Facts, settled
from bincompile.passes.streaming.kinds import (
    BATCH,
    TIME,
    Atom,
    Axes,
    Refused,
    Stepped,
    Windowed,
    expression,
)

MOST_TOKENS = 40  # lengths of sequences at which positions are counted


@dataclasses.dataclass(frozen=True)
class Sweep:
    """How an operator moves along time.

    Args:
        taps: positions that it reads at each place.
        stride: positions between two places.
        apart: positions between two that it reads.
        left: positions of padding in front of the first.
        right: positions of padding behind the last.
        fill: what padding holds.
    """

    taps: int
    stride: int = 1
    apart: int = 1
    left: int = 0
    right: int = 0
    fill: float = 0.0

    @property
    def reach(self) -> int:
        """Positions from the oldest that it reads to the newest."""
        return (self.taps - 1) * self.apart


def time_axis(axes: Axes, what: str) -> int | None:
    """The axis that holds time, and nothing else; None where none does.

    Raises:
        Refused: time shares an axis with other sizes.
    """
    found = next((i for i, axis in enumerate(axes) if any(a.role == TIME for a in axis)), None)
    if found is not None and len(axes[found]) > 1:
        raise Refused(f"{what} an axis that holds time among others")
    return found


def early(kind: Stepped, sweep: Sweep) -> Stepped:
    """The kind as the sweep reads it: padding of another value than its own is made real."""
    mixed = kind.lead and sweep.left and kind.fill != sweep.fill
    return settled(kind) if mixed else kind


def moved(kind: Any, sweep: Sweep, axis: int, length: Any, facts: Facts) -> Any:
    """The kind of what a sweep makes, with the axis of time as it was.

    Args:
        kind: of what it reads.
        sweep: how it moves.
        axis: the one of time, in `kind`.
        length: positions of the result in the model.
        facts: what is known of the model.
    """
    if kind.final:
        raise Refused("reads other tokens of a value that is known at the newest alone")
    axes = (*kind.axes[:axis], (Atom(TIME, length),), *kind.axes[axis + 1:])
    if facts.semantics == "window" and sweep != Sweep(1, apart=sweep.apart):
        kind = facts.lift(settled(kind))
    if isinstance(kind, Windowed):
        refuse_partial(facts)
        return dataclasses.replace(kind, axes=axes, window=facts.positions(length))
    kind = early(kind, sweep)
    late, delay = waits(kind, sweep)
    read = (sweep.reach + late) * kind.rate
    return dataclasses.replace(
        kind, axes=axes, rate=kind.rate * sweep.stride, delay=delay,
        reach=None if kind.reach is None else kind.reach + read,
        first=kind.first + read if kind.first > kind.delay else 0, lead=0, fill=0.0)


def refuse_partial(facts: Facts) -> None:
    """Raise where windows are to be answered that are not full yet, and all positions count."""
    if facts.continual.partial_window:
        raise Refused("reads positions of a window that hold nothing before it is full",
                      "Continual(partial_window=False)")


def waits(kind: Stepped, sweep: Sweep) -> tuple[int, int]:
    """How many indices old the newest that is read is, and the delay of the result."""
    delay = kind.delay + (sweep.reach - kind.lead - sweep.left) * kind.rate
    late = max(0, -(delay // kind.rate))
    return late, delay + late * kind.rate


def window(arg: fx.Node, sweep: Sweep, build: StepBuilder, last: bool = False) -> fx.Node:
    """What a sweep reads at its newest place: (M, taps, *plain), with `last` (M, *plain, taps)."""
    kind = build.kind(arg)
    if sweep.taps == 1 and not kind.lead and not sweep.left:
        return build.call(aten.unsqueeze.default, build.token(arg), -1 if last else 1)
    key = ("swept", arg, sweep, last)
    if key not in build.shared:
        build.shared[key] = swept(arg, sweep, build, stream_window.overload, sweep.taps,
                                  last=(last,))
    return build.shared[key]


def swept(arg: fx.Node, sweep: Sweep, build: StepBuilder, target: Any, *middle: Any,
          last: tuple[Any, ...] = ()) -> fx.Node:
    """A call of an operator that keeps the tokens of a sweep in a ring.

    Its arguments are the token, ring, rows and clock, what stands in the middle, then rate, delay,
    fill, how far entries are apart, how old the newest is, and the last ones.
    """
    kind = build.kind(arg)
    read = early(kind, sweep)
    late, _ = waits(read, sweep)
    node = build.made(arg) if read is kind else build.step(arg)
    ring = build.state("window", (sweep.reach + late + 1, *kind.plain), value_of(arg).dtype)
    return build.call(
        target, build.token_of(node, read), ring, build.rows, build.clock, *middle, read.rate,
        read.delay, kind.fill if read.lead else sweep.fill, sweep.apart, late, *last)


def check_others(axes: Axes, held: Sequence[int], what: str) -> None:
    """Raise where one of these axes holds time or the batch."""
    for axis in held:
        if any(atom.role == TIME for atom in axes[axis]):
            raise Refused(f"{what} time")
        if any(atom.role == BATCH for atom in axes[axis]):
            raise Refused(f"{what} rows of the batch")


def counts_every_step(kind: Stepped, facts: Facts) -> bool:
    """Whether a sequence of any length has as many positions as its steps have made.

    Else a value of the whole sequence covers positions that the steps do not have yet, such as
    those that a convolution makes of padding behind the last token.
    """
    time, length = facts.inputs.length, expression(kind.length)
    for tokens in range(1, MOST_TOKENS) if isinstance(time, sympy.Symbol) else (int(time),):
        found = length.subs(time, tokens) if isinstance(length, sympy.Expr) else length
        if max(0, int(found)) != max(0, (tokens - 1 - kind.delay) // kind.rate + 1):
            return False
    return True
