"""Operators that put something before the first token or behind the last."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import fx

from bincompile.passes.graph import arguments, aten, number, value_of
from bincompile.passes.streaming.builder import StepBuilder
from bincompile.passes.streaming.facts import Facts, settled
from bincompile.passes.streaming.kinds import (
    TIME,
    Atom,
    Indexed,
    Kind,
    Refused,
    Stepped,
    Still,
    Windowed,
)
from bincompile.passes.streaming.regroup import with_axis
from bincompile.passes.streaming.rule import ALL, Rule
from bincompile.passes.streaming.rules.parts import holds, pieces
from bincompile.passes.streaming.rules.time import tail

PREFIX = ("puts tokens before the first: what follows comes later than the tokens do, or needs "
          "them in one window")


def _pads(node: fx.Node, facts: Facts) -> tuple[int, int, int] | None:
    """Time's axis and how many positions are put before and behind; None where time is not."""
    kind, given = facts.kind(node.args[0]), arguments(node)
    counts, axis = [facts.size(c) for c in given["pad"]], kind.time_axis
    if axis is None or not isinstance(kind, Stepped | Windowed):
        return None
    place = 2 * (len(kind.axes) - 1 - axis)
    others = [c for i, c in enumerate(counts) if c and i // 2 != place // 2]
    front, back = (*counts[place:place + 2], 0, 0)[:2]
    if (not front and not back) or others or len(kind.axes[axis]) > 1:
        return None
    if not isinstance(front, int) or not isinstance(back, int):
        raise Refused("pads time to a length that depends on the number of tokens")
    if given.get("mode", "constant") != "constant":
        raise Refused(f"pads time with other tokens ({given['mode']})", "padding with zeros",
                      by_window=True)
    return axis, front, back


def _padded(node: fx.Node, facts: Facts) -> Kind | None:
    found = _pads(node, facts)
    if found is None:
        return None
    axis, front, _ = found
    kind, length = facts.kind(node.args[0]), facts.shape(node)[axis]
    fill = _fill(node)
    if facts.semantics == "window":
        whole = facts.lift(settled(kind))
        return dataclasses.replace(whole, axes=with_axis(kind.axes, axis, (Atom(TIME, length),)),
                                   window=facts.positions(length))
    axes = with_axis(kind.axes, axis, (Atom(TIME, length),))
    if kind.lead and front > 0 and fill != kind.fill:
        kind = settled(kind)
    if front >= 0:
        return dataclasses.replace(kind, axes=axes, lead=kind.lead + front, fill=fill)
    kept = max(kind.lead + front, 0)
    return dataclasses.replace(kind, axes=axes, lead=kept,
                               delay=kind.delay + (-front - kind.lead + kept) * kind.rate)


def _fill(node: fx.Node) -> float:
    value = arguments(node)["value"]
    return 0.0 if value is None else float(value)


def _pad(node: fx.Node, build: StepBuilder) -> fx.Node:
    arg, kind = node.args[0], build.kind(node.args[0])
    found = _pads(node, build.facts)
    assert found is not None
    axis, front, back = found
    if isinstance(build.kind(node), Stepped):
        return build.step(arg) if kind.lead and _fill(node) != kind.fill else build.made(arg)
    has = build.facts.positions(kind.length)
    whole = build.read(arg, build.facts.lift(settled(kind)), has)
    around = [0, 0] * (len(kind.axes) - 1 - axis) + [front, back]
    padded = build.call(aten.constant_pad_nd.default, whole, around, _fill(node))
    return build.newest(padded, axis, build.facts.positions(build.kind(node).length),
                        build.extent(node))


@dataclasses.dataclass(frozen=True)
class Joined:
    """A sequence with stored values in front of it or behind it.

    Args:
        axis: the axis of time.
        front: what stands before it, in order.
        tokens: the sequence.
        back: what stands behind it.
    """

    axis: int
    front: list[fx.Node]
    tokens: fx.Node
    back: list[fx.Node]

    def count(self, nodes: list[fx.Node]) -> int:
        """How many positions these are."""
        return sum(int(value_of(n).shape[self.axis]) for n in nodes)


def _joined(node: fx.Node, facts: Facts) -> Joined | None:
    tensors, axis = pieces(node, facts)
    tensors = [t for t in tensors if facts.shape(t)[axis] != 0]
    moving = [i for i, t in enumerate(tensors) if holds(facts.kind(t).axes[axis], TIME)]
    if not moving:
        return None
    if len(moving) > 1 or any(not isinstance(facts.kind(t), Still)
                              for i, t in enumerate(tensors) if i not in moving):
        raise Refused("puts sequences one behind the other", by_window=True)
    at = moving[0]
    if isinstance(facts.kind(tensors[at]), Indexed):
        raise Refused("puts positions one behind the other")
    if len(facts.kind(tensors[at]).axes[axis]) > 1:
        raise Refused("adds to an axis that time shares with another")
    return Joined(axis, tensors[:at], tensors[at], tensors[at + 1:])


def _cat(node: fx.Node, facts: Facts) -> Kind | None:
    found = _joined(node, facts)
    if found is None:
        return None
    kind: Any = settled(facts.kind(found.tokens))
    length = facts.shape(node)[found.axis]
    axes = with_axis(kind.axes, found.axis, (Atom(TIME, length),))
    if facts.semantics == "window":
        whole = facts.lift(kind)
        return Windowed(axes, facts.positions(length), whole.final)
    count = found.count(found.front)
    reach = None if kind.reach is None else kind.reach + count * kind.rate
    after: Stepped = dataclasses.replace(kind, axes=axes, reach=reach)
    if count and tail(after, facts) > 0 and not found.back:
        raise Refused(PREFIX, "Continual(semantics='window'), or a model without a prefix",
                      by_window=True)
    return after


def _put_together(node: fx.Node, build: StepBuilder) -> fx.Node:
    found, kind = _joined(node, build.facts), build.kind(node)
    assert found is not None
    if isinstance(kind, Windowed):
        return _whole(node, found, build)
    count = found.count(found.front)
    if not count:
        return build.step(found.tokens)
    later = build.shifted(found.tokens, count)
    fills = [number(build.facts.module, t) for t in found.front]
    if len(set(fills)) == 1 and fills[0] is not None and not math.isnan(fills[0]):
        return later if not fills[0] else build.shifted(found.tokens, count, fills[0])
    raise Refused("puts tokens of several values before the first")


def _whole(node: fx.Node, found: Joined, build: StepBuilder) -> fx.Node:
    """All positions of the window, with what stands around them."""
    kind, own = build.kind(node), settled(build.kind(found.tokens))
    has = build.facts.positions(own.length)
    whole = build.read(found.tokens, build.facts.lift(own), has)
    parts = [_spread(build, t, found.axis, kind) for t in found.front]
    parts += [whole, *(_spread(build, t, found.axis, kind) for t in found.back)]
    made = build.call(aten.cat.default, parts, found.axis)
    return build.newest(made, found.axis, kind.window, build.extent(node))


def _spread(build: StepBuilder, tensor: fx.Node, axis: int, kind: Windowed) -> fx.Node:
    """Stored positions, for each row of the step."""
    read = build.read(tensor, kind.with_axes(with_axis(kind.axes, axis, ())))
    sizes = build.sizes(kind.axes)
    sizes[axis] = int(value_of(tensor).shape[axis])
    return build.call(aten.expand.default, read, sizes)


def _everything(node: fx.Node, arg: fx.Node, asked: str, facts: Facts) -> str:
    """All positions, where a window is put together; of tokens one by one what is asked."""
    return ALL if isinstance(facts.kind(node), Windowed) else asked


pad = Rule((aten.constant_pad_nd.default, aten.pad.default), _padded, _pad, _everything)
cat = Rule((aten.cat.default, aten.concat.default), _cat, _put_together, _everything, general=True)
