"""Rows of bits as rows of numbers: what look-ups, bags and fused rows share.

A packed table is (rows, bases * ceil(columns/8)) uint8, bit 1 where positive; its scales are
(rows, bases) float32. Sixteen bits choose, lane by lane, between a scale and its negative, and the
bases of a row are added in their order, so that numbers are those of the reference bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bincompile.runtime.schedules.common import LANE, ceil_div, span

LINE = 64  # bytes that memory delivers at a time

# A prefetch of an address outside the table does nothing, so an index is not tested before it.
TEXT = """
define i16 @bincompile_word(ptr %bytes) alwaysinline {
  %word = load i16, ptr %bytes, align 1
  ret i16 %word
}
define i16 @bincompile_byte(ptr %bytes) alwaysinline {
  %byte = load i8, ptr %bytes, align 1
  %word = zext i8 %byte to i16
  ret i16 %word
}
define <16 x float> @bincompile_chosen(i16 %word, float %one, float %zero) alwaysinline {
  %bits = bitcast i16 %word to <16 x i1>
  %p = insertelement <16 x float> poison, float %one, i32 0
  %ones = shufflevector <16 x float> %p, <16 x float> poison, <16 x i32> zeroinitializer
  %n = insertelement <16 x float> poison, float %zero, i32 0
  %zeros = shufflevector <16 x float> %n, <16 x float> poison, <16 x i32> zeroinitializer
  %r = select <16 x i1> %bits, <16 x float> %ones, <16 x float> %zeros
  ret <16 x float> %r
}
define <16 x float> @bincompile_signed(i16 %word, float %scale) alwaysinline {
  %minus = fneg float %scale
  %r = call <16 x float> @bincompile_chosen(i16 %word, float %scale, float %minus)
  ret <16 x float> %r
}
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
define i32 @bincompile_prefetch(ptr %base, i64 %offset) alwaysinline {
  %p = getelementptr i8, ptr %base, i64 %offset
  call void @llvm.prefetch.p0(ptr %p, i32 0, i32 3, i32 1)
  ret i32 0
}
"""


def text(columns: int) -> str:
    """LLVM text of the functions that this file calls, for rows of this many columns."""
    mask = ", ".join(f"i1 {int(lane < columns % LANE)}" for lane in range(LANE))
    return f"""{TEXT}
declare void @llvm.masked.store.v16f32.p0(<16 x float>, ptr, i32, <16 x i1>)
define i32 @bincompile_store_rest(ptr %out, <16 x float> %values) alwaysinline {{
  call void @llvm.masked.store.v16f32.p0(
      <16 x float> %values, ptr %out, i32 4, <16 x i1> <{mask}>)
  ret i32 0
}}
"""


def vector_of(T: Any, table: Any, row: Any, scales: Sequence[Any], vector: Any,
              columns: int) -> Any:
    """Sixteen numbers of one row: the sum of scale * signs over its bases."""
    total = None
    for base, scale in enumerate(scales):
        bits = word(T, table, (row, base * ceil_div(columns, 8)), vector, columns)
        value = T.call_extern("float32x16", "bincompile_signed", bits, scale)
        total = value if total is None else total + value
    return total


def word(T: Any, packed: Any, at: Sequence[Any], vector: Any, columns: int) -> Any:
    """The bits of one vector of a row whose first byte is packed[at], and no byte behind the row.

    A `vector` that is known only when the kernel runs is a whole one.
    """
    *lead, first = at
    short = isinstance(vector, int) and columns - vector * LANE <= 8
    return T.call_extern("uint16", "bincompile_byte" if short else "bincompile_word",
                         T.address_of(packed[(*lead, first + vector * 2)]))


def each_vector(T: Any, columns: int, step: Callable[[Any], None]) -> None:
    """Do `step` for every vector of a row, the last of which may be a part of one."""
    whole, rest = divmod(columns, LANE)
    if whole:
        with T.serial(0, whole) as vector:
            step(vector)
    if rest:
        step(whole)


def store(T: Any, out: Any, row: Any, vector: Any, value: Any) -> None:
    """Store sixteen numbers of one row of `out`; a `vector` as in `word`."""
    if not isinstance(vector, int) or (vector + 1) * LANE <= int(out.shape[1]):
        T.buffer_store(out, value, [row, span(T, vector * LANE)])
    else:
        T.evaluate(T.call_extern("int32", "bincompile_store_rest",
                                 T.address_of(out[row, vector * LANE]), value))


def prefetch(T: Any, table: Any, scale: Any, row: Any) -> None:
    """Ask for the bytes of a row and its scales; `row` may be any number."""
    size, bases = int(table.shape[1]), int(scale.shape[1])
    for buffer, stride, offsets in (
            (table, size, [*range(0, size - 1, LINE), size - 1]), (scale, 4 * bases, [0])):
        for offset in offsets:
            T.evaluate(T.call_extern("int32", "bincompile_prefetch",
                                     T.address_of(buffer[0, 0]), row * stride + offset))
