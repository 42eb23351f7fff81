"""Tidy: chains of layout operators on one token become a slice and a reshape at most.

With time of size 1 most of them leave the order of elements as it is. Each view is followed as
what it is of its base: a size and a stride for each axis, and an offset.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable
from typing import Any

import sympy
from torch import fx

from bincompile.passes.graph import arguments, aten, is_tensor, put_in_order, shape_of
from bincompile.passes.streaming.builder import StepBuilder
from bincompile.passes.streaming.kinds import expression

Part = tuple[Any, Any]  # a size, and how far its positions are apart
Axis = tuple[Part, ...]
SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int)


@dataclasses.dataclass(frozen=True)
class View:
    """A value as elements of another.

    Args:
        base: the node that holds them.
        axes: the parts of each axis, in elements of the base in its own order.
        offset: the first of them.
    """

    base: fx.Node
    axes: tuple[Axis, ...]
    offset: Any = 0

    @property
    def merged(self) -> Axis:
        """All parts, neighbours put together where they can be."""
        found: list[Part] = []
        for size, stride in (part for axis in self.axes for part in axis):
            if found and found[-1][1] == expression(size * stride):
                found[-1] = (expression(found[-1][0] * size), stride)
            else:
                found.append((size, stride))
        return tuple(found)

    def reshaped(self, sizes: Iterable[Any]) -> View | None:
        """The same elements with other axes; None where parts don't fit into them."""
        waiting, axes = list(self.merged), []
        for size in sizes:
            axis: list[Part] = []
            while size != 1:
                if not waiting:
                    return None
                have, stride = waiting.pop(0)
                rest = _divided(size, have)
                if rest is not None:
                    axis.append((have, stride))
                    size = rest
                    continue
                inner = _divided(have, size)
                if inner is None:
                    return None
                axis.append((size, expression(stride * inner)))
                waiting.insert(0, (inner, stride))
                size = 1
            axes.append(tuple(axis))
        return None if waiting else dataclasses.replace(self, axes=tuple(axes))

    def cut(self, axis: int, start: Any, kept: Any) -> View | None:
        """Neighbouring positions of one axis; None where it has several parts."""
        if len(self.axes[axis]) != 1:
            return None
        stride = self.axes[axis][0][1]
        new: Axis = () if kept == 1 else ((kept, stride),)
        return View(self.base, (*self.axes[:axis], new, *self.axes[axis + 1:]),
                    expression(self.offset + start * stride))

    def without(self, axis: int) -> View:
        """Without an axis of size 1."""
        return dataclasses.replace(self, axes=self.axes[:axis] + self.axes[axis + 1:])


def _divided(whole: Any, part: Any) -> Any:
    ratio = sympy.cancel(sympy.sympify(whole) / part)
    return expression(ratio) if sympy.fraction(ratio)[1] == 1 else None


def tidy(build: StepBuilder) -> None:
    """Replace what reads the end of a chain of views by the shortest one that gives the same."""
    views: dict[fx.Node, View] = {}
    made: dict[Any, fx.Node] = {}
    for node in list(build.graph.nodes):
        if is_tensor(node):
            views[node] = _view(node, views) or _whole(node)
    for node in list(build.graph.nodes):
        if views.get(node, None) is None or views[node].base is node:
            continue
        if any(u not in views or views[u].base is u for u in node.users):
            short = _short(node, views[node], build, made)
            if short is not node:
                node.replace_all_uses_with(
                    short, lambda user: user not in views or views[user].base is user)
    put_in_order(build.graph)


def _sizes(node: fx.Node) -> tuple[Any, ...]:
    return tuple(map(expression, shape_of(node)))


def _whole(node: fx.Node) -> View:
    return View(node, _contiguous(_sizes(node)))


def _contiguous(sizes: tuple[Any, ...]) -> tuple[Axis, ...]:
    axes: list[Axis] = []
    stride: Any = 1
    for size in reversed(sizes):
        axes.insert(0, () if size == 1 else ((size, stride),))
        stride = expression(stride * size)
    return tuple(axes)


def _view(node: fx.Node, views: dict[fx.Node, View]) -> View | None:
    """What a layout operator gives of its base; None for all else."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source, target = node.args[0], node.target
    if target is operator.getitem and source.target in SPLITS:
        return _piece(node, views[source.args[0]])
    read = views.get(source)
    follow = _FOLLOWED.get(target)
    return None if read is None or follow is None else follow(node, read)


def _piece(node: fx.Node, read: View) -> View | None:
    split, index = node.args
    axis = arguments(split)["dim"] % len(read.axes)
    if split.target is aten.unbind.int:
        found = read.cut(axis, index, 1)
        return None if found is None else found.without(axis)
    before = sum(int(part.shape[axis]) for part in split.meta["val"][:index])
    return read.cut(axis, before, expression(shape_of(node)[axis]))


def _permuted(node: fx.Node, read: View) -> View:
    rank, order = len(read.axes), list(range(len(read.axes)))
    if node.target is aten.permute.default:
        order = [d % rank for d in node.args[1]]
    elif rank > 1:
        pair = node.args[1:3] if node.target is aten.transpose.int else (-2, -1)
        first, second = (d % rank for d in pair)
        order[first], order[second] = order[second], order[first]
    return dataclasses.replace(read, axes=tuple(read.axes[i] for i in order))


def _regrouped(node: fx.Node, read: View) -> View | None:
    return read.reshaped(_sizes(node))


def _selected(node: fx.Node, read: View) -> View | None:
    axis, index = node.args[1] % len(read.axes), node.args[2]
    start = _start(index, node.args[0], axis)
    if start is None:
        return None
    found = read.cut(axis, start, 1) if read.axes[axis] else read
    return None if found is None else found.without(axis)


def _cut(node: fx.Node, read: View) -> View | None:
    given = arguments(node)
    axis = given["dim"] % len(read.axes)
    start = _start(given["start"] or 0, node.args[0], axis)
    kept = expression(shape_of(node)[axis])
    if given["step"] != 1 or start is None or kept == 0:
        return None
    return read if not read.axes[axis] else read.cut(axis, start, kept)


def _start(index: Any, node: fx.Node, axis: int) -> int | None:
    """A position from the front; None where it is not a number."""
    size = shape_of(node)[axis]
    if not isinstance(index, int):
        return None
    if index >= 0:
        return index
    return max(index + size, 0) if isinstance(size, int) else None


_FOLLOWED = {
    **dict.fromkeys((aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dims,
                     aten.squeeze.dim, aten.view.default, aten.flatten.using_ints,
                     aten.unflatten.int), _regrouped),
    **dict.fromkeys((aten.permute.default, aten.transpose.int, aten.t.default, aten.mT.default),
                    _permuted),
    aten.select.int: _selected, aten.slice.Tensor: _cut}


def _short(node: fx.Node, view: View, build: StepBuilder, made: dict[Any, fx.Node]) -> fx.Node:
    """The same elements as a reshape, or a slice of features and a reshape; else as it is."""
    base, sizes = view.base, _sizes(node)
    whole = _whole(base)
    if view.merged == whole.merged and view.offset == 0:
        return _shaped(base, sizes, build, made)
    last = len(whole.axes) - 1
    if last < 0 or len(whole.axes[last]) != 1 or not isinstance(whole.axes[last][0][0], int):
        return node
    features, wanted = whole.axes[last][0][0], view.merged
    kept = wanted[-1][0] if wanted and wanted[-1][1] == 1 else None
    lead = View(base, whole.axes[:-1]).merged
    if not isinstance(kept, int) or not isinstance(view.offset, int) or wanted[:-1] != lead \
            or view.offset + kept > features:
        return node
    key = (base, view.offset, kept)
    if key not in made:
        made[key] = _new(build, node, aten.slice.Tensor, base, last, view.offset,
                         view.offset + kept)
    return _shaped(made[key], sizes, build, made)


def _shaped(base: fx.Node, sizes: tuple[Any, ...], build: StepBuilder,
            made: dict[Any, fx.Node]) -> fx.Node:
    if _sizes(base) == sizes:
        return base
    if (base, sizes) not in made:
        made[base, sizes] = _new(build, base, aten.reshape.default, base,
                                 [_argument(size, build) for size in sizes])
    return made[base, sizes]


def _argument(size: Any, build: StepBuilder) -> Any:
    """A size as an argument: a number, or so many times the number of rows."""
    if isinstance(size, int):
        return size
    factor = int(size / expression(build.row_count))
    return build.count if factor == 1 else build.times(build.count, factor)


def _new(build: StepBuilder, like: fx.Node, target: Any, *args: Any) -> fx.Node:
    build.at(like)
    return build.call(target, *args)

