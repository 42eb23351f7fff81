"""Symbolic sizes: numbers for them, and what follows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv, statically_known_true
from torch.utils._sympy.printers import PythonPrinter

from bincompile.conditions import is_condition
from bincompile.passes.graph import value_of

Assignment = Mapping[sympy.Symbol, int]

# What the sizes of a proof are, by order of the symbols' values in the example: distinct and
# small; the same a size further; and one of them 1.
DRAWS = ((2, 5, 7, 3, 11, 13), (3, 4, 6, 9, 5, 8), (2, 1, 1, 1, 1, 1))
MOST_TIMES = 4096  # that a symbol may count more than an axis has


def symbols(nodes: Iterable[Any]) -> dict[sympy.Symbol, int]:
    """The symbols in the sizes of these nodes, or in sizes, and their values in the example."""
    found: dict[sympy.Symbol, int] = {}
    for node in nodes:
        value = value_of(node)
        sizes = value.shape if isinstance(value, torch.Tensor) else [value]
        for size in sizes:
            if isinstance(size, torch.SymInt):
                values = size.node.shape_env.backed_var_to_val
                found.update((s, int(values[s])) for s in size.node.expr.free_symbols
                             if s in values)
    return dict(sorted(found.items(), key=lambda item: str(item[0])))


def assignments(nodes: Iterable[fx.Node]) -> list[dict[sympy.Symbol, int]]:
    """Numbers for the symbols: small ones, equal where the example's were, then the example's."""
    example = symbols(nodes)
    if not example:
        return [{}]
    order = sorted(set(example.values()))
    draws = [{s: draw[order.index(v) % len(draw)] for s, v in example.items()} for draw in DRAWS]
    return [*draws, example]


def lengths(nodes: Iterable[fx.Node], tokens: tuple[Any, ...],
            wanted: Iterable[int]) -> list[dict[sympy.Symbol, int]]:
    """Numbers for the symbols, with token axes at each of the lengths that are wanted.

    An axis may have fewer tokens than a symbol says, as behind a strided convolution; where none
    has exactly so many, it has a few more.

    Token axes that differed in the example differ, in this order and in the other one; then come
    the example's own numbers.
    """
    example = symbols([*nodes, *tokens])
    moving = {s for size in tokens if isinstance(size, torch.SymInt)
              for s in size.node.expr.free_symbols}
    order = sorted({example[s] for s in moving if s in example})
    found, open_ended = [], [t for t in tokens if isinstance(t, torch.SymInt)]
    for length in wanted if order else ():
        for steps in (order, order[::-1])[:len(order)]:
            def numbers(first: int, steps: list[int] = steps,
                        length: int = length) -> dict[sympy.Symbol, int]:
                return {s: first + 3 * steps.index(v) if v in order else 1 + (length < 100)
                        for s, v in example.items()}

            def tokens_at(n: int, at: Any = numbers) -> int:
                return min(concrete(t, at(n)) for t in open_ended)

            found.append(numbers(least(length, tokens_at)))
    return [*found, example]


def least(wanted: int, count: Callable[[int], int]) -> int:
    """The least number from 1 on at which something that grows with it is as much as is wanted.

    It is `wanted` itself where nothing up to 4096 times that is enough.

    Example:
        >>> least(10, lambda n: n // 2)
        20
    """
    low, high = 0, max(wanted, 1)
    while count(high) < wanted:
        low, high = high, high * 2
        if high > MOST_TIMES * wanted:
            return wanted
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if count(middle) >= wanted else (middle, high)
    return high


def concrete(size: Any, numbers: Assignment) -> int:
    """A size as a number."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    return int(size.node.expr.xreplace(dict(numbers)))


def equal(left: Any, right: Any) -> bool:
    """Whether two sizes are known to be equal whatever the symbols are."""
    return statically_known_true(left == right)


def product(sizes: Iterable[Any]) -> Any:
    """The product of sizes."""
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


def conditions(env: ShapeEnv, sizes: Iterable[str]) -> Iterator[tuple[str | None, bool]]:
    """What a capture took for granted of its sizes, and whether the model's own code asked.

    Each condition is text in the input symbols `sizes`; None where it has no such form. Those that
    torch asked for while it worked out layouts are often stricter than the graph.
    """
    known, seen = set(sizes), set()
    for guard in env.guards:
        expression = env.replace(guard.expr)
        free = {str(s) for s in expression.free_symbols}
        if expression in seen or not free:
            continue
        seen.add(expression)
        text = PythonPrinter().doprint(expression)
        usable = is_condition(text) and free <= known
        yield (text if usable else None), not _is_internal(guard.sloc)


def _is_internal(place: Any) -> bool:
    """Whether a line is in torch's own machinery, not in a model or in torch.nn."""
    frame = place.framework_loc
    inside = Path(torch.__file__).parent
    path = Path(frame.filename) if frame is not None else inside / "_C"
    return path.is_relative_to(inside) and path.relative_to(inside).parts[0].startswith("_")
