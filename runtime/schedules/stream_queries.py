"""The heads of one token that share a head of the key: scores, their powers, the sum of values."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from bincompile.runtime.schedules import vector_math
from bincompile.runtime.schedules.attention_parts import (
    Columns,
    largest,
    load,
    power,
    store,
    total,
)
from bincompile.runtime.schedules.common import LANE, ceil_div, span

HEADS = 4  # heads of the query that share one pass over their keys
SUMS = 4  # parts of each sum: none waits for the last, and roundings add up less
ACCUMULATORS = 24  # vectors of sums that fit in registers beside what they are made of


@dataclasses.dataclass(frozen=True)
class Facets:
    """What one compiled kernel is for; see `bincompile.ops.stream_attention`.

    Args:
        repeat: heads of the query for each of the key.
        avx512: whether the processor has AVX-512.
    """

    features: int
    width: int
    repeat: int
    unbounded: bool = False
    softcap: bool = False
    sink: bool = False
    extras: bool = False
    bias: str = ""
    slopes: bool = False
    avx512: bool = False

    @property
    def columns(self) -> int:
        """Vectors of one row of the result."""
        return ceil_div(self.width, LANE)


@dataclasses.dataclass(frozen=True)
class Tensors:
    """The arguments of the compiled function; what it does without is None."""

    sizes: tuple[Any, ...]  # M, N, G, tiles
    query: Any
    key: Any
    value: Any
    keys: Any
    values: Any
    rows: Any
    clock: Any
    sink: Any
    extra_keys: Any
    extra_values: Any
    bias: Any
    slopes: Any
    scale: Any
    softcap: Any
    window: Any
    rate: Any
    delay: Any
    out: Any


@dataclasses.dataclass(frozen=True)
class Token:
    """One token: its row of the state, its slot, how many tokens it sees, how many tiles hold any.
    """

    place: Any
    row: Any
    slot: Any
    count: Any
    used: Any
    slots: Any


def kept(T: Any, number: Any, dtype: str = "int64") -> Any:
    """A number in memory of its own: TVM would spend seconds on what follows from a name for it."""
    memory = T.alloc_buffer((1,), dtype)
    T.buffer_store(memory, number, [0])
    return memory[0]


@contextlib.contextmanager
def each_token(T: Any, unbounded: bool, tensors: Any, place: Any, bad: Any) -> Iterator[Token]:
    """The token at a place of the rows, if its row is there and its ring has a slot for it."""
    row, slots = kept(T, tensors.rows[place]), tensors.sizes[3] * LANE
    with T.If(T.And(row >= 0, row < tensors.sizes[1])):
        with T.Then():
            index = kept(T, -T.floordiv(tensors.delay - tensors.clock[row], tensors.rate))
            with T.If(index < slots if unbounded else T.bool(True)):
                with T.Then():
                    yield Token(place, row, kept(T, T.floormod(index, slots)),
                                kept(T, T.min(index + 1, tensors.window)),
                                kept(T, ceil_div(T.min(index, slots), LANE)), slots)
                with T.Else():
                    T.buffer_store(bad, T.int32(2), [0])
        with T.Else():
            T.buffer_store(bad, T.int32(1), [0])


class Head:
    """One head of the key, with the heads of the query that it serves."""

    def __init__(self, T: Any, facets: Facets, tensors: Tensors, token: Token, group: Any,
                 scores: Any) -> None:
        """Nothing is written yet; `scores` is room for those of `HEADS` heads."""
        self.T, self.facets, self.tensors, self.token = T, facets, tensors, token
        self.group, self.scores = group, scores

    def run(self) -> None:
        """Write these heads of the result, then the new key and value."""
        T, repeat = self.T, self.facets.repeat
        first = self.group * repeat
        with T.If(self.token.count > 0):
            with T.Then():
                with T.serial(0, repeat // HEADS) as chunk:
                    Queries(self, kept(T, first + chunk * HEADS), HEADS).run()
                if repeat % HEADS:
                    Queries(self, first + repeat // HEADS * HEADS, repeat % HEADS).run()
            with T.Else(), T.serial(0, repeat) as head:
                out = Columns(self.tensors.out, (self.token.place, first + head),
                              self.facets.width)
                for column in range(0, self.facets.width, LANE):
                    store(T, out, column, T.broadcast(T.float32(0), LANE))
        self._append()

    def _append(self) -> None:
        T, token, tensors = self.T, self.token, self.tensors
        tile, lane = T.floordiv(token.slot, LANE), T.floormod(token.slot, LANE)
        with T.serial(0, self.facets.features) as k:
            T.buffer_store(tensors.keys, tensors.key[token.place, self.group, k],
                           [token.row, self.group, tile, k, lane])
        goal = Columns(tensors.values, (token.row, self.group, token.slot), self.facets.width)
        source = Columns(tensors.value, (token.place, self.group), self.facets.width)
        for column in range(0, self.facets.width, LANE):
            store(T, goal, column, load(T, source, column))


class Queries:
    """Some heads of the query that share one head of the key."""

    def __init__(self, head: Head, first: Any, count: int) -> None:
        """The `count` heads from `first` on."""
        self.T, self.facets, self.tensors, self.token = (
            head.T, head.facets, head.tensors, head.token)
        self.group, self.scores, self.first, self.count = head.group, head.scores, first, count
        T = self.T
        self.extras = self.tensors.extra_keys.shape[1] if self.facets.extras else 0
        self.side = T.alloc_buffer((count, self.extras + 1), "float32")
        self.best, self.added = (T.alloc_buffer((count, LANE), "float32") for _ in range(2))
        self.factors = T.alloc_buffer((count,), "float32")

    def run(self) -> None:
        """Write these heads of the result."""
        T, used = self.T, self.token.used
        self._side()
        for row in range(self.count):
            T.buffer_store(self.best, T.broadcast(T.float32(-math.inf), LANE), [row, span(T, 0)])
        together = 2 if self.facets.avx512 and self.count <= 2 else 1
        with T.serial(0, T.floordiv(used, together)) as step:
            self._score(step * together, together)
        with T.serial(0, T.floormod(used, together)) as step:
            self._score(T.floordiv(used, together) * together + step, 1)
        self._weigh(used)
        self._add_up()

    def _side(self) -> None:
        """Scores of the token itself, and of the keys that every token sees."""
        T, token = self.T, self.token
        own = Columns(self.tensors.key, (token.place, self.group), self.facets.features)
        for row in range(self.count):
            head = self.first + row
            score = self._capped(self._dot(row, own) * self.tensors.scale, 1)
            if self.tensors.bias is not None:
                score = score + self.tensors.bias[self._bias_row(head), 0]
            T.buffer_store(self.side, score, [row, 0])
            if self.facets.extras:
                with T.serial(0, self.extras) as x:
                    extra = Columns(self.tensors.extra_keys, (self.group, x),
                                    self.facets.features)
                    T.buffer_store(self.side, self._capped(
                        self._dot(row, extra) * self.tensors.scale, 1), [row, x + 1])

    def _bias_row(self, head: Any) -> Any:
        return head if self.facets.bias == "heads" else 0

    def _dot(self, row: int, key: Columns) -> Any:
        T = self.T
        query = Columns(self.tensors.query, (self.token.place, self.first + row),
                        self.facets.features)
        sums = T.broadcast(T.float32(0), LANE)
        for column in range(0, self.facets.features, LANE):
            sums = sums + load(T, query, column) * load(T, key, column)
        return total(T, sums)

    def _capped(self, score: Any, lanes: int) -> Any:
        if not self.facets.softcap:
            return score
        T = self.T
        if lanes == 1:
            return T.call_extern("float32", "bincompile_first", self._capped(
                T.broadcast(score, LANE), LANE))
        cap = T.broadcast(self.tensors.softcap, LANE)
        return vector_math.apply(T, "tanh", score / cap) * cap

    def _score(self, tile: Any, together: int) -> None:
        """The scores of some tiles for every head."""
        T = self.T
        splits = min(SUMS, self.facets.features)
        sums = T.alloc_buffer((self.count, together, splits, LANE), "float32")
        each = [(row, place) for row in range(self.count) for place in range(together)]
        for row, place in each:
            for split in range(splits):
                T.buffer_store(sums, T.broadcast(T.float32(0), LANE), [row, place, split,
                                                                       span(T, 0)])

        def add(k: Any, split: int) -> None:
            for row, place in each:
                number = self.tensors.query[self.token.place, self.first + row, k]
                key = self.tensors.keys[self.token.row, self.group, tile + place, k, span(T, 0)]
                at = [row, place, split, span(T, 0)]
                T.buffer_store(sums, sums[tuple(at)] + T.broadcast(number, LANE) * key, at)

        with T.serial(0, self.facets.features // splits) as step:
            for split in range(splits):
                add(step * splits + split, split)
        for split in range(self.facets.features % splits):
            add(self.facets.features // splits * splits + split, split)
        for row, place in each:
            parts = [sums[row, place, split, span(T, 0)] for split in range(splits)]
            self._keep(row, tile + place, _halved(parts))

    def _keep(self, row: int, tile: Any, products: Any) -> None:
        """Scores of 16 slots, -inf where the token does not see them; its own slot is apart."""
        T, token, tensors = self.T, self.token, self.tensors
        slots = T.broadcast(T.cast(token.slots, "int32"), LANE)
        behind = T.broadcast(T.cast(token.slot - tile * LANE, "int32"), LANE) - T.ramp(
            T.int32(0), 1, LANE)
        distance = T.bind(T.Select(behind < T.broadcast(T.int32(0), LANE), behind + slots, behind))
        score = self._capped(products * T.broadcast(tensors.scale, LANE), LANE)
        head = self.first + row
        if tensors.bias is not None:
            length = T.cast(tensors.bias.shape[1], "int32")
            score = score + tensors.bias[self._bias_row(head), T.min(
                distance, T.broadcast(length - 1, LANE))]
        if tensors.slopes is not None:
            score = score - T.broadcast(tensors.slopes[head], LANE) * T.cast(
                distance, "float32x16")
        hidden = T.broadcast(T.float32(-math.inf), LANE)
        count = T.broadcast(T.cast(token.count, "int32"), LANE)
        score = T.bind(T.Select(distance < count, T.Select(
            distance > T.broadcast(T.int32(0), LANE), score, hidden), hidden))
        T.buffer_store(self.scores, score, [row, span(T, tile * LANE)])
        at = [row, span(T, 0)]
        T.buffer_store(self.best, T.Select(score > self.best[tuple(at)], score,
                                           self.best[tuple(at)]), at)

    def _weigh(self, used: Any) -> None:
        """Scores to powers, and the factor of each row's sum."""
        T = self.T
        for row in range(self.count):
            top = T.alloc_buffer((1,), "float32")
            T.buffer_store(top, largest(T, self.best[row, span(T, 0)]), [0])
            with T.serial(0, self.extras + 1) as x:
                T.buffer_store(top, T.max(top[0], self.side[row, x]), [0])
            if self.tensors.sink is not None:
                T.buffer_store(top, T.max(top[0], self.tensors.sink[self.first + row]), [0])
            base = top[0]
            T.buffer_store(self.added, T.broadcast(T.float32(0), LANE), [row, span(T, 0)])
            at = [row, span(T, 0)]
            with T.serial(0, used) as tile:
                here = [row, span(T, tile * LANE)]
                weight = T.bind(power(T, self.scores[tuple(here)] - T.broadcast(base, LANE)))
                T.buffer_store(self.added, self.added[tuple(at)] + weight, at)
                T.buffer_store(self.scores, weight, here)
            whole = T.alloc_buffer((1,), "float32")
            T.buffer_store(whole, total(T, self.added[tuple(at)]), [0])
            with T.serial(0, self.extras + 1) as x:
                T.buffer_store(self.side, self._single(self.side[row, x] - base), [row, x])
                T.buffer_store(whole, whole[0] + self.side[row, x], [0])
            if self.tensors.sink is not None:
                T.buffer_store(whole, whole[0] + self._single(
                    self.tensors.sink[self.first + row] - base), [0])
            T.buffer_store(self.factors, T.float32(1) / whole[0], [row])

    def _single(self, number: Any) -> Any:
        T = self.T
        return T.call_extern("float32", "bincompile_first", power(T, T.broadcast(number, LANE)))

    def _add_up(self) -> None:
        """The sum of the values that the token sees, some vectors of the result at a time."""
        T, token, columns = self.T, self.token, self.facets.columns
        several = ceil_div(columns, ceil_div(columns * self.count, ACCUMULATORS))
        last = kept(T, token.slot - token.count + 1)  # below 0 where the ring has wrapped around
        for start in range(0, columns, several):
            block = range(start, min(start + several, columns))
            splits = max(1, 2 * SUMS // (self.count * len(block)))
            sums = T.alloc_buffer((splits, self.count, len(block), LANE), "float32")
            self._begin(sums, block, splits)
            for begin, end in ((T.max(last, 0), token.slot),
                               (token.slots + T.min(last, 0), token.slots)):
                steps = kept(T, T.floordiv(end - begin, splits))
                with T.serial(0, steps) as step:
                    for split in range(splits):
                        self._add_slot(sums, split, block, begin + step * splits + split)
                with T.serial(0, end - begin - steps * splits) as step:
                    self._add_slot(sums, 0, block, begin + steps * splits + step)
            self._store(sums, block, splits)

    def _begin(self, sums: Any, block: range, splits: int) -> None:
        """The values of the token itself, and those that every token sees."""
        T, token = self.T, self.token
        for split in range(1, splits):
            for row in range(self.count):
                for place in range(len(block)):
                    T.buffer_store(sums, T.broadcast(T.float32(0), LANE),
                                   [split, row, place, span(T, 0)])
        own = Columns(self.tensors.value, (token.place, self.group), self.facets.width)
        for place, column in enumerate(block):
            value = T.bind(load(T, own, column * LANE))
            for row in range(self.count):
                T.buffer_store(sums, T.broadcast(self.side[row, 0], LANE) * value,
                               [0, row, place, span(T, 0)])
        if self.facets.extras:
            with T.serial(0, self.extras) as x:
                self._add(sums, 0, block, Columns(
                    self.tensors.extra_values, (self.group, x), self.facets.width),
                    lambda row: self.side[row, x + 1])

    def _add_slot(self, sums: Any, split: int, block: range, slot: Any) -> None:
        source = Columns(self.tensors.values, (self.token.row, self.group, slot),
                         self.facets.width)
        self._add(sums, split, block, source, lambda row: self.scores[row, slot])

    def _add(self, sums: Any, split: int, block: range, source: Columns, weight: Any) -> None:
        T = self.T
        for place, column in enumerate(block):
            value = load(T, source, column * LANE)
            for row in range(self.count):
                at = [split, row, place, span(T, 0)]
                T.buffer_store(sums, sums[tuple(at)] + T.broadcast(weight(row), LANE) * value, at)

    def _store(self, sums: Any, block: range, splits: int) -> None:
        T = self.T
        for row in range(self.count):
            out = Columns(self.tensors.out, (self.token.place, self.first + row),
                          self.facets.width)
            for place, column in enumerate(block):
                whole = _halved([sums[split, row, place, span(T, 0)] for split in range(splits)])
                store(T, out, column * LANE, whole * T.broadcast(self.factors[row], LANE))


def _halved(parts: list[Any]) -> Any:
    """The sum of some vectors, two by two."""
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)] + (
            parts[-1:] if len(parts) % 2 else [])
    return parts[0]
