"""Attention with 1-bit queries and keys, head by head, a block of query rows at a time.

The keys of a head are packed once: a vector holds 32 bits of 16 keys, so that popcounts give the
scores of 16 keys without a horizontal sum. A block of rows goes through its keys three times:
scores and their largest, powers and their sum, and the sum of values. With 8-bit probabilities and
1-bit values the last one is a product of bytes. Method: BinaryAttention, arXiv:2603.09582.

Arguments: query (B, H, M, features), key (B, H, N, features), value (B, H, N, width), [bias and
mask (B, H, M, N), the mask uint8], [threshold (H)], scale (a number), out (B, H, M, width); the
last axis of each has stride 1, the others have any. Results of integer sums are the same bit for
bit on every processor, and no row depends on how the work is split.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from bincompile.runtime.schedules.attention_block import QUAD, Block, Facets, Head, Tensors
from bincompile.runtime.schedules.attention_parts import (
    Columns,
    ask,
    helpers,
    load,
    pack_row,
    signs_as_bytes,
    signs_as_masks,
    total,
)
from bincompile.runtime.schedules.common import LANE, MODES, ceil_div, span

ROWS = 8  # query rows of one block
AHEAD = 8  # rows of keys or values that are asked for before they are read
GROUP = 32  # query rows that one thread takes at a time


def build(**parameters: Any) -> Any:
    """The IRModule of these `Facets`, with one function for each of `MODES`."""
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import ir as I
    from tvm.tirx.script import builder as T

    facets = Facets(**parameters)
    with IRBuilder() as builder, I.ir_module():
        for mode in MODES:
            with T.prim_func():
                _function(T, mode, facets)
    return builder.get()


def _function(T: Any, mode: str, facets: Facets) -> None:
    """All heads: "rows" splits them among threads, "panels" the rows of each."""
    heads_loop, rows_loop = (getattr(T, kind) for kind in MODES[mode])
    tensors = _arguments(T, mode, facets)
    with T.attr(0, "pragma_import_llvm", helpers(facets.vnni)), \
            heads_loop(0, tensors.batch * tensors.heads) as place:
        head = _head(T, facets, tensors, place)
        shared = None if mode == "panels" else _buffers(T, facets, head.tiles)
        with rows_loop(0, ceil_div(tensors.rows, GROUP)) as group:
            scores, codes = _buffers(T, facets, head.tiles) if shared is None else shared
            begin = group * GROUP
            count = T.min(T.int64(GROUP), tensors.rows - begin)
            whole = T.floordiv(count, ROWS)
            with T.serial(0, whole) as block:
                Block(T, facets, tensors, head, scores, codes, begin + block * ROWS, ROWS).run()
            with T.serial(0, count - whole * ROWS) as row:
                Block(T, facets, tensors, head, scores, codes, begin + whole * ROWS + row,
                       1).run()


def _arguments(T: Any, name: str, facets: Facets) -> Tensors:
    T.func_name(name)
    T.func_attr({"global_symbol": name, "tirx.noalias": True})
    batch, heads, rows, keys = (T.int64() for _ in range(4))

    def argument(label: str, length: Any, last: Any, dtype: str = "float32") -> Any:
        strides = [T.int64() for _ in range(3)]
        return T.match_buffer(T.arg(label, T.handle()), (batch, heads, length, last), dtype,
                              strides=[*strides, T.int64(1)], align=1 if dtype == "uint8" else 4)

    query = argument("query", rows, T.int64(facets.features))
    key = argument("key", keys, T.int64(facets.features))
    value = argument("value", keys, T.int64(facets.width))
    bias = argument("bias", rows, keys) if facets.bias else None
    mask = argument("mask", rows, keys, "uint8") if facets.mask else None
    threshold = None
    if facets.probabilities == "binary":
        threshold = T.match_buffer(T.arg("threshold", T.handle()), (heads,), "float32", align=4)
    scale = T.arg("scale", T.float32())
    out = argument("out", rows, T.int64(facets.width))
    return Tensors(batch, heads, rows, keys, query, key, value, bias, mask, threshold, scale, out)


def _buffers(T: Any, facets: Facets, tiles: Any) -> tuple[Any, Any]:
    """What one block of rows needs: scores, and 8-bit probabilities or None."""
    scores = T.alloc_buffer((ROWS, tiles * LANE), "float32")
    size = {"bytes": LANE // QUAD, "integers": LANE}.get(facets.sums)
    codes = None if size is None else T.alloc_buffer((ROWS, tiles * size), "int32")
    return scores, codes


def _head(T: Any, facets: Facets, tensors: Tensors, place: Any) -> Head:
    """Pack the keys and values of one head."""
    batch, head = T.floordiv(place, tensors.heads), T.floormod(place, tensors.heads)
    tiles = ceil_div(tensors.keys, LANE)
    bits = T.alloc_buffer((tiles, facets.words, LANE), "uint32")
    key_scale = T.alloc_buffer((tiles, LANE), "float32")
    poison = T.alloc_buffer((1,), "float32")
    T.buffer_store(poison, T.float32(0), [0])
    with T.serial(0, tensors.keys) as j:
        tile, lane = T.floordiv(j, LANE), T.floormod(j, LANE)
        ask(T, Columns(tensors.key, (batch, head, j + AHEAD), facets.features))
        pack_row(T, Columns(tensors.key, (batch, head, j), facets.features),
                 lambda k, word: T.buffer_store(bits, word, [tile, k, lane]),
                 lambda mean: T.buffer_store(key_scale, mean, [tile, lane]))
    scales = None
    if facets.values == "binary":
        scales = T.alloc_buffer((tiles, LANE), "float32")
        with T.serial(0, tiles) as tile:
            T.buffer_store(scales, T.broadcast(T.float32(0), LANE), [tile, span(T, 0)])
    packed = _VALUES[facets.sums](T, facets, tensors, (batch, head), tiles, scales, poison)
    return Head(batch, head, tiles, bits, key_scale, packed, scales, poison)


def _scale_row(T: Any, source: Columns, j: Any, scales: Any, poison: Any) -> None:
    def keep(mean: Any) -> None:
        T.buffer_store(scales, mean, [T.floordiv(j, LANE), T.floormod(j, LANE)])
        T.buffer_store(poison, T.Select(mean < T.float32(math.inf), poison[0],
                                        T.float32(math.nan)), [0])

    pack_row(T, source, None, keep)


def _float_values(T: Any, facets: Facets, tensors: Tensors, at: tuple[Any, Any], tiles: Any,
                  scales: Any, poison: Any) -> Any:
    """Values (keys, columns * 16) side by side, 0 behind their end."""
    kept = T.alloc_buffer((tiles * LANE, facets.columns * LANE), "float32")
    seen = T.alloc_buffer((LANE,), "float32")
    T.buffer_store(seen, T.broadcast(T.float32(0), LANE), [span(T, 0)])
    with T.serial(0, tensors.keys) as j:
        source = Columns(tensors.value, (*at, j), facets.width)
        ask(T, Columns(tensors.value, (*at, j + AHEAD), facets.width))
        if scales is not None:
            _scale_row(T, source, j, scales, poison)
        for column in range(facets.columns):
            value = load(T, source, column * LANE)
            if scales is None:
                finite = T.fabs(value) < T.broadcast(T.float32(math.inf), LANE)
                T.buffer_store(seen, T.Select(finite, seen[span(T, 0)], T.broadcast(
                    T.float32(math.nan), LANE)), [span(T, 0)])
            else:
                scale = T.broadcast(scales[T.floordiv(j, LANE), T.floormod(j, LANE)], LANE)
                value = T.Select(value >= T.broadcast(T.float32(0), LANE), scale, -scale)
            T.buffer_store(kept, value, [j, span(T, column * LANE)])
    with T.serial(0, tiles * LANE - tensors.keys) as j:
        for column in range(facets.columns):
            T.buffer_store(kept, T.broadcast(T.float32(0), LANE),
                           [tensors.keys + j, span(T, column * LANE)])
    if scales is None:
        T.buffer_store(poison, total(T, seen[span(T, 0)]), [0])
    return kept


def _integer_values(T: Any, facets: Facets, tensors: Tensors, at: tuple[Any, Any], tiles: Any,
                    scales: Any, poison: Any) -> Any:
    """Signs (keys, columns * 16) as 0 and -1."""
    kept = T.alloc_buffer((tiles * LANE, facets.columns * LANE), "int32")
    with T.serial(0, tensors.keys) as j:
        source = Columns(tensors.value, (*at, j), facets.width)
        ask(T, Columns(tensors.value, (*at, j + AHEAD), facets.width))
        _scale_row(T, source, j, scales, poison)
        for column in range(facets.columns):
            T.buffer_store(kept, signs_as_masks(T, load(T, source, column * LANE)),
                           [j, span(T, column * LANE)])
    with T.serial(0, tiles * LANE - tensors.keys) as j:
        for column in range(facets.columns):
            T.buffer_store(kept, T.broadcast(T.int32(0), LANE),
                           [tensors.keys + j, span(T, column * LANE)])
    return kept


def _byte_values(T: Any, facets: Facets, tensors: Tensors, at: tuple[Any, Any], tiles: Any,
                 scales: Any, poison: Any) -> Any:
    """Signs (quads of keys, columns, 16), the signs of four keys in the bytes of a word."""
    kept = T.alloc_buffer((tiles * (LANE // QUAD), facets.columns, LANE), "int32")

    def quad(first: Any, step: Any, count: int) -> None:
        rows = [Columns(tensors.value, (*at, first + place), facets.width)
                for place in range(count)]
        for place, source in enumerate(rows):
            ask(T, Columns(tensors.value, (*at, first + (place + AHEAD)), facets.width))
            _scale_row(T, source, first + place, scales, poison)
        for column in range(facets.columns):
            T.buffer_store(kept, signs_as_bytes(T, [load(T, s, column * LANE) for s in rows]),
                           [step, column, span(T, 0)])

    whole = T.floordiv(tensors.keys, QUAD)
    with T.serial(0, whole) as step:
        quad(step * QUAD, step, QUAD)
    for left in range(1, QUAD):
        with T.If(T.floormod(tensors.keys, QUAD) == left), T.Then():
            quad(whole * QUAD, whole, left)
    used = ceil_div(tensors.keys, QUAD)
    with T.serial(0, tiles * (LANE // QUAD) - used) as step:
        for column in range(facets.columns):
            T.buffer_store(kept, T.broadcast(T.int32(0), LANE), [used + step, column, span(T, 0)])
    return kept


_VALUES: dict[str, Callable[..., Any]] = {
    "floats": _float_values, "integers": _integer_values, "bytes": _byte_values}
