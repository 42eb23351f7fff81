"""The loops of a row program: over rows and columns, and over the outputs of a product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bincompile.runtime.schedules import vector_math
from bincompile.runtime.schedules.common import LANE, PANEL, VECTORS, ceil_div, span
from bincompile.runtime.schedules.rows_body import REDUCTIONS, Name, Step
from bincompile.runtime.schedules.rows_emit import number
from bincompile.runtime.schedules.rows_plan import Phase
from bincompile.runtime.schedules.rows_vector import START, Program, Vector, run

MINUS_TWO = -2.0


def tiles(T: Any, count: Any, tile: int, emit: Callable[[Any, Any], None]) -> None:
    """`emit(row, height)` for tiles of `tile` rows; the last may have fewer."""
    with T.serial(0, ceil_div(count, tile)) as step:
        emit(step * tile, T.bind(T.min(T.int64(tile), count - step * tile)))


def columns(T: Any, width: int, together: int, emit: Callable[[list[Any], int], None]) -> None:
    """`emit(columns, left)` for the vectors of a row, `together` at a time where there are so many.

    The last vector may have fewer than 16 lanes: `left`.
    """
    start = 0
    for count in sorted({together, 1}, reverse=True):
        chunk, first = count * LANE, start
        whole = (width - start) // chunk
        if whole:
            with T.serial(0, whole) as place:
                emit([first + place * chunk + v * LANE for v in range(count)], LANE)
        start += whole * chunk
    if start < width:
        emit([start], width - start)


def _together(phase: Phase) -> int:
    """How many vectors go side by side: elementary functions are long chains of operations."""
    return VECTORS if any(step.op in vector_math.FUNCTIONS for step in phase.steps) else 1


def row_phases(program: Program, phases: list[Phase], row: Any, height: Any, tile: int) -> None:
    """All steps of some phases for the rows of one tile."""
    T = program.T
    for phase in (phase for phase in phases if phase.steps):
        sums = {step.target: T.alloc_buffer((tile, LANE), "float32")
                for step in phase.steps if step.op in REDUCTIONS}
        _start(program, phase, sums, height)

        def vectors(places: list[Any], left: int, phase: Phase = phase,
                    sums: dict[Name, Any] = sums) -> None:
            with T.serial(0, height) as place:
                run([Vector(program, row + place, place, column, left, sums)
                     for column in places], phase.steps)

        columns(T, phase.width, _together(phase), vectors)
        _end(program, phase, sums, row, height)


def _start(program: Program, phase: Phase, sums: dict[Name, Any], height: Any) -> None:
    """Clear the partial results of a phase's reductions."""
    T, reduced = program.T, [step for step in phase.steps if step.op in REDUCTIONS]
    if reduced:
        with T.serial(0, height) as place:
            for step in reduced:
                T.buffer_store(sums[step.target], number(T, START.get(step.op, 0)),
                               [place, span(T, 0)])


def _end(program: Program, phase: Phase, sums: dict[Name, Any], row: Any, height: Any) -> None:
    """Finish the rows of a phase whose steps need that."""
    T = program.T
    ended = [step for step in phase.steps if step.op in REDUCTIONS or
             (step.op == "pack" and ceil_div(step.width, LANE) % 2)]
    if ended:
        with T.serial(0, height) as place:
            for step in ended:
                _finish(program, step, sums, row + place, place)


def _finish(program: Program, step: Step, sums: dict[Name, Any], row: Any, place: Any) -> None:
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
    if step.op == "row_scale":
        total = total * T.float32(MINUS_TWO)
    if name in program.arguments.results:
        T.buffer_store(program.arguments.results[name], total, [program.first + row, 0])
    else:
        at = place if name in program.scratch.local else row
        T.buffer_store(program.scratch.values[name], total, [at, 0])


def linear_phase(program: Program, phase: Phase, count: Any, tile: int) -> None:
    """The product of a block's bits with a packed weight, and the steps on what it gives."""
    T, sums = program.T, program.scratch.sums
    _start(program, phase, sums, count)
    whole, left = divmod(phase.width, PANEL)

    def panel(place: Any, left: int) -> None:
        tiles(T, count, tile,
              lambda row, height: _panel(program, phase, (place, left), row, height, tile))

    if whole:
        with getattr(T, program.panels)(0, whole) as place:
            panel(place, PANEL)
    if left:
        panel(whole, left)
    _end(program, phase, sums, T.int64(0), count)


def _panel(program: Program, phase: Phase, panel: tuple[Any, int], row: Any, height: Any,
           tile: int) -> None:
    """One panel of outputs for the rows of a tile; so many of its 64 columns are there."""
    T, step = program.T, phase.linear
    assert step is not None
    bits, _, weight, _, _, features = step.args
    differ = T.alloc_buffer((tile, PANEL), "int32")
    operands = (program.scratch.bits[bits], program.arguments.inputs[weight], panel[0],
                _half(features), differ)
    if tile > 1:
        with T.If(height == tile):
            with T.Then():
                _products(T, row, 0, tile, *operands)
            with T.Else(), T.serial(0, height) as place:
                _products(T, row + place, place, 1, *operands)
    else:
        _products(T, row, 0, 1, *operands)

    def vectors(places: list[Any], left: int) -> None:
        with T.serial(0, height) as place:
            side = [Vector(program, row + place, row + place, panel[0] * PANEL + column, left,
                           program.scratch.sums) for column in places]
            for vector, column in zip(side, places, strict=True):
                vector.give(step, _scaled(vector, differ[place, span(T, column)], step))
            run(side, phase.steps)

    columns(T, panel[1], _together(phase), vectors)


def _half(features: int) -> int:
    """Half of the features, rounded up."""
    return (features + 1) // 2


def _products(T: Any, row: Any, first: Any, height: int, bits: Any, weight: Any, panel: Any,
              less: int, out: Any) -> None:
    """How many bits differ, less a number, for some rows and the outputs of one panel.

    Args:
        row: the first of the rows in the block, `first` its place in `out`.
        height: how many rows; their sums stay in registers.
    """
    sums = T.alloc_buffer((height, PANEL), "int32")
    places = [(place, v * LANE) for place in range(height) for v in range(VECTORS)]
    for place, lane in places:
        T.buffer_store(sums, T.broadcast(T.int32(-less), LANE), [place, span(T, lane)])
    with T.serial(0, int(weight.shape[1])) as k:
        words = [T.bind(weight[panel, k, v, span(T, 0)]) for v in range(VECTORS)]
        for place in range(height):
            word = T.bind(T.broadcast(bits[row + place, k], LANE))
            for v in range(VECTORS):
                differ = T.cast(T.popcount(word ^ words[v]), f"int32x{LANE}")
                T.buffer_store(sums, sums[place, span(T, v * LANE)] + differ,
                               [place, span(T, v * LANE)])
    for place, lane in places:
        T.buffer_store(out, sums[place, span(T, lane)], [first + place, span(T, lane)])


def _scaled(vector: Vector, differ: Any, step: Step) -> Any:
    """((features - 2 * differ) * row scale) * weight scale + bias, each step rounded.

    `differ` is less by half the features (`_half`), which leaves one step of the first two: the
    scale of a row is kept times -2, which is exact.
    """
    T = vector.program.T
    _, scale, _, weight_scale, bias, features = step.args
    factor = vector.read(scale)
    if scale in vector.program.arguments.inputs:
        factor = factor * number(T, MINUS_TWO)
    if features % 2:
        differ, factor = differ + differ + T.broadcast(T.int32(1), LANE), factor * number(T, 0.5)
    value = T.cast(differ, f"float32x{LANE}") * factor
    value = value * vector.read(weight_scale)
    if bias is not None:
        rounded = T.call_extern(f"float32x{LANE}", "bincompile_rounded", value)
        value = rounded + vector.read(bias)
    if step.width == 1:
        value = T.call_extern(f"float32x{LANE}", "bincompile_splat", value)
    return value
