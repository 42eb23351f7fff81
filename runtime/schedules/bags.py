"""Bags of rows: where each begins and ends, and the loops that every kernel of bags shares.

Arguments: indices (n) int32 or int64, [offsets (m), the beginnings of bags, where bags are not all
of one length], table (rows, bases * ceil(columns/8)) uint8 and row_scale (rows, bases), or table
(rows, columns) float32, [weights (n)], padding int64 (an index that takes no part; -1 for none),
out (bags, columns).
The functions return 0, or 1 if an index is not in the table or the offsets don't fit; what is not
in the table is not looked up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from bincompile.runtime.schedules import signed_rows
from bincompile.runtime.schedules.common import ceil_div, return_flag

AHEAD = 16  # rows between the one that is read and the one that memory is asked for
MODES = {"serial": "serial", "bags": "parallel"}


class Bags(NamedTuple):
    """The arguments of a kernel of bags; what it does without is None."""

    count: Any
    bags: Any
    rows: Any
    indices: Any
    offsets: Any
    table: Any
    scale: Any
    weights: Any
    padding: Any
    out: Any
    bad: Any


def module(columns: int, bases: int, indices: str, offsets: str, last: bool, weighted: bool,
           text: str, reduce: Callable[[Any, Bags, Any, Any, Any], None]) -> Any:
    """The IRModule, with one function for each of `MODES`.

    Args:
        bases: how many the table has; 0 for a table of floats.
        indices: their dtype.
        offsets: their dtype; empty where all bags have one length.
        last: whether the last offset only ends the bag before it.
        text: LLVM text of what `reduce` calls.
        reduce: emits one bag, given its number, its first index and the one behind its last.
    """
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import ir as I
    from tvm.tirx.script import builder as T

    with IRBuilder() as builder, I.ir_module():
        for mode in MODES:
            with T.prim_func():
                given = _arguments(T, mode, columns, bases, indices, offsets, last, weighted)
                with T.attr(0, "pragma_import_llvm", text):
                    _loops(T, mode, given, last, reduce)
    return builder.get()


def _arguments(T: Any, mode: str, columns: int, bases: int, indices: str, offsets: str,
               last: bool, weighted: bool) -> Bags:
    T.func_name(mode)
    T.func_attr({"global_symbol": mode, "tirx.noalias": True})
    count, bags, rows = T.int64(), T.int64(), T.int64()

    def argument(name: str, shape: tuple[Any, ...], dtype: str, align: int = 4) -> Any:
        return T.match_buffer(T.arg(name, T.handle()), shape, dtype, align=align)

    return Bags(
        count, bags, rows,
        argument("indices", (count,), indices),
        argument("offsets", (bags + int(last),), offsets) if offsets else None,
        argument("table", (rows, bases * ceil_div(columns, 8)), "uint8", 1) if bases else
        argument("table", (rows, columns), "float32"),
        argument("row_scale", (rows, bases), "float32") if bases else None,
        argument("weights", (count,), "float32") if weighted else None,
        T.arg("padding", T.int64()),
        argument("out", (bags, columns), "float32"),
        T.alloc_buffer((1,), "int32"))


def _loops(T: Any, mode: str, given: Bags, last: bool,
           reduce: Callable[[Any, Bags, Any, Any, Any], None]) -> None:
    T.buffer_store(given.bad, T.int32(0), [0])
    with getattr(T, MODES[mode])(0, given.bags) as bag:
        ends = T.alloc_buffer((2,), "int64")  # else they are spelled out at each use
        for at, bound in enumerate(_bounds(T, given, bag, last)):
            T.buffer_store(ends, bound, [at])
        begin, end = ends[0], ends[1]
        fits = T.And(T.And(begin >= 0, begin <= end), end <= given.count)
        with T.If(T.And(fits, T.Or(bag > 0, begin == 0))):
            with T.Then():
                reduce(T, given, bag, begin, end)
            with T.Else():
                T.buffer_store(given.bad, T.int32(1), [0])
    return_flag(T, given.bad)


def _bounds(T: Any, given: Bags, bag: Any, last: bool) -> tuple[Any, Any]:
    if given.offsets is None:
        length = T.floordiv(given.count, given.bags)
        return bag * length, (bag + 1) * length
    begin = T.cast(given.offsets[bag], "int64")
    if last:
        return begin, T.cast(given.offsets[bag + 1], "int64")
    following = T.cast(given.offsets[T.min(bag + 1, given.bags - 1)], "int64")
    return begin, T.Select(bag + 1 < given.bags, following, given.count)


def each_row(T: Any, given: Bags, begin: Any, end: Any, ask: Callable[[Any], None],
             step: Callable[[Any, Any], None]) -> None:
    """Do `step` for the place and the index of every row of a bag that takes part.

    Args:
        ask: asks memory for a row that is read later.
    """
    with T.serial(begin, end) as at:
        index = T.cast(given.indices[at], "int64")
        ask(later(T, given, at))
        with T.If(T.And(index >= 0, index < given.rows)):
            with T.Then(), T.If(index != given.padding), T.Then():
                step(at, index)
            with T.Else():
                T.buffer_store(given.bad, T.int32(1), [0])


def later(T: Any, given: Bags, at: Any) -> Any:
    """The index of the row that is read some places after the one at `at`."""
    return T.cast(given.indices[T.min(at + AHEAD, given.count - 1)], "int64")


def ask_packed(T: Any, given: Bags, condition: Any) -> Callable[[Any], None]:
    """Asks for a whole row of a packed table where the condition holds."""
    def ask(row: Any) -> None:
        with T.If(condition), T.Then():
            signed_rows.prefetch(T, given.table, given.scale, row)

    return ask
