"""GRU, LSTM and plain recurrent layers: what they remember is their state, layer by layer."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

from torch import fx

from bincompile.ops.stream_gru import stream_gru
from bincompile.ops.stream_lstm import stream_lstm
from bincompile.ops.stream_rnn import stream_rnn
from bincompile.passes.graph import arguments, aten, number, value_of
from bincompile.passes.streaming import placing
from bincompile.passes.streaming.builder import StepBuilder
from bincompile.passes.streaming.facts import Facts, settled
from bincompile.passes.streaming.kinds import (
    BATCH,
    TIME,
    Kind,
    Kinds,
    Refused,
    Stepped,
    Still,
    plain,
)
from bincompile.passes.streaming.rule import Rule

LAYERS = {aten.gru.input: "gru", aten.lstm.input: "lstm", aten.rnn_tanh.input: "tanh",
          aten.rnn_relu.input: "relu"}

ZEROS = (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)


class Layer(NamedTuple):
    """The stored tensors of one layer."""

    weight_ih: fx.Node
    weight_hh: fx.Node
    bias_ih: fx.Node | None
    bias_hh: fx.Node | None
    weight_hr: fx.Node | None


def layers_of(node: fx.Node) -> list[Layer]:
    """The layers that a node calls, the first one first."""
    given = arguments(node)
    params, count = list(given["params"]), given["num_layers"]
    size = len(params) // count
    biased = 2 if given["has_biases"] else 0
    found = []
    for start in range(0, len(params), size):
        own = params[start:start + size]
        rest = own[2 + biased:]
        found.append(Layer(own[0], own[1], own[2] if biased else None, own[3] if biased else None,
                           rest[0] if rest else None))
    return found


def initial_of(node: fx.Node) -> list[fx.Node]:
    """The values that the layers begin with: hidden, and for an LSTM the cell's."""
    hx = arguments(node)["hx"]
    return list(hx) if isinstance(hx, list | tuple) else [hx]


def _kind(node: fx.Node, facts: Facts) -> Kinds | None:
    kind: Any = facts.kind(node.args[0])
    if isinstance(kind, Still):
        return None
    given = arguments(node)
    _check_axes(kind, given["batch_first"])
    if not all(isinstance(facts.kind(n), Still) for n in (*given["params"], *initial_of(node))):
        raise Refused("begins with values, or has weights, that change with time")
    if given["train"] and given["dropout"]:
        raise Refused("drops values out at random", "model.eval()")
    if kind.final:
        raise Refused("reads other tokens of a value that is known at the newest alone")
    if given["bidirectional"]:
        raise Refused("also runs from the last token to the first (bidirectional)",
                      "bidirectional=False")
    if facts.semantics == "window":
        raise Refused("begins anew in every window", "Continual(semantics='banded'), where it "
                      "goes on from the first token")
    kind = dataclasses.replace(settled(kind), reach=None)
    outputs, *held = value_of(node)
    whole = kind.with_axes((*kind.axes[:-1], plain(outputs.shape[-1])))
    batch = kind.axes[0 if given["batch_first"] else 1]
    last = tuple(dataclasses.replace(kind, final=True, axes=(
        plain(h.shape[0]), batch, plain(h.shape[-1]))) for h in held)
    return (whole, *last)


def _check_axes(kind: Any, batch_first: bool) -> None:
    time = 1 if batch_first else 0
    roles = [[atom.role for atom in axis] for axis in kind.axes]
    if roles[time] != [TIME] or any(r not in ([], [BATCH]) for r in (roles[1 - time],)) \
            or BATCH in roles[2] or TIME in roles[2]:
        raise Refused("is a recurrent layer along another axis than time, or over several rows "
                      "of each stream", "tokens of one feature axis, time along the layer's axis")


def _emit(node: fx.Node, build: StepBuilder) -> tuple[Any, ...]:
    kinds, arg = build.kind(node), node.args[0]
    kind, how = settled(build.kind(arg)), LAYERS[node.target]
    token, held = build.token(arg), list[tuple[fx.Node, ...]]()
    if len(kind.plain) != 1:
        token = build.call(aten.reshape.default, token, [build.count, math.prod(kind.plain)])
    for place, layer in enumerate(layers_of(node)):
        held.append(_layer(token, layer, place, node, how, kind, build))
        token = held[-1][0]
    whole = token if kinds[0].plain else build.call(aten.squeeze.dim, token, -1)
    results: list[Any] = [build.restored(whole, kinds[0].axes)]
    for place, last in enumerate(kinds[1:]):
        stacked = build.call(aten.stack.default, [layer[place] for layer in held], 1)
        stacked = build.call(aten.reshape.default, stacked, [build.count, *last.plain])
        results.append(build.restored(stacked, last.axes))
    return tuple(results)


def _layer(token: fx.Node, layer: Layer, place: int, node: fx.Node, how: str, kind: Stepped,
           build: StepBuilder) -> tuple[fx.Node, ...]:
    """One layer of one step: its output, and for an LSTM what its cell holds then."""
    wide, outputs = (int(s) for s in value_of(layer.weight_hh).shape)
    stored = [None if w is None else build.read(w, Kind(())) for w in layer]
    begin = [_begin(hx, place, build) for hx in initial_of(node)]
    dtype, timing = value_of(token).dtype, {"rate": kind.rate, "delay": kind.delay}
    hidden = build.state(f"hidden_{place}", (2, outputs), dtype)
    given = (build.rows, build.clock, *stored[:4])
    if how == "lstm":
        cell = build.state(f"cell_{place}", (2, wide // 4), dtype)
        both = build.call(stream_lstm.overload, token, hidden, cell, *given, stored[4],
                          *begin, **timing)
        return build.item(both, 0), build.item(both, 1)
    if how == "gru":
        return (build.call(stream_gru.overload, token, hidden, *given, begin[0], **timing),)
    return (build.call(stream_rnn.overload, token, hidden, *given, begin[0], how, **timing),)


def _begin(hx: fx.Node, place: int, build: StepBuilder) -> fx.Node | None:
    """(M, size): what a layer begins with; None for zeros."""
    if hx.target in ZEROS or number(build.facts.module, hx) == 0:
        return None
    return build.call(aten.select.int, placing.still(build, hx, build.kind(hx)), 0, place)


recurrent = Rule(tuple(LAYERS), _kind, _emit)
