"""Regrouping: which axes a reshape makes, atom by atom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy

from bincompile.passes.streaming.kinds import (
    PLAIN,
    Atom,
    Axes,
    Axis,
    Refused,
    axis_size,
    expression,
)


def regrouped(axes: Axes, sizes: Sequence[Any]) -> Axes:
    """The axes after a reshape to these sizes.

    Raises:
        Refused: it cuts time or the batch into parts.

    Example:
        >>> from bincompile.passes.streaming.kinds import BATCH, TIME
        >>> before = ((Atom(BATCH, 2),), (Atom(TIME, 5),), (Atom(PLAIN, 12),))
        >>> [len(axis) for axis in regrouped(before, (10, 1, 3, 4))]
        [2, 0, 1, 1]
    """
    waiting = [atom for axis in axes for atom in axis]
    found = []
    for size in sizes:
        axis: list[Atom] = []
        while (missing := _quotient(size, axis_size(tuple(axis)))) != 1:
            if missing is None or not waiting:
                raise Refused("regroups axes so that time or the batch is cut into parts")
            axis.append(_taken(waiting, missing))
        found.append(tuple(axis))
    if waiting:
        raise Refused("regroups axes so that time or the batch is cut into parts")
    return tuple(found)


def _taken(waiting: list[Atom], missing: Any) -> Atom:
    """The next atom, or as much of it as an axis lacks."""
    atom = waiting.pop(0)
    if _quotient(missing, atom.size) is not None:
        return atom
    rest = _quotient(atom.size, missing)
    if atom.role != PLAIN or rest is None:
        raise Refused("regroups axes so that time or the batch is cut into parts")
    waiting.insert(0, Atom(PLAIN, rest))
    return Atom(PLAIN, missing)


def _quotient(whole: Any, part: Any) -> Any:
    """A size divided by another; None where that is no size."""
    if isinstance(whole, int) and isinstance(part, int):
        return whole // part if part and whole % part == 0 else None
    ratio = sympy.cancel(sympy.sympify(whole) / part)
    numerator, denominator = sympy.fraction(ratio)
    return expression(numerator) if denominator == 1 and numerator != 0 else None


def without(axes: Axes, axis: int) -> Axes:
    """Axes without one of them."""
    return axes[:axis] + axes[axis + 1:]


def with_axis(axes: Axes, axis: int, new: Axis) -> Axes:
    """Axes with one of them replaced."""
    return (*axes[:axis], new, *axes[axis + 1:])


def is_plain(axis: Axis) -> bool:
    """Whether an axis holds neither time nor the batch."""
    return all(atom.role == PLAIN for atom in axis)
