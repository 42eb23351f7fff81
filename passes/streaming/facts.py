"""Facts: what is known of every value of a model while its kinds are worked out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from bincompile.config import Continual
from bincompile.passes.graph import activations, is_sequence, is_tensor, value_of
from bincompile.passes.streaming.inputs import Inputs, inputs_of
from bincompile.passes.streaming.kinds import (
    BATCH,
    TIME,
    Axes,
    Axis,
    Indexed,
    Kind,
    Kinds,
    Pairwise,
    Refused,
    Stepped,
    Still,
    Windowed,
    expression,
    is_table,
    plain,
)
from bincompile.program import Program


class Facts:
    """What rules may ask.

    Args:
        program: the model over whole sequences.
        continual: what was asked for.
        semantics: "banded" or "window": what is being tried.
        lifted: whether a join of tokens with absolute positions is computed for the whole window
            anew, under window semantics; else it is `placed`.

    Attributes:
        window: tokens that each attention sees; None: all.
        module: the graph with its stored tensors.
        inputs: which inputs are streams, and the sizes that are time and batch.
        kinds: what was found so far.
        notes: what a reader of the report should know; rules may append.
        windows: (module path, tokens or None) of each attention and pooling; rules append.
        truncates: whether a window is narrower than what the model itself sees; rules set it.
    """

    def __init__(self, program: Program, continual: Continual, semantics: str,
                 lifted: bool = False) -> None:
        self.program, self.continual, self.semantics = program, continual, semantics
        self.lifted, self.window = lifted, continual.window
        self.module = program.graph_module
        self.inputs: Inputs = inputs_of(program, continual)
        self.kinds: dict[fx.Node, Kinds] = {}
        self.notes: list[str] = []
        self.windows: list[tuple[str, int | None]] = []
        self.truncates = False
        self._active = activations(program.graph)

    def __contains__(self, node: fx.Node) -> bool:
        """Whether a node depends on the values of an input."""
        return node in self._active

    def kind(self, arg: Any) -> Any:
        """The kind of an argument; a tuple of kinds where the node has several results."""
        if not isinstance(arg, fx.Node):
            return Still(())
        if arg not in self.kinds:
            self.kinds[arg] = self._free(arg)
        return self.kinds[arg]

    def _free(self, node: fx.Node) -> Kinds:
        """The kind of a node that no input's values take part in."""
        if node.op == "get_attr":
            return Still(tuple(plain(s) for s in value_of(node).shape))
        if not is_tensor(node) and not is_sequence(node):
            return Still(())
        if node in self._active:
            raise RuntimeError(f"{node.name} is asked for before it was looked at")
        from bincompile.passes.streaming.free import free_kind

        return free_kind(node, self)

    def axes(self, arg: Any) -> Axes:
        """The axes of an argument."""
        return self.kind(arg).axes

    def size(self, size: Any) -> Any:
        """A size as an int or an expression in the sizes of time and batch.

        Other open sizes are those of the example; two symbols of time are the same one.
        """
        found = expression(value_of(size))
        return expression(found.xreplace(dict(self.inputs.same))) if isinstance(
            found, sympy.Expr) else found

    def hint(self, size: Any) -> int:
        """A size at the example."""
        found = self.size(size)
        return int(found.xreplace(dict(self.inputs.hints))) if isinstance(
            found, sympy.Expr) else found

    def depends_on_time(self, size: Any) -> bool:
        """Whether a size moves with the number of tokens."""
        found, time = self.size(size), self.inputs.length
        return isinstance(found, sympy.Expr) and time in found.free_symbols

    def shape(self, node: Any) -> tuple[Any, ...]:
        """Sizes of a tensor node in the model."""
        return tuple(map(self.size, value_of(node).shape))

    def tokens(self, node: fx.Node) -> Sequence[fx.Node]:
        """The arguments of a node that depend on time or index."""
        return [n for n in node.all_input_nodes if isinstance(value_of(n), torch.Tensor)
                and not isinstance(self.kind(n), Still)]

    def joined(self, args: Iterable[Any]) -> Any:
        """The kind of a pointwise operator on these arguments, which broadcast to each other.

        Raises:
            Refused: they can't be joined position by position.
        """
        nodes = [a for a in args if isinstance(a, fx.Node) and isinstance(
            value_of(a), torch.Tensor)]
        for arg in args:
            self.refuse_time(arg)
        kinds = [settled(self.kind(n)) for n in nodes]
        return self.join(kinds)

    def refuse_time(self, arg: Any) -> None:
        """Raise where a number that is computed with depends on how many tokens there are."""
        if isinstance(value_of(arg), torch.SymInt | torch.SymFloat) \
                and self.depends_on_number(arg):
            raise Refused("computes with the number of tokens, which grows with every step",
                          "a factor that does not depend on the length of the sequence")

    def depends_on_number(self, arg: Any) -> bool:
        """Whether a number in the graph depends on the number of tokens or of rows."""
        value = value_of(arg)
        return bool(value.node.expr.free_symbols) if isinstance(
            value, torch.SymInt | torch.SymFloat) else False

    def lift(self, kind: Any) -> Windowed:
        """The kind of a value that is wanted for all tokens in the window.

        Raises:
            Refused: it is known at the newest token only, or lags behind.
        """
        if isinstance(kind, Windowed):
            return kind
        if self.window is None:
            raise Refused("needs all tokens of a window, and none was given", "Continual(window=)")
        if kind.final:
            raise Refused("asks for other tokens of a value that is known at the newest alone")
        if kind.rate != 1 or kind.delay:
            raise Refused(f"is wanted over a window, and comes every {kind.rate} steps with a "
                          f"delay of {kind.delay}")
        return Windowed(kind.axes, self.positions(kind.length))

    def positions(self, length: Any) -> int:
        """How many positions an axis of time has in a window.

        Raises:
            Refused: the capture fixed the number of tokens, and the window is another.
        """
        found, window = self.size(length), self.window
        assert window is not None
        if isinstance(found, sympy.Expr):
            return int(found.xreplace({self.inputs.length: sympy.Integer(window)}).doit())
        if window != self.inputs.length:
            raise Refused(f"is captured with {self.inputs.length} tokens, and the window is of "
                          f"{window}", "dynamic_shapes='auto', or an example of the window's size")
        return found

    def check_full(self, indexed: bool) -> None:
        """Raise where positions are counted in windows that are not full."""
        if indexed and self.continual.partial_window:
            raise Refused("counts positions in a window that is not full",
                          "Continual(partial_window=False)")

    def first(self, kind: Windowed) -> int:
        """The first step whose window is full enough to be answered."""
        return 0 if self.continual.partial_window else (self.window or 1) - 1

    def join(self, kinds: Sequence[Any]) -> Any:
        """The kind of a value that is computed from values of these kinds, axis by axis."""
        axes = _broadcast([k.axes for k in kinds])
        whole = Kind(axes)
        if any(isinstance(k, Pairwise) for k in kinds) or len(list(whole.axes_of(TIME))) > 1:
            raise Refused("joins every token with every other outside attention")
        return _joined(kinds, axes, self)


def settled(kind: Any) -> Any:
    """A kind whose padding in front of time is made real."""
    if not isinstance(kind, Stepped) or not kind.lead:
        return kind
    delay = kind.delay - kind.lead * kind.rate
    late = -(delay // kind.rate) * kind.rate if delay < 0 else 0
    reach = None if kind.reach is None else kind.reach + late
    return dataclasses.replace(kind, delay=delay + late, reach=reach, lead=0, fill=0.0)


def _broadcast(shapes: Sequence[Axes]) -> Axes:
    rank = max((len(axes) for axes in shapes), default=0)
    padded = [((),) * (rank - len(axes)) + axes for axes in shapes]
    return tuple(_one_axis([axes[i] for axes in padded]) for i in range(rank))


def _one_axis(found: Sequence[Axis]) -> Axis:
    """The axis that these broadcast to: the one that knows of time or batch, else the first."""
    full = [axis for axis in found if axis]
    marked = [axis for axis in full if any(a.role in (TIME, BATCH) for a in axis)]
    roles = {tuple(a.role for a in axis if a.role in (TIME, BATCH)) for axis in marked}
    if len(roles) > 1:
        raise Refused("joins an axis of time with one that is not")
    if marked and len(full) > len(marked) and len(marked[0]) > 1:
        raise Refused("joins an axis that holds time or the batch among others with a stored one")
    return (marked or full or [()])[0]


def _joined(kinds: Sequence[Any], axes: Axes, facts: Facts) -> Any:
    tables = any(is_table(k, axes) for k in kinds)
    stepped = [k for k in kinds if isinstance(k, Stepped)]
    windowed = [k for k in kinds if isinstance(k, Windowed)]
    indexed = tables or any(isinstance(k, Indexed) for k in kinds)
    prepared = any(isinstance(k, Still) and k.prepared for k in kinds)
    if not stepped and not windowed:
        if indexed and prepared:
            raise Refused("joins positions with an input that does not change with time")
        return Indexed(axes) if indexed else Still(axes, prepared)
    together = _stepped(stepped, axes) if stepped else None
    if facts.semantics == "window" and indexed and together is not None and not windowed:
        if not facts.lifted:
            return dataclasses.replace(together, placed=True)
        facts.check_full(indexed)
        return facts.lift(together)
    if not windowed:
        return together
    facts.check_full(indexed)
    if together is not None:
        facts.lift(together)
    final = any(k.final for k in stepped) or any(k.final for k in windowed)
    return Windowed(axes, windowed[0].window, final)


def _stepped(kinds: Sequence[Stepped], axes: Axes) -> Stepped:
    """Values of one rate, each delayed to the last of them."""
    if len({k.rate for k in kinds}) > 1:
        rates = " and ".join(sorted({f"every {k.rate} steps" for k in kinds}))
        raise Refused(f"joins values of different rates: {rates}")
    delay = max(k.delay for k in kinds)
    reach: int | None = 0
    for kind in kinds:
        reach = None if reach is None or kind.reach is None else max(
            reach, kind.reach + delay - kind.delay)
    return Stepped(axes, kinds[0].rate, delay, reach, max(k.first + delay - k.delay for k in kinds),
                   any(k.final for k in kinds), any(k.placed for k in kinds))
