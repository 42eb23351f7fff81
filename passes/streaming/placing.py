"""Placing: values of one index or one row where the axes of others have time and the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from bincompile.passes.graph import aten, shape_of, value_of
from bincompile.passes.streaming.kinds import (
    BATCH,
    PLAIN,
    TIME,
    Axes,
    Indexed,
    Refused,
    Still,
    Windowed,
    expression,
    parts_of,
)

if TYPE_CHECKING:
    from bincompile.passes.streaming.builder import StepBuilder


def unplaced(build: StepBuilder, node: fx.Node, axes: Axes, extent: int = 1) -> fx.Node:
    """A step node with these axes as (M, *plain), or (M, extent, *plain) where extent is not 1."""
    atoms = [atom for axis in axes for atom in axis if extent > 1 or atom.role != TIME]
    order = sorted(range(len(atoms)), key=lambda i: _RANK[atoms[i].role])
    node = reshaped(build, node, [build.sizes(((a,),), extent)[0] for a in atoms])
    if order != sorted(order):
        node = build.call(aten.permute.default, node, order)
    if not any(atom.role == BATCH for atom in atoms):
        node = build.call(aten.unsqueeze.default, node, 0)
        node = node if build.count == 1 else build.call(
            aten.expand.default, node, [build.count, *(-1 for _ in atoms)])
    return node


_RANK = {BATCH: 0, TIME: 1, PLAIN: 2}


def placed(build: StepBuilder, token: fx.Node, axes: Axes, extent: int = 1) -> fx.Node:
    """(M, *plain), or (M, extent, *plain), as a step node with these axes."""
    atoms = [atom for axis in axes for atom in axis if extent > 1 or atom.role != TIME]
    order = sorted(range(len(atoms)), key=lambda i: _RANK[atoms[i].role])
    if not any(atom.role == BATCH for atom in atoms):
        if build.count != 1:
            raise Refused("depends on the row, and its axes have no batch")
        token = build.call(aten.squeeze.dims, token, [0])
    if order != sorted(order):
        token = build.call(aten.permute.default, token,
                           [order.index(i) for i in range(len(order))])
    return reshaped(build, token, build.sizes(axes, extent))


def reshaped(build: StepBuilder, node: fx.Node, sizes: list[Any]) -> fx.Node:
    """A node in another shape; itself where it has that already."""
    same = [*map(expression, shape_of(node))] == [expression(value_of(s)) for s in sizes]
    return node if same else build.call(aten.reshape.default, node, sizes)


def still(build: StepBuilder, arg: fx.Node, like: Any) -> fx.Node:
    """The node of a value that does not change with time, to be joined with one of a kind."""
    if arg.op == "get_attr":
        return build.stored(arg.target)
    kind = build.kind(arg)
    prepared = any(getattr(part, "prepared", False) for part in parts_of(kind))
    if prepared and not build.preparing:
        return _prepared(build, arg, kind, like)
    key = ("still", arg)
    if key not in build.shared:
        build.shared[key] = _copied(build, arg)
    return build.shared[key]


def _copied(build: StepBuilder, arg: fx.Node) -> fx.Node:
    """A computation as the model has it."""
    def mapped(node: fx.Node) -> Any:
        sized = isinstance(value_of(node), int | torch.SymInt)
        return build.number(node) if sized else still(build, node, None)

    return build.call(arg.target, *fx.node.map_arg(arg.args, mapped),
                      **fx.node.map_arg(dict(arg.kwargs), mapped))


def _prepared(build: StepBuilder, arg: fx.Node, kind: Still, like: Any) -> fx.Node:
    """What was computed when the row began, of the rows of this step."""
    key = ("prepared", arg)
    if key not in build.shared:
        build.frontier.append(arg)
        state = build.state(arg.name, kind.plain, value_of(arg).dtype,
                            prepared=len(build.frontier) - 1)
        build.shared[key] = build.call(aten.index_select.default, state, 0, build.rows)
    axes, batch = kind.axes, like.batch_axis
    if kind.batch_axis is not None or batch is None:
        return placed(build, build.shared[key], axes)
    at = len(like.axes) - batch
    axes = ((),) * (at - len(axes)) + axes
    if axes[-at]:
        raise Refused("joins rows of the batch with an input that has no batch")
    row = tuple(atom for atom in like.axes[batch] if atom.role == BATCH)
    found = placed(build, build.shared[key], (*axes[:-at], row, *axes[len(axes) - at + 1:]))
    return _spread(build, found, -at, like)


def indexed(build: StepBuilder, arg: fx.Node, kind: Indexed, like: Any, extent: int) -> fx.Node:
    """A value of the index alone, where `like` has its rows."""
    from bincompile.passes.streaming import free

    axis = kind.time_axis
    assert axis is not None
    window = build.facts.window
    if isinstance(like, Windowed) and window is not None:
        found = free.emit_windowed(arg, build, window)
        return build.newest(found, axis, like.window, extent)
    return _by_row(build, by_index(build, arg, like), axis - len(kind.axes), like)


def by_index(build: StepBuilder, arg: fx.Node, like: Any) -> fx.Node:
    """A value of the index alone, with the M indices of this step where it has time."""
    from bincompile.passes.streaming import free

    key = ("indexed", arg, like.rate, like.delay)
    if key not in build.shared:
        build.shared[key] = free.emit_indexed(arg, build, like.rate, like.delay)
    return build.shared[key]


def table(build: StepBuilder, arg: fx.Node, kind: Still, like: Any, extent: int) -> fx.Node:
    """The entries of a stored tensor that has one for each index, where `like` has its rows."""
    if kind.prepared:
        raise Refused("takes a value for each index from an input that does not change with time",
                      "that input as a stream: Continual(time_dim={name: axis})")
    axis = like.time_axis - len(like.axes)
    whole = still(build, arg, like)
    length = int(shape_of(whole)[axis])
    if isinstance(like, Windowed):
        if length != like.window:
            raise Refused(f"a stored tensor has {length} positions, and the window {like.window}",
                          "Continual(window=), or the sizes of the example")
        return build.newest(whole, axis + len(kind.axes), length, extent)
    index = entries(build, length, like.rate, like.delay)
    found = build.call(aten.index_select.default, whole, axis + len(kind.axes), index)
    return _by_row(build, found, axis, like)


def entries(build: StepBuilder, length: int, rate: int, delay: int) -> fx.Node:
    """(M,) int64: the index that a step computes, as a place in a table of so many entries.

    With `positions="recycle"` it begins anew after the last; else a row ends there.
    """
    index = build.index(rate, delay)
    if build.facts.continual.positions == "recycle":
        window = build.facts.window if build.facts.semantics == "window" else None
        if window is not None and length < 2 * window - 1:
            raise Refused(f"has {length} positions, and {2 * window - 1} are needed so that no two "
                          f"tokens near a window of {window} share one",
                          "a longer table, or a shorter window")
        note = f"positions begin anew after {length}: a change of the model"
        if note not in build.facts.notes:
            build.facts.notes.append(note)
        return build.call(aten.remainder.Scalar, index, length)
    build.limit((length - 1) * rate + delay + 1)
    return build.call(aten.clamp.default, index, 0) if delay else index


def _by_row(build: StepBuilder, found: fx.Node, time: int, like: Any) -> fx.Node:
    """A value with M indices at the axis `time`, from the end, where `like` has its batch."""
    batch = like.batch_axis
    if batch is None:
        return found
    at = batch - len(like.axes)
    if len(shape_of(found)) < -at:
        found = reshaped(build, found, [*(1,) * (-at - len(shape_of(found))),
                                        *_given(build, found)])
    if at != time:
        if shape_of(found)[at] != 1:
            raise Refused("joins rows of the batch with a stored tensor that has some for each")
        found = build.call(aten.transpose.int, found, at, time)
    return _spread(build, found, at, like)


def _spread(build: StepBuilder, found: fx.Node, at: int, like: Any) -> fx.Node:
    """A value with M at an axis, repeated for what else `like` holds in that axis."""
    batch = like.batch_axis
    if all(atom.role != PLAIN for atom in like.axes[batch]):
        return found
    rank = len(shape_of(found))
    rest = _given(build, found)
    within = [build.count if atom.role == BATCH else 1 if atom.role == TIME else int(atom.size)
              for atom in like.axes[batch]]
    narrow = [size if atom.role == BATCH else 1
              for size, atom in zip(within, like.axes[batch], strict=True)]
    place = rank + at
    found = build.call(aten.reshape.default, found, [*rest[:place], *narrow, *rest[place + 1:]])
    found = build.call(aten.expand.default, found, [*rest[:place], *within, *rest[place + 1:]])
    whole = build.sizes((like.axes[batch],))
    return build.call(aten.reshape.default, found, [*rest[:place], *whole, *rest[place + 1:]])


def _given(build: StepBuilder, node: fx.Node) -> list[Any]:
    """The sizes of a step node as arguments: a symbolic one is the number of rows."""
    return [s if isinstance(s, int) else build.count for s in shape_of(node)]
