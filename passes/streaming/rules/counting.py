"""Running values over time, differences of neighbours, and sums divided by the number of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx

from bincompile.ops.stream_scan import stream_scan
from bincompile.passes.graph import arguments, aten, is_tensor, value_of
from bincompile.passes.streaming.builder import StepBuilder
from bincompile.passes.streaming.facts import Facts, settled
from bincompile.passes.streaming.kinds import (
    Axes,
    Kind,
    Kinds,
    Refused,
    Stepped,
    Still,
    Windowed,
    plain,
)
from bincompile.passes.streaming.rule import ALL, Rule
from bincompile.passes.streaming.rules.pooling import refuse_places
from bincompile.passes.streaming.sweeping import Sweep, moved, refuse_partial, time_axis, window

SCANS = {aten.cumsum.default: "sum", aten.cumprod.default: "prod", aten.cummax.default: "max",
         aten.cummin.default: "min", aten.logcumsumexp.default: "logsumexp"}


def _along_time(node: fx.Node, facts: Facts) -> int | None:
    """The axis that a node is about, where it is that of time."""
    kind, given = facts.kind(node.args[0]), arguments(node)
    if isinstance(kind, Still) or not kind.axes:
        return None
    axis: int = given["dimension"] if "dimension" in given else given["dim"]
    if not isinstance(kind, Stepped | Windowed) or kind.time_axis != axis % len(kind.axes):
        return None
    return time_axis(kind.axes, "scans")


def _scanned(node: fx.Node, facts: Facts) -> Kinds | None:
    axis = _along_time(node, facts)
    if axis is None:
        return None
    kind: Any = settled(facts.kind(node.args[0]))
    if kind.final:
        raise Refused("scans other tokens of a value that is known at the newest alone")
    if facts.semantics == "window":
        refuse_partial(facts)
        kind = facts.lift(kind)
    else:
        kind = dataclasses.replace(kind, reach=None)
    if not isinstance(value_of(node), tuple | list):
        found: Kind = kind
        return found
    refuse_places(node)
    return kind, Still(())


def _asked(node: fx.Node, arg: fx.Node, asked: str, facts: Facts) -> str:
    """In a window computed anew, the newest follows from all others."""
    kind = facts.kind(node)
    kind = kind[0] if isinstance(kind, tuple) else kind
    return ALL if isinstance(kind, Windowed) else asked


def newest_of(node: fx.Node, made: fx.Node, kind: Windowed, build: StepBuilder) -> fx.Node:
    """All positions of a window, or the newest where that is what is asked for."""
    assert kind.time_axis is not None
    return build.newest(made, kind.time_axis, kind.window, build.extent(node))


def _scan(node: fx.Node, build: StepBuilder) -> Any:
    arg, several = node.args[0], isinstance(build.kind(node), tuple)
    kind = build.kind(node)[0] if several else build.kind(node)
    if isinstance(kind, Windowed):
        made = build.call(node.target, build.read(arg, kind, kind.window), *node.args[1:],
                          **node.kwargs)
        made = build.item(made, 0) if several else made
        made = newest_of(node, made, kind, build)
        return (made,) if several else made
    token, dtype = build.token(arg), (value_of(node)[0] if several else value_of(node)).dtype
    if value_of(token).dtype != dtype:
        token = build.call(aten._to_copy.default, token, dtype=dtype)
    wide = torch.float64 if dtype == torch.float32 and SCANS[node.target] in ("sum", "prod") \
        else dtype
    total = build.state("total", (2, *kind.plain), wide)
    made = build.call(stream_scan.overload, token, total, build.rows, build.clock,
                      SCANS[node.target], kind.rate, kind.delay)
    made = build.restored(made, kind.axes)
    return (made,) if several else made


def _differs(node: fx.Node, facts: Facts) -> Kind | None:
    axis = _along_time(node, facts)
    if axis is None:
        return None
    given = arguments(node)
    if given["n"] != 1 or given["prepend"] is not None or given["append"] is not None:
        raise Refused("takes differences of differences, or with something before or behind",
                      "torch.diff(x) alone")
    kind: Kind = moved(facts.kind(node.args[0]), Sweep(2), axis, facts.shape(node)[axis], facts)
    return kind


def _difference(node: fx.Node, build: StepBuilder) -> fx.Node:
    arg, kind = node.args[0], build.kind(node)
    if isinstance(kind, Windowed):
        whole = build.facts.lift(settled(build.kind(arg)))
        made = build.call(node.target, build.read(arg, whole, whole.window), *node.args[1:],
                          **node.kwargs)
        return newest_of(node, made, kind, build)
    both = window(arg, Sweep(2), build)
    first, second = (build.call(aten.select.int, both, 1, i) for i in (0, 1))
    boolean = value_of(both).dtype == torch.bool
    made = build.call(aten.logical_xor.default if boolean else aten.sub.Tensor, second, first)
    return build.restored(made, build.kind(arg).axes)


def _unfolded(node: fx.Node, facts: Facts) -> Kind | None:
    axis = _along_time(node, facts)
    if axis is None:
        return None
    given, kind = arguments(node), facts.kind(node.args[0])
    found: Any = moved(kind, Sweep(given["size"], given["step"]), axis, facts.shape(node)[axis],
                       facts)
    axes: Axes = (*found.axes, plain(given["size"]))
    result: Kind = found.with_axes(axes)
    return result


def _unfold(node: fx.Node, build: StepBuilder) -> fx.Node:
    arg, kind, given = node.args[0], build.kind(node), arguments(node)
    if isinstance(kind, Windowed):
        whole = build.facts.lift(settled(build.kind(arg)))
        made = build.call(node.target, build.read(arg, whole, whole.window), *node.args[1:])
        return newest_of(node, made, kind, build)
    read = window(arg, Sweep(given["size"], given["step"]), build, last=True)
    return build.restored(read, kind.axes)


def _counted(node: fx.Node, facts: Facts) -> Kind | None:
    """A value of all tokens so far, divided by how many there are."""
    if len(node.args) != 2 or node.kwargs:
        return None
    value, number = node.args
    if not is_tensor(value) or not isinstance(number, fx.Node) or is_tensor(number):
        return None
    kind, size = facts.kind(value), facts.size(number)
    if not isinstance(kind, Stepped) or kind.time_axis is not None or not kind.final \
            or not isinstance(size, sympy.Expr):
        return None
    if size != facts.inputs.length:
        return None
    if kind.rate != 1 or kind.delay or kind.lead:
        raise Refused("divides by the number of tokens, which is another when the value comes")
    found: Kind = kind.with_axes(kind.axes)
    return found


def _divide(node: fx.Node, build: StepBuilder) -> fx.Node:
    value, kind = node.args[0], build.kind(node)
    if build.facts.semantics == "window" and not build.facts.continual.partial_window:
        return build.call(node.target, build.step(value), build.facts.window)
    seen = build.call(aten.add.Tensor, build.index(), 1)
    if build.facts.window is not None:
        seen = build.call(aten.clamp.default, seen, None, build.facts.window)
    token = build.token(value)
    for _ in kind.plain:
        seen = build.call(aten.unsqueeze.default, seen, -1)
    return build.restored(build.call(node.target, token, seen), kind.axes)


def _divided(node: fx.Node, facts: Facts, args: tuple[Any, ...],
             kwargs: Mapping[str, Any]) -> Any:
    """The same, by the tokens in the window."""
    value, number = args
    if facts.semantics == "banded" and facts.window is not None:
        number = min(number, facts.window)
    return node.target(value, number)


scan = Rule(tuple(SCANS), _scanned, _scan, _asked)
difference = Rule((aten.diff.default,), _differs, _difference, _asked)
unfold = Rule((aten.unfold.default, aten.unfold_copy.default), _unfolded, _unfold, _asked)
counted = Rule((aten.div.Tensor, aten.true_divide.Tensor), _counted, _divide,
               reference=_divided)
