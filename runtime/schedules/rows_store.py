"""Where a row program finds and leaves its values: arguments, results and scratch."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from bincompile.runtime.schedules.common import LANE, PANEL, VECTORS, WORD, ceil_div, span
from bincompile.runtime.schedules.rows_body import (
    LOOK_UPS,
    REDUCTIONS,
    Input,
    Name,
    Step,
)
from bincompile.runtime.schedules.rows_plan import Plan

MAIN = ("rows", "indices")  # roles of inputs with something for every row
WIDE = ("rows", "period", "repeat")  # roles of inputs whose last axis is a row
ROWS = (*WIDE, "indices", "index_period")
INDICES = ("int32", "int64")
_UNEVEN = "the inputs have different numbers of rows"


@dataclasses.dataclass
class Arguments:
    """The buffers of a function; rows that inputs share are flat, whatever their rank.

    Args:
        rows: how many rows there are.
        step: rows of one block.
        inputs: the buffer of each input.
        periods: after how many rows an input begins again.
        repeats: for how many rows in turn a row of an input stands.
        results: the buffer of each result.
    """

    rows: Any
    step: Any
    inputs: dict[Name, Any]
    periods: dict[Name, Any]
    repeats: dict[Name, Any]
    results: dict[Name, Any]


def declare(T: Any, inputs: tuple[Input, ...], plan: Plan, widths: dict[Name, int],
            rank: int) -> Arguments:
    """The arguments of the function being built: step, inputs in order, results in order.

    Args:
        rank: how many leading axes the results have.
    """
    step = T.arg("step", T.int64())
    given = {Name(f"x{place}"): entry for place, entry in enumerate(inputs)}
    buffers, counts = {}, {}
    for name, entry in given.items():
        shape = _shape(T, entry)
        align = 64 if entry.role in ("panels", "padded") else 1 if entry.role == "bits" else 4
        buffers[name] = T.match_buffer(T.arg(name, T.handle()), shape, entry.dtype, align=align)
        if entry.role in ROWS:
            counts[name] = math.prod(shape[:len(shape) - (entry.role in WIDE)], start=T.int64(1))
    results = {}
    for place, name in enumerate(plan.results):
        shape = (*(T.int64() for _ in range(rank)), widths[name])
        results[name] = T.match_buffer(T.arg(f"out{place}", T.handle()), shape, "float32",
                                       align=4)
        counts[name] = math.prod(shape[:-1], start=T.int64(1))
    main = next(name for name, entry in given.items() if entry.role in MAIN)
    rows = T.bind(counts[main])
    found = Arguments(rows, step, buffers, {}, {}, results)
    for name, count in counts.items():
        size = T.bind(count)
        if name in given and given[name].role not in MAIN:
            some = T.bind(T.max(size, T.int64(1)))
            if given[name].role == "repeat":
                found.repeats[name] = T.bind(T.max(T.floordiv(rows, some), T.int64(1)))
            else:
                found.periods[name] = size
            with T.Assert(T.Or(rows == 0, T.And(size > 0, T.floormod(rows, some) == 0)), _UNEVEN):
                pass
        elif name != main:
            with T.Assert(size == rows, _UNEVEN):
                pass
        where = found.inputs if name in given else found.results
        where[name] = _flat(T, where[name], size)
    return found


def _flat(T: Any, buffer: Any, rows: Any) -> Any:
    """The same memory with all leading axes as one."""
    wide = buffer.dtype not in INDICES
    return T.decl_buffer((rows, buffer.shape[-1]) if wide else (rows,), buffer.dtype,
                         data=buffer.data, align=4)


def _shape(T: Any, given: Input) -> tuple[Any, ...]:
    if given.role == "panels":
        outputs, features = (int(size or 0) for size in given.shape)
        return ceil_div(outputs, PANEL), ceil_div(features, WORD), VECTORS, LANE
    if given.role == "padded":
        return (ceil_div(int(given.shape[0] or 0), PANEL) * PANEL,)
    return tuple(T.int64() if size is None else size for size in given.shape)


@dataclasses.dataclass
class Scratch:
    """What is kept between phases, for each row of a block or for one row at a time.

    Args:
        values: rows of numbers that another phase reads and that are no results.
        local: those of them that only the row's own loop reads: one row is enough.
        bits: packed signs.
        sums: sixteen partial results of each reduction inside a product's loop.
        places: the row that each look-up reads.
    """

    values: dict[Name, Any]
    local: set[Name]
    bits: dict[Name, Any]
    sums: dict[Name, Any]
    places: dict[Name, Any]


def allocate(T: Any, plan: Plan, block: int) -> Scratch:
    """The scratch of one block."""
    found = Scratch({}, set(), {}, {}, {})
    for phase in plan.phases:
        for step in phase.every:
            _allocate_step(T, plan, step, found, block, phase.linear is not None)
    return found


def _allocate_step(T: Any, plan: Plan, step: Step, found: Scratch, block: int,
                   in_product: bool) -> None:
    name = step.target
    if step.op == "pack":
        found.bits[name] = T.alloc_buffer((block, ceil_div(step.width, WORD)), "uint32")
        return
    if step.op in LOOK_UPS:
        found.places[name] = T.alloc_buffer((block,), "int64")
    if step.op in REDUCTIONS and in_product:
        found.sums[name] = T.alloc_buffer((block, LANE), "float32")
    if (plan.is_kept(name) or step.op in REDUCTIONS) and name not in plan.results:
        rows = block
        if plan.is_local(name) and not in_product:
            rows = 1
            found.local.add(name)
        width = 1 if step.width == 1 else ceil_div(step.width, LANE) * LANE
        found.values[name] = T.alloc_buffer((rows, width), "float32")


def load(T: Any, buffer: Any, row: Any, column: Any, left: int, width: int) -> Any:
    """One vector of a row; with `left` lanes of it inside the row, if `left` is less than 16."""
    if width == 1:
        return T.broadcast(buffer[row, 0], LANE)
    if left == LANE or int(buffer.shape[1]) > width:
        return buffer[row, span(T, column)]
    return T.call_extern(f"float32x{LANE}", f"bincompile_load_{left}",
                         T.address_of(buffer[row, column]))


def store(T: Any, buffer: Any, row: Any, column: Any, value: Any, left: int, width: int) -> None:
    """The opposite of `load`: what is behind the row's end is not written, except in scratch."""
    if width == 1:
        T.buffer_store(buffer, T.call_extern("float32", "bincompile_first", value), [row, 0])
    elif left == LANE or int(buffer.shape[1]) > width:
        T.buffer_store(buffer, value, [row, span(T, column)])
    else:
        T.evaluate(T.call_extern("int32", f"bincompile_store_{left}",
                                 T.address_of(buffer[row, column]), value))
