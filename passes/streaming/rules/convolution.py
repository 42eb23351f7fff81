"""Convolutions over time: a window of what they reach, then the same weights on it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from bincompile.ops.stream_depthwise import stream_depthwise
from bincompile.passes.graph import arguments, aten, is_tensor, value_of
from bincompile.passes.streaming.builder import StepBuilder
from bincompile.passes.streaming.facts import Facts, settled
from bincompile.passes.streaming.kinds import (
    Kind,
    Refused,
    Stepped,
    Still,
    Windowed,
    plain,
)
from bincompile.passes.streaming.rule import Rule, everything
from bincompile.passes.streaming.rules.linear import emit
from bincompile.passes.streaming.rules.pointwise import UNARY, overloads
from bincompile.passes.streaming.sweeping import (
    Sweep,
    check_others,
    moved,
    swept,
    time_axis,
    window,
)
from bincompile.program import attribute

BY_RANK = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
PADDED = (aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)
CONVOLUTIONS = (*BY_RANK.values(), *PADDED, aten.convolution.default)
OTHERS = ("native_dropout", "frexp", "log_sigmoid_forward", "view_as_real_copy", "real", "imag",
          "angle", "conj", "resolve_conj", "zeros_like", "ones_like", "full_like")
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input,
              aten.conv_transpose3d.input)


@dataclasses.dataclass(frozen=True)
class Convolution:
    """The arguments of a convolution, one number for each of its spatial axes.

    Args:
        weight: its node.
        bias: its node, or None.
        stride, dilation: as torch takes them.
        padding: in front of each axis and behind it.
        groups: groups of channels.
        first: its first spatial axis among the axes of its input.
    """

    weight: fx.Node
    bias: fx.Node | None
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    groups: int
    first: int

    def sweep(self, axis: int) -> Sweep:
        """How it moves along an axis of its input."""
        at = axis - self.first
        taps = int(value_of(self.weight).shape[2 + at])
        return Sweep(taps, self.stride[at], self.dilation[at], *self.padding[at])


def convolution_of(node: fx.Node) -> Convolution:
    """The convolution that a node calls.

    Raises:
        Refused: it is a transposed one.
    """
    given = arguments(node)
    if given.get("transposed"):
        raise Refused("is a transposed convolution, which makes several tokens of one")
    rank = value_of(given["weight"]).ndim - 2
    stride, dilation = _each(given["stride"], rank), _each(given["dilation"], rank)
    taps = [int(t) for t in value_of(given["weight"]).shape[2:]]
    padding = given["padding"]
    if padding == "same":
        wide = [(t - 1) * d for t, d in zip(taps, dilation, strict=True)]
        both = tuple((w // 2, w - w // 2) for w in wide)
    else:
        both = tuple((p, p) for p in _each(0 if padding == "valid" else padding, rank))
    return Convolution(given["weight"], given["bias"], stride, dilation, both, given["groups"],
                       value_of(given["input"]).ndim - rank)


def _each(value: Any, rank: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * rank if len(values) == 1 else values


def _kind(node: fx.Node, facts: Facts) -> Kind | None:
    given = arguments(node)
    kind: Any = facts.kind(given["input"])
    if isinstance(kind, Still):
        return None
    if any(is_tensor(a) and not _stored(facts.kind(a)) for a in (given["weight"], given["bias"])):
        raise Refused("convolves with a weight that is not stored")
    conv = convolution_of(node)
    spatial = range(conv.first, len(kind.axes))
    axis = kind.time_axis if kind.time_axis not in spatial else time_axis(kind.axes, "convolves")
    check_others(kind.axes, (conv.first - 1,), "takes as channels")
    check_others(kind.axes, [i for i in spatial if i != axis], "convolves over")
    shape = facts.shape(node)
    axes = (*kind.axes[:conv.first - 1], *(plain(s) if i != axis else kind.axes[i]
                                           for i, s in enumerate(shape) if i >= conv.first - 1))
    if axis is None or axis not in spatial:
        found: Kind = settled(kind).with_axes(axes)
        return found
    result: Kind = moved(kind.with_axes(axes), conv.sweep(axis), axis, shape[axis], facts)
    return result


def _stored(kind: Any) -> bool:
    return isinstance(kind, Still) and not kind.prepared


def _demand(node: fx.Node, arg: fx.Node, asked: str, facts: Facts) -> str:
    """Over a window computed anew, the last place reads more than the last token."""
    conv, axis = convolution_of(node), facts.kind(arg).time_axis
    alone = axis is None or axis < conv.first or not conv.sweep(axis).reach
    return asked if alone else everything(node, arg, asked, facts)


def _emit(node: fx.Node, build: StepBuilder) -> fx.Node:
    conv, arg = convolution_of(node), arguments(node)["input"]
    kind, axis = build.kind(arg), build.kind(arg).time_axis
    if axis is None or axis < conv.first:
        return emit(node, build)
    sweep = conv.sweep(axis)
    if isinstance(build.kind(node), Windowed):
        return _over_window(node, conv, build)
    if value_of(arg).ndim - conv.first == 1:
        others = Kind(tuple(a for i, a in enumerate(kind.axes) if i not in (axis, conv.first - 1)))
        if conv.groups == 1 and not others.plain:
            return _as_linear(node, conv, sweep, build)
        if len(kind.plain) < 2 and _is_depthwise(conv) and value_of(arg).is_floating_point():
            return _by_feature(node, conv, sweep, build)
    taken = window(arg, sweep, build)
    taken = taken if sweep.taps > 1 else build.call(aten.select.int, taken, 1, 0)
    taken = build.restored(taken, kind.axes, sweep.taps)
    whole = dataclasses.replace(
        conv, stride=_set(conv.stride, axis - conv.first, 1),
        dilation=_set(conv.dilation, axis - conv.first, 1),
        padding=_set(conv.padding, axis - conv.first, (0, 0)))
    return _called(taken, whole, build)


def _is_depthwise(conv: Convolution) -> bool:
    """Whether each channel has stored weights of its own, and makes one channel."""
    shape = value_of(conv.weight).shape
    return conv.weight.op == "get_attr" and tuple(shape[:2]) == (conv.groups, 1)


def _set(values: tuple[Any, ...], at: int, value: Any) -> tuple[Any, ...]:
    return (*values[:at], value, *values[at + 1:])


def _as_linear(node: fx.Node, conv: Convolution, sweep: Sweep, build: StepBuilder) -> fx.Node:
    """One linear layer of all that is read: what row programs know."""
    arg = arguments(node)["input"]
    outputs, channels, taps = (int(s) for s in value_of(conv.weight).shape)
    read = window(arg, sweep, build, last=True)
    flat = build.call(aten.reshape.default, read, [build.count, channels * taps])
    if conv.weight.op == "get_attr":
        stored = attribute(build.facts.module, conv.weight.target).detach()
        weight = build.constant(stored.reshape(outputs, channels * taps), conv.weight.name)
    else:
        weight = build.call(aten.reshape.default, build.read(conv.weight, Kind(())),
                            [outputs, channels * taps])
    bias = build.read(conv.bias, Kind(()))
    return build.restored(build.call(aten.linear.default, flat, weight, bias),
                          build.kind(node).axes)


def _by_feature(node: fx.Node, conv: Convolution, sweep: Sweep, build: StepBuilder) -> fx.Node:
    """Each channel with weights of its own, read where the tokens are kept."""
    stored = attribute(build.facts.module, conv.weight.target).detach()
    weight = build.constant(stored[:, 0].T.contiguous(), conv.weight.name)
    made = swept(arguments(node)["input"], sweep, build, stream_depthwise.overload, weight,
                 build.read(conv.bias, Kind(())))
    return build.restored(made, build.kind(node).axes)


def _over_window(node: fx.Node, conv: Convolution, build: StepBuilder) -> fx.Node:
    """The convolution as it is on all tokens of the window."""
    arg = arguments(node)["input"]
    kind, extent = build.kind(node), build.extent(node)
    lifted = build.facts.lift(settled(build.kind(arg)))
    taken = build.read(arg, lifted, lifted.window)
    made = _called(taken, conv, build)
    return build.newest(made, kind.time_axis, kind.window, extent)


def _called(taken: fx.Node, conv: Convolution, build: StepBuilder) -> fx.Node:
    """The convolution of a step node; uneven padding is put around it before."""
    uneven = [count for pair in reversed(conv.padding) for count in (
        (0, 0) if pair[0] == pair[1] else pair)]
    if any(uneven):
        taken = build.call(aten.constant_pad_nd.default, taken, uneven)
    even = [pair[0] if pair[0] == pair[1] else 0 for pair in conv.padding]
    return build.call(BY_RANK[len(conv.stride)], taken, build.read(conv.weight, Kind(())),
                      build.read(conv.bias, Kind(())), list(conv.stride), even,
                      list(conv.dilation), conv.groups)


def _transposed(node: fx.Node, facts: Facts) -> Kind | None:
    kind = facts.kind(node.args[0])
    if isinstance(kind, Still):
        return None
    raise Refused("is a transposed convolution, which makes several tokens of one",
                  "a convolution, or the model on whole sequences")


def _keeps_padding(node: fx.Node, facts: Facts) -> Kind | None:
    """A function of every number alone leaves padding in front of time where it is."""
    tensors = [n for n in node.all_input_nodes if is_tensor(n)]
    kind: Any = facts.kind(tensors[0]) if len(tensors) == 1 else None
    if not isinstance(kind, Stepped) or not kind.lead or len(node.all_input_nodes) > 1:
        return None
    fill = torch.tensor(kind.fill, dtype=value_of(tensors[0]).dtype)
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: fill)
    found: Kind = dataclasses.replace(kind, fill=float(node.target(*args, **kwargs)))
    return found


def _on_tokens(node: fx.Node, build: StepBuilder) -> fx.Node:
    """The same call, padding in front of time left aside."""
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), build.made)
    return build.call(node.target, *args, **kwargs)


alone = Rule(overloads((*(n for n in UNARY if n not in OTHERS), "add", "sub", "mul", "div")),
             _keeps_padding, _on_tokens)
convolution = Rule(CONVOLUTIONS, _kind, _emit, _demand)
transposed = Rule(TRANSPOSED, _transposed, emit)
