"""A block of query rows of an attention kernel: scores, their powers, and the sum of values."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from bincompile.runtime.schedules.attention_parts import (
    Columns,
    ask,
    largest,
    load,
    pack_row,
    power,
    store,
    total,
)
from bincompile.runtime.schedules.common import LANE, WORD, ceil_div, span
from bincompile.runtime.schedules.vector_math import ROUND

QUAD = 4  # keys of one 32-bit word of bytes
LEVELS = {"int8": 127.0, "uint8": 255.0}
TOGETHER = 4  # rows whose powers are computed side by side
UNROLLED = 4  # words of a row of bits up to which queries stay in registers
ACCUMULATORS = 24  # vectors of sums that fit in registers beside what they are made of


@dataclasses.dataclass(frozen=True)
class Facets:
    """What one compiled kernel is for; see `bincompile.ops.binary_attention`.

    Args:
        vnni: whether the processor multiplies vectors of bytes (AVX-512 VNNI).
    """

    features: int
    width: int
    bias: bool
    mask: bool
    causal: bool
    probabilities: str
    values: str
    vnni: bool

    @property
    def words(self) -> int:
        """32-bit words of one row of bits."""
        return ceil_div(self.features, WORD)

    @property
    def columns(self) -> int:
        """Vectors of one row of the result."""
        return ceil_div(self.width, LANE)

    @property
    def sums(self) -> str:
        """How values are added up: "bytes", "integers" or "floats"."""
        if self.probabilities != "uint8":
            return "floats"
        return "bytes" if self.vnni else "integers"


@dataclasses.dataclass(frozen=True)
class Tensors:
    """The arguments of the compiled function; what it does without is None."""

    batch: Any
    heads: Any
    rows: Any
    keys: Any
    query: Any
    key: Any
    value: Any
    bias: Any
    mask: Any
    threshold: Any
    scale: Any
    out: Any


@dataclasses.dataclass(frozen=True)
class Head:
    """One head: where it is, and its packed keys and values."""

    batch: Any
    head: Any
    tiles: Any  # vectors of keys
    bits: Any  # (tiles, words, 16)
    key_scale: Any  # (tiles, 16)
    value: Any  # as `Facets.sums` says
    value_scale: Any  # (tiles, 16), or None
    poison: Any  # 0, or nan where some value is not finite


class Block:
    """One block of rows of one head."""

    def __init__(self, T: Any, facets: Facets, tensors: Tensors, head: Head, scores: Any,
                 codes: Any, first: Any, height: int) -> None:
        """The block of `height` rows from `first` on; `scores` and `codes` are room for it."""
        self.T, self.facets, self.tensors, self.head = T, facets, tensors, head
        self.scores, self.codes, self.first, self.height = scores, codes, first, height
        self.factors = T.alloc_buffer((height,), "float32")
        self.bases = T.alloc_buffer((height,), "float32")
        self.tops = T.alloc_buffer((height, LANE), "float32")

    def run(self) -> None:
        """Write these rows of the result."""
        T, keys = self.T, self.tensors.keys
        bits = self._queries()
        tiles, whole = self.head.tiles, T.floordiv(keys, LANE)
        if self.facets.causal:  # a value that is not finite counts where its weight is 0, too
            seen = T.if_then_else(self.head.poison[0] == T.float32(0),
                                  T.min(keys, self.first + self.height), keys)
            tiles = ceil_div(seen, LANE)
            whole = T.floordiv(T.min(keys, self.first + 1), LANE)
        best = T.alloc_buffer((self.height, LANE), "float32")
        for row in range(self.height):
            T.buffer_store(best, T.broadcast(T.float32(-math.inf), LANE), [row, span(T, 0)])
        with T.serial(0, whole) as tile:
            self._score(bits, tile, best, False)
        with T.serial(0, tiles - whole) as step:
            self._score(bits, whole + step, best, True)
        for row in range(self.height):
            T.buffer_store(self.tops, best[row, span(T, 0)], [row, span(T, 0)])
        self._weigh(tiles)
        self._add_up(tiles)

    def _queries(self) -> Any:
        T, scale = self.T, self.tensors.scale
        bits = T.alloc_buffer((self.height, self.facets.words), "uint32")
        with T.serial(0, self.height) as row:
            place = (self.head.batch, self.head.head, self.first + row)
            ask(T, Columns(self.tensors.query, (*place[:2], place[2] + self.height),
                           self.facets.features))
            pack_row(T, Columns(self.tensors.query, place, self.facets.features),
                     lambda k, word: T.buffer_store(bits, word, [row, k]),
                     lambda mean: T.buffer_store(self.factors, mean * scale, [row]))
        return bits

    def _score(self, bits: Any, tile: Any, best: Any, partly: bool) -> None:
        """The scores of 16 keys for every row; `partly` where some are hidden or do not exist."""
        T = self.T
        differ = T.alloc_buffer((self.height, LANE), "int32")
        for row in range(self.height):
            T.buffer_store(differ, T.broadcast(T.int32(0), LANE), [row, span(T, 0)])

        def add(k: Any) -> None:
            for row in range(self.height):
                word = self.head.bits[tile, k, span(T, 0)] ^ T.broadcast(bits[row, k], LANE)
                T.buffer_store(differ, differ[row, span(T, 0)] + T.cast(
                    T.popcount(word), "int32x16"), [row, span(T, 0)])

        if self.facets.words <= UNROLLED:
            for k in range(self.facets.words):
                add(k)
        else:
            with T.serial(0, self.facets.words) as k:
                add(k)
        for row in range(self.height):
            score = self._scaled(differ[row, span(T, 0)], row, tile, partly)
            T.buffer_store(self.scores, score, [row, span(T, tile * LANE)])
            at = [row, span(T, 0)]
            T.buffer_store(best, T.Select(score > best[tuple(at)], score, best[tuple(at)]), at)

    def _scaled(self, differ: Any, row: int, tile: Any, partly: bool) -> Any:
        """Scores as the reference rounds them, -inf where hidden."""
        T, tensors = self.T, self.tensors
        place = (self.head.batch, self.head.head, self.first + row)
        hidden = T.broadcast(T.float32(-math.inf), LANE)
        left = T.cast(tensors.keys - tile * LANE, "int32") if partly else None
        dot = T.broadcast(T.float32(self.facets.features), LANE) - T.cast(
            differ, "float32x16") * T.broadcast(T.float32(2), LANE)
        score = dot * T.broadcast(self.factors[row], LANE) * self.head.key_scale[tile, span(T, 0)]
        if tensors.bias is not None:
            added = (load(T, Columns(tensors.bias, place, tensors.keys), tile * LANE, left)
                     if partly else tensors.bias[(*place, span(T, tile * LANE))])
            score = T.call_extern("float32x16", "bincompile_as_rounded", score) + added
        if tensors.mask is not None:
            kept = (T.call_extern("uint8x16", "bincompile_some_bytes", T.address_of(
                tensors.mask[(*place, tile * LANE)]), left)
                if partly else tensors.mask[(*place, span(T, tile * LANE))])
            score = T.Select(kept != T.broadcast(T.uint8(0), LANE), score, hidden)
        if partly:
            if self.facets.causal:
                left = T.min(left, T.cast(self.first + (row + 1) - tile * LANE, "int32"))
            score = T.Select(T.ramp(T.int32(0), 1, LANE) < T.broadcast(left, LANE), score, hidden)
        return score

    def _weigh(self, tiles: Any) -> None:
        """Scores to the weights of values, and the factor of each row's sum."""
        T, height = self.T, self.height
        sums, most = (T.alloc_buffer((height, LANE), "float32") for _ in range(2))
        with T.serial(0, height) as row:
            top = largest(T, self.tops[row, span(T, 0)])
            T.buffer_store(self.bases, T.Select(top == T.float32(-math.inf), T.float32(0), top),
                           [row])
        for start in range(0, height, TOGETHER):
            self._raise(range(start, min(start + TOGETHER, height)), tiles, sums, most)
        steps = T.alloc_buffer((height,), "float32")
        with T.serial(0, height) as row:
            whole = total(T, sums[row, span(T, 0)])
            if self.facets.sums == "floats":
                T.buffer_store(self.factors, _share(T, T.float32(1), whole), [row])
            else:
                best = largest(T, most[row, span(T, 0)])
                share = _share(T, best, whole * T.float32(LEVELS["uint8"]))
                T.buffer_store(self.factors, share + self.head.poison[0], [row])
                T.buffer_store(steps, T.float32(LEVELS["uint8"]) / best, [row])
        if self.facets.sums != "floats":
            self._quantise(steps, tiles)

    def _raise(self, rows: range, tiles: Any, sums: Any, most: Any) -> None:
        """Scores of some rows to powers, and their sum; for integers times the values' scales."""
        T = self.T
        added, best = (T.alloc_buffer((len(rows), LANE), "float32")
                       for _ in range(2))
        for place in range(len(rows)):
            for kept in (added, best):
                T.buffer_store(kept, T.broadcast(T.float32(0), LANE), [place, span(T, 0)])
        with T.serial(0, tiles) as tile:
            for place, row in enumerate(rows):
                at, here = [row, span(T, tile * LANE)], [place, span(T, 0)]
                below = self.scores[tuple(at)] - T.broadcast(self.bases[row], LANE)
                weight = self._counted(power(T, below))
                T.buffer_store(added, added[tuple(here)] + weight, here)
                if self.facets.sums != "floats":
                    weight = weight * self.head.value_scale[tile, span(T, 0)]
                    more = best[tuple(here)]
                    T.buffer_store(best, T.Select(weight > more, weight, more), here)
                T.buffer_store(self.scores, weight, at)
        for place, row in enumerate(rows):
            T.buffer_store(sums, added[place, span(T, 0)], [row, span(T, 0)])
            T.buffer_store(most, best[place, span(T, 0)], [row, span(T, 0)])

    def _counted(self, powers: Any) -> Any:
        T, kind = self.T, self.facets.probabilities
        zero, ones = (T.broadcast(T.float32(n), LANE) for n in (0, 1))
        if kind == "int8":
            large = T.broadcast(T.float32(ROUND), LANE)
            level = powers * T.broadcast(T.float32(LEVELS[kind]), LANE) + large
            return T.call_extern("float32x16", "bincompile_as_rounded", level) - large
        if kind == "binary":
            least = T.min(self.tensors.threshold[self.head.head], T.float32(1))
            none = T.Select(powers >= zero, zero, powers)  # nan stays
            kept = T.Select(powers >= T.broadcast(least, LANE), ones, none)
            return T.Select(powers > zero, kept, none)
        return powers

    def _quantise(self, steps: Any, tiles: Any) -> None:
        """Weights to integers up to 255, of which the largest weight is one."""
        T = self.T
        with T.serial(0, tiles) as tile:
            for row in range(self.height):
                scaled = self.scores[row, span(T, tile * LANE)] * T.broadcast(
                    steps[row], LANE) + T.broadcast(T.float32(ROUND), LANE)
                code = T.reinterpret("int32x16", scaled)
                if self.facets.sums == "bytes":
                    packed = T.reinterpret("int32x4", T.cast(code, "uint8x16"))
                    T.buffer_store(self.codes, packed, [row, span(T, tile * QUAD, QUAD)])
                else:
                    T.buffer_store(self.codes, code & T.broadcast(T.int32(255), LANE),
                                   [row, span(T, tile * LANE)])

    def _add_up(self, tiles: Any) -> None:
        """The sum of values, some vectors of the result at a time."""
        T, facets = self.T, self.facets
        kind = "float32" if facets.sums == "floats" else "int32"
        steps = tiles * (LANE // QUAD if facets.sums == "bytes" else LANE)
        several = ceil_div(facets.columns, ceil_div(facets.columns * self.height, ACCUMULATORS))
        for start in range(0, facets.columns, several):
            columns = range(start, min(start + several, facets.columns))
            sums = T.alloc_buffer((self.height, several, LANE), kind)
            for row in range(self.height):
                for place in range(len(columns)):
                    T.buffer_store(sums, T.broadcast(T.float32(0) if kind == "float32" else
                                                     T.int32(0), LANE), [row, place, span(T, 0)])
            with T.serial(0, steps) as step:
                for place, column in enumerate(columns):
                    value = self._value(step, column)
                    for row in range(self.height):
                        at = [row, place, span(T, 0)]
                        T.buffer_store(sums, self._added(sums[tuple(at)], row, step, value), at)
            self._store(sums, columns)

    def _value(self, step: Any, column: int) -> Any:
        T, value = self.T, self.head.value
        if self.facets.sums == "bytes":
            return value[step, column, span(T, 0)]
        return value[step, span(T, column * LANE)]

    def _added(self, sum_: Any, row: int, step: Any, value: Any) -> Any:
        T = self.T
        if self.facets.sums == "floats":
            return sum_ + T.broadcast(self.scores[row, step], LANE) * value
        code = T.broadcast(self.codes[row, step], LANE)
        if self.facets.sums == "bytes":
            return T.call_extern("int32x16", "bincompile_dot", sum_, code, value)
        return sum_ + ((code ^ value) - value)

    def _store(self, sums: Any, columns: range) -> None:
        T = self.T
        for row in range(self.height):
            out = Columns(self.tensors.out,
                          (self.head.batch, self.head.head, self.first + row), self.facets.width)
            for place, column in enumerate(columns):
                found = sums[row, place, span(T, 0)]
                if self.facets.sums != "floats":
                    found = T.cast(found, "float32x16")
                store(T, out, column * LANE, found * T.broadcast(self.factors[row], LANE))


def _share(T: Any, part: Any, whole: Any) -> Any:
    """part / whole; 0 where nothing is there, and nan stays."""
    return T.Select(whole == T.float32(0), T.float32(0), part / whole)
