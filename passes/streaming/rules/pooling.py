"""Pooling over time: of neighbouring tokens, or of all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from bincompile.ops.stream_pool import stream_pool
from bincompile.ops.stream_scan import stream_scan
from bincompile.passes.graph import arguments, aten, value_of
from bincompile.passes.streaming.builder import StepBuilder
from bincompile.passes.streaming.facts import Facts, settled
from bincompile.passes.streaming.kinds import (
    BATCH,
    Kind,
    Kinds,
    Refused,
    Stepped,
    Still,
    Windowed,
    plain,
)
from bincompile.passes.streaming.rule import ALL, Rule
from bincompile.passes.streaming.rules.linear import emit
from bincompile.passes.streaming.sweeping import (
    Sweep,
    check_others,
    counts_every_step,
    moved,
    refuse_partial,
    time_axis,
    waits,
    window,
)
from bincompile.program import owner

AVERAGES = {aten.avg_pool1d.default: 1, aten.avg_pool2d.default: 2, aten.avg_pool3d.default: 3}
MAXIMA = {aten.max_pool1d.default: 1, aten.max_pool2d.default: 2, aten.max_pool3d.default: 3,
          aten.max_pool1d_with_indices.default: 1, aten.max_pool2d_with_indices.default: 2,
          aten.max_pool3d_with_indices.default: 3}


@dataclasses.dataclass(frozen=True)
class Pool:
    """The arguments of a pooling of neighbours, one number for each of its spatial axes.

    Args:
        kind: "max", "sum" or "mean" (of those that there are).
        size, stride, padding, apart: as torch takes them.
        divisor: of a sum along one axis; None: as many as there are positions.
        first: its first spatial axis among the axes of its input.
    """

    kind: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    apart: tuple[int, ...]
    divisor: int | None
    first: int

    def sweep(self, axis: int) -> Sweep:
        """How it moves along an axis of its input."""
        at = axis - self.first
        fill = float("-inf") if self.kind == "max" else 0.0
        return Sweep(self.size[at], self.stride[at], self.apart[at], self.padding[at],
                     self.padding[at], fill)


def pool_of(node: fx.Node) -> Pool:
    """The pooling that a node calls."""
    given = arguments(node)
    rank = (AVERAGES | MAXIMA)[node.target]

    def each(value: Any) -> tuple[int, ...]:
        values = tuple(value) if isinstance(value, list | tuple) else (value,)
        return values * rank if len(values) == 1 else values

    size = each(given["kernel_size"])
    kind = "max" if node.target in MAXIMA else "sum" if given["count_include_pad"] else "mean"
    return Pool(kind, size, each(given["stride"]) or size, each(given["padding"]),
                each(given.get("dilation", 1)), given.get("divisor_override"),
                value_of(given["self"]).ndim - rank)


def _slides(node: fx.Node, facts: Facts) -> Kinds | None:
    arg = node.args[0]
    kind: Any = facts.kind(arg)
    if isinstance(kind, Still):
        return None
    pool, held = pool_of(node), value_of(node)
    spatial = range(pool.first, len(kind.axes))
    axis = kind.time_axis if kind.time_axis not in spatial else time_axis(kind.axes, "pools")
    check_others(kind.axes, [i for i in spatial if i != axis], "pools over")
    shape = [facts.size(s) for s in (held[0] if isinstance(held, tuple | list) else held).shape]
    axes = tuple(plain(s) if i in spatial and i != axis else kind.axes[i]
                 for i, s in enumerate(shape))
    found: Any
    if axis is None or axis not in spatial:
        found = settled(kind).with_axes(axes)
    elif pool.divisor is not None and len(pool.size) > 1:
        raise Refused("divides by a number of its own while it pools time and features")
    else:
        read = _early(kind, pool.sweep(axis))
        if arguments(node)["ceil_mode"] and not isinstance(read, Stepped):
            raise Refused("pools a part of a window at its end (ceil_mode)", "ceil_mode=False")
        found = moved(read.with_axes(axes), pool.sweep(axis), axis, shape[axis], facts)
    if not isinstance(held, tuple | list):
        one: Kind = found
        return one
    refuse_places(node)
    return found, Still(())


def refuse_places(node: fx.Node) -> None:
    """Raise where something reads at which position a maximum was."""
    if any(user.args[1] != 0 and user.users for user in node.users):
        raise Refused("says at which position of time a value was", "the values alone")


def _early(kind: Any, sweep: Sweep) -> Any:
    """What is pooled, with padding made real unless it is the pool's own."""
    own = isinstance(kind, Stepped) and kind.fill == sweep.fill and not waits(kind, sweep)[0]
    return kind if own else settled(kind)


def _asked(node: fx.Node, arg: fx.Node, asked: str, facts: Facts) -> str:
    """Over a window computed anew, the last place reads more than the last token."""
    kind = facts.kind(node)
    kind = kind[0] if isinstance(kind, tuple) else kind
    return ALL if isinstance(kind, Windowed) and facts.kind(arg).time_axis is not None else asked


def _emit_slides(node: fx.Node, build: StepBuilder) -> Any:
    arg, pool = node.args[0], pool_of(node)
    kind, axis = build.kind(arg), build.kind(arg).time_axis
    several = isinstance(build.kind(node), tuple)
    result = build.kind(node)[0] if several else build.kind(node)
    if axis is None or axis < pool.first:
        made = emit(node, build)
        return (build.item(made, 0),) if several else made
    if isinstance(result, Windowed):
        whole = build.facts.lift(settled(kind))
        made = build.call(node.target, build.read(arg, whole, whole.window), *node.args[1:],
                          **node.kwargs)
        made = build.item(made, 0) if several else made
        made = build.newest(made, axis, result.window, build.extent(node))
    else:
        made = _over_features(node, _of_neighbours(arg, pool, axis, build), pool, axis, build)
    return (made,) if several else made


def _of_neighbours(arg: fx.Node, pool: Pool, axis: int, build: StepBuilder) -> fx.Node:
    """The step node of what is pooled over time alone."""
    sweep, kind = pool.sweep(axis), build.kind(arg)
    read = _early(kind, sweep)
    if sweep.apart > 1:
        token = build.call(aten.amax.default, window(arg, sweep, build), [1])
    else:
        made = build.made(arg) if read is kind else build.step(arg)
        # Without padding a window is full when it is read, and its mean is that of all it holds.
        full = pool.kind == "sum" and not (pool.divisor or sweep.left or read.lead)
        token = pooled(build.token_of(made, read), read, "mean" if full else pool.kind,
                       sweep.taps, build)
        if pool.kind == "sum" and not full:
            token = build.call(aten.div.Tensor, token, pool.divisor or sweep.taps)
    return build.restored(token, kind.axes)


def pooled(token: fx.Node, kind: Stepped, how: str, size: int, build: StepBuilder) -> fx.Node:
    """The last tokens (M, *plain) of a stream as one: their sum, mean, maximum or minimum."""
    if size == 1:
        return token
    dtype, shape = value_of(token).dtype, kind.plain
    states = [build.state(name, (count, *shape), dtype)
              for name, count in (("pooled", size), ("ends", size), ("begin", 2))]
    return build.call(stream_pool.overload, token, *states, build.rows, build.clock, size, how,
                      kind.rate, kind.delay)


def _over_features(node: fx.Node, made: fx.Node, pool: Pool, axis: int,
                   build: StepBuilder) -> fx.Node:
    """The same pooling over the other axes, where there are any."""
    def others(values: tuple[int, ...], alone: int) -> list[int]:
        return [alone if i == axis - pool.first else v for i, v in enumerate(values)]

    if len(pool.size) == 1:
        return made
    size, stride = others(pool.size, 1), others(pool.stride, 1)
    rest = [size, stride, others(pool.padding, 0)]
    ceil = arguments(node)["ceil_mode"]
    if node.target in AVERAGES:
        return build.call(node.target, made, *rest, ceil, pool.kind == "sum")
    plain_pool = {2: aten.max_pool2d.default, 3: aten.max_pool3d.default}[len(pool.size)]
    return build.call(plain_pool, made, *rest, others(pool.apart, 1), ceil)


# Pooling of everything: the operator, and how the tokens become one.
WHOLE = {aten.mean.dim: "mean", aten.sum.dim_IntList: "sum", aten.amax.default: "max",
         aten.amin.default: "min", aten.max.dim: "max", aten.min.dim: "min",
         aten.adaptive_avg_pool1d.default: "mean", aten.adaptive_max_pool1d.default: "max",
         aten.adaptive_avg_pool2d.default: "mean", aten.adaptive_max_pool2d.default: "max",
         aten._adaptive_avg_pool2d.default: "mean"}
OVER_FEATURES = {"mean": aten.mean.dim, "sum": aten.sum.dim_IntList, "max": aten.amax.default,
                 "min": aten.amin.default}


def dims_of(node: fx.Node) -> tuple[list[int], bool]:
    """The axes that an operator pools, and whether they are kept with size 1.

    Raises:
        Refused: it makes more than one place of an axis.
    """
    given, rank = arguments(node), value_of(node.args[0]).ndim
    if "output_size" in given:
        sizes = list(given["output_size"])
        dims = [rank - len(sizes) + i for i in range(len(sizes))]
        shape = value_of(node.args[0]).shape
        whole = [d for d, size in zip(dims, sizes, strict=True) if size == 1]
        if any(size not in (1, None) and (not isinstance(shape[d], int) or size != shape[d])
               for d, size in zip(dims, sizes, strict=True)):
            raise Refused("pools into several places", "an output size of 1")
        return whole, True
    dims = given["dim"]
    dims = [dims] if isinstance(dims, int) else list(dims or range(rank))
    return [d % rank for d in dims], given["keepdim"]


def _pools_all(node: fx.Node, facts: Facts) -> Kinds | None:
    kind: Any = facts.kind(node.args[0])
    if isinstance(kind, Still) or kind.time_axis is None:
        return None
    dims, keep = dims_of(node)
    if kind.time_axis not in dims:
        return None
    if not isinstance(kind, Stepped | Windowed):
        raise Refused("pools positions")
    axis = time_axis(kind.axes, "pools")
    for dim in dims:
        if any(a.role == BATCH for a in kind.axes[dim]):
            raise Refused("pools rows of the batch")
    if given_dtype(node) not in (None, value_of(node.args[0]).dtype):
        raise Refused("pools time in another dtype", "x.to(dtype) before it")
    axes = tuple(() if i in dims else a for i, a in enumerate(kind.axes) if keep or i not in dims)
    several = isinstance(value_of(node), tuple | list)
    found = _whole(node, kind, axes, facts)
    if several:
        refuse_places(node)
    assert axis is not None
    return (found, Still(())) if several else found


def given_dtype(node: fx.Node) -> torch.dtype | None:
    """The dtype that an operator is asked to compute in."""
    found: torch.dtype | None = arguments(node).get("dtype")
    return found


def _whole(node: fx.Node, kind: Any, axes: Any, facts: Facts) -> Kind:
    """The kind of all tokens as one, under the semantics at hand."""
    if kind.final:
        raise Refused("pools other tokens of a value that is known at the newest alone")
    if isinstance(kind, Windowed):
        refuse_partial(facts)
        facts.windows.append((owner(node), facts.window))
        return Stepped(axes, reach=facts.window, first=facts.first(kind), final=True)
    if not counts_every_step(kind, facts):
        raise Refused("pools positions that a sequence has only at its end, behind a layer that "
                      "looks ahead", "padding in front of the first token alone", by_window=True)
    kind = settled(kind)
    facts.windows.append((owner(node), facts.window))
    if facts.window is None:
        return dataclasses.replace(kind, axes=axes, reach=None, final=True)
    facts.truncates |= facts.semantics == "banded"
    count = facts.window
    if facts.semantics == "window":
        count = facts.positions(facts.kind(node.args[0]).length)
        facts.lift(kind)
    reach = None if kind.reach is None else kind.reach + (count - 1) * kind.rate
    first = max(kind.first, kind.delay)
    if facts.semantics == "window" and not facts.continual.partial_window:
        first = max(first, facts.window - 1)
    return dataclasses.replace(kind, axes=axes, reach=reach, first=first, final=True)


def _emit_whole(node: fx.Node, build: StepBuilder) -> Any:
    arg, how = node.args[0], WHOLE[node.target]
    several = isinstance(build.kind(node), tuple)
    result = build.kind(node)[0] if several else build.kind(node)
    kind, (dims, keep) = build.kind(arg), dims_of(node)
    if isinstance(kind, Windowed):
        made = build.call(OVER_FEATURES[how], build.made(arg), dims, keep)
        return (made,) if several else made
    token, read = build.token(arg), settled(kind)
    others = [d for d in dims if d != kind.time_axis]
    size = build.facts.window
    if size is not None and build.facts.semantics == "window":
        size = build.facts.positions(kind.length)
    token = running(token, read, how, build) if size is None else pooled(
        token, read, how, size, build)
    made = build.restored(token, read.axes)
    if others:
        made = build.call(OVER_FEATURES[how], made, others, True)
    made = build.call(aten.reshape.default, made, build.sizes(result.axes))
    return (made,) if several else made


def running(token: fx.Node, kind: Stepped, how: str, build: StepBuilder) -> fx.Node:
    """All tokens (M, *plain) of a stream as one."""
    dtype = value_of(token).dtype
    wide = torch.float64 if dtype == torch.float32 and how in ("sum", "mean") else dtype
    total = build.state("total", (2, *kind.plain), wide)
    return build.call(stream_scan.overload, token, total, build.rows, build.clock, how, kind.rate,
                      kind.delay)


def _reference(node: fx.Node, facts: Facts, args: tuple[Any, ...],
               kwargs: Mapping[str, Any]) -> Any:
    """The operator on the last tokens alone, where a window bounds it."""
    x, axis = args[0], facts.kind(node.args[0]).time_axis
    dims, _ = dims_of(node)
    if facts.semantics == "banded" and facts.window is not None and axis in dims:
        x = x.narrow(axis, max(0, x.shape[axis] - facts.window), min(x.shape[axis], facts.window))
    return node.target(x, *args[1:], **kwargs)


def _asked_all(node: fx.Node, arg: fx.Node, asked: str, facts: Facts) -> str:
    return ALL


slides = Rule((*AVERAGES, *MAXIMA), _slides, _emit_slides, _asked)
whole = Rule(tuple(WHOLE), _pools_all, _emit_whole, _asked_all, _reference)
