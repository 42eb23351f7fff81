"""Shared heads: keys and values of fewer heads than the queries, before they are repeated."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import fx

from bincompile.passes.graph import arguments, aten, is_tensor, shape_of
from bincompile.passes.sizes import equal
from bincompile.passes.trail import regrouping

PERMUTES = (aten.transpose.int, aten.permute.default, aten.mT.default)


@dataclasses.dataclass(frozen=True)
class Shared:
    """A tensor whose heads each serve `groups` others in turn.

    Args:
        node: the tensor before its heads are repeated.
        axis: where the heads are once `order` permuted its axes.
        groups: how often each head is repeated.
        order: the axis that each axis of the repeated tensor comes from.
    """

    node: fx.Node
    axis: int
    groups: int
    order: tuple[int, ...]

    def arranged(self, build: Any, tensor: Any) -> Any:
        """The tensor with its axes as the repeated one has them."""
        plain = self.order == tuple(range(len(self.order)))
        return tensor if plain else build.call(aten.permute.default, tensor, list(self.order))


def shared_heads(node: fx.Node) -> Shared | None:
    """What a tensor is repeated from, seen through permutes of its axes; None if it is not."""
    order = tuple(range(len(shape_of(node))))
    while node.target in PERMUTES:
        step = permuted(node)
        order = tuple(step[i] for i in order)
        node = node.args[0]
    repeats = node.target is aten.repeat_interleave.self_int
    found = _interleaved(node) if repeats else _expanded(node)
    if found is None:
        return None
    origin, axis, groups = found
    return Shared(origin, order.index(axis), groups, order)


def permuted(node: fx.Node) -> tuple[int, ...]:
    """For a permute, the axis of its input that each axis comes from."""
    rank = len(shape_of(node))
    if node.target is aten.permute.default:
        return tuple(i % rank for i in node.args[1])
    first, second = node.args[1:] if node.target is aten.transpose.int else (-2, -1)
    order = list(range(rank))
    order[first], order[second] = order[second], order[first]
    return tuple(order)


def _interleaved(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    found = arguments(node)
    if not isinstance(found["repeats"], int) or found["dim"] is None:
        return None
    return found["self"], found["dim"] % len(shape_of(node)), found["repeats"]


def _expanded(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """reshape(expand(unsqueeze(x))) that repeats each index of one axis."""
    if node.target is not aten.reshape.default or node.args[0].target is not aten.expand.default:
        return None
    expanded = node.args[0]
    single = expanded.args[0]
    if single.target is not aten.unsqueeze.default or not is_tensor(single.args[0]):
        return None
    axis = single.args[1] % len(shape_of(single))
    before, after = shape_of(single), shape_of(expanded)
    groups = after[axis]
    same = len(before) == len(after) and all(
        equal(b, a) for i, (b, a) in enumerate(zip(before, after, strict=True)) if i != axis)
    merged = [g for g in regrouping(after, shape_of(node)).groups
              if (len(g[0]), len(g[1])) != (1, 1)]
    if not same or not isinstance(groups, int) or merged != [((axis - 1, axis), (axis - 1,))]:
        return None
    return single.args[0], axis - 1, groups
