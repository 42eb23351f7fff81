"""Kinds: what a value of the model is once time passes, and which of its axes hold what.

Every axis is a tuple of atoms, outermost first: time, batch, or a plain size. A reshape merges and
splits atoms; an axis of size 1 holds none. So an axis of (batch * heads) or (time * batch) stays
known for what it is, whatever numbers a capture wrote down for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import sympy
import torch

TIME, BATCH, PLAIN = "time", "batch", "plain"


@dataclasses.dataclass(frozen=True)
class Atom:
    """A part of an axis.

    Args:
        role: "time", "batch" or "plain".
        size: how many positions it has in the model: an int, or an expression in the sizes that
            the capture left open.
    """

    role: str
    size: Any

    def __str__(self) -> str:
        return f"{self.role} {self.size}" if self.role == TIME else str(self.size)


Axis = tuple[Atom, ...]
Axes = tuple[Axis, ...]


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a value is once time passes.

    Args:
        axes: what each of its axes holds, in the model.
    """

    axes: Axes

    @property
    def time_axis(self) -> int | None:
        """The axis that holds time; None where none does."""
        return next(self.axes_of(TIME), None)

    @property
    def batch_axis(self) -> int | None:
        """The axis that holds the batch; None where none does."""
        return next(self.axes_of(BATCH), None)

    def axes_of(self, role: str) -> Iterator[int]:
        """The axes that hold an atom of this role."""
        return (i for i, axis in enumerate(self.axes) if any(a.role == role for a in axis))

    @property
    def atoms(self) -> tuple[Atom, ...]:
        """All atoms in order."""
        return tuple(atom for axis in self.axes for atom in axis)

    @property
    def plain(self) -> tuple[int, ...]:
        """Sizes of the plain atoms in order: the shape of one token of one row."""
        return tuple(int(atom.size) for atom in self.atoms if atom.role == PLAIN)

    @property
    def length(self) -> Any:
        """How many positions its time axis has in the model; None without one."""
        return next((atom.size for atom in self.atoms if atom.role == TIME), None)

    def with_axes(self, axes: Axes) -> Any:
        """The same kind with other axes."""
        return dataclasses.replace(self, axes=axes)


@dataclasses.dataclass(frozen=True)
class Still(Kind):
    """Does not change with time.

    Args:
        prepared: whether it depends on inputs that do not change with time: it is computed once
            for each row, when the row begins.
    """

    prepared: bool = False


@dataclasses.dataclass(frozen=True)
class Stepped(Kind):
    """Has one value for each index: the time axis is of size 1 in the step program.

    Args:
        rate: steps between two indices.
        delay: the step of index 0: index n is there at step n * rate + delay.
        reach: tokens of the stream that it depends on, the newest at its step among them; None:
            all since the row began.
        first: the first step whose value is valid, where that is later than `delay`.
        final: it is valid at the last position of the sequence only, as after x[:, -1:]: nothing
            may ask for it at other positions.
        placed: under window semantics, it depends on its index in the stream, where the model
            counts within the window: allowed only in what goes by differences of indices.
        lead: indices before the first that hold `fill`, as after a pad; whoever knows nothing of
            it reads it through `StepBuilder`, which makes them real.
        fill: what they hold.
    """

    rate: int = 1
    delay: int = 0
    reach: int | None = 1
    first: int = 0
    final: bool = False
    placed: bool = False
    lead: int = 0
    fill: float = 0.0


@dataclasses.dataclass(frozen=True)
class Windowed(Kind):
    """Computed anew at every step for all tokens in the window, under window semantics.

    In the step program its time axis is of the size of the window, or of size 1 where only the
    newest position is asked for (`StepBuilder.extent`).

    Args:
        window: positions in the window: its tokens, unless some were padded or cut.
        final: as for `Stepped`.
    """

    window: int
    final: bool = False


@dataclasses.dataclass(frozen=True)
class Indexed(Kind):
    """Depends on the index alone: one time axis, no batch, e.g. cos and sin of positions."""


@dataclasses.dataclass(frozen=True)
class Pairwise(Kind):
    """Depends on two indices alone: a mask, or a bias by distance. Attention reads it."""


Kinds = Kind | tuple[Kind, ...]


class Refused(Exception):
    """Why a node can't run one step at a time.

    Args:
        reason: what it does with time.
        change: what to change.
        by_window: whether it could under window semantics.
        placed: whether it is an absolute position under window semantics that stopped it.
    """

    def __init__(self, reason: str, change: str = "the model, or run it on whole sequences",
                 by_window: bool = False, placed: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.change, self.by_window, self.placed = reason, change, by_window, placed


def expression(size: Any) -> Any:
    """A size as an int, or as an expression that can be compared and hashed.

    Example:
        >>> expression(7)
        7
    """
    if isinstance(size, torch.SymInt):
        size = size.node.expr
    if isinstance(size, sympy.Expr):
        size = sympy.expand(size)
        return int(size) if size.is_Integer else size
    return int(size)


def axis_size(axis: Axis) -> Any:
    """The size of an axis in the model.

    Example:
        >>> axis_size((Atom(BATCH, 2), Atom(PLAIN, 3)))
        6
    """
    size: Any = 1
    for atom in axis:
        size = expression(size * atom.size) if isinstance(atom.size, sympy.Expr) \
            or isinstance(size, sympy.Expr) else size * atom.size
    return size


def plain(size: Any) -> Axis:
    """An axis that holds neither time nor batch.

    Example:
        >>> plain(1), len(plain(8))
        ((), 1)
    """
    size = expression(size)
    return () if size == 1 else (Atom(PLAIN, size),)


def is_table(kind: Any, axes: Axes) -> bool:
    """Whether a kind has a plain axis where others have time of that size: a value per index."""
    whole = Kind(axes)
    if not isinstance(kind, Still) or whole.time_axis is None:
        return False
    own = whole.time_axis - len(axes) + len(kind.axes)
    return own >= 0 and bool(kind.axes[own]) and axis_size(kind.axes[own]) == whole.length \
        and all(atom.role == PLAIN for atom in kind.axes[own])


def parts_of(kind: Kinds) -> tuple[Kind, ...]:
    """The kinds of all results of a node."""
    return kind if isinstance(kind, tuple) else (kind,)
