"""What a free value is made of, written again for the indices of some rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from bincompile.ops import OPERATORS
from bincompile.passes.graph import (
    FLOATS,
    SIZES,
    aten,
    in_double,
    is_sequence,
    is_tensor,
    shape_of,
    value_of,
)
from bincompile.passes.mask_graph import ALIKE, MaskGraph

LOOK_UPS = (aten.embedding.default, aten.index.Tensor, aten.index_select.default,
            aten.gather.default, aten.reshape.default, aten._to_copy.default,
            *(operator.overload for name, operator in OPERATORS.items() if "embedding" in name))
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


class Tensors:
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
            return self._pairs(args[0], args[1], node.target is aten.polar.default)
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
