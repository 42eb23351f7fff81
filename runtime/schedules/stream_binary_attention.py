"""Attention of each row's newest token to keys of 1 bit in its ring, and the ring's next slot.

A vector holds 32 bits of the keys of 16 slots, so that popcounts give their scores without a
horizontal sum. Slots that the token does not see are never added up.

Arguments: query, key (M, H, features), value (M, H, width), each of any strides but the last
axis's; key_bits (N, H, tiles, words, 16) int32, key_scales (N, H, tiles, 16), held (N, H,
tiles * 16, width), rows (M) and clock (N) int64, [threshold (H)], scale, window, rate, delay
(numbers), out (M, H, width). The functions "serial" and "heads", which splits the heads of all rows
among threads, return 1 where a row is not there, or 2 where its ring has no slot left, of which
nothing is read or written then. Method: BinaryAttention, arXiv:2603.09582.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from bincompile.runtime.schedules.attention_parts import (
    Columns,
    helpers,
    largest,
    load,
    pack_row,
    power,
    store,
    total,
)
from bincompile.runtime.schedules.common import LANE, WORD, ceil_div, return_flag, span
from bincompile.runtime.schedules.stream_queries import Token, each_token, kept
from bincompile.runtime.schedules.vector_math import ROUND

MODES = ("serial", "heads")
# Passes of TVM without use here that would take half of the time of a compilation.
SKIPPED = ("s_tir.CompactBufferAllocation", "s_tir.HoistIfThenElse")
LEVELS = 127.0
SPLITS = 4  # sums of values that are carried side by side, so that none waits for the last
ACCUMULATORS = 16  # vectors of sums that fit in registers


@dataclasses.dataclass(frozen=True)
class Facets:
    """What one compiled kernel is for; see `bincompile.ops.stream_binary_attention`."""

    features: int
    width: int
    unbounded: bool
    probabilities: str
    values: str
    avx512: bool

    @property
    def words(self) -> int:
        """Words of one key."""
        return ceil_div(self.features, WORD)


@dataclasses.dataclass(frozen=True)
class Tensors:
    """The arguments of the compiled function; what it does without is None."""

    sizes: tuple[Any, ...]  # M, N, H, tiles
    query: Any
    key: Any
    value: Any
    key_bits: Any
    key_scales: Any
    held: Any
    rows: Any
    clock: Any
    threshold: Any
    scale: Any
    window: Any
    rate: Any
    delay: Any
    out: Any


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
    tensors = _arguments(T, mode, facets)
    count, _, heads, tiles = tensors.sizes
    with T.attr(0, "pragma_import_llvm", helpers(facets.avx512)):
        bad = T.alloc_buffer((1,), "int32")
        T.buffer_store(bad, T.int32(0), [0])
        if mode == "serial":
            scores = T.alloc_buffer((tiles * LANE,), "float32")
            with T.serial(0, count) as place, \
                    each_token(T, facets.unbounded, tensors, place, bad) as token, \
                    T.serial(0, heads) as head:
                Head(T, facets, tensors, token, head, scores).run()
        else:
            with T.parallel(0, count * heads) as unit, each_token(
                    T, facets.unbounded, tensors, T.floordiv(unit, heads), bad) as token:
                Head(T, facets, tensors, token, T.floormod(unit, heads),
                     T.alloc_buffer((tiles * LANE,), "float32")).run()
        return_flag(T, bad)


def _arguments(T: Any, name: str, facets: Facets) -> Tensors:
    T.func_name(name)
    T.func_attr({"global_symbol": name, "tirx.noalias": True})
    m, n, heads, tiles = (T.int64() for _ in range(4))

    def argument(label: str, shape: tuple[Any, ...], dtype: str = "float32",
                 strided: bool = False) -> Any:
        strides = [T.int64() for _ in shape[1:]] + [T.int64(1)] if strided else None
        sizes = [T.int64(size) if isinstance(size, int) else size for size in shape]
        return T.match_buffer(T.arg(label, T.handle()), sizes, dtype, strides=strides,
                              align=8 if dtype == "int64" else 4)

    return Tensors(
        (m, n, heads, tiles),
        argument("query", (m, heads, facets.features), strided=True),
        argument("key", (m, heads, facets.features), strided=True),
        argument("value", (m, heads, facets.width), strided=True),
        argument("key_bits", (n, heads, tiles, facets.words, LANE), "int32"),
        argument("key_scales", (n, heads, tiles, LANE)),
        argument("held", (n, heads, tiles * LANE, facets.width)),
        argument("rows", (m,), "int64"), argument("clock", (n,), "int64"),
        argument("threshold", (heads,)) if facets.probabilities == "binary" else None,
        T.arg("scale", T.float32()), T.arg("window", T.int64()), T.arg("rate", T.int64()),
        T.arg("delay", T.int64()),
        argument("out", (m, heads, facets.width)))


class Head:
    """One head of one token."""

    def __init__(self, T: Any, facets: Facets, tensors: Tensors, token: Token, head: Any,
                 scores: Any) -> None:
        """Nothing is written yet; `scores` is room for those of one head."""
        self.T, self.facets, self.tensors, self.token = T, facets, tensors, token
        self.head, self.scores = head, scores
        self.best, self.added = (T.alloc_buffer((LANE,), "float32") for _ in range(2))
        self.factor = T.alloc_buffer((1,), "float32")

    def run(self) -> None:
        """Write the new key and value, then this head of the result."""
        T, token = self.T, self.token
        self._append()
        with T.If(token.count > 0):
            with T.Then():
                used = kept(T, T.min(token.used + 1, self.tensors.sizes[3]))
                self._score(used)
                self._weigh(used)
                self._add_up()
            with T.Else():
                out = Columns(self.tensors.out, (token.place, self.head), self.facets.width)
                for column in range(0, self.facets.width, LANE):
                    store(T, out, column, T.broadcast(T.float32(0), LANE))

    def _append(self) -> None:
        T, token, tensors, width = self.T, self.token, self.tensors, self.facets.width
        tile, lane = T.floordiv(token.slot, LANE), T.floormod(token.slot, LANE)
        at = (token.row, self.head, tile)
        pack_row(T, Columns(tensors.key, (token.place, self.head), self.facets.features),
                 lambda k, word: T.buffer_store(
                     tensors.key_bits, T.reinterpret("int32", word), [*at, k, lane]),
                 lambda mean: T.buffer_store(tensors.key_scales, mean, [*at, lane]))
        source = Columns(tensors.value, (token.place, self.head), width)
        goal = Columns(tensors.held, (token.row, self.head, token.slot), width)
        mean = T.alloc_buffer((1,), "float32")
        if self.facets.values == "binary":
            pack_row(T, source, None, lambda size: T.buffer_store(mean, size, [0]))
        for column in range(0, width, LANE):
            value = load(T, source, column)
            if self.facets.values == "binary":
                size = T.broadcast(mean[0], LANE)
                value = T.Select(value >= T.broadcast(T.float32(0), LANE), size,
                                 T.broadcast(T.float32(0), LANE) - size)
            store(T, goal, column, value)

    def _score(self, used: Any) -> None:
        """The scores of all tiles and the largest; -inf where the token does not see a slot."""
        T, token, tensors = self.T, self.token, self.tensors
        bits = T.alloc_buffer((self.facets.words,), "uint32")
        pack_row(T, Columns(tensors.query, (token.place, self.head), self.facets.features),
                 lambda k, word: T.buffer_store(bits, word, [k]),
                 lambda mean: T.buffer_store(self.factor, mean * tensors.scale, [0]))
        T.buffer_store(self.best, T.broadcast(T.float32(-math.inf), LANE), [span(T, 0)])
        differ = T.alloc_buffer((LANE,), "int32")
        hidden = T.broadcast(T.float32(-math.inf), LANE)
        with T.serial(0, used) as tile:
            T.buffer_store(differ, T.broadcast(T.int32(0), LANE), [span(T, 0)])
            for k in range(self.facets.words):
                word = T.reinterpret("uint32x16", tensors.key_bits[
                    token.row, self.head, tile, k, span(T, 0)]) ^ T.broadcast(bits[k], LANE)
                T.buffer_store(differ, differ[span(T, 0)] + T.cast(
                    T.popcount(word), "int32x16"), [span(T, 0)])
            dot = T.broadcast(T.float32(self.facets.features), LANE) - T.cast(
                differ[span(T, 0)], "float32x16") * T.broadcast(T.float32(2), LANE)
            score = dot * T.broadcast(self.factor[0], LANE) * tensors.key_scales[
                token.row, self.head, tile, span(T, 0)]
            behind = T.broadcast(T.cast(token.slot - tile * LANE, "int32"), LANE) - T.ramp(
                T.int32(0), 1, LANE)
            slots = T.broadcast(T.cast(token.slots, "int32"), LANE)
            distance = T.Select(behind < T.broadcast(T.int32(0), LANE), behind + slots, behind)
            score = T.bind(T.Select(distance < T.broadcast(T.cast(token.count, "int32"), LANE),
                                    score, hidden))
            T.buffer_store(self.scores, score, [span(T, tile * LANE)])
            best = self.best[span(T, 0)]
            T.buffer_store(self.best, T.Select(score > best, score, best), [span(T, 0)])

    def _weigh(self, used: Any) -> None:
        """Scores to the weights of values, and the factor of their sum."""
        T = self.T
        base = T.alloc_buffer((1,), "float32")
        top = largest(T, self.best[span(T, 0)])
        T.buffer_store(base, T.Select(top == T.float32(-math.inf), T.float32(0), top), [0])
        T.buffer_store(self.added, T.broadcast(T.float32(0), LANE), [span(T, 0)])
        with T.serial(0, used) as tile:
            here = [span(T, tile * LANE)]
            below = self.scores[tuple(here)] - T.broadcast(base[0], LANE)
            weight = T.bind(self._counted(T.bind(power(T, below))))
            T.buffer_store(self.added, self.added[span(T, 0)] + weight, [span(T, 0)])
            T.buffer_store(self.scores, weight, here)
        whole = kept(T, total(T, self.added[span(T, 0)]), "float32")
        T.buffer_store(self.factor, T.Select(whole == T.float32(0), T.float32(0),
                                             T.float32(1) / whole), [0])

    def _counted(self, powers: Any) -> Any:
        T, kind = self.T, self.facets.probabilities
        zero, ones = (T.broadcast(T.float32(n), LANE) for n in (0, 1))
        if kind == "int8":
            large = T.broadcast(T.float32(ROUND), LANE)
            level = powers * T.broadcast(T.float32(LEVELS), LANE) + large
            return T.call_extern("float32x16", "bincompile_as_rounded", level) - large
        if kind == "binary":
            least = T.min(self.tensors.threshold[self.head], T.float32(1))
            none = T.Select(powers >= zero, zero, powers)  # nan stays
            return T.Select(powers > zero, T.Select(
                powers >= T.broadcast(least, LANE), ones, none), none)
        return powers

    def _add_up(self) -> None:
        """The sum of the values that the token sees, some vectors of the result at a time."""
        T, token, columns = self.T, self.token, ceil_div(self.facets.width, LANE)
        last = kept(T, token.slot - token.count + 1)  # below 0 where the ring has wrapped around
        for start in range(0, columns, ACCUMULATORS):
            block = range(start, min(start + ACCUMULATORS, columns))
            splits = max(1, SPLITS // len(block))
            sums = T.alloc_buffer((splits, len(block), LANE), "float32")
            for split in range(splits):
                for place in range(len(block)):
                    T.buffer_store(sums, T.broadcast(T.float32(0), LANE),
                                   [split, place, span(T, 0)])
            for begin, end in ((T.max(last, 0), token.slot + 1),
                               (token.slots + T.min(last, 0), token.slots)):
                steps = kept(T, T.floordiv(end - begin, splits))
                with T.serial(0, steps) as step:
                    for split in range(splits):
                        self._add(sums, split, block, begin + step * splits + split)
                with T.serial(0, end - begin - steps * splits) as step:
                    self._add(sums, 0, block, begin + steps * splits + step)
            out = Columns(self.tensors.out, (token.place, self.head), self.facets.width)
            for place, column in enumerate(block):
                whole = sums[0, place, span(T, 0)]
                for split in range(1, splits):
                    whole = whole + sums[split, place, span(T, 0)]
                store(T, out, column * LANE, whole * T.broadcast(self.factor[0], LANE))

    def _add(self, sums: Any, split: int, block: range, slot: Any) -> None:
        T = self.T
        source = Columns(self.tensors.held, (self.token.row, self.head, slot), self.facets.width)
        weight = T.broadcast(self.scores[slot], LANE)
        for place, column in enumerate(block):
            at = [split, place, span(T, 0)]
            T.buffer_store(sums, sums[tuple(at)] + weight * load(T, source, column * LANE), at)
