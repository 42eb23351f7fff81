"""The builder of a step program: nodes, tokens, windows, delays, positions and states."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._sympy.functions import CleanDiv, FloorDiv

from bincompile.ops.stream_index import stream_index
from bincompile.ops.stream_shift import stream_shift
from bincompile.ops.stream_window import stream_window
from bincompile.passes.graph import Build, aten, finish, is_tensor
from bincompile.passes.normalise import detach_outputs
from bincompile.passes.streaming import placing
from bincompile.passes.streaming.facts import Facts, settled
from bincompile.passes.streaming.kinds import (
    BATCH,
    TIME,
    Axes,
    Axis,
    Indexed,
    Kind,
    Refused,
    Stepped,
    Windowed,
    expression,
    is_table,
)
from bincompile.passes.streaming.rule import ALL
from bincompile.program import attribute, owner
from bincompile.steps import State

ROWS, STREAMS = 1031, 2053  # stand for any number of rows, and are no size of a model
_ARITHMETIC = {sympy.Add: operator.add, sympy.Mul: operator.mul, FloorDiv: operator.floordiv,
               CleanDiv: operator.floordiv}


class StepBuilder:
    """Writes the step program.

    In what follows a *token* is `(M, *plain)`: the rows first, then the plain sizes of the value in
    order, no time. A *step node* has the axes of the model's node, with time of size 1 (of the
    window, where `extent` says so) and the batch of size M.

    Args:
        facts: what is known of the model.
        asked: which positions of each node are asked for: "last" or "all".

    Attributes:
        facts: the same.
        graph: the graph of the step program.
        rows: (M,) int64, the rows of this step's tokens.
        clock: (N,) int64, the steps that each row has taken.
        count: M, an int or a node.
        states: those made so far, in the order of their placeholders.
        limits: how many steps a row can take, by reason.
        frontier: nodes of the model that are computed once for each row.
        shared: nodes that several readers ask for, by what they are.
    """

    preparing = False  # whether it writes what is computed once for each row

    def __init__(self, facts: Facts, asked: Mapping[fx.Node, str]) -> None:
        self.facts, self.asked = facts, asked
        self.graph, self.states = fx.Graph(), list[State]()
        self.limits: list[int] = []
        self.frontier: list[fx.Node] = []
        self.constants: dict[str, torch.Tensor] = {}
        self.mode = FakeTensorMode(shape_env=ShapeEnv())
        self._made: dict[fx.Node, Any] = {}
        self.shared: dict[Any, fx.Node] = {}
        self._named: set[fx.Node] = set()
        self._node: fx.Node | None = None
        self._end = self.graph.output(())
        self.place_inputs()

    def place_inputs(self) -> None:
        """Place the tokens, the rows and the clock."""
        inputs = self.facts.inputs
        rows = counted(self.mode, "rows", ROWS) if inputs.batch is not None else \
            self.mode.from_tensor(torch.zeros(1, dtype=torch.int64), static_shapes=True)
        clock = counted(self.mode, "clock", STREAMS)
        self.row_count, self.stream_count = rows.shape[0], clock.shape[0]
        by_name = {n.name: n for n in inputs.kinds}
        for step in inputs.steps:
            node = by_name[step.name]
            with self.mode:
                value = torch.empty(self.shape(inputs.kinds[node].axes), dtype=step.dtype)
            self._made[node] = self.placeholder(step.name, value)
        self.rows = self.placeholder("rows", rows)
        self.clock = self.placeholder("clock", clock)
        self.count = 1 if inputs.batch is None else self.call(aten.sym_size.int, self.rows, 0)

    def placeholder(self, name: str, value: torch.Tensor) -> fx.Node:
        """A new input, behind those that are there."""
        placed = self.graph.find_nodes(op="placeholder")
        at = self.graph.inserting_after(placed[-1]) if placed else \
            self.graph.inserting_before(next(iter(self.graph.nodes)))
        with at:
            node = self.graph.placeholder(name)
        node.meta["val"] = value
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of an operator, with its fake value and the records of the node at hand."""
        build = Build(self.graph, self._end, self._node or self._end)
        build.mode = self.mode
        return build.call(target, *args, **kwargs)

    def item(self, made: Any, index: int) -> fx.Node:
        """One result of a node that has several, or of a tuple of nodes."""
        if isinstance(made, tuple):
            found: fx.Node = made[index]
            return found
        return self.call(operator.getitem, made, index)

    def stored(self, name: str) -> fx.Node:
        """The node of a tensor that the model stores."""
        return self._get_attr(name, attribute(self.facts.module, name).detach())

    def constant(self, tensor: torch.Tensor, name: str) -> fx.Node:
        """The node of a tensor that the step program stores beside those of the model."""
        taken = {*self.constants, *dict(self.facts.module.named_buffers())}
        unique = _unique(f"step_{name}", taken)
        self.constants[unique] = tensor
        return self._get_attr(unique, tensor)

    def _get_attr(self, name: str, tensor: torch.Tensor) -> fx.Node:
        if name not in self.shared:
            with self.graph.inserting_before(next(iter(self.graph.nodes))):
                node = self.graph.get_attr(name)
            node.meta["val"] = self.mode.from_tensor(tensor, static_shapes=True)
            self.shared[name] = node
        return self.shared[name]

    def state(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, fill: float = 0.0,
              grows: int | None = None, block: int = 1, prepared: int | None = None) -> fx.Node:
        """The placeholder (N, *shape) of a new state of the node at hand.

        Args:
            name: what it holds, e.g. "keys"; the module path is put before it.
            shape: of one row.
            dtype: its dtype.
            fill: what a new row holds.
            grows: the axis of `shape` that grows with the tokens; None where the size is fixed.
            block: how many tokens one index of that axis holds.
            prepared: which output of the `prepare` program it is.
        """
        path = owner(self._node) if self._node is not None else ""
        whole = re.sub(r"\W+", "_", f"{path}.{name}" if path else name)
        whole = f"s{whole}" if whole[0].isdigit() else whole
        taken = {n.name for n in self.graph.find_nodes(op="placeholder", sort=False)}
        with self.mode:
            value = torch.empty((self.stream_count, *shape), dtype=dtype)
        node = self.placeholder(_unique(whole, taken), value)
        self.states.append(State(node.name, tuple(shape), dtype, fill, grows, block=block,
                                 prepared=prepared, path=path))
        return node

    def answer(self, results: list[fx.Node]) -> None:
        """Say what the graph gives."""
        self._end.args = (tuple(results),)

    def finished(self) -> fx.GraphModule:
        """The module of the graph, over the tensors that the model stores."""
        stored = {n.target: self.constants[n.target] if n.target in self.constants
                  else attribute(self.facts.module, n.target)
                  for n in self.graph.nodes if n.op == "get_attr"}
        module = fx.GraphModule(stored, self.graph)
        detach_outputs(module)
        return finish(module)

    @property
    def is_fixed(self) -> bool:
        """Whether an operator that was called settled what was to be any number of rows."""
        counts: tuple[Any, ...] = (self.row_count, self.stream_count)
        return any(isinstance(s, torch.SymInt) and isinstance(expression(s), int)
                   for s in counts)

    def limit(self, steps: int) -> None:
        """Note that a row can take no more steps than this."""
        self.limits.append(steps)

    def kind(self, arg: Any) -> Any:
        """The kind of a model's node."""
        return self.facts.kind(arg)

    def extent(self, arg: Any) -> int:
        """The size of time in the step node of a value: 1, or the window."""
        kind = self.kind(arg)
        kind = kind[0] if isinstance(kind, tuple) else kind
        return kind.window if isinstance(kind, Windowed) and self.asked.get(arg) == ALL else 1

    # Sizes of axes, as values for fake tensors and as arguments of nodes

    def shape(self, axes: Axes, extent: int = 1) -> tuple[Any, ...]:
        """The sizes of a step node with these axes: ints and SymInts."""
        return tuple(self._size(axis, extent, self.row_count) for axis in axes)

    def sizes(self, axes: Axes, extent: int = 1) -> list[Any]:
        """The same as arguments: ints and nodes."""
        return [self._size(axis, extent, self.count) for axis in axes]

    def _size(self, axis: Axis, extent: int, rows: Any) -> Any:
        factor, batched = 1, False
        for atom in axis:
            batched |= atom.role == BATCH
            factor *= 1 if atom.role == BATCH else extent if atom.role == TIME else int(atom.size)
        if not batched:
            return factor
        return rows if factor == 1 else self.times(rows, factor)

    def times(self, size: Any, factor: int) -> Any:
        """A size times a number."""
        if not isinstance(size, fx.Node):
            return size * factor
        key = (size, factor)
        if key not in self.shared:
            self.shared[key] = self.call(operator.mul, size, factor)
        return self.shared[key]

    def number(self, size: Any) -> Any:
        """A size of the model that does not depend on time, in the step program."""
        found = self.facts.size(size)
        return found if isinstance(found, int) else self._written(found)

    def _written(self, found: sympy.Expr) -> Any:
        if found == self.facts.inputs.batch:
            return self.count
        if found.is_Integer:
            return int(found)
        if type(found) not in _ARITHMETIC:
            raise Refused(f"needs the size {found}, which a step does not have")
        first, *rest = (self._written(part) for part in found.args)
        for part in rest:
            nodes = isinstance(first, fx.Node) or isinstance(part, fx.Node)
            apply = _ARITHMETIC[type(found)]
            first = self.call(apply, first, part) if nodes else apply(first, part)
        return first

    # Values

    def made(self, arg: fx.Node) -> fx.Node:
        """The step node of a model's node, as it is; for `Stepped` and `Windowed` ones."""
        return self._made[arg]

    def emitted(self, node: fx.Node, made: Any) -> None:
        """Keep the step node of a model's node, or the tuple of them, under the same name."""
        self._made[node] = made
        if isinstance(made, fx.Node) and made not in self._named and made.op == "call_function":
            self._named.add(made)
            made._rename(node.name)

    def at(self, node: fx.Node) -> None:
        """Say which node of the model is at hand."""
        self._node = node

    def step(self, arg: fx.Node) -> fx.Node:
        """The step node of a value, with padding in front of time made real."""
        kind = self.kind(arg)
        if not isinstance(kind, Stepped) or not kind.lead:
            return self.made(arg)
        key = ("settled", arg)
        if key not in self.shared:
            self.shared[key] = self._settled(arg, kind)
        return self.shared[key]

    def _settled(self, arg: fx.Node, kind: Stepped) -> fx.Node:
        after = settled(kind)
        by = kind.lead + (after.delay - kind.delay) // kind.rate
        if by:
            return self._shifted(self.made(arg), kind, by, kind.fill)
        index = self.index(kind.rate, kind.delay)
        token = self.token_of(self.made(arg), kind)
        absent = self.call(aten.lt.Scalar, index, 0)
        for _ in kind.plain:
            absent = self.call(aten.unsqueeze.default, absent, -1)
        kept = self.call(aten.masked_fill.Scalar, token, absent, kind.fill)
        return self.restored(kept, kind.axes)

    def read(self, arg: Any, like: Any, extent: int = 1) -> Any:
        """An argument ready to be joined with others in a value of the kind `like`.

        Delays are made up for, a value for each index becomes one for each row, what a row had
        prepared is taken by its number, and tokens become windows where `extent` is the window's.
        """
        if not is_tensor(arg):
            return self.number(arg) if isinstance(arg, fx.Node) else arg
        kind = self.kind(arg)
        if isinstance(kind, Windowed):
            return self.made(arg) if kind.time_axis is None else self.newest(
                self.made(arg), kind.time_axis, self.extent(arg), extent)
        if isinstance(kind, Stepped):
            return self._read_stepped(arg, like, extent)
        if isinstance(kind, Indexed):
            return placing.indexed(self, arg, kind, like, extent)
        if is_table(kind, like.axes):
            return placing.table(self, arg, kind, like, extent)
        return placing.still(self, arg, like)

    def newest(self, node: fx.Node, axis: int, has: int, wanted: int) -> fx.Node:
        """The newest position of a window, where that is all that is asked for."""
        return node if has == wanted else self.call(aten.slice.Tensor, node, axis, has - 1, has)

    def _read_stepped(self, arg: fx.Node, like: Any, extent: int) -> fx.Node:
        node, kind = self.step(arg), settled(self.kind(arg))
        if isinstance(like, Stepped) and like.delay > kind.delay:
            key = ("delayed", arg, like.delay)
            if key not in self.shared:
                # Between two ticks the next index is computed: what waits is one back already.
                by = -((kind.delay - like.delay) // kind.rate)
                self.shared[key] = self._shifted(node, kind, by)
            return self.shared[key]
        if extent > 1 and kind.time_axis is not None:
            return self.restored(self.windowed(arg, extent), kind.axes, extent)
        return node

    def index(self, rate: int = 1, delay: int = 0) -> fx.Node:
        """(M,) int64: the index that this step computes, of values of a rate and delay."""
        key = ("index", rate, delay)
        if key not in self.shared:
            self.shared[key] = self.call(stream_index.overload, self.rows, self.clock, rate,
                                          delay)
        return self.shared[key]

    def token(self, arg: fx.Node) -> fx.Node:
        """The token (M, *plain) of a `Stepped` value."""
        key = ("token", arg)
        if key not in self.shared:
            self.shared[key] = self.token_of(self.step(arg), self.kind(arg))
        return self.shared[key]

    def token_of(self, node: fx.Node, kind: Kind, extent: int = 1) -> fx.Node:
        """A step node with the axes of a kind as (M, *plain), or (M, extent, *plain)."""
        return placing.unplaced(self, node, kind.axes, extent)

    def restored(self, token: fx.Node, axes: Axes, extent: int = 1) -> fx.Node:
        """A token (M, *plain), or (M, extent, *plain), with these axes."""
        return placing.placed(self, token, axes, extent)

    def windowed(self, arg: fx.Node, size: int, fill: float = 0.0, name: str = "") -> fx.Node:
        """(M, size, *plain): the last tokens of a `Stepped` value, the oldest first.

        Those before the first are `fill`.
        """
        kind = settled(self.kind(arg))
        key = ("window", arg, size, fill)
        if key not in self.shared:
            ring = self.state(name or arg.name, (size, *kind.plain), arg.meta["val"].dtype)
            self.shared[key] = self.call(
                stream_window.overload, self.token(arg), ring, self.rows, self.clock, size,
                kind.rate, kind.delay, fill)
        return self.shared[key]

    def shifted(self, arg: fx.Node, by: int, fill: float = 0.0) -> fx.Node:
        """The step node of a `Stepped` value of so many indices ago; `fill` before the first."""
        return self._shifted(self.step(arg), settled(self.kind(arg)), by, fill)

    def _shifted(self, node: fx.Node, kind: Stepped, by: int, fill: float = 0.0) -> fx.Node:
        token = self.token_of(node, kind)
        ring = self.state("delayed", (by + 1, *kind.plain), token.meta["val"].dtype)
        found = self.call(stream_shift.overload, token, ring, self.rows, self.clock, by, kind.rate,
                          kind.delay, fill)
        return self.restored(found, kind.axes)


def counted(mode: FakeTensorMode, name: str, count: int) -> torch.Tensor:
    """A fake (count,) int64 whose size is a symbol."""
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    return mode.from_tensor(torch.zeros(count, dtype=torch.int64), symbolic_context=context,
                            source=ConstantSource(name))


def _unique(name: str, taken: set[str]) -> str:
    """The name, with a number behind it where it is taken."""
    found, number = name, 1
    while found in taken:
        found, number = f"{name}_{number}", number + 1
    return found
