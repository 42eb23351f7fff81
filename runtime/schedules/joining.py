"""How two numbers become one in running values: sums, products, maxima, minima, log of sums."""

from __future__ import annotations

from typing import Any

from bincompile.runtime.schedules import vector_math

LN2 = 0.6931471805599453


def text(kind: str) -> str:
    """LLVM text of what `joined` calls."""
    return vector_math.helpers("exp", "log", lanes=1) if kind == "logsumexp" else ""


def joined(T: Any, kind: str, a: Any, b: Any) -> Any:
    """The two of them as one; of maxima and minima a nan stays."""
    if kind in ("sum", "mean"):
        return a + b
    if kind == "prod":
        return a * b
    if kind == "logsumexp":
        return _logsumexp(T, a, b)
    better = a > b if kind == "max" else a < b
    return T.Select(T.Or(better, T.isnan(a)), a, b)


def _logsumexp(T: Any, a: Any, b: Any) -> Any:
    high, low = T.Select(a > b, a, b), T.Select(a > b, b, a)
    power = vector_math.apply(T, "exp", low - high, lanes=1)
    more = vector_math.apply(T, "log", T.float32(1) + power, lanes=1)
    return T.Select(a == b, a + T.float32(LN2), high + more)  # equal infinities have no difference
