"""Sum, mean or maximum of the rows of a bag: sixteen columns of one row at a time, in registers.

Rows are added in their order, columns are independent, so that the numbers are the same for any
number of threads and on every instruction set. Arguments as in `schedules.bags`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from bincompile.runtime.schedules import signed_rows
from bincompile.runtime.schedules.bags import Bags, ask_packed, each_row, module
from bincompile.runtime.schedules.common import LANE, ceil_div, span

TILE = 16  # vectors of columns that are added up together


def build(columns: int, bases: int, indices: str, offsets: str, last: bool, weighted: bool,
          mode: str) -> Any:
    """The IRModule; `mode` is "sum", "mean" or "max", the rest as in `bags.module`."""
    return module(columns, bases, indices, offsets, last, weighted, signed_rows.text(columns),
                  functools.partial(_reduce, mode=mode, columns=columns))


def _reduce(T: Any, given: Bags, bag: Any, begin: Any, end: Any, mode: str, columns: int) -> None:
    vectors = ceil_div(columns, LANE)
    size = ceil_div(vectors, ceil_div(vectors, TILE))
    whole = columns // (size * LANE)
    emit = functools.partial(_tile, T, given, bag, begin, end, mode)
    if whole:
        with T.serial(0, whole) as tile:
            emit([tile * size + place for place in range(size)], tile == 0)
    if columns % (size * LANE):
        emit(range(whole * size, vectors), T.bool(not whole))


def _tile(T: Any, given: Bags, bag: Any, begin: Any, end: Any, mode: str,
          vectors: Sequence[Any], first: Any) -> None:
    columns, bases = int(given.out.shape[1]), int(given.scale.shape[1])
    totals = [T.alloc_buffer((LANE,), "float32") for _ in vectors]  # one each: kept in registers
    kept, whole = T.alloc_buffer((1,), "int64"), [span(T, 0)]
    T.buffer_store(kept, T.int64(0), [0])
    for total in totals:
        T.buffer_store(total, T.broadcast(T.float32("-inf" if mode == "max" else 0), LANE), whole)

    def add(at: Any, index: Any) -> None:
        scales = [given.scale[index, base] for base in range(bases)]
        if given.weights is not None:
            scales = [scale * given.weights[at] for scale in scales]
        T.buffer_store(kept, kept[0] + 1, [0])
        for total, vector in zip(totals, vectors, strict=True):
            value = signed_rows.vector_of(T, given.table, index, scales, vector, columns)
            before = total[whole[0]]
            T.buffer_store(total, T.max(before, value) if mode == "max" else before + value, whole)

    each_row(T, given, begin, end, ask_packed(T, given, first), add)
    for buffer, vector in zip(totals, vectors, strict=True):
        total = buffer[whole[0]]
        if mode == "mean":
            total = total / T.broadcast(T.cast(T.max(kept[0], T.int64(1)), "float32"), LANE)
        elif mode == "max":
            total = T.Select(kept[0] > 0, total, T.broadcast(T.float32(0), LANE))
        signed_rows.store(T, given.out, bag, vector, total)
