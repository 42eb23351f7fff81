"""Axes: which axes a product of two tensors contracts, and where its own axes go."""

from __future__ import annotations

import dataclasses
import operator
import string
from typing import Any

from torch import fx

from bincompile.passes.graph import SIZES, arguments, aten, is_tensor, shape_of
from bincompile.passes.sizes import equal, product
from bincompile.passes.trail import regrouping

LAYOUTS = (aten.reshape.default, aten.transpose.int, aten.permute.default,
           aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.expand.default,
           aten.unflatten.int, aten.flatten.using_ints, aten.mT.default, aten.t.default)
REGROUPS = (aten.reshape.default, aten.unflatten.int, aten.flatten.using_ints,
            aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims)


@dataclasses.dataclass(frozen=True)
class Contraction:
    """A product of two tensors that sums over one axis.

    Args:
        left_axes: a label for each axis of the left operand.
        right_axes: the same for the right one.
        axes: labels of the result: batch axes, and one own axis of each operand.
        added: what baddbmm adds, with its factor.
    """

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_axes: tuple[str, ...]
    right_axes: tuple[str, ...]
    axes: tuple[str, ...]
    factor: float = 1.0
    added: tuple[fx.Node, float] | None = None

    @property
    def contracted(self) -> str:
        """The label that both operands have and the result lacks."""
        return next(a for a in self.left_axes if a in self.right_axes and a not in self.axes)

    @property
    def own(self) -> tuple[str, str]:
        """The label that only the left operand has, and the one that only the right has."""
        return (next(a for a in self.left_axes if a not in self.right_axes and a[0] not in "*_"),
                next(a for a in self.right_axes if a not in self.left_axes and a[0] not in "*_"))

    @property
    def batch(self) -> tuple[str, ...]:
        """Labels of the batch axes, in the order of the result."""
        return tuple(a for a in self.axes if a not in self.own)


def contraction(node: fx.Node) -> Contraction | None:
    """The node as a contraction of two tensors over one axis, or None."""
    return next(iter(readings(node)), None)


def readings(node: fx.Node) -> tuple[Contraction, ...]:
    """The node as a contraction, once for each choice of the operands' own axes.

    Where an operand has several axes of its own, those not chosen count as batch axes.
    """
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return ()
    if node.target in (aten.matmul.default, aten.bmm.default, aten.mm.default):
        return _matmul(node, *node.args)
    if node.target in (aten.baddbmm.default, aten.addmm.default):
        return _added_matmul(node)
    if node.target is aten.einsum.default:
        return _einsum(node)
    if node.target is aten.sum.dim_IntList:
        return _summed(node)
    return ()


def _added_matmul(node: fx.Node) -> tuple[Contraction, ...]:
    found = arguments(node)
    factors = ("batch1", "batch2") if "batch1" in found else ("mat1", "mat2")
    added = (found["self"], float(found["beta"])) if found["beta"] != 0 else None
    return tuple(dataclasses.replace(p, factor=float(found["alpha"]), added=added)
                 for p in _matmul(node, *(found[name] for name in factors)))


def _matmul(node: fx.Node, left: fx.Node, right: fx.Node) -> tuple[Contraction, ...]:
    ranks = len(shape_of(left)), len(shape_of(right))
    if min(ranks) < 2:
        return ()
    batch = tuple(f"*{i}" for i in reversed(range(max(ranks) - 2)))
    lead = [batch[len(batch) - (rank - 2):] for rank in ranks]
    return (Contraction(node, left, right, (*lead[0], "m", "k"), (*lead[1], "k", "n"),
                        (*batch, "m", "n")),)


def _summed(node: fx.Node) -> tuple[Contraction, ...]:
    """The sum of a product of two tensors that broadcast to each other.

    An operand's axes of size 1 are labelled "_": it does not have them.
    """
    found = arguments(node)
    both = found["self"]
    if both.target is not aten.mul.Tensor or not all(map(is_tensor, both.args)) \
            or len(found["dim"] or ()) != 1 or found["keepdim"] or found["dtype"] is not None:
        return ()
    left, right = both.args
    sizes, rank = (shape_of(left), shape_of(right)), len(shape_of(both))
    axis = found["dim"][0] % rank
    if len(sizes[0]) != rank or len(sizes[1]) != rank:
        return ()
    lacks = [[equal(s, 1) for s in side] for side in sizes]
    own = [[i for i in range(rank) if i != axis and not lacks[side][i] and lacks[1 - side][i]]
           for side in (0, 1)]
    if lacks[0][axis] or lacks[1][axis] or not all(own):
        return ()

    def read(mine: int, yours: int) -> Contraction:
        names = [f"{i}" if i in (mine, yours, axis) else f"*{i}" for i in range(rank)]
        ours, theirs = (tuple(f"_{i}" if lacks[side][i] and i in own[1 - side] else names[i]
                              for i in range(rank)) for side in (0, 1))
        return Contraction(node, left, right, ours, theirs,
                           tuple(n for i, n in enumerate(names) if i != axis))

    return tuple(read(mine, yours) for mine in reversed(own[0]) for yours in reversed(own[1]))


def _einsum(node: fx.Node) -> tuple[Contraction, ...]:
    equation, operands = node.args[0].replace(" ", ""), node.args[1]
    if len(operands) != 2 or "->" not in equation:
        return ()
    inputs, output = _without_dots(equation, operands).split("->")
    left, right = inputs.split(",")
    summed = [a for a in left if a in right and a not in output]
    own = ([a for a in left if a not in right], [a for a in right if a not in left])
    distinct = all(len(set(labels)) == len(labels) for labels in (left, right, output))
    if len(summed) != 1 or not all(own) or any(a not in output for o in own for a in o) \
            or not distinct:
        return ()

    def read(mine: str, yours: str) -> Contraction:
        kept = (mine, yours, *summed)
        ours, theirs, found = (tuple(a if a in kept else f"*{a}" for a in axes)
                               for axes in (left, right, output))
        return Contraction(node, operands[0], operands[1], ours, theirs, found)

    order = [sorted(o, key=output.index, reverse=True) for o in own]
    return tuple(read(mine, yours) for mine in order[0] for yours in order[1])


def _without_dots(equation: str, operands: tuple[fx.Node, ...]) -> str:
    """The equation with letters in place of its ellipses, which share them from the right."""
    if "..." not in equation:
        return equation
    inputs, output = equation.split("->")
    parts = inputs.split(",")
    free = [c for c in string.ascii_letters if c not in equation]
    counts = [len(shape_of(t)) - len(p) + 3 if "..." in p else 0
              for p, t in zip(parts, operands, strict=True)]
    letters = "".join(free[:max(counts)])
    parts = [p.replace("...", letters[len(letters) - c:])
             for p, c in zip(parts, counts, strict=True)]
    return ",".join(parts) + "->" + output.replace("...", letters)


def moved(node: fx.Node, positions: tuple[int, ...]) -> tuple[int, ...] | None:
    """Where axes of a layout operator's input stand in its output; None if one is changed."""
    before, after = shape_of(node.args[0]), shape_of(node)
    target, rank = node.target, len(before)
    if target in (aten.transpose.int, aten.mT.default, aten.t.default):
        pair = node.args[1:] if target is aten.transpose.int else (-2, -1)
        swap = {pair[0] % rank: pair[1] % rank, pair[1] % rank: pair[0] % rank}
        return tuple(swap.get(p, p) for p in positions)
    if target is aten.permute.default:
        order = [d % rank for d in node.args[1]]
        return tuple(order.index(p) for p in positions)
    if target is aten.expand.default:
        shift = len(after) - rank
        kept = all(equal(before[p], after[p + shift]) for p in positions)
        return tuple(p + shift for p in positions) if kept else None
    if target in REGROUPS:
        found = tuple(_regrouped(before, after, p) for p in positions)
        return None if None in found else found  # type: ignore[return-value]
    return None


def _regrouped(before: tuple[Any, ...], after: tuple[Any, ...], position: int) -> int | None:
    lead, wanted = product(before[:position]), before[position]
    for index, size in enumerate(after):
        if isinstance(size, int) != isinstance(wanted, int):  # far cheaper than to compare symbols
            continue
        if equal(size, wanted) and equal(product(after[:index]), lead):
            return index
    return None


SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int)
# How a value is followed back to the projection that made it: operators that keep their axes,
# and which argument to follow.
POINTWISE = (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor,
             aten._to_copy.default, aten.to.dtype, aten.neg.default, aten.relu.default,
             aten.gelu.default, aten.silu.default, aten.layer_norm.default, aten.rms_norm.default,
             aten.tanh.default, aten.sigmoid.default, aten.elu.default, aten.batch_norm.default,
             aten.group_norm.default)


def source(node: fx.Node, axis: int) -> tuple[fx.Node, int]:
    """The node and axis that an axis of a value comes from, through layout and pointwise steps."""
    axis %= len(shape_of(node))
    for _ in range(200):
        if node.op != "call_function" or node.target in SIZES:
            break
        if node.target in LAYOUTS:
            before = shape_of(node.args[0])
            found = next((a for a in range(len(before)) if moved(node, (a,)) == (axis,)), None)
            if found is None:
                found = _outer(node, axis)
            if found is None:
                found = _innermost(node, axis)
            if found is None:
                break
            node, axis = node.args[0], found
        elif node.target is operator.getitem and node.args[0].target in SPLITS:
            split = node.args[0]
            if split.target is aten.unbind.int:
                axis += axis >= (arguments(split)["dim"] % len(shape_of(split.args[0])))
            node = split.args[0]
        elif node.target is aten.select.int:
            axis += axis >= node.args[1] % len(shape_of(node.args[0]))
            node = node.args[0]
        elif node.target in (aten.slice.Tensor, aten.cat.default):
            node = node.args[0] if node.target is aten.slice.Tensor else node.args[0][0]
        elif node.target in POINTWISE and is_tensor(node.args[0]) \
                and len(shape_of(node.args[0])) == len(shape_of(node)):
            node = node.args[0]
        else:
            break
    return node, axis


def _innermost(node: fx.Node, axis: int) -> int | None:
    """The last of several axes that were merged into one."""
    if node.target not in REGROUPS:
        return None
    groups = regrouping(shape_of(node.args[0]), shape_of(node)).groups
    return next((old[-1] for old, new in groups if new == (axis,) and old), None)


def _outer(node: fx.Node, axis: int) -> int | None:
    """The axis before a split of one axis into several, of which `axis` is one."""
    before, after = shape_of(node.args[0]), shape_of(node)
    if node.target not in REGROUPS or not before:
        return None
    last = (before[-1], after[-1])
    if axis == len(after) - 1 and all(isinstance(s, int) for s in last) and last[0] % last[1] == 0:
        return len(before) - 1
    for index in range(len(before)):
        for start in range(axis + 1):
            for stop in range(axis + 1, len(after) + 1):
                if equal(product(after[:start]), product(before[:index])) \
                        and equal(product(after[start:stop]), before[index]):
                    return index
    return None
