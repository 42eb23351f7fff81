"""Inputs: which of a model's inputs are streams, and which sizes are time and the batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx

from bincompile.config import Continual
from bincompile.errors import ContinualError
from bincompile.passes.graph import value_of
from bincompile.passes.sizes import concrete, symbols
from bincompile.passes.streaming.kinds import (
    BATCH,
    TIME,
    Atom,
    Axes,
    Axis,
    Kind,
    Stepped,
    Still,
    expression,
    plain,
)
from bincompile.program import Program
from bincompile.steps import TimeInput


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The inputs of a model as a stream takes them.

    Args:
        steps: those that a step takes a token of.
        statics: positions of the tensors that do not change with time.
        kinds: the kind of each placeholder.
        length: how many tokens the model is captured with: a symbol, or an int.
        batch: how many rows; None where there is no batch.
        same: symbols that stand for another: of time and batch one each; other open sizes are
            those of the example.
        hints: time and batch in the example.
    """

    steps: tuple[TimeInput, ...]
    statics: tuple[int, ...]
    kinds: Mapping[fx.Node, Kind]
    length: Any
    batch: Any
    same: Mapping[sympy.Symbol, Any]
    hints: Mapping[sympy.Symbol, int]


def inputs_of(program: Program, continual: Continual) -> Inputs:
    """Which inputs are streams.

    Raises:
        ContinualError: `time_dim` names an input or an axis that there is not, or the inputs
            differ in their number of tokens.
    """
    nodes = program.graph.find_nodes(op="placeholder", sort=False)
    tensors = {n: at for at, n in enumerate(nodes) if isinstance(value_of(n), torch.Tensor)}
    numbers = symbols(tensors)
    shapes = {n: tuple(concrete(s, numbers) for s in value_of(n).shape) for n in tensors}
    times = _times(continual.time_dim, shapes, program)
    first = next(iter(times))
    tokens = shapes[first][times[first]]
    if tokens < 2:
        raise ContinualError(f"an example of {tokens} token in {first.name}", "2 or more tokens",
                             "the example inputs")
    at = _batch_axis(first, times[first])
    batch = None if at is None else expression(value_of(first).shape[at])
    rows = None if at is None else shapes[first][at]
    same = {s: sympy.Integer(n) for s, n in numbers.items()}
    length = _main(value_of(first).shape[times[first]], same)
    batch = None if batch is None else _main(value_of(first).shape[at], same)
    for node, axis in times.items():
        _unify(value_of(node).shape[axis], length, same)
    for node in tensors:
        own = _own_batch(shapes[node], times.get(node), rows)
        if own is not None:
            _unify(value_of(node).shape[own], batch, same)
    hints = {s: n for s, n in ((length, tokens), (batch, rows or 1))
             if isinstance(s, sympy.Symbol)}
    kinds: dict[fx.Node, Kind] = {}
    steps = []
    for node in tensors:
        held = _axes(node, times.get(node), shapes[node], length, batch, rows)
        kinds[node] = Stepped(held) if node in times else Still(held, prepared=True)
        if node in times:
            steps.append(_step(node, tensors[node], kinds[node], shapes[node]))
    statics = tuple(at for node, at in tensors.items() if node not in times)
    return Inputs(tuple(steps), statics, kinds, length, batch, same, hints)


def _main(size: Any, same: dict[sympy.Symbol, Any]) -> Any:
    """The symbol of a size, which stands for itself; or the number."""
    found = expression(size)
    if isinstance(found, sympy.Symbol):
        same.pop(found, None)
        return found
    return found if isinstance(found, int) else int(found.xreplace(same))


def _unify(size: Any, main: Any, same: dict[sympy.Symbol, Any]) -> None:
    found = expression(size)
    if isinstance(found, sympy.Symbol) and found != main:
        same[found] = main


def _times(asked: Any, shapes: Mapping[fx.Node, tuple[int, ...]],
           program: Program) -> dict[fx.Node, int]:
    """The axis of time of each input that is a stream."""
    if isinstance(asked, Mapping):
        return _named(asked, shapes)
    able = [n for n, shape in shapes.items() if -len(shape) <= asked < len(shape)]
    if not able:
        raise ContinualError(f"time_dim={asked} with inputs of shapes {[*shapes.values()]}",
                             "an axis of the first input", "Continual(time_dim=)")
    tokens = shapes[able[0]][asked]
    return {n: asked % len(shapes[n]) for n in able if shapes[n][asked] == tokens}


def _named(asked: Mapping[str, int],
           shapes: Mapping[fx.Node, tuple[int, ...]]) -> dict[fx.Node, int]:
    named = {n.name: n for n in shapes}
    found = {}
    for name, axis in asked.items():
        node = named.get(name)
        if node is None:
            raise ContinualError(f"time_dim names the input {name!r}", ", ".join(named),
                                 "Continual(time_dim=)")
        rank = len(shapes[node])
        if not -rank <= axis < rank:
            raise ContinualError(f"time_dim={axis} of {name}, which has {rank} axes",
                                 f"{-rank} to {rank - 1}", "Continual(time_dim=)")
        found[node] = axis % rank
    lengths = {shapes[n][axis] for n, axis in found.items()}
    if len(lengths) > 1:
        raise ContinualError(f"streams of {sorted(lengths)} tokens", "as many tokens in each",
                             "the example inputs, or Continual(time_dim=)")
    return {n: found[n] for n in shapes if n in found}


def _batch_axis(node: fx.Node, time: int) -> int | None:
    """The first axis that is not time, unless it holds features or a batch that is always 1."""
    value = value_of(node)
    others = [axis for axis in range(value.ndim) if axis != time]
    if not others or (value.ndim == 2 and time == 0 and value.is_floating_point()):
        return None
    return None if expression(value.shape[others[0]]) == 1 else others[0]


def _axes(node: fx.Node, time: int | None, shape: tuple[int, ...], length: Any, batch: Any,
          rows: int | None) -> Axes:
    """What the axes of an input hold: the first as large as the batch, and not time, is that."""
    own = _own_batch(shape, time, rows)

    def axis_of(at: int) -> Axis:
        if at == time:
            return (Atom(TIME, length),)
        return (Atom(BATCH, batch),) if at == own else plain(shape[at])

    return tuple(map(axis_of, range(len(shape))))


def _own_batch(shape: tuple[int, ...], time: int | None, rows: int | None) -> int | None:
    """The batch axis of an input: its first that isn't time, where that is as large."""
    first = next((axis for axis in range(len(shape)) if axis != time), None)
    return first if first is not None and shape[first] == rows else None


def _step(node: fx.Node, position: int, kind: Kind, shape: tuple[int, ...]) -> TimeInput:
    time, batch = kind.time_axis, kind.batch_axis
    assert time is not None
    token = tuple(s for axis, s in enumerate(shape) if axis not in (time, batch))
    return TimeInput(node.name, position, time, batch is not None, token, value_of(node).dtype)
