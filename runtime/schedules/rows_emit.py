"""The pointwise steps of a row program, on vectors of 16 numbers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from bincompile.runtime.schedules import vector_math
from bincompile.runtime.schedules.common import LANE


def number(T: Any, value: float) -> Any:
    """A vector of one number."""
    return T.broadcast(T.float32(value), LANE)


def _relu(T: Any, x: Any) -> Any:
    return T.Select(x < number(T, 0), number(T, 0), x)


def _clamp(T: Any, x: Any, low: Any, high: Any) -> Any:
    for limit, passes in ((low, lambda a, b: a < b), (high, lambda a, b: a > b)):
        if limit is not None:
            x = T.bind(T.Select(passes(x, number(T, limit)), number(T, limit), x))
    return x


def _extern(name: str) -> Callable[..., Any]:
    return lambda T, *args: T.call_extern(f"float32x{LANE}", f"bincompile_{name}", *args)


def _math(name: str) -> Callable[..., Any]:
    return lambda T, x: vector_math.apply(T, name, x)


_COMPARISONS = {"eq": operator.eq, "lt": operator.lt, "le": operator.le, "gt": operator.gt,
                "ge": operator.ge}


def _truth(compare: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """Truths are the numbers 0 and 1: a vector of bits can't be bound to a name."""
    return lambda T, a, b: T.Select(compare(a, b), number(T, 1), number(T, 0))


# What each step is, of vectors that are bound to a name each: an argument may be used twice.
POINTWISE: Mapping[str, Callable[..., Any]] = {
    "add": lambda T, a, b: a + b,
    "sub": lambda T, a, b: a - b,
    "mul": lambda T, a, b: a * b,
    "div": lambda T, a, b: a / b,
    "neg": lambda T, x: x * number(T, -1),
    "abs": lambda T, x: T.fabs(x),
    "sqrt": lambda T, x: T.sqrt(x),
    "relu": _relu,
    "clamp": _clamp,
    "copy": lambda T, x: x,
    "one": lambda T, x: number(T, 1),
    "square": lambda T, x: x * x,
    "cube": lambda T, x: x * x * x,
    "inverse_square": lambda T, x: number(T, 1) / (x * x),
    **{name: _truth(compare) for name, compare in _COMPARISONS.items()},
    # TVM's own "not equal" is false for a nan
    "ne": lambda T, a, b: T.Select(a == b, number(T, 0), number(T, 1)),
    "logical_and": lambda T, a, b: a * b,
    "logical_or": lambda T, a, b: a + b - a * b,
    "logical_not": lambda T, a: number(T, 1) - a,
    "where": lambda T, c, a, b: T.Select(c != number(T, 0), a, b),
    **{name: _extern(name) for name in ("maximum", "minimum")},
    **{name: _math(name) for name in vector_math.FUNCTIONS},
}
LITERAL = ("clamp",)  # steps whose literals stay Python's


def emit(T: Any, op: str, args: list[Any]) -> Any:
    """The vector that a step gives; arguments are vectors and numbers."""
    if op not in LITERAL:
        args = [number(T, arg) if isinstance(arg, int | float) else arg for arg in args]
    return POINTWISE[op](T, *args)
