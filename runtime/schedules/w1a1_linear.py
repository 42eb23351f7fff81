"""Linear layer with 1-bit weights and activations, from float32 to float32 in one function.

Each block of rows is packed to sign bits and scaled, then multiplied panel by panel: a vector holds
32 bits of 16 outputs, the word of activations is broadcast, and popcounts add up lane by lane.
Method: XNOR-Net, arXiv:1603.05279.

Arguments: x (rows, features), weight (panels, words, 4, 16) uint32 with bit 1 where negative,
weight_scale (panels * 64), [bias (panels * 64)], [shift (words * 32)], [activation_scale (1)],
out (rows, outputs). Padding bits are 0 on both sides, so that they never differ.
"""

from __future__ import annotations

from typing import Any

from bincompile.runtime.schedules.common import (
    LANE,
    MODES,
    PANEL,
    VECTORS,
    WORD,
    ceil_div,
    halving,
    lanes,
    linear_buffers,
    load_tail,
    span,
    store_outputs,
    tail_text,
)

BLOCK = 32  # rows of one block: their packed bits stay in the first-level cache

# A nan is negative (unordered), -0.0 is not. Halving adds up lanes in the order of
# `bits.row_scale`. The fence keeps LLVM from fusing the addition of the bias with the product
# before it: results have to round like the reference.
HELPERS = f"""
define i32 @bincompile_signs(<16 x float> %low, <16 x float> %high) alwaysinline {{
  %both = shufflevector <16 x float> %low, <16 x float> %high, <32 x i32> {lanes(range(32))}
  %negative = fcmp ult <32 x float> %both, zeroinitializer
  %word = bitcast <32 x i1> %negative to i32
  ret i32 %word
}}
define float @bincompile_sum(<16 x float> %v16) alwaysinline {{
  {halving(16, 8)}
  {halving(8, 4)}
  {halving(4, 2)}
  {halving(2, 1)}
  %sum = extractelement <1 x float> %v1, i32 0
  ret float %sum
}}
declare <16 x float> @llvm.arithmetic.fence.v16f32(<16 x float>)
define <16 x float> @bincompile_rounded(<16 x float> %v) alwaysinline {{
  %r = call <16 x float> @llvm.arithmetic.fence.v16f32(<16 x float> %v)
  ret <16 x float> %r
}}
"""


def build(features: int, outputs: int, bias: bool, shift: bool, row_scale: bool) -> Any:
    """The IRModule, with one function for each of `MODES`."""
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import ir as I
    from tvm.tirx.script import builder as T

    with IRBuilder() as builder, I.ir_module():
        for mode in MODES:
            _function(T, mode, features, outputs, bias, shift, row_scale)
    return builder.get()


def _function(T: Any, mode: str, features: int, outputs: int, bias: bool, shift: bool,
              row_scale: bool) -> None:
    words, panels = ceil_div(features, WORD), ceil_div(outputs, PANEL)
    blocks_loop, panels_loop = (getattr(T, kind) for kind in MODES[mode])
    with T.prim_func():
        rows, x, weight, scale, added, shifted, given, out = linear_buffers(
            T, mode, features, outputs, bias, shift, not row_scale)
        with T.attr(0, "pragma_import_llvm", HELPERS + tail_text(features)), \
                blocks_loop(0, ceil_div(rows, BLOCK)) as block:
            bits = T.alloc_buffer((BLOCK, words), "uint32")
            means = T.alloc_buffer((BLOCK,), "float32")
            first = block * BLOCK
            count = T.min(T.int64(BLOCK), rows - first)
            with T.serial(0, count) as row:
                _pack(T, x, first + row, shifted, bits, means if row_scale else None, row)
            with panels_loop(0, panels) as panel, T.serial(0, count) as row:
                sums = _products(T, bits, row, weight, panel)
                mean = means[row] if given is None else given[0]
                for v in range(VECTORS):
                    column = panel * PANEL + v * LANE
                    value = _finish(T, sums[span(T, v * LANE)], features, mean, scale, added,
                                    column)
                    store_outputs(T, out, first + row, column, value, outputs)


def _pack(T: Any, x: Any, source: Any, shift: Any, bits: Any, means: Any, row: Any) -> None:
    """Sign bits of one row and, where wanted, its mean |x| in the order of `bits.row_scale`."""
    features = int(x.shape[1])
    whole, tail = divmod(features, WORD)
    sums = T.alloc_buffer((LANE,), "float32", scope="local")
    T.buffer_store(sums, T.broadcast(T.float32(0), LANE), [span(T, 0)])

    def word(k: Any, halves: list[Any]) -> None:
        if shift is not None:
            halves = [half + shift[span(T, k * WORD + place)]
                      for half, place in zip(halves, (0, LANE), strict=True)]
        for half in halves if means is not None else ():
            T.buffer_store(sums, sums[span(T, 0)] + T.fabs(half), [span(T, 0)])
        T.buffer_store(bits, T.call_extern("uint32", "bincompile_signs", *halves), [row, k])

    if whole:
        with T.serial(0, whole) as k:
            word(k, [x[source, span(T, k * WORD)], x[source, span(T, k * WORD + LANE)]])
    if tail:
        word(whole, [load_tail(T, x, source, whole * WORD + place) for place in (0, LANE)])
    if means is not None:
        total = T.call_extern("float32", "bincompile_sum", sums[span(T, 0)])
        T.buffer_store(means, total / T.float32(features), [row])


def _products(T: Any, bits: Any, row: Any, weight: Any, panel: Any) -> Any:
    """How many bits differ, for one row and the outputs of one panel."""
    sums = T.alloc_buffer((PANEL,), "int32", scope="local")
    for v in range(VECTORS):
        T.buffer_store(sums, T.broadcast(T.int32(0), LANE), [span(T, v * LANE)])
    with T.serial(0, int(weight.shape[1])) as k:
        word = T.broadcast(bits[row, k], LANE)
        for v in range(VECTORS):
            differ = T.popcount(word ^ weight[panel, k, v, span(T, 0)])
            T.buffer_store(sums, sums[span(T, v * LANE)] + T.cast(differ, "int32x16"),
                           [span(T, v * LANE)])
    return sums


def _finish(T: Any, differ: Any, features: int, mean: Any, scale: Any, bias: Any,
            column: Any) -> Any:
    """((features - 2 * differ) * mean) * scale + bias, each step rounded."""
    agree = T.broadcast(T.float32(features), LANE) - T.cast(differ, "float32x16") * T.broadcast(
        T.float32(2), LANE)
    value = agree * T.broadcast(mean, LANE) * scale[span(T, column)]
    if bias is None:
        return value
    rounded = T.call_extern("float32x16", "bincompile_rounded", value)
    return rounded + bias[span(T, column)]
