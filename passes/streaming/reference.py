"""The named reference: the whole-sequence program in float64, as the semantics of a stream say.

"banded": on all tokens so far, every attention and pooling within its window. "window": on the
last tokens alone, again for each step.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from bincompile.passes.graph import value_of
from bincompile.passes.sizes import equal
from bincompile.passes.streaming.analysis import Analysis
from bincompile.passes.streaming.double import doubled, wide
from bincompile.passes.streaming.draw import Sequences, batch_size, draw
from bincompile.passes.streaming.free import position_references
from bincompile.passes.streaming.kinds import BATCH, PLAIN, TIME, Axes, expression
from bincompile.passes.streaming.retime import retimed
from bincompile.program import Program
from bincompile.steps import StepProgram, TimeInput

MOST_ELEMENTS = 2**24  # of one batch of windows through the widest value of the graph


@dataclasses.dataclass(frozen=True)
class Reference:
    """The program as a function of sequences.

    Args:
        steps: whose inputs and answers say where rows and time are.
        program: the whole-sequence program.
        function: its graph, as the semantics say.
        double: whether in float64.
        batch: rows of one call where the capture fixed them; 0 where a call has no batch axis;
            None where there may be any number.
        length: tokens of one call where the capture fixed them, else None.
        axes: for each flat output what its axes hold.
        final: which of them are the model's at the last position of a sequence only.
    """

    steps: StepProgram
    program: Program
    function: fx.GraphModule
    double: bool
    batch: int | None
    length: int | None
    axes: tuple[Axes, ...]
    final: tuple[bool, ...]

    @classmethod
    def of(cls, steps: StepProgram, program: Program, analysis: Analysis,
           double: bool = True, start: int = 0) -> Reference:
        """The reference of these steps, as the analysis says that the program's nodes run.

        Args:
            steps: what is proven.
            program: the whole-sequence program.
            analysis: of that program.
            double: whether it runs in float64, or in its own dtypes.
            start: the index of a sequence's first token, where positions begin anew.
        """
        nodes = program.graph.find_nodes(op="placeholder")
        first = steps.inputs[0]
        length = expression(value_of(nodes[first.position]).shape[first.time_axis])
        size = batch_size(nodes, steps.inputs)
        batch = 0 if size is None else size if isinstance(size, int) else None
        fixed = isinstance(length, int)
        function = doubled(program.graph_module, {
            **(retimed(analysis) if fixed else {}), **analysis.references,
            **position_references(analysis.facts, start)}, double)
        kinds = [analysis.facts.kind(n)
                 for n in analysis.facts.program.graph.output_node().args[0]]
        found = cls(steps, program, function, double, batch, None, tuple(k.axes for k in kinds),
                    tuple(getattr(k, "final", False) for k in kinds))
        return dataclasses.replace(found, length=length) \
            if fixed and not found._runs_on(length) else found

    def _runs_on(self, length: int) -> bool:
        """Whether a program that was captured with so many tokens runs on others alike."""
        short = draw(self.steps, self.program, 1, length, 0)
        long = draw(self.steps, self.program, 1, 2 * length, 0)
        short = dataclasses.replace(short, tokens=long.until(length).tokens)
        long = dataclasses.replace(long, statics=short.statics)
        try:
            whole, part = self(long), self(short)
        except (RuntimeError, IndexError, ValueError):  # a size that the graph holds
            return False
        steps = self.steps
        count = 1 + (length - 1 - steps.delay) // steps.rate
        return all(axis is None or torch.allclose(
            a[:, :count].double(), b[:, :count].double(), equal_nan=True)
            for a, b, axis in zip(whole, part, steps.answers, strict=True))

    def __call__(self, sequences: Sequences) -> list[torch.Tensor]:
        """The flat outputs, each `arranged`."""
        rows, parts = sequences.tokens[0].shape[0], list[list[torch.Tensor]]()
        size = self._rows_at_once(rows, sequences.length)
        for start in range(0, rows, size):
            chosen = torch.arange(start, start + size).clamp_max(rows - 1)
            found = self._call(sequences, chosen)
            count = min(size, rows - start)
            parts.append([arranged(value, axes, size)[:count]
                          for value, axes in zip(found, self.axes, strict=True)])
        return [torch.cat(values) for values in zip(*parts, strict=True)]

    def _rows_at_once(self, rows: int, length: int) -> int:
        if self.batch is not None:
            return max(self.batch, 1)
        widest = max((_features(n) for n in self.program.graph.nodes), default=1)
        return max(1, min(rows, MOST_ELEMENTS // max(1, widest * length)))

    def _call(self, sequences: Sequences, chosen: torch.Tensor) -> list[torch.Tensor]:
        flat: list[Any] = [spec.constant for spec in self.program.signature.inputs]
        nodes = self.program.graph.find_nodes(op="placeholder")
        for taken, tokens in zip(self.steps.inputs, sequences.tokens, strict=True):
            flat[taken.position] = placed(tokens[chosen], taken, 1)
        batch = batch_size(nodes, self.steps.inputs)
        for position, value in zip(self.steps.statics, sequences.statics, strict=True):
            flat[position] = _of_rows(value, nodes[position], batch, sequences.owners[chosen])
        with torch.no_grad():
            return [v if isinstance(v, torch.Tensor) else torch.as_tensor(v)
                    for v in self.function(*(map(wide, flat) if self.double else flat))]


def arranged(value: torch.Tensor, axes: Axes, rows: int) -> torch.Tensor:
    """A value with its rows first and, where it has time, time second; merged axes taken apart.

    A value without rows is the same for all of them.
    """
    atoms = [atom for axis in axes for atom in axis]
    sizes = [rows if a.role == BATCH else -1 if a.role == TIME else int(a.size) for a in atoms]
    order = [i for role in (BATCH, TIME, PLAIN) for i, a in enumerate(atoms) if a.role == role]
    found = value.reshape(sizes).permute(order)
    return found if any(a.role == BATCH for a in atoms) else found.expand(rows, *found.shape)


def placed(tokens: torch.Tensor, taken: TimeInput, time: int) -> torch.Tensor:
    """Tokens (rows, length, ...) as the program's input has its axes."""
    if not taken.batched:
        return tokens[0].movedim(time - 1, taken.time_axis)
    return tokens.movedim(time, taken.time_axis)


def _of_rows(value: Any, node: fx.Node, batch: Any, chosen: torch.Tensor) -> Any:
    """A static input for these rows: those of its axis that is the batch."""
    if not isinstance(value, torch.Tensor) or batch is None:
        return value
    axis = next((axis for axis, size in enumerate(value_of(node).shape) if equal(size, batch)),
                None)
    return value if axis is None else value.index_select(axis, chosen % value.shape[axis])


def _features(node: fx.Node) -> int:
    """Elements of a value for each row and token, as far as its sizes are numbers."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or node.op != "call_function":
        return 0
    total = 1
    for size in value.shape:
        total *= size if isinstance(size, int) else 1
    return total


def lengths_allowed(program: Program, taken: TimeInput) -> tuple[int, int | None]:
    """The fewest and the most tokens that one call of the program may have."""
    spec = program.signature.inputs[taken.position]
    symbol = spec.shape[taken.time_axis]
    if not isinstance(symbol, str):  # `Reference.length` says whether it has to be that many
        return 1, None
    return program.signature.ranges.get(symbol, (1, None))

