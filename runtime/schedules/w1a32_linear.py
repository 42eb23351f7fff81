"""Linear layer with 1-bit weights and float activations: sums of four inputs from a table.

Four weights of one output are four bits, and the 16 sums +-a +-b +-c +-d that they can choose from
fit in one AVX-512 register, so a permutation by the bits gives 16 outputs four products each. With
AVX2 eight sums fit; the other eight are their negatives, so the fourth bit becomes the sign
(`runtime.panels.fold_signs` has turned the lower three). Method: look-up tables in place of
products, as in T-MAC, arXiv:2407.00088, here with float sums and no quantisation.

Arguments: x (rows, features), weight (panels, words, 4, 16) uint32 with bit 1 where negative,
weight_scale (panels * 64), [bias (panels * 64)], [shift (words * 32)], out (rows, outputs).
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
    linear_buffers,
    span,
    store_outputs,
)

BLOCK = 8  # rows of one block
TILE = 4  # rows whose sums are added up together
GROUP = 4  # inputs of one table
GROUPS = WORD // GROUP
_PICK = {16: "llvm.x86.avx512.permvar.sf.512", 8: "llvm.x86.avx2.permps"}


def build(features: int, outputs: int, bias: bool, shift: bool, table: int) -> Any:
    """The IRModule, with one function for each of `MODES`; `table` is 16 or 8 sums."""
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import ir as I
    from tvm.tirx.script import builder as T

    with IRBuilder() as builder, I.ir_module():
        for mode in MODES:
            _function(T, mode, features, outputs, bias, shift, table)
    return builder.get()


def helpers(table: int) -> str:
    """LLVM text of the table of sums of four inputs, and of the choice from it."""
    floats, integers = f"<{table} x float>", f"<{table} x i32>"
    lines, total = [], ""
    for bit in range(GROUP):
        signs = ", ".join(f"float {-1 if place >> bit & 1 else 1}.0" for place in range(table))
        lines += [f"%i{bit} = insertelement {floats} poison, float %x{bit}, i32 0",
                  f"%b{bit} = shufflevector {floats} %i{bit}, {floats} poison, "
                  f"{integers} zeroinitializer",
                  f"%p{bit} = fmul {floats} %b{bit}, <{signs}>"]
        if bit:
            lines.append(f"%s{bit} = fadd {floats} {total}, %p{bit}")
        total = f"%s{bit}" if bit else f"%p{bit}"
    order = f"{floats} %t, {integers} %i"
    body = "\n  ".join(lines)
    return f"""
define {floats} @bincompile_sums(float %x0, float %x1, float %x2, float %x3) alwaysinline {{
  {body}
  ret {floats} {total}
}}
declare {floats} @{_PICK[table]}({floats}, {integers})
define {floats} @bincompile_pick({order}) alwaysinline {{
  %r = call {floats} @{_PICK[table]}({order})
  ret {floats} %r
}}
"""


def _function(T: Any, mode: str, features: int, outputs: int, bias: bool, shift: bool,
              table: int) -> None:
    words, panels = ceil_div(features, WORD), ceil_div(outputs, PANEL)
    blocks_loop, panels_loop = (getattr(T, kind) for kind in MODES[mode])
    with T.prim_func():
        rows, x, weight, scale, added, shifted, _, out = linear_buffers(
            T, mode, features, outputs, bias, shift)

        def tile(first: Any, height: int) -> None:
            sums = T.alloc_buffer((height, words * GROUPS, table), "float32")
            for row in range(height):
                _tabulate(T, x, first + row, shifted, sums, row)
            with panels_loop(0, panels) as panel:
                for start in range(0, PANEL, VECTORS * table):
                    totals = _add_up(T, sums, weight, panel, start)
                    _finish(T, totals, scale, added, out, first, panel * PANEL + start)

        with T.attr(0, "pragma_import_llvm", helpers(table)), \
                blocks_loop(0, ceil_div(rows, BLOCK)) as block:
            begin = block * BLOCK
            count = T.min(T.int64(BLOCK), rows - begin)
            with T.serial(0, T.floordiv(count, TILE)) as step:
                tile(begin + step * TILE, TILE)
            with T.serial(0, T.floormod(count, TILE)) as step:
                tile(begin + T.floordiv(count, TILE) * TILE + step, 1)


def _tabulate(T: Any, x: Any, source: Any, shift: Any, sums: Any, row: int) -> None:
    """The sums of every four inputs of one row; inputs behind its end are 0."""
    features, groups, table = int(x.shape[1]), int(sums.shape[1]), int(sums.shape[2])

    def inputs(start: Any, count: int) -> list[Any]:
        values = [x[source, start + place] for place in range(count)]
        if shift is not None:
            values = [value + shift[start + place] for place, value in enumerate(values)]
        return values + [T.float32(0)] * (GROUP - count)

    def store(group: Any, values: list[Any]) -> None:
        entry = T.call_extern(f"float32x{table}", "bincompile_sums", *values)
        T.buffer_store(sums, entry, [row, group, span(T, 0, table)])

    whole, left = divmod(features, GROUP)
    if whole:
        with T.serial(0, whole) as group:
            store(group, inputs(group * GROUP, GROUP))
    if left:
        store(whole, inputs(whole * GROUP, left))
    for group in range(ceil_div(features, GROUP), groups):
        T.buffer_store(sums, T.broadcast(T.float32(0), table), [row, group, span(T, 0, table)])


def _add_up(T: Any, sums: Any, weight: Any, panel: Any, start: int) -> Any:
    """The products of the rows of a tile with four vectors of outputs."""
    height, _, table = (int(size) for size in sums.shape)
    totals = T.alloc_buffer((height, VECTORS * table), "float32", scope="local")
    places = [divmod(start + v * table, LANE) for v in range(VECTORS)]
    zero = T.broadcast(T.float32(0), table)
    for row in range(height):
        for v in range(VECTORS):
            T.buffer_store(totals, zero, [row, span(T, v * table, table)])
    with T.serial(0, int(weight.shape[1])) as k:
        for group in range(GROUPS):
            for v, (vector, lane) in enumerate(places):
                word = weight[panel, k, vector, span(T, lane, table)]
                for row in range(height):
                    at = [row, span(T, v * table, table)]
                    entry = sums[row, k * GROUPS + group, span(T, 0, table)]
                    chosen = _pick(T, entry, word, group, table)
                    T.buffer_store(totals, totals[tuple(at)] + chosen, at)
    return totals


def _pick(T: Any, entry: Any, word: Any, group: int, table: int) -> Any:
    """The sums that four bits of every word choose from a table."""
    def constant(value: int) -> Any:
        return T.broadcast(T.uint32(value), table)

    order = T.reinterpret(f"int32x{table}", word >> constant(group * GROUP))
    picked = T.call_extern(f"float32x{table}", "bincompile_pick", entry, order)
    if table == 1 << GROUP:
        return picked
    sign = (word << constant(WORD - (group + 1) * GROUP)) & constant(1 << 31)
    return T.reinterpret(f"float32x{table}", T.reinterpret(f"uint32x{table}", picked) ^ sign)


def _finish(T: Any, totals: Any, scale: Any, bias: Any, out: Any, first: Any,
            column: Any) -> None:
    """Scale, add the bias, and store."""
    height, table = int(totals.shape[0]), int(totals.shape[1]) // VECTORS
    outputs = int(out.shape[1])
    for row in range(height):
        for v in range(VECTORS):
            at = column + v * table
            value = totals[row, span(T, v * table, table)] * scale[span(T, at, table)]
            if bias is not None:
                value = value + bias[span(T, at, table)]
            store_outputs(T, out, first + row, at, value, outputs, table)
