"""Look-up in a table of rows of 1-bit bases: bits choose between a row's scale and its negative.

Arguments: indices (count) int32 or int64, table (rows, bases * ceil(columns/8)) uint8,
row_scale (rows, bases), out (count, columns). The functions return how things went: 0, or 1 if an
index is not in the table; such an index is not looked up.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from bincompile.runtime.schedules import signed_rows
from bincompile.runtime.schedules.common import ceil_div, return_flag

BLOCK = 64  # indices of one block
AHEAD = 8  # rows between the one that is read and the one that memory is asked for
MODES = {"serial": "serial", "rows": "parallel"}


def build(columns: int, bases: int, indices: str) -> Any:
    """The IRModule, with one function for each of `MODES`; `indices` is their dtype."""
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import ir as I
    from tvm.tirx.script import builder as T

    with IRBuilder() as builder, I.ir_module():
        for mode in MODES:
            _function(T, mode, columns, bases, indices)
    return builder.get()


def _function(T: Any, mode: str, columns: int, bases: int, dtype: str) -> None:
    with T.prim_func():
        T.func_name(mode)
        T.func_attr({"global_symbol": mode, "tirx.noalias": True})
        count, rows = T.int64(), T.int64()

        def argument(name: str, shape: tuple[Any, ...], dtype: str, align: int) -> Any:
            return T.match_buffer(T.arg(name, T.handle()), shape, dtype, align=align)

        indices = argument("indices", (count,), dtype, 4)
        table = argument("table", (rows, bases * ceil_div(columns, 8)), "uint8", 1)
        scale = argument("row_scale", (rows, bases), "float32", 4)
        out = argument("out", (count, columns), "float32", 4)
        with T.attr(0, "pragma_import_llvm", signed_rows.text(columns)):
            bad = T.alloc_buffer((1,), "int32")
            T.buffer_store(bad, T.int32(0), [0])
            with getattr(T, MODES[mode])(0, ceil_div(count, BLOCK)) as block, \
                    T.serial(0, T.min(T.int64(BLOCK), count - block * BLOCK)) as place:
                at = block * BLOCK + place
                index = T.cast(indices[at], "int64")
                later = T.cast(indices[T.min(at + AHEAD, count - 1)], "int64")
                signed_rows.prefetch(T, table, scale, later)
                with T.If(T.And(index >= 0, index < rows)):
                    with T.Then():
                        scales = [scale[index, base] for base in range(bases)]
                        signed_rows.each_vector(T, columns, functools.partial(
                            _copy, T, table, index, scales, out, at))
                    with T.Else():
                        T.buffer_store(bad, T.int32(1), [0])
            return_flag(T, bad)


def _copy(T: Any, table: Any, index: Any, scales: Sequence[Any], out: Any, at: Any,
          vector: Any) -> None:
    columns = int(out.shape[1])
    value = signed_rows.vector_of(T, table, index, scales, vector, columns)
    signed_rows.store(T, out, at, vector, value)
