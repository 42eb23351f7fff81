"""Free values: what follows from sizes and stored tensors alone, such as positions and masks.

They are not read operator by operator: they are computed at several lengths and looked at. A value
with one axis that grows with time, whose entries do not depend on how many there are, depends on
the index alone. It is written for a step by writing its subgraph again with the indices of the
rows in place of what counts positions, in float64; what is written is run on random indices and
held against the value itself.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import fx

from bincompile.errors import BincompileError
from bincompile.passes.graph import (
    FLOATS,
    Evaluate,
    arguments,
    aten,
    is_sequence,
    is_tensor,
    shape_of,
)
from bincompile.passes.mask_graph import ALIKE, MaskGraph
from bincompile.passes.patterns import Context
from bincompile.passes.sizes import Assignment, symbols
from bincompile.passes.streaming.free_writer import Counter, Free, Tensors, written

LENGTHS = (2, 3, 5, 8, 13, 40)  # at which a value is looked at, where it has so many entries
AWAY = 2**40  # beyond every position that a stream reaches: about a million years of audio

_KNOWN: weakref.WeakKeyDictionary[fx.GraphModule, dict[str, Free]] = weakref.WeakKeyDictionary()


def free_of(node: fx.Node, module: fx.GraphModule, time: frozenset[sympy.Symbol],
            axis: int | None = None) -> Free:
    """What a free value is.

    Args:
        node: that no input's values take part in.
        module: its graph and the stored tensors.
        time: the symbols that count tokens; none where a capture fixed their number.
        axis: where the number is fixed, the axis that meets one of time; None: not known.
    """
    known = _KNOWN.setdefault(module, {})
    name = f"{node.name} {sorted(map(str, time))} {axis}"
    if name not in known:
        known[name] = _looked_at(node, module, time, axis)
    return known[name]


def _looked_at(node: fx.Node, module: fx.GraphModule, time: frozenset[sympy.Symbol],
               axis: int | None) -> Free:
    graph = MaskGraph.of(node, Context(module, frozenset()), weights=True)
    if graph is None or graph.inputs:
        return Free(node, reason="it takes too many operators to make")
    if not time and axis is None:
        return Free(node, graph=graph)
    moves = bool(time & set(symbols(graph.sources)))
    if time and not moves:
        return Free(node, graph=graph)
    seen = list(_values(graph, time))
    if len(seen) < (2 if moves else 1):
        return Free(node, graph=graph, reason="it can't be computed at other lengths")
    if axis is not None:
        return _indexed(node, graph, axis, seen)
    sizes = [v.shape for v in (run[node] for _, run in seen)]
    axes = tuple(i for i in range(len(sizes[0])) if len({s[i] for s in sizes}) > 1)
    if not axes:
        first = seen[0][1][node]
        same = all(_alike(first, run[node]) for _, run in seen)
        return Free(node, graph=graph,
                    reason="" if same else "it depends on the number of tokens")
    if len(axes) == 2:
        return Free(node, axes, graph)
    if len(axes) > 2:
        return Free(node, axes, graph, reason=f"{len(axes)} of its axes grow with time")
    return _indexed(node, graph, axes[0], seen)


def _values(graph: MaskGraph, time: frozenset[sympy.Symbol],
            ) -> Iterator[tuple[int, dict[fx.Node, Any]]]:
    """Every value of a subgraph at several lengths, where the model allows them."""
    example = symbols(graph.sources)
    for length in LENGTHS if time & set(example) else LENGTHS[-1:]:
        env = graph.values({s: length if s in time else v for s, v in example.items()})
        if env is not None:
            yield length, env


def _alike(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two values are the same but for rounding."""
    if left.shape != right.shape:
        return False
    if not (left.is_floating_point() or left.is_complex()):
        return bool(torch.equal(left, right))
    coarse = 1e-4 if right.dtype in FLOATS else 1e-9  # made of whole numbers, in torch's default
    return bool(torch.allclose(left, right.to(left.dtype), rtol=coarse, atol=1e-3 * coarse,
                               equal_nan=True))


def _indexed(node: fx.Node, graph: MaskGraph, axis: int, seen: list[tuple[int, Any]]) -> Free:
    """A value along one axis of time: whether it depends on the index alone, and how it is made."""
    values = [run[node] for _, run in seen]
    longest = max(values, key=lambda v: v.shape[axis])
    if not all(_alike(longest.narrow(axis, 0, v.shape[axis]), v) for v in values):
        return Free(node, (axis,), graph,
                    reason="its entries depend on how many tokens there are")
    runs = [run for _, run in seen]
    counters = dict(_counters(node, runs, axis))
    found = Free(node, (axis,), graph, counters)
    count = longest.shape[axis]
    indices = torch.tensor([count - 1, 0, count // 2, 0, *range(min(count, 3))])
    try:
        made = written(found, indices, Evaluate(), Tensors(graph))
    except (RuntimeError, IndexError, ValueError, TypeError):
        made = None
    wanted = longest.index_select(axis, indices)
    if made is None or not _broadcasts(made, wanted):
        return dataclasses.replace(
            found, reason="it is made of operators that mix positions")
    return dataclasses.replace(found, limit=_limit(found))


def _broadcasts(made: torch.Tensor, wanted: torch.Tensor) -> bool:
    if made.ndim != wanted.ndim:
        return False
    wide = made.double() if made.is_floating_point() else made
    try:
        return _alike(wide.expand(wanted.shape), wanted)
    except RuntimeError:
        return False


def _limit(found: Free) -> int | None:
    """How many indices there are before a look-up runs over the end of its table."""
    assert found.graph is not None
    tensors = Tensors(found.graph)

    def runs(index: int) -> bool:
        try:
            written(found, torch.tensor([index]), Evaluate(), tensors)
        except (RuntimeError, IndexError, BincompileError):
            return False
        return True

    if runs(AWAY):
        return None
    low, high = 0, 1
    while runs(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if runs(middle) else (low, middle)
    return high


def _counters(node: fx.Node, runs: list[Mapping[fx.Node, Any]],
              axis: int) -> Iterator[tuple[fx.Node, Counter]]:
    """The nodes nearest to a value, of those that it is made of, that count positions."""
    if node.op == "get_attr":
        yield node, Counter(axis, 0, table=node)
        return
    length = runs[0][node].shape[axis] if len(runs) == 1 else None
    pending, met = [node], set[fx.Node]()
    while pending:
        found = pending.pop()
        if found in met or found.op == "get_attr" or not (
                is_tensor(found) or is_sequence(found)) or not _grows(found, runs, length):
            continue
        met.add(found)
        counter = _count(found, [r[found] for r in runs], length) or _sliced(found, runs, length)
        if counter is not None:
            yield found, counter
        elif found.target not in ALIKE:
            pending += found.all_input_nodes


def _grows(node: fx.Node, runs: list[Mapping[fx.Node, Any]], length: int | None) -> bool:
    """Whether sizes of a value depend on the number of tokens, or may, where that is fixed."""
    parts = [v if isinstance(v, tuple | list) else (v,) for v in (run[node] for run in runs)]
    tensors = [[p for p in run if isinstance(p, torch.Tensor)] for run in parts]
    if length is not None:
        return any(length in p.shape for p in tensors[0])
    return any(len({p.shape for p in part}) > 1 for part in zip(*tensors, strict=True))


def _axes_of(values: list[Any], length: int | None) -> list[int]:
    """The axes that grow with the number of tokens, or may."""
    if length is not None:
        return [i for i, size in enumerate(values[0].shape) if size == length]
    sizes = zip(*(v.shape for v in values), strict=True)
    return [i for i, found in enumerate(sizes) if len(set(found)) > 1]


def _count(node: fx.Node, values: list[Any], length: int | None) -> Counter | None:
    """Whole numbers in equal steps along the one axis that grows."""
    if isinstance(values[0], tuple | list) or values[0].is_complex() \
            or values[0].dtype is torch.bool:
        return None
    longest = max(values, key=lambda v: v.numel())
    axes = _axes_of(values, length)
    if len(axes) != 1 or longest.shape[axes[0]] < 2:
        return None
    moved = longest.movedim(axes[0], 0).reshape(longest.shape[axes[0]], -1)
    if moved.shape[1] < 1 or not bool((moved == moved[:, :1]).all()):
        return None
    numbers = moved[:, 0].double()
    first, step = float(numbers[0]), float(numbers[1] - numbers[0])
    if step == 0 or not (first.is_integer() and step.is_integer()):
        return None
    counted = first + step * torch.arange(len(numbers), dtype=torch.float64)
    return Counter(axes[0], int(first), int(step)) if bool((numbers == counted).all()) else None


def _sliced(node: fx.Node, runs: list[Mapping[fx.Node, Any]], length: int | None,
            ) -> Counter | None:
    """The first entries of a table that does not grow."""
    if node.target is not aten.slice.Tensor:
        return None
    found = arguments(node)
    table, axis, start = found["self"], found["dim"] % len(shape_of(node)), found["start"] or 0
    if found["step"] != 1 or not isinstance(start, int) or start < 0 or (
            table.op != "get_attr" and _grows(table, runs, length)):
        return None
    fits = axis in _axes_of([run[node] for run in runs], length)
    return Counter(axis, start, table=table) if fits else None


def at_sizes(found: Free, numbers: Assignment) -> torch.Tensor | None:
    """The value in float64 where the open sizes are these; None if the model has none there."""
    env = None if found.graph is None else found.graph.values(numbers)
    return None if env is None else env[found.node]
