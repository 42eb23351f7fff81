"""Majority of the signs of a bag's rows, counted by bits: a plane holds one bit of every count.

Eight rows are added up by seven full adders (each 512 columns at once) before a carry reaches the
planes of eights; rows that are left over go through all planes one by one. Half of the number of
votes is then compared with the planes. Counts are integers, so the result is exact.
Method: the carry-save adders of Harley and Seal, as in arXiv:1611.07612, kept apart by column.

Arguments as in `schedules.bags`, of tables with at least one row. A row with a scale of 0 does not
vote.
"""

from __future__ import annotations

import functools
from typing import Any

from bincompile.runtime.schedules import signed_rows
from bincompile.runtime.schedules.bags import Bags, ask_packed, later, module
from bincompile.runtime.schedules.common import LANE, ceil_div, span

REGISTER = 64  # bytes of a vector of bits, 512 columns
GROUP = 8  # rows that are added up before a carry leaves the lowest planes
LOW = 3  # planes of ones, twos and fours
HIGH = 61  # planes of eights and up: counts are below 2**64
_CARRY = LOW + GROUP  # the place of the first carry, behind those of planes and rows
_ADDERS = (  # plane, two inputs, and where the carry goes
    (0, LOW, LOW + 1, _CARRY), (0, LOW + 2, LOW + 3, _CARRY + 1),
    (0, LOW + 4, LOW + 5, _CARRY + 2), (0, LOW + 6, LOW + 7, _CARRY + 3),
    (1, _CARRY, _CARRY + 1, _CARRY + 4), (1, _CARRY + 2, _CARRY + 3, _CARRY + 5),
    (2, _CARRY + 4, _CARRY + 5, _CARRY + 6))
_EIGHTS = _CARRY + 6
_WIRES = _EIGHTS + 1

TEXT = f"""
define <16 x float> @bincompile_vote(i16 %more, i16 %tied, float %tie) alwaysinline {{
  %most = bitcast i16 %more to <16 x i1>
  %rest = call <16 x float> @bincompile_chosen(i16 %tied, float %tie, float -1.0)
  %r = select <16 x i1> %most, <16 x float> <{', '.join(['float 1.0'] * LANE)}>, <16 x float> %rest
  ret <16 x float> %r
}}
"""


def build(columns: int, indices: str, offsets: str, last: bool, tie: float) -> Any:
    """The IRModule; `tie` is the result where as many votes are +1 as -1."""
    return module(columns, 1, indices, offsets, last, False, signed_rows.text(columns) + TEXT,
                  functools.partial(_reduce, columns=columns, tie=tie))


def _reduce(T: Any, given: Bags, bag: Any, begin: Any, end: Any, columns: int,
            tie: float) -> None:
    width = ceil_div(columns, 8)
    more, tied = (T.alloc_buffer((width,), "uint8") for _ in range(2))
    blocks = width // REGISTER
    if blocks:
        with T.serial(0, blocks) as block:
            _count(T, given, begin, end, block * REGISTER, REGISTER, more, tied, block == 0)
    start = blocks * REGISTER
    for size in (REGISTER >> step for step in range(1, 7)):
        if (width - start) & size:
            _count(T, given, begin, end, start, size, more, tied, T.bool(start == 0))
            start += size

    def finish(vector: Any) -> None:
        bits = [signed_rows.word(T, votes, (0,), vector, columns) for votes in (more, tied)]
        value = T.call_extern("float32x16", "bincompile_vote", *bits, T.float32(tie))
        signed_rows.store(T, given.out, bag, vector, value)

    signed_rows.each_vector(T, columns, finish)


def _count(T: Any, given: Bags, begin: Any, end: Any, start: Any, size: int, more: Any,
           tied: Any, first: Any) -> None:
    """Where more votes are +1, and where as many, for `size` bytes of columns from `start` on."""
    wires = [T.alloc_buffer((size,), "uint8") for _ in range(_WIRES)]
    rows = T.alloc_buffer((GROUP * size,), "uint8")
    high = T.alloc_buffer((HIGH * size,), "uint8")
    counts = T.alloc_buffer((2,), "int64")  # of votes, and of unknown rows
    loops = T.alloc_buffer((2,), "int64")
    T.buffer_store(loops, T.floordiv(end - begin, T.int64(GROUP)), [0])
    T.buffer_store(loops, T.int64(64) - T.cast(T.clz(T.max(loops[0], T.int64(1))), "int64"), [1])
    whole, planes = loops[0], loops[1]
    for count in range(2):
        T.buffer_store(counts, T.int64(0), [count])
    for plane in range(LOW):
        _put(T, wires, size, plane, _bytes(T, T.uint8(0), size))
    with T.serial(0, planes) as plane:
        _put(T, high, size, plane, _bytes(T, T.uint8(0), size))
    with T.serial(0, whole) as group:
        with T.serial(0, GROUP) as row:
            _fetch(T, given, begin + group * GROUP + row, start, rows, size, row, counts, first)
        for row in range(GROUP):
            _put(T, wires, size, LOW + row, _get(T, rows, size, row))
        for plane, one, two, carry in _ADDERS:
            _add(T, wires, size, plane, one, two, carry)
        _ripple(T, wires, size, _EIGHTS, high, planes)
    with T.serial(begin + whole * GROUP, end) as at:
        _fetch(T, given, at, start, wires, size, LOW, counts, first)
        for plane in range(LOW):
            _half_add(T, wires, size, plane, wires, LOW)
        _ripple(T, wires, size, LOW, high, planes)
    _compare(T, wires, high, size, planes, counts[0])
    odd = T.cast(T.int64(0) - (T.int64(1) - counts[0] % 2), "uint8")
    T.buffer_store(more, _get(T, wires, size, LOW), [span(T, start, size)])
    T.buffer_store(tied, _get(T, wires, size, LOW + 1) & _bytes(T, odd, size),
                   [span(T, start, size)])
    with T.If(counts[1] > 0), T.Then():
        T.buffer_store(given.bad, T.int32(1), [0])


def _bytes(T: Any, value: Any, size: int) -> Any:
    return value if size == 1 else T.broadcast(value, size)


def _at(T: Any, planes: Any, size: int, place: Any) -> tuple[Any, Any]:
    """Where a plane lies: a buffer of its own, which stays in a register, or a part of one."""
    if isinstance(planes, list):
        return planes[place], span(T, 0, size)
    return planes, span(T, place * size, size)


def _get(T: Any, planes: Any, size: int, place: Any) -> Any:
    buffer, where = _at(T, planes, size, place)
    return buffer[where]


def _put(T: Any, planes: Any, size: int, place: Any, value: Any) -> None:
    buffer, where = _at(T, planes, size, place)
    T.buffer_store(buffer, value, [where])


def _fetch(T: Any, given: Bags, at: Any, start: Any, rows: Any, size: int, place: Any, counts: Any,
           first: Any) -> None:
    """The bits of one row, or zeros for one that does not vote."""
    read = T.alloc_buffer((2,), "int64")
    T.buffer_store(read, T.cast(given.indices[at], "int64"), [0])
    index = read[0]
    ask_packed(T, given, first)(later(T, given, at))
    known = T.And(index >= 0, index < given.rows)
    row = T.Select(known, index, T.int64(0))
    votes = T.And(T.And(known, index != given.padding), given.scale[row, 0] != T.float32(0))
    T.buffer_store(read, T.Select(votes, T.int64(1), T.int64(0)), [1])
    voting = read[1]
    T.buffer_store(counts, counts[0] + voting, [0])
    T.buffer_store(counts, counts[1] + T.Select(known, T.int64(0), T.int64(1)), [1])
    mask = T.cast(T.int64(0) - voting, "uint8")
    _put(T, rows, size, place,
         given.table[row, span(T, start, size)] & _bytes(T, mask, size))


def _add(T: Any, wires: Any, size: int, plane: int, one: int, two: int, carry: int) -> None:
    """A full adder: the sum stays in the plane."""
    low, a, b = (_get(T, wires, size, place) for place in (plane, one, two))
    _put(T, wires, size, carry, (a & b) | (low & (a ^ b)))
    _put(T, wires, size, plane, low ^ a ^ b)


def _half_add(T: Any, planes: Any, size: int, plane: Any, wires: Any, carry: int) -> None:
    """Add the carry to a plane; what it carries takes its place."""
    low, added = _get(T, planes, size, plane), _get(T, wires, size, carry)
    spare = _EIGHTS - 1  # free: all adders before have been read
    _put(T, wires, size, spare, low & added)
    _put(T, planes, size, plane, low ^ added)
    _put(T, wires, size, carry, _get(T, wires, size, spare))


def _ripple(T: Any, wires: Any, size: int, carry: int, high: Any, planes: Any) -> None:
    with T.serial(0, planes) as plane:
        _half_add(T, high, size, plane, wires, carry)


def _compare(T: Any, wires: Any, high: Any, size: int, planes: Any, kept: Any) -> None:
    """Whether each count is more than half of `kept`, and whether it is the whole part of it."""
    more, same = LOW, LOW + 1
    _put(T, wires, size, more, _bytes(T, T.uint8(0), size))
    _put(T, wires, size, same, _bytes(T, T.uint8(255), size))

    def step(counted: Any, place: Any) -> None:
        bit = ((kept >> 1) >> place) & T.int64(1)
        half = _bytes(T, T.cast(T.int64(0) - bit, "uint8"), size)
        equal = _get(T, wires, size, same)
        _put(T, wires, size, more, _get(T, wires, size, more) | (equal & counted & ~half))
        _put(T, wires, size, same, equal & ~(counted ^ half))

    with T.serial(0, planes) as plane:
        step(_get(T, high, size, planes - 1 - plane), planes - 1 - plane + LOW)
    for plane in reversed(range(LOW)):
        step(_get(T, wires, size, plane), T.int64(plane))
