"""The loops of a row program: over rows and columns, and over the outputs of a product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bincompile.runtime.schedules.common import LANE, PANEL, VECTORS, ceil_div, span
from bincompile.runtime.schedules.rows_body import REDUCTIONS, Name, Step
from bincompile.runtime.schedules.rows_emit import number
from bincompile.runtime.schedules.rows_plan import Phase
from bincompile.runtime.schedules.rows_vector import START, Program, Vector


def tiles(T: Any, count: Any, tile: int, emit: Callable[[Any, int], None]) -> None:
    """`emit(row, height)` for tiles of `tile` rows, then for what is left one by one."""
    whole = T.floordiv(count, tile)
    with T.serial(0, whole) as step:
        emit(step * tile, tile)
    if tile > 1:
        with T.serial(0, count - whole * tile) as step:
            emit(whole * tile + step, 1)


def columns(T: Any, width: int, emit: Callable[[Any, int], None]) -> None:
    """`emit(column, left)` for the vectors of a row; the last may have fewer than 16 lanes."""
    whole, left = divmod(width, LANE)
    if whole:
        with T.serial(0, whole) as vector:
            emit(vector * LANE, LANE)
    if left:
        emit(whole * LANE, left)


def row_phases(program: Program, phases: list[Phase], row: Any, height: int) -> None:
    """All steps of some phases for the rows of one tile."""
    T = program.T
    for phase in (phase for phase in phases if phase.steps):
        sums = {step.target: T.alloc_buffer((height, LANE), "float32", scope="local")
                for step in phase.steps if step.op in REDUCTIONS}
        _start(program, phase, sums, height)

        def vectors(column: Any, left: int, phase: Phase = phase,
                    sums: dict[Name, Any] = sums) -> None:
            shared: dict[Name, Any] = {}
            for place in range(height):
                Vector(program, row + place, place, column, left, sums, shared).run(phase.steps)

        columns(T, phase.width, vectors)
        for place in range(height):
            for step in phase.steps:
                _finish(program, step, sums, row + place, place)


def _start(program: Program, phase: Phase, sums: dict[Name, Any], height: int) -> None:
    T = program.T
    for step in phase.steps:
        for place in range(height if step.target in sums else 0):
            T.buffer_store(sums[step.target], number(T, START.get(step.op, 0)),
                           [place, span(T, 0)])


def _finish(program: Program, step: Step, sums: dict[Name, Any], row: Any, place: int) -> None:
    """What is left to do at the end of a row: a reduction's total, the last half of a word."""
    T, name = program.T, step.target
    if step.op == "pack" and ceil_div(step.width, LANE) % 2:
        T.evaluate(T.call_extern(
            "int32", "bincompile_pack", T.address_of(program.scratch.bits[name][row, 0]),
            T.int64(ceil_div(step.width, LANE)), number(T, 0)))
    if name not in sums:
        return
    fold = {"amax": "fold_maximum", "amin": "fold_minimum"}.get(step.op, "sum")
    total = T.call_extern("float32", f"bincompile_{fold}", sums[name][place, span(T, 0)])
    if step.op in ("mean", "row_scale"):
        total = total / T.float32(program.widths[step.reads[0]])
    if name in program.arguments.results:
        T.buffer_store(program.arguments.results[name], total, [program.first + row, 0])
    else:
        at = place if name in program.scratch.local else row
        T.buffer_store(program.scratch.values[name], total, [at, 0])


def linear_phase(program: Program, phase: Phase, count: Any, tile: int) -> None:
    """The product of a block's bits with a packed weight, and the steps on what it gives."""
    T = program.T
    reduced = [step for step in phase.steps if step.op in REDUCTIONS]
    sums = program.scratch.sums
    if reduced:
        with T.serial(0, count) as row:
            for step in reduced:
                T.buffer_store(sums[step.target], number(T, START.get(step.op, 0)),
                               [row, span(T, 0)])
    whole, left = divmod(phase.width, PANEL)

    def panel(place: Any, left: int) -> None:
        tiles(T, count, tile, lambda row, height: _panel(program, phase, place, row, height, left))

    if whole:
        with T.serial(0, whole) as place:
            panel(place, PANEL)
    if left:
        panel(whole, left)
    packed = [step for step in phase.steps
              if step.op == "pack" and ceil_div(step.width, LANE) % 2]
    if reduced or packed:
        with T.serial(0, count) as row:
            for step in reduced + packed:
                _finish(program, step, {name: _Row(kept, row) for name, kept in sums.items()},
                        row, 0)


class _Row:
    """A buffer of partial results, seen from one row."""

    def __init__(self, buffer: Any, row: Any) -> None:
        self.buffer, self.row = buffer, row

    def __getitem__(self, at: tuple[Any, Any]) -> Any:
        return self.buffer[self.row, at[1]]


def _panel(program: Program, phase: Phase, panel: Any, row: Any, height: int, left: int) -> None:
    """One panel of outputs for the rows of a tile; `left` of its 64 columns are there."""
    T, step = program.T, phase.linear
    assert step is not None
    bits, _, weight = step.args[:3]
    differ = _products(T, program.scratch.bits[bits], row, height,
                       program.arguments.inputs[weight], panel)
    reduced = [s.target for s in phase.steps if s.op in REDUCTIONS]
    sums = {name: T.alloc_buffer((height, LANE), "float32", scope="local") for name in reduced}
    for name in reduced:
        for place in range(height):
            T.buffer_store(sums[name], program.scratch.sums[name][row + place, span(T, 0)],
                           [place, span(T, 0)])
    for v in range(ceil_div(left, LANE)):
        shared: dict[Name, Any] = {}
        for place in range(height):
            vector = Vector(program, row + place, place, panel * PANEL + v * LANE,
                            min(LANE, left - v * LANE), sums, shared)
            value = _scaled(vector, differ[place, span(T, v * LANE)], step)
            vector.give(step, value)
            vector.run(phase.steps)
    for name in reduced:
        for place in range(height):
            T.buffer_store(program.scratch.sums[name], sums[name][place, span(T, 0)],
                           [row + place, span(T, 0)])


def _products(T: Any, bits: Any, row: Any, height: int, weight: Any, panel: Any) -> Any:
    """How many bits differ, for the rows of a tile and the outputs of one panel."""
    sums = T.alloc_buffer((height, PANEL), "int32", scope="local")
    for place in range(height):
        for v in range(VECTORS):
            T.buffer_store(sums, T.broadcast(T.int32(0), LANE), [place, span(T, v * LANE)])
    with T.serial(0, int(weight.shape[1])) as k:
        words = [T.bind(weight[panel, k, v, span(T, 0)]) for v in range(VECTORS)]
        for place in range(height):
            word = T.bind(T.broadcast(bits[row + place, k], LANE))
            for v in range(VECTORS):
                at = [place, span(T, v * LANE)]
                differ = T.cast(T.popcount(word ^ words[v]), f"int32x{LANE}")
                T.buffer_store(sums, sums[tuple(at)] + differ, at)
    return sums


def _scaled(vector: Vector, differ: Any, step: Step) -> Any:
    """((features - 2 * differ) * row scale) * weight scale + bias, each step rounded."""
    T = vector.program.T
    _, scale, _, weight_scale, bias, features = step.args
    agree = number(T, features) - T.cast(differ, f"float32x{LANE}") * number(T, 2)
    value = agree * vector.read(scale) * vector.read(weight_scale)
    if bias is not None:
        rounded = T.call_extern(f"float32x{LANE}", "bincompile_rounded", value)
        value = rounded + vector.read(bias)
    if step.width == 1:
        value = T.call_extern(f"float32x{LANE}", "bincompile_splat", value)
    return value
