"""What is computed once for each row: all that follows from inputs that do not change with time."""

from __future__ import annotations

import torch
from torch import fx

from bincompile.passes.graph import aten, value_of
from bincompile.passes.streaming import placing
from bincompile.passes.streaming.builder import ROWS, StepBuilder, counted
from bincompile.passes.streaming.facts import Facts


class PrepareBuilder(StepBuilder):
    """Writes the `prepare` program: its inputs are those of the model that are no streams."""

    preparing = True

    def place_inputs(self) -> None:
        """Place the inputs that do not change with time."""
        inputs = self.facts.inputs
        counts = counted(self.mode, "rows", ROWS) if inputs.batch is not None else \
            torch.empty(1)
        self.row_count, self.count = counts.shape[0], 1
        for node, kind in inputs.kinds.items():
            if node.name in {step.name for step in inputs.steps}:
                continue
            with self.mode:
                value = torch.empty(self.shape(kind.axes), dtype=value_of(node).dtype)
            placed = self.placeholder(node.name, value)
            self.shared["still", node] = placed
            if kind.batch_axis is not None and self.count == 1:
                self.count = self.call(aten.sym_size.int, placed, kind.batch_axis)


def prepare(facts: Facts, frontier: list[fx.Node]) -> fx.GraphModule:
    """The graph from the inputs that are no streams to (rows, *plain) of each of these nodes."""
    build = PrepareBuilder(facts, {})
    found = []
    for node in frontier:
        build.at(node)
        found.append(placing.unplaced(build, placing.still(build, node, None), facts.axes(node)))
    build.answer(found)
    return build.finished()
