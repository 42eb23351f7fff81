"""The subgraph that makes a mask: run at chosen sizes and for chosen inputs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from bincompile.passes.graph import (
    aten,
    in_double,
    is_sequence,
    is_tensor,
    shape_of,
    value_of,
)
from bincompile.passes.patterns import Context
from bincompile.passes.sizes import Assignment, concrete, symbols
from bincompile.program import attribute

# Operators that read the sizes of their first argument alone.
ALIKE = (aten.ones_like.default, aten.zeros_like.default, aten.full_like.default,
         aten.empty_like.default, aten.new_ones.default, aten.new_zeros.default,
         aten.new_full.default, aten.new_empty.default)
# Operators whose whole numbers may say how far a mask reaches.
COMPARING = (
    aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar, aten.rsub.Scalar,
    aten.lt.Scalar, aten.le.Scalar, aten.gt.Scalar, aten.ge.Scalar, aten.eq.Scalar,
    aten.ne.Scalar, aten.floor_divide.default, aten.div.Tensor_mode, aten.div.Scalar_mode,
    aten.remainder.Scalar, aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default,
    aten.mul.Tensor, aten.mul.Scalar, aten.tril.default, aten.triu.default)
CREATING = (aten.arange.default, aten.arange.start, aten.arange.start_step, aten.ones.default,
            aten.zeros.default, aten.full.default, aten.new_ones.default, aten.new_zeros.default)
LAYERS = (aten.linear.default, aten.addmm.default, aten.convolution.default, aten.conv1d.default,
          aten.conv2d.default, aten.layer_norm.default, aten.rms_norm.default, aten.softmax.int)
MOST_NODES = 200  # a mask takes fewer; what takes more is computed from the model's activations
MOST_NUMBERS = 2**25  # in one value of a trial
ENDLESS = 2**31  # an end of a slice that is no size

Draw = Callable[[torch.dtype, list[int]], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class MaskGraph:
    """The nodes between a mask and the inputs, stored tensors and sizes that it is made of."""

    node: fx.Node
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    stored: Mapping[fx.Node, Any]
    shapes: tuple[fx.Node, ...]  # only their sizes are read
    sizes: tuple[fx.Node, ...]
    moving: frozenset[fx.Node]  # of the nodes, those that depend on inputs

    @classmethod
    def of(cls, node: fx.Node, context: Context, weights: bool = False) -> MaskGraph | None:
        """The subgraph; None if it is too large for a mask, or weights take part that may not."""
        found = _collected(node, context, weights)
        if found is None:
            return None
        nodes, inputs, stored, shapes, sizes = found
        order = {n: i for i, n in enumerate(node.graph.nodes)}
        made = sorted((n for n in nodes if n.op == "call_function"), key=order.__getitem__)
        moving = set(inputs)
        for n in made:
            if n.target not in ALIKE and not moving.isdisjoint(n.all_input_nodes):
                moving.add(n)
        return cls(node, tuple(made), tuple(sorted(inputs, key=order.__getitem__)), stored,
                   tuple(shapes - set(stored)), tuple(sizes), frozenset(moving - inputs))

    @property
    def sources(self) -> tuple[fx.Node, ...]:
        """Everything that has sizes."""
        return (*self.nodes, *self.inputs, *self.shapes, *self.sizes)

    def text(self) -> str:
        """A text that is equal for subgraphs that make the same mask."""
        names = {n: f"%{i}" for i, n in enumerate(self.nodes)}
        names.update((n, f"like {shape_of(n)}") for n in self.shapes if n not in names)
        names.update((n, str(value_of(n))) for n in self.sizes)
        names.update((n, str(n.target)) for n in (*self.inputs, *self.stored))
        lines = (f"{n.target}{fx.node.map_arg((n.args, dict(n.kwargs)), names.__getitem__)}"
                 for n in self.nodes)
        return "\n".join([*lines, names[self.node]])

    def reach(self) -> tuple[set[int], set[int]]:
        """Whole numbers that indices are compared with, and lengths of what is stored or made."""
        compared, lengths = set[int](), set[int]()
        for node in self.nodes:
            numbers = {abs(int(a)) for a in _numbers(node.args) if a == int(a)}
            if node.target in COMPARING and _counts(node):
                compared |= numbers
            elif node.target in CREATING:
                lengths |= {n for n in numbers if n < ENDLESS}
        lengths |= {size for t in self.stored.values() for size in t.shape}
        compared |= {abs(int(t)) for t in self.stored.values()
                     if t.numel() == 1 and not t.is_floating_point() and not t.is_complex()}
        return compared, lengths

    def affordable(self, numbers: Assignment) -> bool:
        """Whether a trial at these sizes is small enough."""
        return all(math.prod(concrete(s, numbers) for s in shape_of(n)) <= MOST_NUMBERS
                   for n in (*self.inputs, *self.shapes, self.node))

    def values(self, numbers: Assignment) -> dict[fx.Node, Any] | None:
        """Every value at these sizes, where no input takes part; None where there are none."""
        leaves = self._leaves(numbers)
        return None if leaves is None else self._run(leaves, {}, True)

    def at(self, numbers: Assignment, swap: Mapping[int, int] | None = None,
           ) -> Callable[[Draw], torch.Tensor | None]:
        """The mask at these sizes, as a function of how an input is drawn.

        It is None where the model itself can't make it of such sizes or values.

        Args:
            swap: whole numbers that indices are compared with, and what stands in their place.
        """
        leaves = self._leaves(numbers)
        settled = None if leaves is None else self._run(leaves, swap or {}, True)

        def made(draw: Draw) -> torch.Tensor | None:
            if settled is None:
                return None
            drawn = {n: draw(value_of(n).dtype, [concrete(s, numbers) for s in shape_of(n)])
                     for n in self.inputs}
            env = self._run({**settled, **drawn}, swap or {}, False)
            return None if env is None else env[self.node]

        return made

    def _run(self, env: dict[fx.Node, Any], swap: Mapping[int, int],
             settled: bool) -> dict[fx.Node, Any] | None:
        """Adds the nodes that are settled by sizes, or those that are not."""
        try:
            with torch.no_grad():
                for node in self.nodes:
                    if (node in self.moving) != settled:
                        env[node] = _call(node, env, swap)
        except (RuntimeError, IndexError, ValueError, TypeError, OverflowError):
            return None  # sizes, or values of an input, that the model does not allow
        return env

    def _leaves(self, numbers: Assignment) -> dict[fx.Node, Any] | None:
        env: dict[fx.Node, Any] = {n: _number(value_of(n), numbers) for n in self.sizes}
        for node in self.shapes:
            shape = [concrete(s, numbers) for s in shape_of(node)]
            if min(shape, default=1) < 0:
                return None
            env[node] = torch.zeros(shape, dtype=in_double(value_of(node).dtype))
        return {**env, **self.stored}


def _collected(node: fx.Node, context: Context, weights: bool) -> tuple[Any, ...] | None:
    nodes, inputs, shapes, sizes = (set[fx.Node]() for _ in range(4))
    stored: dict[fx.Node, Any] = {}
    pending = [node]
    while pending:
        found = pending.pop()
        if found in nodes or found in inputs or found in stored:
            continue
        if found.op == "get_attr":
            value = attribute(context.graph_module, found.target)
            if value_of(found).requires_grad and not weights:
                return None
            stored[found] = value.double() if value.is_floating_point() else value
        elif found.op == "placeholder":
            inputs.add(found)
        else:
            nodes.add(found)
            if len(nodes) > MOST_NODES or (found.target in LAYERS and not weights):
                return None
            for read in found.all_input_nodes:
                if not (is_tensor(read) or is_sequence(read)):
                    sizes.add(read)
                elif found.target in ALIKE:
                    shapes.add(read)
                else:
                    pending.append(read)
    if not all(map(_is_size, sizes)):
        return None
    return nodes, inputs, stored, shapes, sizes


def _is_size(node: fx.Node) -> bool:
    """Whether a node is a plain number, or a size that doesn't depend on values."""
    value = value_of(node)
    return bool(symbols([node])) if isinstance(value, torch.SymInt) \
        else isinstance(value, int | float)


def _number(value: Any, numbers: Assignment) -> Any:
    return concrete(value, numbers) if isinstance(value, torch.SymInt) else value


def _call(node: fx.Node, env: Mapping[fx.Node, Any], swap: Mapping[int, int]) -> Any:
    given = node.args
    if swap and node.target in COMPARING and _counts(node):
        given = tuple(_swapped(a, swap) for a in given)
    args = in_double(fx.node.map_arg(given, env.__getitem__))
    kwargs = fx.node.map_arg(dict(node.kwargs), env.__getitem__)
    return node.target(*args, **{k: in_double(v) for k, v in kwargs.items()})


def _counts(node: fx.Node) -> bool:
    """Whether a node computes with indices, or compares what was computed with them."""
    dtype = value_of(node).dtype
    return node.target in (aten.tril.default, aten.triu.default) or (
        not dtype.is_floating_point and not dtype.is_complex)


def _swapped(arg: Any, swap: Mapping[int, int]) -> Any:
    if isinstance(arg, bool) or not isinstance(arg, int | float) or abs(arg) not in swap:
        return arg
    return int(math.copysign(swap[int(abs(arg))], arg))


def _numbers(args: Any) -> Iterator[float]:
    for arg in args:
        if isinstance(arg, list | tuple):
            yield from _numbers(arg)
        elif isinstance(arg, int | float) and not isinstance(arg, bool) and math.isfinite(arg):
            yield arg
