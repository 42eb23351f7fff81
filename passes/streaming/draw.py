"""Random tokens of a stream, and values for the inputs that do not change with time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from bincompile.ops import operator_of
from bincompile.passes.graph import aten, value_of
from bincompile.passes.sizes import concrete, symbols
from bincompile.passes.streaming.kinds import expression
from bincompile.program import Program
from bincompile.steps import StepProgram, TimeInput

# Where an operator takes indices from, and the table whose size along an axis bounds them.
INDEXED = {aten.embedding.default: (1, 0, 0), aten.index_select.default: (2, 0, None),
           aten.gather.default: (2, 0, None)}
FEWEST = 2  # ids of an input that no table bounds
KEPT = 0.8  # share of tokens that a bool input keeps
LOUD = 3.0  # factor of every other row's tokens: scores of another scale


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Inputs of so many rows over so many tokens.

    Args:
        tokens: for each `TimeInput` (rows, length, *token).
        statics: for each position in `StepProgram.statics` the whole input.
        owners: (rows,) which row of the statics each row has.
    """

    tokens: tuple[torch.Tensor, ...]
    statics: tuple[Any, ...]
    owners: torch.Tensor

    @property
    def length(self) -> int:
        """Tokens of each row."""
        return self.tokens[0].shape[1]

    def until(self, end: int) -> Sequences:
        """The first tokens alone."""
        return dataclasses.replace(self, tokens=tuple(t[:, :end] for t in self.tokens))

    def positive(self) -> Sequences:
        """The same with float tokens above 0, for models that take a logarithm or a root."""
        return dataclasses.replace(self, tokens=tuple(
            t.abs() + 0.1 if t.is_floating_point() else t for t in self.tokens))

    def windows(self, rows: torch.Tensor, ends: torch.Tensor, window: int) -> Sequences:
        """For each pair of a row and a step the last tokens up to that step, as a row."""
        places = ends[:, None] + torch.arange(1 - window, 1)
        return Sequences(tuple(t[rows[:, None], places] for t in self.tokens), self.statics,
                         self.owners[rows])


def draw(steps: StepProgram, program: Program, rows: int, length: int, seed: int) -> Sequences:
    """Sequences within the ranges that the program's tables allow; the same ones for a seed."""
    generator = torch.Generator().manual_seed(seed)
    nodes = program.graph.find_nodes(op="placeholder")
    tokens = tuple(_tokens(taken, nodes[taken.position], rows, length, generator)
                   for taken in steps.inputs)
    statics = tuple(_static(program, nodes, position, steps.inputs, rows, generator)
                    for position in steps.statics)
    return Sequences(tokens, statics, torch.arange(rows))


def _tokens(taken: TimeInput, node: fx.Node, rows: int, length: int,
            generator: torch.Generator) -> torch.Tensor:
    made = _values((rows, length, *taken.token), taken.dtype, node, generator)
    if made.is_floating_point():
        made[1::2] *= LOUD
    return made


def _static(program: Program, nodes: Sequence[fx.Node], position: int,
            inputs: Sequence[TimeInput], rows: int, generator: torch.Generator) -> Any:
    spec, node = program.signature.inputs[position], nodes[position]
    if spec.dtype is None:
        return spec.constant
    numbers = dict(symbols([node]))
    batch = batch_size(nodes, inputs)
    if isinstance(batch, torch.SymInt):
        numbers[batch.node.expr] = rows
    shape = [concrete(size, numbers) for size in value_of(node).shape]
    return _values(shape, spec.dtype, node, generator)


def batch_size(nodes: Sequence[fx.Node], inputs: Sequence[TimeInput]) -> Any:
    """The size of the batch axis: an int, a symbol, or None where there is none."""
    first = inputs[0]
    if not first.batched:
        return None
    sizes = list(value_of(nodes[first.position]).shape)
    del sizes[first.time_axis]
    fixed = expression(sizes[0])
    return fixed if isinstance(fixed, int) else sizes[0]  # a size that torch fixed is a SymInt


def _values(shape: Sequence[int], dtype: torch.dtype, node: fx.Node,
            generator: torch.Generator) -> torch.Tensor:
    if dtype is torch.bool:
        return torch.rand(shape, generator=generator) < KEPT
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, ids_below(node), tuple(shape), generator=generator).to(dtype)


def ids_below(node: fx.Node) -> int:
    """The least size of the tables that an integer input is an index into."""
    bounds = list(_bounds(node, set()))
    return min(bounds, default=FEWEST)


def _bounds(node: fx.Node, seen: set[fx.Node]) -> Iterator[int]:
    for user in node.users:
        if user in seen or user.op != "call_function":
            continue
        seen.add(user)
        bound = _bound(user, node)
        if bound is not None:
            yield bound
        made = value_of(user)
        if isinstance(made, torch.Tensor) and not made.is_floating_point() \
                and made.dtype is not torch.bool:
            yield from _bounds(user, seen)


def _bound(user: fx.Node, indices: fx.Node) -> int | None:
    """The size of the table that this call looks its indices up in; None if it does not."""
    operator = operator_of(user.target)
    if operator is not None:
        given = operator.bind(user.args, dict(user.kwargs))
        table = given.get("table", given.get("weight"))
        looked_up = given.get("indices") is indices and isinstance(table, fx.Node)
        return _size(table, 0) if looked_up else None
    if user.target is aten.index.Tensor and indices in user.args[1]:
        return _size(user.args[0], list(user.args[1]).index(indices))
    if user.target not in INDEXED:
        return None
    place, table, axis = INDEXED[user.target]
    if len(user.args) <= place or user.args[place] is not indices:
        return None
    return _size(user.args[table], user.args[1] if axis is None else axis)


def _size(table: fx.Node, axis: int) -> int | None:
    size = value_of(table).shape[axis]
    return int(size) if isinstance(size, int) else None


def finite_share(values: Sequence[Any]) -> float:
    """The share of elements that are neither nan nor infinite."""
    floats = [v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]
    total = sum(v.numel() for v in floats)
    return math.fsum(float(v.isfinite().sum()) for v in floats) / total if total else 1.0
