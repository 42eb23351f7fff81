"""Maximum of the rows of a bag of a float table, sixteen columns of many at a time, in registers.

The first row of a bag stands until a number is greater, so that a nan stays where it is first and
is passed over elsewhere, and of 0.0 and -0.0 the first is taken: as in torch. Arguments as in
`schedules.bags`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from bincompile.runtime.schedules import signed_rows
from bincompile.runtime.schedules.bags import Bags, each_row, module
from bincompile.runtime.schedules.common import LANE, ceil_div, span

TILE = 16  # vectors of columns that are compared together


def build(columns: int, indices: str, offsets: str, last: bool) -> Any:
    """The IRModule; arguments as in `bags.module`."""
    return module(columns, 0, indices, offsets, last, False, text(columns),
                  functools.partial(_reduce, columns=columns))


def text(columns: int) -> str:
    """LLVM text of what this file calls; lanes behind the end of a row are 0."""
    mask = ", ".join(f"i1 {int(lane < columns % LANE)}" for lane in range(LANE))
    return f"""{signed_rows.text(columns)}
define <16 x float> @bincompile_most(<16 x float> %before, <16 x float> %value) alwaysinline {{
  %more = fcmp ogt <16 x float> %value, %before
  %r = select <16 x i1> %more, <16 x float> %value, <16 x float> %before
  ret <16 x float> %r
}}
declare <16 x float> @llvm.masked.load.v16f32.p0(ptr, i32, <16 x i1>, <16 x float>)
define <16 x float> @bincompile_load_rest(ptr %p) alwaysinline {{
  %v = call <16 x float> @llvm.masked.load.v16f32.p0(
      ptr %p, i32 4, <16 x i1> <{mask}>, <16 x float> zeroinitializer)
  ret <16 x float> %v
}}
"""


def _reduce(T: Any, given: Bags, bag: Any, begin: Any, end: Any, columns: int) -> None:
    vectors = ceil_div(columns, LANE)
    size = ceil_div(vectors, ceil_div(vectors, TILE))
    whole = columns // (size * LANE)
    if whole:
        with T.serial(0, whole) as tile:
            _tile(T, given, bag, begin, end, [tile * size + place for place in range(size)])
    if columns % (size * LANE):
        _tile(T, given, bag, begin, end, range(whole * size, vectors))


def _tile(T: Any, given: Bags, bag: Any, begin: Any, end: Any, vectors: Sequence[Any]) -> None:
    most = [T.alloc_buffer((LANE,), "float32") for _ in vectors]  # one each: kept in registers
    kept, whole = T.alloc_buffer((1,), "int64"), [span(T, 0)]
    T.buffer_store(kept, T.int64(0), [0])
    for buffer in most:
        T.buffer_store(buffer, T.broadcast(T.float32(0), LANE), whole)

    def ask(row: Any) -> None:
        for vector in vectors:
            T.evaluate(T.call_extern("int32", "bincompile_prefetch",
                                     T.address_of(given.table[0, 0]),
                                     (row * int(given.table.shape[1]) + vector * LANE) * 4))

    def compare(at: Any, index: Any) -> None:
        values = [_load(T, given.table, index, vector) for vector in vectors]
        with T.If(kept[0] == 0):
            with T.Then():
                for buffer, value in zip(most, values, strict=True):
                    T.buffer_store(buffer, value, whole)
            with T.Else():
                for buffer, value in zip(most, values, strict=True):
                    T.buffer_store(buffer, T.call_extern("float32x16", "bincompile_most",
                                                         buffer[whole[0]], value), whole)
        T.buffer_store(kept, T.int64(1), [0])

    each_row(T, given, begin, end, ask, compare)
    for buffer, vector in zip(most, vectors, strict=True):
        signed_rows.store(T, given.out, bag, vector, buffer[whole[0]])


def _load(T: Any, table: Any, row: Any, vector: Any) -> Any:
    if not isinstance(vector, int) or (vector + 1) * LANE <= int(table.shape[1]):
        return table[row, span(T, vector * LANE)]
    return T.call_extern("float32x16", "bincompile_load_rest",
                         T.address_of(table[row, vector * LANE]))
