"""The loops of a row program: over rows and columns, and over the outputs of a product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bincompile.runtime.schedules import vector_math
from bincompile.runtime.schedules.common import LANE, PANEL, VECTORS, ceil_div, span
from bincompile.runtime.schedules.rows_body import REDUCTIONS, Name, Step
from bincompile.runtime.schedules.rows_emit import number
from bincompile.runtime.schedules.rows_plan import Phase
from bincompile.runtime.schedules.rows_product import products
from bincompile.runtime.schedules.rows_vector import START, Program, Vector, run

MINUS_TWO = -2.0
# Numbers of a weight that are worth a second thread: half a megabyte, some microseconds.
WORTH_THREADS = 1 << 17


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


def row_phases(program: Program, phases: list[Phase], row: Any) -> None:
    """All steps of some phases for one row."""
    T = program.T
    for phase in (phase for phase in phases if phase.steps):
        sums = {step.target: T.alloc_buffer((1, LANE), "float32")
                for step in phase.steps if step.op in REDUCTIONS}
        _start(program, phase, sums, 0)

        def vectors(places: list[Any], left: int, phase: Phase = phase,
                    sums: dict[Name, Any] = sums) -> None:
            run([Vector(program, row, 0, column, left, sums) for column in places], phase.steps)

        columns(T, phase.width, _together(phase), vectors)
        _end(program, phase, sums, row, 0)


def _start(program: Program, phase: Phase, sums: dict[Name, Any], place: Any) -> None:
    """Clear the partial results of a row's reductions; `place` is where they are in `sums`."""
    T = program.T
    for step in phase.steps:
        if step.op in REDUCTIONS:
            T.buffer_store(sums[step.target], number(T, START.get(step.op, 0)),
                           [place, span(T, 0)])


def _end(program: Program, phase: Phase, sums: dict[Name, Any], row: Any, place: Any) -> None:
    """Finish a row, as far as steps of the phase need that."""
    for step in phase.steps:
        if _has_end(step):
            _finish(program, step, sums, row, place)


def _has_end(step: Step) -> bool:
    return step.op in REDUCTIONS or (step.op == "pack" and ceil_div(step.width, LANE) % 2 == 1)


def _finish(program: Program, step: Step, sums: dict[Name, Any], row: Any, place: Any) -> None:
    """What is left to do at the end of a row: a reduction's total, the last half of a word."""
    T, name = program.T, step.target
    if step.op == "pack":
        T.evaluate(T.call_extern(
            "int32", "bincompile_pack", T.address_of(program.scratch.bits[name][row, 0]),
            T.int64(ceil_div(step.width, LANE)), number(T, 0)))
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
        at = 0 if name in program.scratch.local else row
        T.buffer_store(program.scratch.values[name], total, [at, 0])


def linear_phase(program: Program, phase: Phase, count: Any) -> None:
    """The product of a block with a weight, and the steps on what it gives."""
    T, sums = program.T, program.scratch.sums
    if any(step.op in REDUCTIONS for step in phase.steps):
        with T.serial(0, count) as row:
            _start(program, phase, sums, row)
    whole, left = divmod(phase.width, PANEL)
    assert phase.linear is not None
    panel = _panel if phase.linear.op == "product" else _panel_of_signs
    if whole:
        with getattr(T, program.panels if _splits(phase) else "serial")(0, whole) as place:
            panel(program, phase, place, PANEL, count)
    if left:
        panel(program, phase, whole, left, count)
    if any(map(_has_end, phase.steps)):
        with T.serial(0, count) as row:
            _end(program, phase, sums, row, row)


def _splits(phase: Phase) -> bool:
    """Whether threads may share the panels of a product: it is large, and adds nothing up."""
    assert phase.linear is not None
    work = phase.width * phase.linear.args[-1]
    return phase.linear.op == "product" and work >= WORTH_THREADS and not any(
        step.op in REDUCTIONS for step in phase.steps)


def _panel(program: Program, phase: Phase, panel: Any, left: int, count: Any) -> None:
    """One panel of outputs with a float weight; `left` of its 64 columns are there."""
    T, step = program.T, phase.linear
    assert step is not None
    sums = products(program, step, panel, left, count)
    with T.serial(0, count) as row:
        def value(vector: Vector, column: Any) -> Any:
            return _spread(T, sums[row, span(T, column)], step)

        _follow(program, phase, (panel, left), row, value)


def _panel_of_signs(program: Program, phase: Phase, panel: Any, left: int, count: Any) -> None:
    """The same with a packed weight and the block's bits."""
    T, step = program.T, phase.linear
    assert step is not None
    bits, _, weight, _, _, features = step.args
    with T.serial(0, count) as row:
        differ = _products(T, row, program.scratch.bits[bits], program.arguments.inputs[weight],
                           panel, _half(features))

        def value(vector: Vector, column: Any) -> Any:
            return _scaled(vector, differ[span(T, column)], step)

        _follow(program, phase, (panel, left), row, value)


def _follow(program: Program, phase: Phase, place: tuple[Any, int], row: Any,
            value: Callable[[Vector, Any], Any]) -> None:
    """The steps on one row of a panel; `value` gives what the product gave at some columns."""
    (panel, left), step = place, phase.linear
    assert step is not None

    def vectors(places: list[Any], left: int) -> None:
        side = [Vector(program, row, row, panel * PANEL + column, left, program.scratch.sums)
                for column in places]
        for vector, column in zip(side, places, strict=True):
            vector.give(step, value(vector, column))
        run(side, phase.steps)

    columns(program.T, left, _together(phase), vectors)


def _spread(T: Any, value: Any, step: Step) -> Any:
    """A product as other steps read it: a row of one number is that number in all lanes."""
    if step.width > 1:
        return value
    return T.call_extern(f"float32x{LANE}", "bincompile_splat", value)


def _half(features: int) -> int:
    """Half of the features, rounded up."""
    return (features + 1) // 2


def _products(T: Any, row: Any, bits: Any, weight: Any, panel: Any, less: int) -> Any:
    """How many bits differ, less a number, for one row and the outputs of one panel.

    What a loop reads is in memory: the sums are copied there, to stay in registers before.
    """
    sums, kept = T.alloc_buffer((PANEL,), "int32"), T.alloc_buffer((PANEL,), "int32")
    for v in range(VECTORS):
        T.buffer_store(sums, T.broadcast(T.int32(-less), LANE), [span(T, v * LANE)])
    with T.serial(0, int(weight.shape[1])) as k:
        word = T.bind(T.broadcast(bits[row, k], LANE))
        for v in range(VECTORS):
            differ = T.popcount(word ^ weight[panel, k, v, span(T, 0)])
            T.buffer_store(sums, sums[span(T, v * LANE)] + T.cast(differ, f"int32x{LANE}"),
                           [span(T, v * LANE)])
    for v in range(VECTORS):
        T.buffer_store(kept, sums[span(T, v * LANE)], [span(T, v * LANE)])
    return kept


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
    return _spread(T, value, step)
