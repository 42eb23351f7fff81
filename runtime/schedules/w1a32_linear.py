"""Linear layer with bases of 1-bit weights and float activations: sums of inputs from a table.

Five weights of one output are five bits, and the 32 sums +-a +-b +-c +-d +-e that they can choose
from fit in two AVX-512 registers, so a permutation by the bits gives 16 outputs five products each.
With AVX2 eight sums fit; eight more are their negatives, so a fourth bit becomes the sign
(`runtime.panels.fold_signs` has turned the lower three). With SSE the four sums of two inputs fit,
and bytes are permuted. Method: look-up tables in place of products, as in T-MAC, arXiv:2407.00088,
here with float sums and no quantisation.

Arguments: x (rows, features), weight (bases, panels, words, 4, 16) uint32 with bit 1 where
negative (30 bits of a word for tables of 32 sums), weight_scale (bases, panels * 64),
[bias (panels * 64)], [shift (words * 32)], out (rows, outputs).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from bincompile.runtime.schedules.common import LANE, MODES, PANEL, VECTORS, WORD, ceil_div, span
from bincompile.runtime.schedules.layer import SLICES, Layer, declare, store_outputs, tiles

BLOCK = 8  # rows of one block
TILE = 4  # rows whose sums are added up together


class Table(NamedTuple):
    """How one size of table is used.

    Args:
        group: inputs of one table.
        lanes: outputs of one vector.
        vectors: vectors of outputs that registers hold beside each other for a tile of rows.
        words: words of inputs whose tables stay in the first-level cache.
        pick: the instruction that chooses from it.
    """

    group: int
    lanes: int
    vectors: int
    words: int
    pick: str

    @property
    def groups(self) -> int:
        """Tables of the inputs of one word."""
        return WORD // self.group

    @property
    def inputs(self) -> int:
        """Inputs of one word."""
        return self.groups * self.group


TABLES = {  # by the number of sums
    32: Table(5, 16, 4, 6, "llvm.x86.avx512.vpermi2var.ps.512"),
    8: Table(4, 8, 2, 16, "llvm.x86.avx2.permps"),
    4: Table(2, 4, 2, 16, "llvm.x86.ssse3.pshuf.b.128")}


def build(features: int, outputs: int, bases: int, bias: bool, shift: bool, table: int) -> Any:
    """The IRModule, with one function for each of `MODES`; `table` is a number of sums."""
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import ir as I
    from tvm.tirx.script import builder as T

    with IRBuilder() as builder, I.ir_module():
        for mode in MODES:
            _function(T, mode, features, outputs, bases, bias, shift, table)
    return builder.get()


def helpers(table: int) -> str:
    """LLVM text of the table of sums of a group of inputs, and of the choice from it."""
    floats, integers = f"<{table} x float>", f"<{table} x i32>"
    lines, total = [], ""
    for bit in range(TABLES[table].group):
        signs = ", ".join(f"float {-1 if place >> bit & 1 else 1}.0" for place in range(table))
        lines += [f"%i{bit} = insertelement {floats} poison, float %x{bit}, i32 0",
                  f"%b{bit} = shufflevector {floats} %i{bit}, {floats} poison, "
                  f"{integers} zeroinitializer",
                  f"%p{bit} = fmul {floats} %b{bit}, <{signs}>"]
        if bit:
            lines.append(f"%s{bit} = fadd {floats} {total}, %p{bit}")
        total = f"%s{bit}" if bit else f"%p{bit}"
    body, inputs = "\n  ".join(lines), ", ".join(
        f"float %x{bit}" for bit in range(TABLES[table].group))
    return f"""
define {floats} @bincompile_sums({inputs}) alwaysinline {{
  {body}
  ret {floats} {total}
}}
{_PICKS[table].format(pick=TABLES[table].pick, floats=f"<{TABLES[table].lanes} x float>",
                      integers=f"<{TABLES[table].lanes} x i32>")}"""


_TWO = """declare {floats} @{pick}({floats}, {integers}, {floats})
define {floats} @bincompile_pick({floats} %low, {floats} %high, {integers} %i) alwaysinline {{
  %r = call {floats} @{pick}({floats} %low, {integers} %i, {floats} %high)
  ret {floats} %r
}}
"""
_ONE = """declare {floats} @{pick}({floats}, {integers})
define {floats} @bincompile_pick({floats} %t, {integers} %i) alwaysinline {{
  %r = call {floats} @{pick}({floats} %t, {integers} %i)
  ret {floats} %r
}}
"""
# Bits that choose one of four floats become the places of its four bytes.
_FOUR = """declare <16 x i8> @{pick}(<16 x i8>, <16 x i8>)
define {floats} @bincompile_pick({floats} %t, {integers} %i) alwaysinline {{
  %code = and {integers} %i, splat (i32 3)
  %first = mul {integers} %code, splat (i32 {spread})
  %places = add {integers} %first, splat (i32 {steps})
  %bytes = bitcast {integers} %places to <16 x i8>
  %table = bitcast {floats} %t to <16 x i8>
  %chosen = call <16 x i8> @{pick}(<16 x i8> %table, <16 x i8> %bytes)
  %r = bitcast <16 x i8> %chosen to {floats}
  ret {floats} %r
}}
""".replace("{spread}", str(0x04040404)).replace("{steps}", str(0x03020100))
_PICKS = {32: _TWO, 8: _ONE, 4: _FOUR}


def _function(T: Any, mode: str, features: int, outputs: int, bases: int, bias: bool, shift: bool,
              table: int) -> None:
    form = TABLES[table]
    words, panels = ceil_div(features, form.inputs), ceil_div(outputs, PANEL)
    blocks_loop, slices_loop = (getattr(T, kind) for kind in MODES[mode])
    slices = min(panels, SLICES) if MODES[mode][1] == "parallel" else 1
    most = ceil_div(panels, slices)
    with T.prim_func():
        layer = declare(T, mode, features, outputs, bias, shift,
                        (bases, panels, words, VECTORS, LANE), "uint32", panels * PANEL)

        def tile(first: Any, height: int) -> None:
            sums = T.alloc_buffer((words * form.groups, height, table), "float32")
            for row in range(height):
                _tabulate(T, layer, first + row, sums, row)
            with slices_loop(0, slices) as part:
                _slice(T, layer, first, sums, part * most, most)

        with T.attr(0, "pragma_import_llvm", helpers(table)), \
                blocks_loop(0, ceil_div(layer.rows, BLOCK)) as block:
            tiles(T, layer.rows, block * BLOCK, BLOCK, TILE, tile)


def _tabulate(T: Any, layer: Layer, source: Any, sums: Any, row: int) -> None:
    """The sums of every group of inputs of one row; inputs behind its end are 0."""
    features, groups, table = int(layer.x.shape[1]), int(sums.shape[0]), int(sums.shape[2])
    group_size = TABLES[table].group

    def inputs(start: Any, count: int) -> list[Any]:
        values = [layer.x[source, start + place] for place in range(count)]
        if layer.shift is not None:
            values = [value + layer.shift[start + place] for place, value in enumerate(values)]
        return values + [T.float32(0)] * (group_size - count)

    def store(group: Any, values: list[Any]) -> None:
        entry = T.call_extern(f"float32x{table}", "bincompile_sums", *values)
        T.buffer_store(sums, entry, [group, row, span(T, 0, table)])

    whole, left = divmod(features, group_size)
    if whole:
        with T.serial(0, whole) as group:
            store(group, inputs(group * group_size, group_size))
    if left:
        store(whole, inputs(whole * group_size, left))
    for group in range(ceil_div(features, group_size), groups):
        T.buffer_store(sums, T.broadcast(T.float32(0), table), [group, row, span(T, 0, table)])


def _slice(T: Any, layer: Layer, first: Any, sums: Any, start: Any, most: int) -> None:
    """The outputs of some panels for the rows of a tile.

    Words are the outer loop, some at a time, so that their tables stay in the first-level cache.
    """
    bases, panels, words = (int(size) for size in layer.weight.shape[:3])
    height, form = int(sums.shape[1]), TABLES[int(sums.shape[2])]
    count, run = T.min(most, panels - start), form.words
    totals = T.alloc_buffer((bases, most, height, PANEL), "float32")
    for base in range(bases):
        with T.serial(0, count) as panel, T.serial(0, height) as row:
            for column in range(0, PANEL, LANE):
                T.buffer_store(totals, T.broadcast(T.float32(0), LANE),
                               [base, panel, row, span(T, column)])
    with T.serial(0, ceil_div(words, run)) as step, T.serial(0, bases) as base, \
            T.serial(0, count) as panel:
        part = (step * run, T.min(run, words - step * run))
        width = (form.vectors if height > 1 else VECTORS) * form.lanes
        for column in range(0, PANEL, width):
            places = range(column, column + width, form.lanes)
            _add_up(T, sums, layer.weight, (base, start + panel), part, totals, (base, panel),
                    places)
    with T.serial(0, count) as panel:
        _finish(T, layer, first, totals, start + panel, panel, form.lanes)


def _add_up(T: Any, sums: Any, weight: Any, source: tuple[Any, Any], part: tuple[Any, Any],
            totals: Any, target: tuple[Any, Any], columns: range) -> None:
    """Add what some words choose for the rows of a tile and some vectors of outputs."""
    height, table, lanes = int(sums.shape[1]), int(sums.shape[2]), columns.step
    groups = TABLES[table].groups
    kept = T.alloc_buffer((height, len(columns), lanes), "float32")
    cells = [(row, v, column) for row in range(height) for v, column in enumerate(columns)]
    for row, v, column in cells:
        T.buffer_store(kept, totals[*target, row, span(T, column, lanes)],
                       [row, v, span(T, 0, lanes)])
    with T.serial(0, part[1]) as place:
        k = part[0] + place
        for group in range(groups):
            entries = [[sums[k * groups + group, row, span(T, start, lanes)]
                        for start in range(0, table, lanes)] for row in range(height)]
            for v, column in enumerate(columns):
                word = weight[*source, k, column // LANE, span(T, column % LANE, lanes)]
                for row, chosen in enumerate(_picks(T, entries, word, group, table)):
                    at = [row, v, span(T, 0, lanes)]
                    T.buffer_store(kept, kept[tuple(at)] + chosen, at)
    for row, v, column in cells:
        T.buffer_store(totals, kept[row, v, span(T, 0, lanes)],
                       [*target, row, span(T, column, lanes)])


def _picks(T: Any, entries: list[list[Any]], word: Any, group: int, table: int) -> list[Any]:
    """The sums that one group of bits of every word chooses from the table of each row."""
    bits, lanes = TABLES[table].group, TABLES[table].lanes

    def constant(value: int) -> Any:
        return T.broadcast(T.uint32(value), lanes)

    order = T.reinterpret(f"int32x{lanes}", word >> constant(group * bits))
    picked = [T.call_extern(f"float32x{lanes}", "bincompile_pick", *entry, order)
              for entry in entries]
    if table == 1 << bits:
        return picked
    sign = (word << constant(WORD - (group + 1) * bits)) & constant(1 << 31)
    return [T.reinterpret(f"float32x{lanes}", T.reinterpret(f"uint32x{lanes}", value) ^ sign)
            for value in picked]


def _finish(T: Any, layer: Layer, first: Any, totals: Any, panel: Any, place: Any,
            lanes: int) -> None:
    """Scale the sums of each base, add the bases and the bias up, and store."""
    bases, _, height, _ = (int(size) for size in totals.shape)
    for row in range(height):
        for start in range(0, PANEL, lanes):
            column = panel * PANEL + start
            value = None
            for base in range(bases):
                found = totals[base, place, row, span(T, start, lanes)] \
                    * layer.scale[base, span(T, column, lanes)]
                value = found if value is None else value + found
            store_outputs(T, layer, first + row, column, value, lanes)
