"""One vector of one row: the steps of a phase at sixteen columns."""

from __future__ import annotations

import dataclasses
from typing import Any

from bincompile.runtime.schedules import vector_math
from bincompile.runtime.schedules.common import LANE, PANEL, VECTORS, ceil_div, span
from bincompile.runtime.schedules.rows_body import REDUCTIONS, Input, Name, Step
from bincompile.runtime.schedules.rows_emit import emit, number
from bincompile.runtime.schedules.rows_plan import Plan
from bincompile.runtime.schedules.rows_store import ROWS, Arguments, Scratch, load, store

START = {"amax": float("-inf"), "amin": float("inf")}  # of a reduction; else 0
_JOIN = {"amax": "maximum", "amin": "minimum"}


@dataclasses.dataclass(frozen=True)
class Program:
    """What all phases of one function share."""

    T: Any
    plan: Plan
    inputs: tuple[Input, ...]
    widths: dict[Name, int]
    arguments: Arguments
    scratch: Scratch
    steps: dict[Name, Step]
    first: Any  # the block's first row
    bad: Any  # set where an index is not in its table
    panels: str  # how the loop over the panels of a product runs
    block: int  # the most rows of a block

    def input(self, name: Name) -> Input:
        """How an input is read."""
        return self.inputs[int(name[1:])]


@dataclasses.dataclass
class Vector:
    """Sixteen columns of a row, of which `left` are inside it.

    Args:
        row: the row's place in its block.
        place: its place among the partial results; 0 where there are those of one row.
        sums: the partial results of reductions (row, lane).
    """

    program: Program
    row: Any
    place: Any
    column: Any
    left: int
    sums: dict[Name, Any]
    values: dict[Name, Any] = dataclasses.field(default_factory=dict)

    def run(self, step: Step) -> None:
        """Do a step, and keep what other phases read."""
        if step.op == "pack":
            self._pack(step)
        elif step.op in REDUCTIONS:
            self._reduce(step)
        else:
            self.give(step, self._value(step))

    def give(self, step: Step, value: Any) -> None:
        """A step's value, bound to a name, and stored where it is read again."""
        T, program, name = self.program.T, self.program, step.target
        self.values[name] = value = T.bind(value)
        if name in program.arguments.results or name in program.scratch.values:
            store(T, *self._kept(name), value, self.left, step.width)

    def read(self, name: Name) -> Any:
        """A value or an input as a vector."""
        if name not in self.values:
            self.values[name] = self._load(name)
        return self.values[name]

    def _kept(self, name: Name) -> tuple[Any, Any, Any]:
        """Buffer, row and column of what is kept."""
        program = self.program
        if name in program.arguments.results:
            return program.arguments.results[name], program.first + self.row, self.column
        row = 0 if name in program.scratch.local else self.row
        return program.scratch.values[name], row, self.column

    def _load(self, name: Name) -> Any:
        program, T = self.program, self.program.T
        if name not in program.arguments.inputs:
            return T.bind(load(T, *self._kept(name), self.left, program.widths[name]))
        buffer, given = program.arguments.inputs[name], program.input(name)
        if given.role in ROWS:
            row = input_row(program, name, self.row)
            return T.bind(load(T, buffer, row, self.column, self.left, given.width))
        return T.bind(self._columns(buffer, given))

    def _columns(self, buffer: Any, given: Input) -> Any:
        T = self.program.T
        if given.width == 1 and given.role != "padded":
            return T.broadcast(buffer[0], LANE)
        if self.left == LANE or given.role == "padded":
            return buffer[span(T, self.column)]
        return T.call_extern(f"float32x{LANE}", f"bincompile_load_{self.left}",
                             T.address_of(buffer[self.column]))

    def _value(self, step: Step) -> Any:
        T = self.program.T
        if step.op in ("embedding", "binary_embedding"):
            value = self._row_of_table(step)
            return T.call_extern("float32x16", "bincompile_splat", value) \
                if step.width == 1 else value
        args = [self.read(arg) if isinstance(arg, Name) else arg for arg in step.args]
        return emit(T, step.op, args)

    def _inside(self, value: Any, rest: float) -> Any:
        """The vector with what is behind the row's end replaced."""
        if self.left == LANE:
            return value
        T = self.program.T
        return T.call_extern(f"float32x{LANE}", f"bincompile_keep_{self.left}", value,
                             number(T, rest))

    def _pack(self, step: Step) -> None:
        T, words = self.program.T, self.program.scratch.bits[step.target]
        value = self._inside(self.read(step.reads[0]), 0)
        half = T.cast(T.floordiv(self.column, LANE), "int64")
        T.evaluate(T.call_extern("int32", "bincompile_pack", T.address_of(words[self.row, 0]),
                                 half, value))

    def _reduce(self, step: Step) -> None:
        T, at = self.program.T, [self.place, span(self.program.T, 0)]
        value = self._inside(self.read(step.reads[0]), START.get(step.op, 0))
        kept = self.sums[step.target]
        before = kept[tuple(at)]
        if step.op in _JOIN:
            after = T.call_extern(f"float32x{LANE}", f"bincompile_{_JOIN[step.op]}", before, value)
        else:
            after = before + (T.fabs(value) if step.op == "row_scale" else value)
        T.buffer_store(kept, after, at)

    def _row_of_table(self, step: Step) -> Any:
        T, program = self.program.T, self.program
        index = program.scratch.places[step.target][self.row]
        inputs = program.arguments.inputs
        if step.op == "embedding":
            return load(T, inputs[step.args[0]], index, self.column, self.left,
                        step.width if step.width > 1 else 2)
        _, table, scale, features = step.args
        bases = program.input(scale).shape[1:] or (1,)
        value = None
        for base in range(int(bases[0] or 1)):
            byte = base * ceil_div(features, 8) + T.floordiv(self.column, 8)
            size = inputs[scale][index, base] if program.input(scale).shape[1:] \
                else inputs[scale][index]
            signed = T.call_extern(f"float32x{LANE}",
                                   f"bincompile_signs_{2 if self.left > 8 else 1}",
                                   T.address_of(inputs[table][index, byte]), size)
            value = signed if value is None else value + signed
        return value


def input_row(program: Program, name: Name, row: Any) -> Any:
    """Which row of an input belongs to a row of the block."""
    row = program.first + row
    period, repeat = (known.get(name) for known in (program.arguments.periods,
                                                    program.arguments.repeats))
    if repeat is not None:
        return program.T.floordiv(row, repeat)
    return row if period is None else program.T.floormod(row, period)


def run(vectors: list[Vector], steps: list[Step]) -> None:
    """Do the steps on vectors side by side, elementary functions on all of them as one."""
    for step in steps:
        if len(vectors) == VECTORS and step.op in vector_math.FUNCTIONS:
            T = vectors[0].program.T
            joined = T.bind(T.call_extern(f"float32x{PANEL}", "bincompile_join",
                                          *(vector.read(step.reads[0]) for vector in vectors)))
            results = T.bind(vector_math.apply(T, step.op, joined, PANEL))
            for place, vector in enumerate(vectors):
                vector.give(step, T.call_extern(f"float32x{LANE}", f"bincompile_part_{place}",
                                                results))
        else:
            for vector in vectors:
                vector.run(step)
