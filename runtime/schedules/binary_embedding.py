"""Look-up in a table of 1-bit rows: sixteen bits choose between a row's scale and its negative.

Arguments: indices (count) int32 or int64, table (rows, ceil(columns/8)) uint8, row_scale (rows),
out (count, columns). The functions return how things went: 0, or 1 if an index is not in the table;
such an index is not looked up.
"""

from __future__ import annotations

from typing import Any

from bincompile.runtime.schedules.common import LANE, ceil_div, span

BLOCK = 64  # indices of one block
MODES = {"serial": "serial", "rows": "parallel"}


def build(columns: int, indices: str) -> Any:
    """The IRModule, with one function for each of `MODES`; `indices` is their dtype."""
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import ir as I
    from tvm.tirx.script import builder as T

    with IRBuilder() as builder, I.ir_module():
        for mode in MODES:
            _function(T, mode, columns, indices)
    return builder.get()


def helpers(columns: int) -> str:
    """LLVM text: sixteen signs times a scale, and the same for what is left of a row."""
    left = columns % LANE
    mask = ", ".join(f"i1 {int(lane < left)}" for lane in range(LANE))
    narrow = "i8" if left <= 8 else "i16"
    rest = "%rest = zext i8 %word to i16" if left <= 8 else "%rest = add i16 %word, 0"
    return f"""
define <16 x float> @bincompile_signed(i16 %word, float %scale) alwaysinline {{
  %signs = bitcast i16 %word to <16 x i1>
  %minus = fneg float %scale
  %p = insertelement <16 x float> poison, float %scale, i32 0
  %plus = shufflevector <16 x float> %p, <16 x float> poison, <16 x i32> zeroinitializer
  %n = insertelement <16 x float> poison, float %minus, i32 0
  %negative = shufflevector <16 x float> %n, <16 x float> poison, <16 x i32> zeroinitializer
  %r = select <16 x i1> %signs, <16 x float> %plus, <16 x float> %negative
  ret <16 x float> %r
}}
define <16 x float> @bincompile_row(ptr %bytes, float %scale) alwaysinline {{
  %word = load i16, ptr %bytes, align 1
  %r = call <16 x float> @bincompile_signed(i16 %word, float %scale)
  ret <16 x float> %r
}}
declare void @llvm.masked.store.v16f32.p0(<16 x float>, ptr, i32, <16 x i1>)
define i32 @bincompile_rest(ptr %out, ptr %bytes, float %scale) alwaysinline {{
  %word = load {narrow}, ptr %bytes, align 1
  {rest}
  %r = call <16 x float> @bincompile_signed(i16 %rest, float %scale)
  call void @llvm.masked.store.v16f32.p0(<16 x float> %r, ptr %out, i32 4, <16 x i1> <{mask}>)
  ret i32 0
}}
"""


def _function(T: Any, mode: str, columns: int, dtype: str) -> None:
    with T.prim_func():
        T.func_name(mode)
        T.func_attr({"global_symbol": mode, "tirx.noalias": True})
        count, rows = T.int64(), T.int64()

        def argument(name: str, shape: tuple[Any, ...], dtype: str, align: int) -> Any:
            return T.match_buffer(T.arg(name, T.handle()), shape, dtype, align=align)

        indices = argument("indices", (count,), dtype, 4)
        table = argument("table", (rows, ceil_div(columns, 8)), "uint8", 1)
        scale = argument("row_scale", (rows,), "float32", 4)
        out = argument("out", (count, columns), "float32", 4)
        with T.attr(0, "pragma_import_llvm", helpers(columns)):
            bad = T.alloc_buffer((1,), "int32")
            T.buffer_store(bad, T.int32(0), [0])
            with getattr(T, MODES[mode])(0, ceil_div(count, BLOCK)) as block, \
                    T.serial(0, T.min(T.int64(BLOCK), count - block * BLOCK)) as place:
                at = block * BLOCK + place
                index = T.cast(indices[at], "int64")
                with T.If(T.And(index >= 0, index < rows)):
                    with T.Then():
                        _row(T, table, index, scale[index], out, at)
                    with T.Else():
                        T.buffer_store(bad, T.int32(1), [0])
            T.Return(bad[0])


def _row(T: Any, table: Any, index: Any, scale: Any, out: Any, at: Any) -> None:
    whole, left = divmod(int(out.shape[1]), LANE)
    if whole:
        with T.serial(0, whole) as k:
            start = T.address_of(table[index, k * 2])
            T.buffer_store(out, T.call_extern("float32x16", "bincompile_row", start, scale),
                           [at, span(T, k * LANE)])
    if left:
        T.evaluate(T.call_extern("int32", "bincompile_rest", T.address_of(out[at, whole * LANE]),
                                 T.address_of(table[index, whole * 2]), scale))
