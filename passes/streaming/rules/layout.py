"""Operators that move, merge, split or repeat axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from bincompile.passes.graph import arguments, aten, shape_of
from bincompile.passes.streaming.builder import StepBuilder
from bincompile.passes.streaming.facts import Facts
from bincompile.passes.streaming.kinds import (
    BATCH,
    TIME,
    Atom,
    Axes,
    Axis,
    Kind,
    Refused,
    plain,
)
from bincompile.passes.streaming.regroup import is_plain, regrouped
from bincompile.passes.streaming.rule import Rule

Emit = Callable[[fx.Node, StepBuilder], fx.Node]


def moved(axes_of: Callable[[fx.Node, Facts, Axes], Axes]) -> Callable[[fx.Node, Facts], Kind]:
    """The kind of what is read, with other axes."""
    def kind(node: fx.Node, facts: Facts) -> Kind:
        read = facts.kind(node.args[0])
        after = axes_of(node, facts, read.axes)
        if len(list(Kind(after).axes_of(TIME))) > 1:
            raise Refused("joins every token with every other outside attention")
        found: Kind = read.with_axes(after)
        return found

    return kind


def source(node: fx.Node, build: StepBuilder) -> fx.Node:
    """The step node of what a layout operator reads, padding in front of time left aside."""
    arg = node.args[0]
    axis = build.kind(arg).time_axis
    made = build.made(arg)
    return made if axis is None else build.newest(made, axis, build.extent(arg),
                                                  build.extent(node))


def as_it_is(node: fx.Node, build: StepBuilder) -> fx.Node:
    """The same call, for operators whose arguments name axes and no sizes."""
    rest = fx.node.map_arg(tuple(node.args[1:]), build.number)
    return build.call(node.target, source(node, build), *rest,
                      **fx.node.map_arg(dict(node.kwargs), build.number))


def resized(node: fx.Node, build: StepBuilder) -> fx.Node:
    """A reshape to the sizes that the axes have in a step."""
    sizes = build.sizes(build.kind(node).axes, build.extent(node))
    return build.call(aten.reshape.default, source(node, build), sizes)


def _reshape(node: fx.Node, facts: Facts, axes: Axes) -> Axes:
    return regrouped(axes, facts.shape(node))


def _permuted(node: fx.Node, facts: Facts, axes: Axes) -> Axes:
    rank, order = len(axes), list(range(len(axes)))
    if node.target in (aten.permute.default, aten.permute_copy.default):
        order = [d % rank for d in node.args[1]]
    elif rank > 1:
        pair = node.args[1:3] if len(node.args) == 3 else (-2, -1)
        first, second = (d % rank for d in pair)
        order[first], order[second] = order[second], order[first]
    return tuple(axes[i] for i in order)


def _moved_axis(node: fx.Node, facts: Facts, axes: Axes) -> Axes:
    given = arguments(node)
    rank = len(axes)
    before, after = ([d % rank for d in _listed(given[name])]
                     for name in ("source", "destination"))
    rest = iter(i for i in range(rank) if i not in before)
    order = [before[after.index(i)] if i in after else next(rest) for i in range(rank)]
    return tuple(axes[i] for i in order)


def _listed(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


def _unsqueezed(node: fx.Node, facts: Facts, axes: Axes) -> Axes:
    at = arguments(node)["dim"] % (len(axes) + 1)
    return (*axes[:at], (), *axes[at:])


def _dropped(node: fx.Node, axes: Axes) -> list[int]:
    """The axes that a squeeze drops: those of size 1 in the model, whatever they are in a step."""
    given = arguments(node).get("dim")
    wanted = range(len(axes)) if given is None else [d % len(axes) for d in _listed(given)]
    return [d for d in wanted if not axes[d]]


def _squeezed(node: fx.Node, facts: Facts, axes: Axes) -> Axes:
    gone = _dropped(node, axes)
    return tuple(axis for i, axis in enumerate(axes) if i not in gone)


def _squeeze(node: fx.Node, build: StepBuilder) -> fx.Node:
    gone = _dropped(node, build.kind(node.args[0]).axes)
    read = source(node, build)
    return build.call(aten.squeeze.dims, read, gone) if gone else read


def grown(size: Any, facts: Facts) -> Axis:
    """The axis that an axis of size 1 becomes when it is spread to a size."""
    size, inputs = facts.size(size), facts.inputs
    if not isinstance(size, int) and inputs.batch is not None and size == inputs.batch:
        return (Atom(BATCH, size),)
    if facts.depends_on_time(size):
        return (Atom(TIME, size),)
    return plain(facts.hint(size))


def _expanded(node: fx.Node, facts: Facts, axes: Axes) -> Axes:
    sizes = shape_of(node)
    padded = ((),) * (len(sizes) - len(axes)) + axes
    return tuple(axis or grown(size, facts) for axis, size in zip(padded, sizes, strict=True))


def _expand(node: fx.Node, build: StepBuilder) -> fx.Node:
    sizes = build.sizes(build.kind(node).axes, build.extent(node))
    return build.call(aten.expand.default, source(node, build), sizes)


def _repeated(node: fx.Node, facts: Facts, axes: Axes) -> Axes:
    counts = list(node.args[1])
    padded = ((),) * (len(counts) - len(axes)) + axes

    def times(axis: Axis, count: Any) -> Axis:
        if facts.size(count) == 1:
            return axis
        if not is_plain(axis):
            raise Refused("repeats the tokens or the rows")
        return (*grown(count, facts), *axis)

    return tuple(map(times, padded, counts))


def _repeat(node: fx.Node, build: StepBuilder) -> fx.Node:
    """Repeats of the step: those that are time are of one token."""
    before, after = build.kind(node.args[0]).axes, build.kind(node).axes
    padded = ((),) * (len(after) - len(before)) + before
    counts = [build.sizes((new[:len(new) - len(old)],), build.extent(node))[0]
              for old, new in zip(padded, after, strict=True)]
    return build.call(aten.repeat.default, source(node, build), counts)


def _interleaved(node: fx.Node, facts: Facts, axes: Axes) -> Axes:
    given = arguments(node)
    if given["dim"] is None:
        raise Refused("flattens time and the batch")
    at = given["dim"] % len(axes)
    if any(atom.role == TIME for atom in axes[at]):
        raise Refused("repeats every token: several answers for each step")
    return (*axes[:at], (*axes[at], *plain(facts.hint(given["repeats"]))), *axes[at + 1:])


def _interleave(node: fx.Node, build: StepBuilder) -> fx.Node:
    given = arguments(node)
    return build.call(node.target, source(node, build), build.facts.hint(given["repeats"]),
                      given["dim"])


def _as_complex(node: fx.Node, facts: Facts, axes: Axes) -> Axes:
    if not is_plain(axes[-1]):
        raise Refused("makes complex numbers of tokens")
    return axes[:-1]


def _as_real(node: fx.Node, facts: Facts, axes: Axes) -> Axes:
    return (*axes, plain(2))


RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default,
            aten.view_copy.default, aten.flatten.using_ints, aten.unflatten.int,
            aten.view_as.default, aten._reshape_alias.default)
reshape = Rule(RESHAPES, moved(_reshape), resized)
permute = Rule((aten.permute.default, aten.permute_copy.default, aten.transpose.int, aten.t.default,
                aten.mT.default, aten.adjoint.default, aten.transpose_copy.int),
               moved(_permuted), as_it_is)
movedim = Rule((aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int,
                aten.moveaxis.intlist), moved(_moved_axis), as_it_is)
swap = Rule((aten.swapaxes.default, aten.swapdims.default), moved(_permuted), as_it_is)
unsqueeze = Rule((aten.unsqueeze.default, aten.unsqueeze_copy.default), moved(_unsqueezed),
                 as_it_is)
squeeze = Rule((aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default,
                aten.squeeze_copy.dim), moved(_squeezed), _squeeze)
expand = Rule((aten.expand.default, aten.expand_copy.default, aten.expand_as.default,
               aten.broadcast_to.default), moved(_expanded), _expand)
repeat = Rule((aten.repeat.default, aten.tile.default), moved(_repeated), _repeat)
interleave = Rule((aten.repeat_interleave.self_int,), moved(_interleaved), _interleave)
as_complex = Rule((aten.view_as_complex.default,), moved(_as_complex), as_it_is)
as_real = Rule((aten.view_as_real.default,), moved(_as_real), as_it_is)
