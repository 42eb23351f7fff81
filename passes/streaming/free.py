"""Free values in a stream: positions, tables and masks, which no input takes part in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx

from bincompile.passes.graph import aten, shape_of, value_of
from bincompile.passes.sizes import symbols
from bincompile.passes.streaming import placing
from bincompile.passes.streaming.free_graph import at_sizes, free_of
from bincompile.passes.streaming.free_writer import Counter, Free, written
from bincompile.passes.streaming.kinds import (
    BATCH,
    TIME,
    Atom,
    Axis,
    Indexed,
    Kind,
    Pairwise,
    Refused,
    Still,
    plain,
)

if TYPE_CHECKING:
    from bincompile.passes.streaming.builder import StepBuilder
    from bincompile.passes.streaming.facts import Facts

def free_kind(node: fx.Node, facts: Facts) -> Kind | tuple[Kind, ...]:
    """The kind of a value that no input's values take part in, or of each of its parts.

    Where a capture fixed the number of tokens, every such value is `Still`: what it is shows where
    it meets tokens.

    Raises:
        Refused: it depends on the number of tokens otherwise than by an index or two.
    """
    value = value_of(node)
    if isinstance(value, tuple | list):
        return tuple(Still(tuple(plain(facts.hint(s)) for s in part.shape)) for part in value)
    sizes = [facts.size(s) for s in shape_of(node)]
    time = symbols_of_time(facts)
    if not time:
        return Still(tuple(_axis(s, False, facts) for s in sizes))
    found = free_of(node, facts.module, time)
    if found.reason:
        raise Refused(f"is made from the number of tokens: {found.reason}",
                      "positions that count from the first token")
    axes = tuple(_axis(s, i in found.axes, facts) for i, s in enumerate(sizes))
    if not found.axes:
        return Still(tuple((Atom(BATCH, s),) if s == facts.inputs.batch else axis
                           for s, axis in zip(sizes, axes, strict=True)))
    return (Indexed, Pairwise)[len(found.axes) - 1](axes)


def _axis(size: Any, moves: bool, facts: Facts) -> Axis:
    if moves:
        return (Atom(TIME, size),)
    return () if size == facts.inputs.batch else plain(facts.hint(size))


def symbols_of_time(facts: Facts) -> frozenset[sympy.Symbol]:
    """The symbols that count tokens; none where a capture fixed their number."""
    length = facts.inputs.length
    if not isinstance(length, sympy.Symbol):
        return frozenset()
    return frozenset({length, *(s for s, main in facts.inputs.same.items() if main == length)})


def free_at(node: fx.Node, facts: Facts, axis: int | None = None) -> Free:
    """What a free value is, where its axis `axis` meets one of time.

    Raises:
        Refused: its entries depend on more than their index.
    """
    time = symbols_of_time(facts)
    found = free_of(node, facts.module, time, None if time else axis)
    if found.reason or len(found.axes) != 1:
        raise Refused(f"meets tokens with a value that does not depend on the index alone: "
                      f"{found.reason or 'it has no axis of time'}",
                      "positions that count from the first token")
    return found


def emit_indexed(node: fx.Node, builder: StepBuilder, rate: int, delay: int,
                 axis: int | None = None) -> fx.Node:
    """A free value at the indices of this step's tokens: M in place of time, the batch of size 1.

    Angles are computed in float64, so that they are right after any number of steps.

    Args:
        node: in the model's graph.
        builder: of the step program.
        rate: of the value that it meets.
        delay: of the same.
        axis: of the node, where a capture fixed the number of tokens: the one that is time.

    Raises:
        Refused: its entries depend on more than their index.
    """
    found = free_at(node, builder.facts, axis)
    indices = builder.index(rate, delay) if found.limit is None else \
        placing.entries(builder, found.limit, rate, delay)
    made = written(found, indices, _Once(builder), _Leaves(builder))
    return _narrow(made, value_of(node).dtype, builder)


def emit_windowed(node: fx.Node, builder: StepBuilder, window: int) -> fx.Node:
    """A free value over a window of so many tokens, the first of them of index 0; batch of 1.

    Raises:
        Refused: it can't be computed for so many tokens.
    """
    facts = builder.facts
    value = over_window(node, facts, window)
    key = ("over a window", node, window)
    if key not in builder.shared:
        wide = builder.constant(value, f"{node.name}_{window}")
        builder.shared[key] = _narrow(wide, value_of(node).dtype, builder)
    return builder.shared[key]


def over_window(node: fx.Node, facts: Facts, window: int) -> torch.Tensor:
    """A free value over so many tokens in float64, its batch of size 1.

    Raises:
        Refused: it can't be computed for so many tokens.
    """
    time = symbols_of_time(facts)
    found = free_of(node, facts.module, time)
    if not time and window != facts.inputs.length:
        raise Refused(f"was captured for {facts.inputs.length} tokens, and the window has {window}",
                      "dynamic_shapes='auto', or a window of as many tokens")
    numbers = {} if found.graph is None else {
        s: window if s in time else _else(s, facts) for s in symbols(found.graph.sources)}
    value = at_sizes(found, numbers)
    if value is None:
        raise Refused(f"can't be computed for {window} tokens: {found.reason or 'a table ends'}",
                      "a shorter window, or longer tables")
    return value


def _else(symbol: sympy.Symbol, facts: Facts) -> int:
    """The number of an open size that is not time: one row, and all else as in the example."""
    same, batch = facts.inputs.same.get(symbol, symbol), facts.inputs.batch
    return 1 if same == batch else int(same)


def _narrow(node: fx.Node, dtype: torch.dtype, builder: StepBuilder) -> fx.Node:
    """The value in the dtype that the model has it in."""
    return node if value_of(node).dtype == dtype else \
        _Once(builder).call(aten._to_copy.default, node, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class _Once:
    """Writes each call once: layers that make the same angles share them."""

    builder: StepBuilder

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """The node of a call."""
        key = ("once", target, repr((args, sorted(kwargs.items()))))
        if key not in self.builder.shared:
            self.builder.shared[key] = self.builder.call(target, *args, **kwargs)
        return self.builder.shared[key]


@dataclasses.dataclass(frozen=True)
class _Leaves:
    """Stored tensors and the number of rows in a step program."""

    builder: StepBuilder

    def leaf(self, node: fx.Node) -> fx.Node:
        """The stored tensor of a node."""
        return self.builder.stored(node.target)

    def count(self, indices: fx.Node) -> Any:
        """How many indices there are."""
        return self.builder.count


def position_references(facts: Facts,
                        start: int = 0) -> Mapping[str, Callable[..., torch.Tensor]]:
    """For positions that begin anew: what stands for the nodes that count them, by name.

    Each takes the node's own arguments in a run over a whole sequence.

    Args:
        facts: what is known of the model.
        start: the index, in the stream, of the first token of that sequence.
    """
    found: dict[str, Callable[..., torch.Tensor]] = {}
    time = symbols_of_time(facts)
    if facts.continual.positions != "recycle" or not time:
        return found
    for node in facts.module.graph.nodes:
        value = value_of(node)
        if node in facts or not isinstance(value, torch.Tensor) or node.op != "call_function" \
                or all(n not in facts for n in node.users):
            continue
        free = free_of(node, facts.module, time)
        if free.limit is not None:
            found.update({n.name: _recycled(n, counter, free.limit, start)
                          for n, counter in free.counters.items()})
    return found


def _recycled(node: fx.Node, counter: Counter, limit: int,
              begin: int) -> Callable[..., torch.Tensor]:
    """The values of a node whose count begins anew after `limit`."""
    def from_table(table: torch.Tensor, axis: int, start: Any, stop: int, *_: Any) -> torch.Tensor:
        places = torch.arange(begin, begin + stop - counter.first).remainder(limit)
        return table.index_select(axis, places + counter.first)

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = node.target(*args, **kwargs)
        index = (made - counter.first).div(counter.step, rounding_mode="floor").to(torch.int64)
        return ((index + begin).remainder(limit) * counter.step + counter.first).to(made.dtype)

    return counted if counter.table is None else from_table
