"""Products of a row program with float weights, as they are stored: sums over rows of both.

Every sum runs over 16 lanes in the order of the columns, one chain for each row and output, so that
its bits depend neither on how many rows there are nor on which of them go together.
"""

from __future__ import annotations

from typing import Any

from bincompile.runtime.schedules.common import LANE, PANEL, span
from bincompile.runtime.schedules.rows_body import Name, Step
from bincompile.runtime.schedules.rows_vector import Program, input_row

# Rows that share what is read of the weight, and how many outputs go at once: what 32 registers
# hold. One row alone is bound by memory, which few streams side by side read fastest.
TILES = {4: 4, 2: 8, 1: 8}


def products(program: Program, step: Step, panel: Any, left: int, count: Any) -> Any:
    """The sums of all rows of a block for the outputs of one panel: a buffer (rows, 64)."""
    T = program.T
    kept = T.alloc_buffer((program.block, PANEL), "float32")
    vectors, rest = divmod(left, LANE)
    for place, outputs in ((0, LANE), (vectors, rest)):
        times = vectors if outputs == LANE else 1
        if not times or not outputs:
            continue
        with T.serial(0, times) as vector:
            _vector(program, step, (panel, (place + vector) * LANE, outputs), kept, count)
    return kept


def _vector(program: Program, step: Step, place: tuple[Any, Any, int], kept: Any,
            count: Any) -> None:
    """The sums of all rows for at most 16 outputs."""
    T, done = program.T, program.T.int64(0)
    for rows in TILES:
        if rows <= program.block:
            times = T.bind(T.floordiv(count - done, rows))
            with T.serial(0, times) as tile:
                _tile(program, step, (done + tile * rows, rows), place, kept)
            done = T.bind(done + times * rows)


def _tile(program: Program, step: Step, rows: tuple[Any, int], place: tuple[Any, Any, int],
          kept: Any) -> None:
    """The sums of some rows and at most 16 outputs."""
    T, (row, many), (panel, first, outputs) = program.T, rows, place
    partial = T.alloc_buffer((many, LANE, LANE), "float32")
    groups, rest = divmod(outputs, TILES[many])
    base = panel * PANEL + first
    if groups:
        with T.serial(0, groups) as group:
            start = group * TILES[many]
            _sums(program, step, rows, (base, start, TILES[many]), partial)
    if rest:
        _sums(program, step, rows, (base, groups * TILES[many], rest), partial)
    zero = T.broadcast(T.float32(0), LANE)
    for one in range(many):
        lanes = [partial[one, o, span(T, 0)] if o < outputs else zero for o in range(LANE)]
        T.buffer_store(kept, T.call_extern(f"float32x{LANE}", "bincompile_sums", *lanes),
                       [row + one, span(T, first)])


def _sums(program: Program, step: Step, rows: tuple[Any, int], outputs: tuple[Any, Any, int],
          partial: Any) -> None:
    """Sixteen partial sums for each of some rows and outputs."""
    T, (row, many), (base, start, width) = program.T, rows, outputs
    weight, features = program.arguments.inputs[step.args[1]], step.args[2]
    sums = T.alloc_buffer((many * width * LANE,), "float32")
    sources = [_row(program, step.args[0], row + one) for one in range(many)]
    places = [(one, o, span(T, (one * width + o) * LANE))
              for one in range(many) for o in range(width)]
    for _, _, at in places:
        T.buffer_store(sums, T.broadcast(T.float32(0), LANE), [at])

    def add(column: Any, left: int) -> None:
        given = [T.bind(_load(T, buffer, at, column, left)) for buffer, at in sources]
        weights = [T.bind(_load(T, weight, base + start + o, column, left)) for o in range(width)]
        for one, o, at in places:
            T.buffer_store(sums, sums[at] + given[one] * weights[o], [at])

    whole, left = divmod(features, LANE)
    if whole:
        with T.serial(0, whole) as k:
            add(k * LANE, LANE)
    if left:
        add(whole * LANE, left)
    for one, o, at in places:
        T.buffer_store(partial, sums[at], [one, start + o, span(T, 0)])


def _row(program: Program, name: Name, row: Any) -> tuple[Any, Any]:
    """Where a row of a value is: the buffer, and its place there."""
    if name in program.arguments.inputs:
        return program.arguments.inputs[name], program.T.bind(input_row(program, name, row))
    if name in program.arguments.results:
        return program.arguments.results[name], program.first + row
    return program.scratch.values[name], row


def _load(T: Any, buffer: Any, row: Any, column: Any, left: int) -> Any:
    """One vector of a row; nothing behind its last column, where other numbers may stand."""
    if left == LANE:
        return buffer[row, span(T, column)]
    return T.call_extern(f"float32x{LANE}", f"bincompile_load_{left}",
                         T.address_of(buffer[row, column]))
