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
from bincompile.ops.embedding import embedding
from bincompile.passes.graph import (
    FLOATS,
    SIZES,
    Evaluate,
    arguments,
    aten,
    in_double,
    is_sequence,
    is_tensor,
    shape_of,
    value_of,
)
from bincompile.passes.mask_graph import ALIKE, MaskGraph
from bincompile.passes.patterns import Context
from bincompile.passes.sizes import Assignment, symbols

LENGTHS = (2, 3, 5, 8, 13, 40)  # at which a value is looked at, where it has so many entries
AWAY = 2**40  # beyond every position that a stream reaches: about a million years of audio
LOOK_UPS = (aten.embedding.default, aten.index.Tensor, aten.index_select.default,
            aten.gather.default, aten.reshape.default, aten._to_copy.default, embedding.overload)
PAIRS = (aten.polar.default, aten.complex.default)


@dataclasses.dataclass(frozen=True)
class Counter:
    """A value that counts positions: entry t along `axis` is first + step * t.

    With a `table`, entry t is that of the table at first + t.
    """

    axis: int
    first: int
    step: int = 1
    table: fx.Node | None = None


@dataclasses.dataclass(frozen=True)
class Free:
    """What is known of a free value.

    Args:
        node: in the model's graph.
        axes: those that grow with time: none, one, or two.
        graph: how it is made.
        counters: for one axis, the nodes in whose place indices stand, and what they count.
        limit: for one axis, how many indices there are; None: no end.
        reason: why it is not known what it is; empty where it is known.
    """

    node: fx.Node
    axes: tuple[int, ...] = ()
    graph: MaskGraph | None = None
    counters: Mapping[fx.Node, Counter] = dataclasses.field(default_factory=dict)
    limit: int | None = None
    reason: str = ""


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
        made = written(found, indices, Evaluate(), _Tensors(graph))
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
    tensors = _Tensors(found.graph)

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


class _Tensors:
    """Stored tensors and sizes as `Evaluate` has them."""

    def __init__(self, graph: MaskGraph) -> None:
        self.stored = graph.stored

    def leaf(self, node: fx.Node) -> Any:
        """The stored tensor of a node."""
        return self.stored[node]

    def count(self, indices: Any) -> Any:
        """How many indices there are."""
        return indices.shape[0]


def written(found: Free, indices: Any, build: Any, leaves: Any) -> Any:
    """The value at these indices, its axis of time as long as they are many, the batch's of 1.

    Floats are of 64 bits where anything is computed, and as they are stored where not.

    Args:
        found: a value with one axis of time.
        indices: (M,) int64, a node or a tensor.
        build: a `Build`, or `Evaluate`.
        leaves: `leaf(node)` gives a stored tensor, `count(indices)` how many indices there are.
    """
    return _Writer(found, indices, build, leaves).at(found.node)


def at_sizes(found: Free, numbers: Assignment) -> torch.Tensor | None:
    """The value in float64 where the open sizes are these; None if the model has none there."""
    env = None if found.graph is None else found.graph.values(numbers)
    return None if env is None else env[found.node]


class _Writer:
    """Writes a subgraph for some indices."""

    def __init__(self, found: Free, indices: Any, build: Any, leaves: Any) -> None:
        self.found, self.indices, self.build, self.leaves = found, indices, build, leaves
        self.made: dict[fx.Node, Any] = {}
        self.count = str(shape_of(found.node)[found.axes[0]])

    def at(self, node: fx.Node) -> Any:
        """What stands for a node."""
        if node not in self.made:
            self.made[node] = self._written(node)
        return self.made[node]

    def _written(self, node: fx.Node) -> Any:
        if node in self.found.counters:
            return self._counted(node, self.found.counters[node])
        if node.op == "get_attr":
            return self.leaves.leaf(node)
        if not (is_tensor(node) or is_sequence(node)):
            return self._size(node)
        if node.target in ALIKE:
            return self._filled(node)
        args = in_double(fx.node.map_arg(node.args, self.at))
        kwargs = {name: in_double(value) for name, value in
                  fx.node.map_arg(dict(node.kwargs), self.at).items()}
        args = self._widened(node, args)
        if node.target in PAIRS:
            return self._pairs(*args, polar=node.target is aten.polar.default)
        return self.build.call(node.target, *args, **kwargs)

    def _pairs(self, first: Any, second: Any, polar: bool) -> Any:
        """Complex numbers; torch's own shape rule for them would fix the number of rows."""
        call = self.build.call
        if polar:
            parts = [call(turn, second) for turn in (aten.cos.default, aten.sin.default)]
            first, second = (call(aten.mul.Tensor, first, part) for part in parts)
        return call(aten.view_as_complex.default, call(aten.stack.default, [first, second], -1))

    def _counted(self, node: fx.Node, counter: Counter) -> Any:
        call, rank = self.build.call, len(shape_of(node))
        if counter.table is not None:
            places = call(aten.add.Tensor, self.indices, counter.first) if counter.first \
                else self.indices
            table = self.leaves.leaf(node) if counter.table is node else self.at(counter.table)
            return call(aten.index_select.default, table, counter.axis, places)
        made = self.indices
        if counter.step != 1:
            made = call(aten.mul.Tensor, made, counter.step)
        if counter.first:
            made = call(aten.add.Tensor, made, counter.first)
        if value_of(node).is_floating_point():
            made = call(aten._to_copy.default, made, dtype=torch.float64)
        if rank > 1:
            shape = [1] * rank
            shape[counter.axis] = -1
            made = call(aten.reshape.default, made, shape)
        return made

    def _size(self, node: fx.Node) -> Any:
        value = value_of(node)
        if not isinstance(value, torch.SymInt):
            return value
        if str(value) == self.count:
            return self.leaves.count(self.indices)
        if node.target in SIZES or node.op != "call_function":
            return 1
        args = fx.node.map_arg(node.args, self.at)
        if all(isinstance(a, int | float) for a in args):
            return node.target(*args)
        return self.build.call(node.target, *args)

    def _filled(self, node: fx.Node) -> Any:
        """A tensor like another one of which only the sizes are read."""
        name = node.target.overloadpacket.__name__.removeprefix("new_").removesuffix("_like")
        fill = {"ones": 1, "zeros": 0, "full": node.args[-1]}[name]
        value = value_of(node)
        sizes = [self.leaves.count(self.indices) if str(s) == self.count else
                 s if isinstance(s, int) else 1 for s in value.shape]
        dtype = in_double(value.dtype)
        return self.build.call(aten.full.default, sizes, self.at(fill) if isinstance(
            fill, fx.Node) else fill, dtype=dtype)

    def _widened(self, node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of a computation with floats in float64.

        Whole numbers would be taken to the dtype of a stored float, or to torch's default.
        """
        flat = [a for arg in args for a in (arg if isinstance(arg, list | tuple) else (arg,))]
        dtypes = {value_of(a).dtype for a in flat if isinstance(value_of(a), torch.Tensor)}
        floats = value_of(node).dtype if is_tensor(node) else torch.float32
        if node.target in LOOK_UPS or len(dtypes - {torch.bool}) < 1 \
                or not (floats.is_floating_point or floats.is_complex) \
                or (dtypes <= {torch.bool, *FLOATS} and len(dtypes & set(FLOATS)) < 2):
            return args

        def wide(arg: Any) -> Any:
            if isinstance(arg, list | tuple):
                return type(arg)(map(wide, arg))
            value = value_of(arg)
            if not isinstance(value, torch.Tensor) or value.dtype in (
                    torch.bool, torch.float64) or value.is_complex():
                return arg
            return self.build.call(aten._to_copy.default, arg, dtype=torch.float64)

        return tuple(map(wide, args))
