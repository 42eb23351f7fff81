"""Linear layer with k bases of 1-bit weights and int8 activations: sums of five from a table.

Each row is quantised (`quantised.py`). The 32 sums that five of its numbers can give fit in one
AVX-512 register as int16, so a permutation by five bits of 32 weights gives 160 products. A word
holds 15 bits of one output; sums of 510 numbers at most are added up in uint16, then in int32.
Method: look-up tables in place of products, as in T-MAC, arXiv:2407.00088.

A bit chooses whether a number is in the sum at all, and every sum is raised by the negative numbers
of its five, so that none is below 0: the sum with signs is twice the result less the row's sum of
magnitudes. Outputs n and n + 16 of a vector are its even and odd lanes.

Arguments: x (rows, features), weight (bases, panels, words, vectors, 32) uint16 with bit 1 where
positive, weight_scale (bases, panels * vectors * 32), [bias (panels * vectors * 32)],
[shift (words * 15)], out (rows, outputs).
"""

from __future__ import annotations

from typing import Any

from bincompile.runtime.schedules.common import LANE, MODES, ceil_div, span
from bincompile.runtime.schedules.layer import SLICES, Layer, declare, store_outputs, tiles
from bincompile.runtime.schedules.quantised import Rows, quantise, scaled, text

BLOCK = 8  # rows of one block
TILE = 4  # rows that are added up together
GROUP = 5  # numbers of one table
GROUPS = 3  # tables of one word
WORD = GROUP * GROUPS
WIDTH = 2 * LANE  # outputs of one vector
VECTORS = 4  # vectors of one panel, at most
FLUSH = 34  # words whose sums fit in uint16, at most: 34 * 3 * 5 * 127 < 2^16


def vectors_of(outputs: int) -> tuple[int, int]:
    """How many panels of how many vectors hold this many outputs.

    Example:
        >>> vectors_of(768), vectors_of(70)
        ((6, 4), (1, 3))
    """
    vectors = ceil_div(outputs, WIDTH)
    panels = ceil_div(vectors, VECTORS)
    return panels, ceil_div(vectors, panels)


_LOADED = """
  %p{name} = getelementptr i8, ptr %{source}, i64 {offset}
  %i{name} = load i32, ptr %p{name}, align 1
  %v{name} = insertelement <16 x i32> poison, i32 %i{name}, i32 0
  %s{name} = shufflevector <16 x i32> %v{name}, <16 x i32> poison, <16 x i32> zeroinitializer
  %{name} = bitcast <16 x i32> %s{name} to <64 x i8>"""
_DOT = "call <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32>"
_HELPERS = """
declare <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32>, <64 x i8>, <64 x i8>)
declare <32 x i16> @llvm.x86.avx512.packssdw.512(<16 x i32>, <16 x i32>)
declare <32 x i16> @llvm.x86.avx512.permvar.hi.512(<32 x i16>, <32 x i16>)
define <32 x i16> @bincompile_table(ptr %numbers, ptr %negatives) alwaysinline {{{sums}
  %table = call <32 x i16> @llvm.x86.avx512.packssdw.512(<16 x i32> %low, <16 x i32> %high)
  ret <32 x i16> %table
}}
define <32 x i16> @bincompile_pick(<32 x i16> %table, <32 x i16> %order) alwaysinline {{
  %r = call <32 x i16> @llvm.x86.avx512.permvar.hi.512(<32 x i16> %table, <32 x i16> %order)
  ret <32 x i16> %r
}}
define <16 x i32> @bincompile_halves(<32 x i16> %v) alwaysinline {{
  %r = bitcast <32 x i16> %v to <16 x i32>
  ret <16 x i32> %r
}}
"""


def helpers() -> str:
    """LLVM text of the table of the sums of five bytes, and of the choice from it."""
    def bytes_of(places: list[int], bits: tuple[int, ...]) -> str:
        chosen = (place >> bit & 1 if bit >= 0 else 0 for place in places for bit in bits)
        return ", ".join(f"i8 {bit}" for bit in chosen)

    four, fifth = (0, 1, 2, 3), (4, -1, -1, -1)
    # packing interleaves the lanes by quarters: low and high are where it takes them from
    low = [8 * quarter + place for quarter in range(4) for place in range(4)]
    loads = "".join(_LOADED.format(name=name, source=source, offset=offset)
                    for name, source, offset in (("a", "numbers", 0), ("b", "numbers", 4),
                                                 ("c", "negatives", 0), ("d", "negatives", 4)))
    sums = [f"%base4 = {_DOT} zeroinitializer, <64 x i8> splat (i8 1), <64 x i8> %c)",
            f"%base = {_DOT} %base4, <64 x i8> <{bytes_of([16] * LANE, fifth)}>, <64 x i8> %d)"]
    for name, places in (("low", low), ("high", [place + 4 for place in low])):
        sums += [f"%{name}4 = {_DOT} %base, <64 x i8> <{bytes_of(places, four)}>, <64 x i8> %a)",
                 f"%{name} = {_DOT} %{name}4, <64 x i8> <{bytes_of(places, fifth)}>, "
                 "<64 x i8> %b)"]
    return _HELPERS.format(sums="\n  ".join([loads, *sums]))


def build(features: int, outputs: int, bases: int, bias: bool, shift: bool) -> Any:
    """The IRModule, with one function for each of `MODES`."""
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import ir as I
    from tvm.tirx.script import builder as T

    with IRBuilder() as builder, I.ir_module():
        for mode in MODES:
            _function(T, mode, features, outputs, bases, bias, shift)
    return builder.get()


def _function(T: Any, mode: str, features: int, outputs: int, bases: int, bias: bool,
              shift: bool) -> None:
    words, (panels, vectors) = ceil_div(features, WORD), vectors_of(outputs)
    blocks_loop, slices_loop = (getattr(T, kind) for kind in MODES[mode])
    slices = min(panels, SLICES) if MODES[mode][1] == "parallel" else 1
    with T.prim_func():
        weight = (bases, panels, words, vectors, WIDTH)
        layer = declare(T, mode, features, outputs, bias, shift, weight, "uint16",
                        panels * vectors * WIDTH)

        def tile(first: Any, height: int) -> None:
            tables = T.alloc_buffer((words * GROUPS, height, WIDTH), "int16")
            rows = Rows(first, T.alloc_buffer((height,), "float32"),
                        T.alloc_buffer((height,), "int32"))
            _tabulate(T, layer, rows, tables)
            with slices_loop(0, slices) as part:
                _slice(T, layer, rows, tables, part * ceil_div(panels, slices),
                       ceil_div(panels, slices))

        with T.attr(0, "pragma_import_llvm", helpers() + text(features)), \
                blocks_loop(0, ceil_div(layer.rows, BLOCK)) as block:
            tiles(T, layer.rows, block * BLOCK, BLOCK, TILE, tile)


def _tabulate(T: Any, layer: Layer, rows: Rows, tables: Any) -> None:
    """Quantise the rows of a tile, and make their tables."""
    groups, height = int(tables.shape[0]), int(tables.shape[1])
    size = ceil_div(groups * GROUP + LANE, LANE) * LANE
    numbers, negatives = (T.alloc_buffer((height, size), "int8") for _ in range(2))
    for row in range(height):
        quantise(T, layer, rows, row, numbers, negatives)
        with T.serial(0, groups) as group:
            starts = (T.address_of(part[row, group * GROUP]) for part in (numbers, negatives))
            T.buffer_store(tables, T.call_extern("int16x32", "bincompile_table", *starts),
                           [group, row, span(T, 0, WIDTH)])


def _slice(T: Any, layer: Layer, rows: Rows, tables: Any, start: Any, most: int) -> None:
    """The outputs of some panels for the rows of a tile.

    Words are the outer loop: the tables of FLUSH words stay in the first-level cache.
    """
    bases, panels, words, vectors = (int(size) for size in layer.weight.shape[:4])
    count, height = T.min(most, panels - start), int(tables.shape[1])
    sums = T.alloc_buffer((bases, most, 2, height, vectors, LANE), "int32")
    cells = [(row, v) for row in range(height) for v in range(vectors)]
    for base in range(bases):
        with T.serial(0, count) as panel:
            for half in range(2):
                for row, v in cells:
                    T.buffer_store(sums, T.broadcast(T.int32(0), LANE),
                                   [base, panel, half, row, v, span(T, 0)])
    run = ceil_div(words, ceil_div(words, FLUSH))
    with T.serial(0, ceil_div(words, run)) as step, T.serial(0, bases) as base, \
            T.serial(0, count) as panel:
        part = (step * run, T.min(run, words - step * run))
        _add_up(T, tables, layer.weight, (base, start + panel), part, sums, (base, panel))
    with T.serial(0, count) as panel:
        _finish(T, layer, rows, sums, start + panel, panel)


def _add_up(T: Any, tables: Any, weight: Any, source: tuple[Any, Any],
            run: tuple[Any, Any], sums: Any, target: tuple[Any, Any]) -> None:
    """Add the sums that some words of a panel choose: whole int32 lanes, and their upper halves."""
    height, vectors = int(tables.shape[1]), int(weight.shape[3])
    cells = [(row, v) for row in range(height) for v in range(vectors)]
    short = T.alloc_buffer((height, vectors, WIDTH), "uint16")
    for row, v in cells:
        T.buffer_store(short, T.broadcast(T.uint16(0), WIDTH), [row, v, span(T, 0, WIDTH)])
    with T.serial(0, run[1]) as place:
        k = run[0] + place
        for group in range(GROUPS):
            entries = [tables[k * GROUPS + group, row, span(T, 0, WIDTH)] for row in range(height)]
            for v in range(vectors):
                order = weight[*source, k, v, span(T, 0, WIDTH)]
                if group:
                    order = order >> T.broadcast(T.uint16(group * GROUP), WIDTH)
                for row in range(height):
                    at = [row, v, span(T, 0, WIDTH)]
                    chosen = T.call_extern("uint16x32", "bincompile_pick", entries[row], order)
                    T.buffer_store(short, short[tuple(at)] + chosen, at)
    for row, v in cells:
        pair = T.call_extern("uint32x16", "bincompile_halves", short[row, v, span(T, 0, WIDTH)])
        for half, value in enumerate((pair, pair >> T.broadcast(T.uint32(16), LANE))):
            at = [*target, half, row, v, span(T, 0)]
            T.buffer_store(sums, sums[tuple(at)] + T.reinterpret("int32x16", value), at)


def _finish(T: Any, layer: Layer, rows: Rows, sums: Any, panel: Any, place: Any) -> None:
    """Scale the sums of each base, add the bases and the bias up, and store."""
    bases, _, _, height, vectors, _ = (int(size) for size in sums.shape)
    sixteen = T.broadcast(T.int32(16), LANE)
    for row in range(height):
        without = T.broadcast(rows.sizes[row], LANE)
        for v in range(vectors):
            for half in range(2):
                column, total = (panel * vectors + v) * WIDTH + half * LANE, None
                for base in range(bases):
                    whole, upper = (sums[base, place, n, row, v, span(T, 0)] for n in range(2))
                    found = upper if half else whole - T.shift_left(upper, sixteen)
                    value = scaled(T, found + found - without, rows.scales[row],
                                   layer.scale[base, span(T, column)])
                    total = value if total is None else total + value
                store_outputs(T, layer, rows.first + row, column, total)
