"""Operators that take parts along an axis that is not time, or put parts together along one."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from bincompile.passes.graph import arguments, aten, value_of
from bincompile.passes.streaming import placing
from bincompile.passes.streaming.builder import StepBuilder
from bincompile.passes.streaming.facts import Facts, settled
from bincompile.passes.streaming.kinds import (
    BATCH,
    TIME,
    Axes,
    Axis,
    Kind,
    Kinds,
    Refused,
    Stepped,
    Still,
    Windowed,
    plain,
)
from bincompile.passes.streaming.regroup import is_plain, with_axis, without
from bincompile.passes.streaming.rule import Rule
from bincompile.passes.streaming.rules.layout import as_it_is, source


def cut_axis(node: fx.Node, facts: Facts) -> tuple[Kind, int]:
    """The kind of what is read, and the axis that the node is about."""
    kind, given = facts.kind(node.args[0]), arguments(node)
    return kind, given.get("dim", 0) % len(kind.axes)


def holds(axis: Axis, role: str) -> bool:
    """Whether an axis holds time, or the batch."""
    return any(atom.role == role for atom in axis)


def _beside_time(node: fx.Node, facts: Facts) -> tuple[Kind, int] | None:
    """The same, where the axis is not time; the rows of a batch are not taken apart."""
    kind, axis = cut_axis(node, facts)
    if holds(kind.axes[axis], TIME):
        return None
    if holds(kind.axes[axis], BATCH):
        raise Refused("takes the rows of the batch apart")
    return kind, axis


def _split(node: fx.Node, facts: Facts) -> Kinds | None:
    found = _beside_time(node, facts)
    if found is None:
        raise Refused("cuts time into parts")
    kind, axis = found
    if node.target is aten.unbind.int:
        return (kind.with_axes(without(kind.axes, axis)),) * len(value_of(node))
    return tuple(kind.with_axes(with_axis(kind.axes, axis, plain(part.shape[axis])))
                 for part in value_of(node))


def _select(node: fx.Node, facts: Facts) -> Kind | None:
    found = _beside_time(node, facts)
    return None if found is None else found[0].with_axes(without(found[0].axes, found[1]))


def _resized(node: fx.Node, facts: Facts) -> Kind | None:
    """A part of an axis; the whole of one that is time or the batch is left as it is."""
    kind, axis = cut_axis(node, facts)
    if facts.shape(node) == facts.shape(node.args[0]):
        found: Kind = kind.with_axes(kind.axes)
        return found
    if _beside_time(node, facts) is None:
        return None
    return kind.with_axes(with_axis(kind.axes, axis, plain(facts.shape(node)[axis])))


def _slice(node: fx.Node, build: StepBuilder) -> fx.Node:
    axis = arguments(node)["dim"] % len(build.kind(node).axes)
    if not is_plain(build.kind(node).axes[axis]):
        return source(node, build)
    return as_it_is(node, build)


def _picked(node: fx.Node, facts: Facts) -> Kind | None:
    """Entries of an axis, by stored numbers."""
    found = _beside_time(node, facts)
    if found is None or facts.tokens(node) != [node.args[0]]:
        return None
    kind, axis = found
    return kind.with_axes(with_axis(kind.axes, axis, plain(facts.shape(node)[axis])))


def _pick(node: fx.Node, build: StepBuilder) -> fx.Node:
    _, axis, index = node.args
    return build.call(node.target, source(node, build), axis,
                      build.read(index, Kind(())))


def _places(node: fx.Node, facts: Facts) -> Kind | None:
    """x[..., [2, 0]]: entries of plain axes by stored numbers, which stand side by side."""
    kind, indices = settled(facts.kind(node.args[0])), list(node.args[1])
    given = [i for i, index in enumerate(indices) if index is not None]
    if not isinstance(kind, Stepped | Windowed) or any(
            not isinstance(facts.kind(indices[i]), Still) for i in given):
        return None
    if given != list(range(given[0], given[-1] + 1)):
        raise Refused("takes entries of axes that stand apart")
    for i in given:
        if not is_plain(kind.axes[i]):
            raise Refused("takes tokens or rows by their numbers")
    rest = kind.axes[given[-1] + 1:]
    shape = facts.shape(node)
    new = tuple(plain(s) for s in shape[given[0]:len(shape) - len(rest)])
    found: Kind = kind.with_axes((*kind.axes[:given[0]], *new, *rest))
    return found


def _place(node: fx.Node, build: StepBuilder) -> fx.Node:
    kind = build.kind(node)
    indices = [None if i is None else placing.still(build, i, kind) for i in node.args[1]]
    return build.call(node.target, build.read(node.args[0], kind, build.extent(node)), indices)


def _gathered(node: fx.Node, facts: Facts) -> Kind | None:
    """Entries along a plain axis, by numbers that may change with time."""
    given = arguments(node)
    kinds = [settled(facts.kind(given[name])) for name in ("self", "index")]
    axis = given["dim"] % len(kinds[0].axes)
    if not all(is_plain(k.axes[axis]) for k in kinds):
        raise Refused("takes tokens or rows by their numbers")
    axes = [[*k.axes] for k in kinds]
    for own in axes:
        own[axis] = ()
    joined = facts.join([k.with_axes(tuple(own)) for k, own in zip(kinds, axes, strict=True)])
    found: Kind = joined.with_axes(with_axis(joined.axes, axis, kinds[1].axes[axis]))
    return found


def _gather(node: fx.Node, build: StepBuilder) -> fx.Node:
    given, kind = arguments(node), build.kind(node)
    read, index = (build.read(given[name], kind, build.extent(node))
                   for name in ("self", "index"))
    return build.call(node.target, read, given["dim"], index)


def _item(node: fx.Node, facts: Facts) -> Kind | None:
    kinds = facts.kind(node.args[0])
    return kinds[node.args[1]] if isinstance(kinds, tuple) else None


def _get_item(node: fx.Node, build: StepBuilder) -> fx.Node:
    made = build.made(node.args[0])
    part = build.item(made, node.args[1])
    axis = build.kind(node).time_axis
    return part if axis is None else build.newest(part, axis, build.extent(node.args[0]),
                                                  build.extent(node))


def pieces(node: fx.Node, facts: Facts) -> tuple[list[fx.Node], int]:
    """What a cat or stack puts together, and the axis of the result."""
    tensors, axis = list(node.args[0]), arguments(node)["dim"]
    return tensors, axis % value_of(node).ndim


def _cat(node: fx.Node, facts: Facts) -> Kind | None:
    tensors, axis = pieces(node, facts)
    kinds = [settled(facts.kind(t)) for t in tensors]
    if any(holds(k.axes[axis], TIME) for k in kinds):
        return None
    if any(holds(k.axes[axis], BATCH) for k in kinds):
        raise Refused("puts rows together")
    rest = [k.with_axes(with_axis(k.axes, axis, ())) for k in kinds]
    return _grown(facts.join(rest), axis, plain(facts.shape(node)[axis]))


def _grown(kind: Any, axis: int, new: Axis) -> Kind:
    found: Kind = kind.with_axes(with_axis(kind.axes, axis, new))
    return found


def _stack(node: fx.Node, facts: Facts) -> Kind:
    tensors, axis = pieces(node, facts)
    joined = facts.joined(tensors)
    axes: Axes = (*joined.axes[:axis], plain(len(tensors)), *joined.axes[axis:])
    found: Kind = joined.with_axes(axes)
    return found


def _put_together(node: fx.Node, build: StepBuilder) -> fx.Node:
    tensors, axis = pieces(node, build.facts)
    kind = build.kind(node)
    if node.target is aten.stack.default:
        kind = kind.with_axes(without(kind.axes, axis))
    parts = [build.read(t, kind, build.extent(node)) for t in tensors]
    return build.call(node.target, parts, axis)


def _turned(node: fx.Node, facts: Facts) -> Kind | None:
    """flip and roll over axes that are not time."""
    kind, given = facts.kind(node.args[0]), arguments(node)
    dims = given["dims"] or range(len(kind.axes))
    if any(holds(kind.axes[d], TIME) for d in dims):
        raise Refused("turns time around" if "shifts" not in given
                      else "brings the last tokens before the first")
    if any(holds(kind.axes[d], BATCH) for d in dims):
        raise Refused("moves rows of the batch")
    found: Kind = kind.with_axes(kind.axes)
    return found


split = Rule((aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default,
              aten.unbind.int, aten.tensor_split.sections, aten.tensor_split.indices,
              aten.split.sizes), _split, as_it_is, general=True)
select = Rule((aten.select.int,), _select, as_it_is)
resize = Rule((aten.slice.Tensor, aten.narrow.default), _resized, _slice)
pick = Rule((aten.index_select.default,), _picked, _pick)
places = Rule((aten.index.Tensor,), _places, _place)
gather = Rule((aten.gather.default,), _gathered, _gather)
item = Rule((operator.getitem,), _item, _get_item)
cat = Rule((aten.cat.default, aten.concat.default, aten.concatenate.default), _cat, _put_together)
stack = Rule((aten.stack.default,), _stack, _put_together)
turn = Rule((aten.flip.default, aten.roll.default), _turned, as_it_is, general=True)
