"""What the schedules of int8 activations share: quantised rows, and sums that are scaled.

A row's scale is its largest |x| over 127; each number is x * (127 / largest), rounded half to even.
A row whose largest |x| is below 2^-100 counts as zero; one with nan or an infinity has scale nan.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from bincompile.runtime.schedules.common import LANE, ceil_div, load_tail, span, tail_text
from bincompile.runtime.schedules.layer import Layer

LEVELS = 127
SMALLEST = 0x0D800000  # the bits of 2^-100
INFINITE = 0x7F800000  # the bits of an infinity; those of a nan are larger

# Magnitudes compare like their bits as integers, which finds nan and infinities too; in a row that
# has one the factor is 0, so what is converted is 0 or nan, and nan has no integer.
QUANTISE = """
declare <16 x float> @llvm.rint.v16f32(<16 x float>)
declare i32 @llvm.vector.reduce.smax.v16i32(<16 x i32>)
declare i32 @llvm.vector.reduce.add.v16i32(<16 x i32>)
define <16 x i32> @bincompile_size(<16 x float> %v) alwaysinline {
  %bits = bitcast <16 x float> %v to <16 x i32>
  %r = and <16 x i32> %bits, splat (i32 2147483647)
  ret <16 x i32> %r
}
define i32 @bincompile_largest(<16 x i32> %v) alwaysinline {
  %r = call i32 @llvm.vector.reduce.smax.v16i32(<16 x i32> %v)
  ret i32 %r
}
define i32 @bincompile_total(<16 x i32> %v) alwaysinline {
  %r = call i32 @llvm.vector.reduce.add.v16i32(<16 x i32> %v)
  ret i32 %r
}
define <16 x i32> @bincompile_level(<16 x float> %v, float %by) alwaysinline {
  %b = insertelement <16 x float> poison, float %by, i32 0
  %factors = shufflevector <16 x float> %b, <16 x float> poison, <16 x i32> zeroinitializer
  %scaled = fmul <16 x float> %v, %factors
  %even = call <16 x float> @llvm.rint.v16f32(<16 x float> %scaled)
  %number = fcmp ord <16 x float> %even, zeroinitializer
  %safe = select <16 x i1> %number, <16 x float> %even, <16 x float> zeroinitializer
  %r = fptosi <16 x float> %safe to <16 x i32>
  ret <16 x i32> %r
}
"""

# Keeps LLVM from fusing a sum with the product before it: results have to round like the reference.
FENCE = """
declare <16 x float> @llvm.arithmetic.fence.v16f32(<16 x float>)
define <16 x float> @bincompile_rounded(<16 x float> %v) alwaysinline {
  %r = call <16 x float> @llvm.arithmetic.fence.v16f32(<16 x float> %v)
  ret <16 x float> %r
}
"""


class Rows(NamedTuple):
    """A tile of rows: the first, their scales, and the totals of their numbers."""

    first: Any
    scales: Any
    sizes: Any


def quantise(T: Any, layer: Layer, rows: Rows, row: int, numbers: Any,
             negatives: Any = None) -> None:
    """One row as int8 with zeros behind it (`numbers` (height, padded)), its scale and its total.

    With `negatives`, what is negative goes there as well, and the total is of magnitudes.
    """
    features, filled = int(layer.x.shape[1]), int(numbers.shape[1])
    state = T.alloc_buffer((LANE,), "int32")
    zero = T.broadcast(T.int32(0), LANE)

    def each(change: Any) -> Any:
        """The state after `change` of every sixteen numbers, in turn."""
        T.buffer_store(state, zero, [span(T, 0)])
        if features >= LANE:
            with T.serial(0, features // LANE) as step:
                T.buffer_store(state, change(_inputs(T, layer, rows, row, step), step),
                               [span(T, 0)])
        if features % LANE:
            step = features // LANE
            T.buffer_store(state, change(_inputs(T, layer, rows, row, step), step), [span(T, 0)])
        return state[span(T, 0)]

    def size(values: Any, _: Any) -> Any:
        return T.max(state[span(T, 0)], T.call_extern("int32x16", "bincompile_size", values))

    def level(values: Any, step: Any) -> Any:
        found, place = T.call_extern("int32x16", "bincompile_level", values, factor), [
            row, span(T, step * LANE)]
        T.buffer_store(numbers, T.cast(found, "int8x16"), place)
        if negatives is None:
            return state[span(T, 0)] + found
        T.buffer_store(negatives, T.cast(T.max(zero - found, zero), "int8x16"), place)
        return state[span(T, 0)] + T.max(found, zero - found)

    factor = _factor(T, rows, row, T.call_extern("int32", "bincompile_largest", each(size)))
    T.buffer_store(rows.sizes, T.call_extern("int32", "bincompile_total", each(level)), [row])
    for place in range(ceil_div(features, LANE) * LANE, filled, LANE):
        for part in (numbers, negatives):
            if part is not None:
                T.buffer_store(part, T.broadcast(T.int8(0), LANE), [row, span(T, place)])


def _factor(T: Any, rows: Rows, row: int, largest: Any) -> Any:
    """What numbers are multiplied with, from the bits of the largest; the scale is stored."""
    bits, factor = (T.alloc_buffer((1,), kind) for kind in ("int32", "float32"))
    T.buffer_store(bits, largest, [0])
    value, finite = T.reinterpret("float32", bits[0]), bits[0] < INFINITE
    counts = T.And(bits[0] >= SMALLEST, finite)
    T.buffer_store(factor, T.Select(counts, T.float32(LEVELS) / value, T.float32(0)), [0])
    scale = T.Select(counts, value / T.float32(LEVELS), T.float32(0))
    T.buffer_store(rows.scales, T.Select(finite, scale, T.float32(float("nan"))), [row])
    return factor[0]


def _inputs(T: Any, layer: Layer, rows: Rows, row: int, step: Any) -> Any:
    """Sixteen numbers of a row, shifted; what lies behind its end is 0."""
    if isinstance(step, int):
        values = load_tail(T, layer.x, rows.first + row, step * LANE)
    else:
        values = layer.x[rows.first + row, span(T, step * LANE)]
    return values if layer.shift is None else values + layer.shift[span(T, step * LANE)]


def text(features: int) -> str:
    """LLVM text that `quantise` and `scaled` call."""
    return QUANTISE + FENCE + (tail_text(features) if features % LANE else "")


def scaled(T: Any, sums: Any, row: Any, scale: Any) -> Any:
    """(sums * row) * scale, rounded."""
    value = T.cast(sums, "float32x16") * T.broadcast(row, LANE) * scale
    return T.call_extern("float32x16", "bincompile_rounded", value)
