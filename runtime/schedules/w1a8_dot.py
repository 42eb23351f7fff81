"""Linear layer with k bases of 1-bit weights and int8 activations: products of bytes.

For instruction sets without permutations of 32 numbers. Each row is quantised (`quantised.py`); a
bit of a word, masked out of each of its four bytes, is 0 or 1, and is multiplied with four of the
row's numbers at a time for all rows of a tile. Pairs are added up in int16, 32 words at most at a
time, then in int32: the sum with signs is twice the result less the row's total.

Arguments: x (rows, features), weight (bases, panels, words, 16) uint32, where bit 8 j + t stands
for number 4 t + j and is 1 where positive, weight_scale (bases, panels * 16), [bias (panels * 16)],
[shift (words * 32)], out (rows, outputs).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from bincompile.runtime.schedules.common import LANE, MODES, WORD, ceil_div, span
from bincompile.runtime.schedules.layer import Layer, declare, store_outputs
from bincompile.runtime.schedules.quantised import Rows, quantise, scaled, text

BLOCK = 8  # rows of one block
BYTES = 4  # numbers that are multiplied at a time
STEPS = WORD // BYTES
APART = 64  # bytes, so that rows do not lie a power of two apart
FLUSH = 16  # words whose pairs fit in int16: 16 * 8 * 2 * 127 < 2^15


class Instructions(NamedTuple):
    """What an instruction set multiplies with, and how many rows its registers hold."""

    lanes: int
    multiply: str
    add_pairs: str
    tile: int


# By the number of bits of a register.
REGISTERS = {256: Instructions(8, "llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd", 4),
             128: Instructions(4, "llvm.x86.ssse3.pmadd.ub.sw.128", "llvm.x86.sse2.pmadd.wd", 2)}


def helpers(registers: int) -> str:
    """LLVM text of the products of four bytes each, added up in pairs, and of sums of pairs."""
    lanes, multiply, add_pairs, _ = REGISTERS[registers]
    words, pairs, numbers = (f"<{lanes} x i32>", f"<{2 * lanes} x i16>", f"<{4 * lanes} x i8>")
    return f"""
declare {pairs} @{multiply}({numbers}, {numbers})
declare {words} @{add_pairs}({pairs}, {pairs})
define {pairs} @bincompile_products({words} %bits, i32 %four) alwaysinline {{
  %chosen = bitcast {words} %bits to {numbers}
  %f = insertelement {words} poison, i32 %four, i32 0
  %fours = shufflevector {words} %f, {words} poison, {words} zeroinitializer
  %x = bitcast {words} %fours to {numbers}
  %r = call {pairs} @{multiply}({numbers} %chosen, {numbers} %x)
  ret {pairs} %r
}}
define {words} @bincompile_pairs({pairs} %v) alwaysinline {{
  %r = call {words} @{add_pairs}({pairs} %v, {pairs} splat (i16 1))
  ret {words} %r
}}
define i32 @bincompile_four(ptr %numbers) alwaysinline {{
  %r = load i32, ptr %numbers, align 1
  ret i32 %r
}}
"""


def build(features: int, outputs: int, bases: int, bias: bool, shift: bool, registers: int) -> Any:
    """The IRModule, with one function for each of `MODES`; `registers` are bits of one."""
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import ir as I
    from tvm.tirx.script import builder as T

    with IRBuilder() as builder, I.ir_module():
        for mode in MODES:
            _function(T, mode, features, outputs, bases, bias, shift, registers)
    return builder.get()


def _function(T: Any, mode: str, features: int, outputs: int, bases: int, bias: bool, shift: bool,
              registers: int) -> None:
    words, panels = ceil_div(features, WORD), ceil_div(outputs, LANE)
    blocks_loop, panels_loop = (getattr(T, kind) for kind in MODES[mode])
    most = REGISTERS[registers].tile
    with T.prim_func():
        layer = declare(T, mode, features, outputs, bias, shift, (bases, panels, words, LANE),
                        "uint32", panels * LANE)

        def tile(first: Any, height: int) -> None:
            rows = Rows(first, T.alloc_buffer((height,), "float32"),
                        T.alloc_buffer((height,), "int32"))
            numbers = T.alloc_buffer((height, words * WORD + APART), "int8")
            for row in range(height):
                quantise(T, layer, rows, row, numbers)
            with panels_loop(0, panels) as panel:
                _panel(T, layer, rows, numbers, panel, REGISTERS[registers].lanes)

        with T.attr(0, "pragma_import_llvm", helpers(registers) + text(features)), \
                blocks_loop(0, ceil_div(layer.rows, BLOCK)) as block:
            begin = block * BLOCK
            count = T.min(T.int64(BLOCK), layer.rows - begin)
            with T.serial(0, T.floordiv(count, most)) as step:
                tile(begin + step * most, most)
            with T.serial(0, T.floormod(count, most)) as step:
                tile(begin + T.floordiv(count, most) * most + step, 1)


def _panel(T: Any, layer: Layer, rows: Rows, numbers: Any, panel: Any, lanes: int) -> None:
    """Sixteen outputs for the rows of a tile."""
    bases, height = int(layer.weight.shape[0]), int(numbers.shape[0])
    sums = T.alloc_buffer((height, LANE), "int32")
    kept = T.alloc_buffer((height, LANE), "float32")
    for base in range(bases):
        _add_up(T, numbers, layer.weight, base, panel, sums, lanes)
        for row in range(height):
            found = sums[row, span(T, 0)]
            value = scaled(T, found + found - T.broadcast(rows.sizes[row], LANE),
                           rows.scales[row], layer.scale[base, span(T, panel * LANE)])
            if base:
                value = kept[row, span(T, 0)] + value
            if base < bases - 1:
                T.buffer_store(kept, value, [row, span(T, 0)])
            else:
                store_outputs(T, layer, rows.first + row, panel * LANE, value)


def _add_up(T: Any, numbers: Any, weight: Any, base: int, panel: Any, sums: Any,
            lanes: int) -> None:
    """The sums of the numbers that one base chooses."""
    words, height = int(weight.shape[2]), int(numbers.shape[0])
    cells = [(row, v) for row in range(height) for v in range(LANE // lanes)]
    ones = T.broadcast(T.uint32(0x01010101), lanes)
    for row, v in cells:
        T.buffer_store(sums, T.broadcast(T.int32(0), lanes), [row, span(T, v * lanes, lanes)])
    with T.serial(0, ceil_div(words, FLUSH)) as step:
        short = T.alloc_buffer((height, LANE // lanes, 2 * lanes), "int16")
        for row, v in cells:
            T.buffer_store(short, T.broadcast(T.int16(0), 2 * lanes),
                           [row, v, span(T, 0, 2 * lanes)])
        with T.serial(0, T.min(FLUSH, words - step * FLUSH)) as place:
            k = step * FLUSH + place
            for bit in range(STEPS):
                fours = [T.call_extern("int32", "bincompile_four",
                                       T.address_of(numbers[row, k * WORD + bit * BYTES]))
                         for row in range(height)]
                for v in range(LANE // lanes):
                    word = weight[base, panel, k, span(T, v * lanes, lanes)]
                    chosen = (word >> T.broadcast(T.uint32(bit), lanes)) & ones
                    for row in range(height):
                        at = [row, v, span(T, 0, 2 * lanes)]
                        products = T.call_extern(f"int16x{2 * lanes}", "bincompile_products",
                                                 chosen, fours[row])
                        T.buffer_store(short, short[tuple(at)] + products, at)
        for row, v in cells:
            at = [row, span(T, v * lanes, lanes)]
            pairs = T.call_extern(f"int32x{lanes}", "bincompile_pairs",
                                  short[row, v, span(T, 0, 2 * lanes)])
            T.buffer_store(sums, sums[tuple(at)] + pairs, at)
