"""Operators that take, shift or pad tokens along time itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import sympy
from torch import fx

from bincompile.passes.graph import arguments, aten
from bincompile.passes.streaming.builder import StepBuilder
from bincompile.passes.streaming.facts import Facts, settled
from bincompile.passes.streaming.kinds import (
    TIME,
    Atom,
    Axes,
    Axis,
    Kind,
    Refused,
    Stepped,
    Windowed,
    expression,
    plain,
)
from bincompile.passes.streaming.regroup import with_axis, without
from bincompile.passes.streaming.rule import ALL, LAST, Rule
from bincompile.passes.streaming.rules.parts import holds

NOT_NEWEST = "picks a token that a stream does not come back to"
EDGE = "depends on the padding behind the last token, which a stream does not have"
NEWEST = "x[:, -1], the newest token"


@dataclasses.dataclass(frozen=True)
class Taken:
    """A part of time: from `skipped` behind the first to `behind` before the end.

    Args:
        axis: the axis of time.
        skipped: positions left out in front; None where so many are kept from the end on.
        behind: positions left out at the end.
        kept: how many there are, where that is a number.
        step: each so many-th is kept.
    """

    axis: int
    skipped: int | None
    behind: int
    kept: int | None
    step: int = 1


def time_axis(node: fx.Node, facts: Facts) -> int | None:
    """The axis that a node is about, where that is the time of a value that moves with it."""
    kind, given = facts.kind(node.args[0]), arguments(node)
    axis = given["dim"] % len(kind.axes)
    if not holds(kind.axes[axis], TIME) or not isinstance(kind, Stepped | Windowed):
        return None
    if len(kind.axes[axis]) > 1:
        raise Refused("takes tokens from an axis that time shares with another")
    return axis


def before_end(index: Any, facts: Facts, length: Any) -> int | None:
    """How far an index is from the end, where it counts from there."""
    index = facts.size(index)
    if isinstance(index, int) and index < 0:
        return -index
    rest = expression(sympy.sympify(length) - index)
    moves = isinstance(index, sympy.Expr) or not isinstance(length, sympy.Expr)
    return rest if isinstance(rest, int) and moves else None


def _selected(node: fx.Node, facts: Facts) -> Taken:
    axis = time_axis(node, facts)
    assert axis is not None
    kind, index = facts.kind(node.args[0]), arguments(node)["index"]
    behind = before_end(index, facts, kind.length)
    first = facts.size(index)
    if behind is None or (not isinstance(kind.length, sympy.Expr) and first != kind.length - 1 \
            and not (isinstance(first, int) and first < 0)):
        if facts.semantics != "window":
            raise Refused(NOT_NEWEST, NEWEST, by_window=True)
        behind = facts.positions(kind.length) - first
    return Taken(axis, None, behind - 1, 1)


def _sliced(node: fx.Node, facts: Facts) -> Taken:
    axis = time_axis(node, facts)
    assert axis is not None
    given, length = arguments(node), facts.kind(node.args[0]).length
    start, step = given["start"] or 0, given["step"]
    after = facts.shape(node)[axis]
    end = given["end"]
    whole = end is None or (isinstance(facts.size(end), int) and facts.size(end) > 2**40)
    behind = 0 if whole else before_end(end, facts, length)
    first = facts.size(start)
    if behind is None or (isinstance(length, sympy.Expr) and isinstance(after, int)
                          and not _from_end(start, facts)):
        raise Refused("keeps the first tokens, which a stream does not come back to",
                      "x[:, -k:], the newest tokens", by_window=True)
    if _from_end(start, facts):
        if step != 1 or not isinstance(after, int):
            raise Refused("keeps every other of the newest tokens")
        return Taken(axis, None, behind, after)
    return Taken(axis, int(first), behind, None, step)


def _from_end(start: Any, facts: Facts) -> bool:
    """Whether a start counts from the end."""
    start = facts.size(start)
    return isinstance(start, sympy.Expr) or start < 0


def tail(kind: Stepped, facts: Facts) -> int:
    """How many positions the model has behind the newest that a stream has by then.

    Above 0 where the last positions of the model come from padding behind the last token; below 0
    where the model leaves out the newest ones.
    """
    tokens = 40 * kind.rate + kind.delay + 1
    length, time = kind.length, facts.inputs.length
    if isinstance(length, sympy.Expr):
        return int(length.xreplace({time: sympy.Integer(tokens)}).doit()) - kind.lead - 41
    return int(length) - kind.lead - ((int(time) - 1 - kind.delay) // kind.rate + 1)


def _back(kind: Stepped | Windowed, taken: Taken, facts: Facts) -> int:
    """How many indices before the newest the last one is that is taken."""
    if isinstance(kind, Windowed) or kind.time_axis is None:
        return taken.behind
    back = taken.behind - tail(kind, facts)
    if back < 0:
        raise Refused(EDGE, "padding in front of the first token alone", by_window=True)
    return back


def _newest(kind: Stepped | Windowed, taken: Taken, facts: Facts, axes: Axes) -> Stepped:
    """The kind of some positions at the end, together one value for each step."""
    assert taken.kept is not None
    if isinstance(kind, Windowed):
        return Stepped(axes, reach=facts.window, first=facts.first(kind), final=True)
    back = _back(kind, taken, facts)
    if kind.final and back + taken.kept > 1:
        raise Refused("asks for other positions of a value that is known at the newest alone")
    whole: Stepped = settled(kind)
    behind = (back + taken.kept - 1) * whole.rate
    reach = None if whole.reach is None else whole.reach + behind
    return dataclasses.replace(whole, axes=axes, reach=reach, final=True,
                               first=max(whole.first, whole.delay) + behind)


def _select(node: fx.Node, facts: Facts) -> Kind | None:
    axis = time_axis(node, facts)
    if axis is None:
        return None
    kind = facts.kind(node.args[0])
    return _newest(kind, _selected(node, facts), facts, without(kind.axes, axis))


def _emit_select(node: fx.Node, build: StepBuilder) -> fx.Node:
    taken = _selected(node, build.facts)
    return build.call(aten.squeeze.dims, _positions(node, build, taken), [taken.axis])


def _positions(node: fx.Node, build: StepBuilder, taken: Taken) -> fx.Node:
    """The step node of what is taken at the end, with the axis of time of that size."""
    arg, kind, kept = node.args[0], build.kind(node.args[0]), taken.kept
    assert kept is not None
    if isinstance(kind, Windowed):
        end = build.extent(arg) - taken.behind
        return build.made(arg) if build.extent(arg) == kept else build.call(
            aten.slice.Tensor, build.made(arg), taken.axis, end - kept, end)
    back = _back(kind, taken, build.facts)
    if kept == 1:
        return build.shifted(arg, back) if back else build.step(arg)
    found = build.restored(build.windowed(arg, kept + back), settled(kind).axes, kept + back)
    return build.call(aten.slice.Tensor, found, taken.axis, 0, kept) if back else found


def _slice(node: fx.Node, facts: Facts) -> Kind | None:
    axis = time_axis(node, facts)
    if axis is None:
        return None
    kind, taken = facts.kind(node.args[0]), _sliced(node, facts)
    if taken.kept is not None:
        return _newest(kind, taken, facts, with_axis(kind.axes, axis, plain(taken.kept)))
    time: Axis = (Atom(TIME, facts.shape(node)[axis]),)
    axes = with_axis(kind.axes, axis, time)
    if facts.semantics == "window":
        if taken.step != 1:
            raise Refused("keeps every other token of a window")
        return dataclasses.replace(facts.lift(settled(kind)), axes=axes,
                                   window=facts.positions(time[0].size))
    assert isinstance(kind, Stepped) and taken.skipped is not None
    skipped = min(kind.lead, taken.skipped)
    kind = dataclasses.replace(kind, lead=kind.lead - skipped)
    kind = kind if taken.step == 1 else settled(kind)
    return dataclasses.replace(
        kind, axes=axes, delay=kind.delay + (taken.skipped - skipped) * kind.rate,
        rate=kind.rate * taken.step)


def _emit_slice(node: fx.Node, build: StepBuilder) -> fx.Node:
    arg, kind = node.args[0], build.kind(node.args[0])
    taken, after = _sliced(node, build.facts), build.kind(node)
    if taken.kept is not None:
        return _positions(node, build, taken)
    if isinstance(after, Stepped):
        return build.made(arg) if kind.lead == 0 or after.lead else build.step(arg)
    has = build.facts.positions(kind.length)
    whole = build.read(arg, build.facts.lift(settled(kind)), has)
    end = has - taken.behind
    start = end - 1 if build.extent(node) == 1 else taken.skipped
    return build.call(aten.slice.Tensor, whole, taken.axis, start, end)


def _asked(node: fx.Node, arg: fx.Node, asked: str, facts: Facts) -> str:
    """The newest position asks for no other."""
    kind = facts.kind(arg)
    if kind.time_axis is None or facts.kind(node).time_axis == kind.time_axis:
        same = facts.shape(node) == facts.shape(arg)
        return asked if same or isinstance(kind, Stepped) else ALL
    taken = _selected(node, facts) if node.target is aten.select.int else _sliced(node, facts)
    return LAST if taken.kept == 1 and not taken.behind else ALL


select = Rule((aten.select.int,), _select, _emit_select, _asked, general=True)
slice_ = Rule((aten.slice.Tensor,), _slice, _emit_slice, _asked, general=True)
