"""Pooling of the last tokens: the end of one block joined with the beginning of the next.

`pool`: token (M, F), ring (N, window, F), ends (N, window, F), begin (N, 2, F), rows, clock, rate,
delay, out (M, F). The ends of a block are computed when the next one begins, from its last token
to its second.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from bincompile.runtime.schedules.joining import joined, text
from bincompile.runtime.schedules.ticks import each_step, function, steps, tensor


class _Pool(NamedTuple):
    kind: str
    dtype: str
    wide: str
    window: Any
    size: Any
    token: Any
    ring: Any
    ends: Any
    begin: Any
    out: Any


def build(kind: str, dtype: str, wide: str) -> Any:
    """The IRModule; `dtype` of the tokens, `wide` of what is summed up."""
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import ir as I

    with IRBuilder() as builder, I.ir_module(), function("pool") as T:
        count, streams, window, size = (T.int64() for _ in range(4))
        token = tensor(T, "token", (count, size), dtype)
        ring = tensor(T, "ring", (streams, window, size), dtype)
        ends = tensor(T, "ends", (streams, window, size), wide)
        begin = tensor(T, "begin", (streams, 2, size), wide)
        given = steps(T, count, streams)
        out = tensor(T, "out", (count, size), dtype)
        pool = _Pool(kind, dtype, wide, window, size, token, ring, ends, begin, out)
        with T.attr(0, "pragma_import_llvm", text(kind)):
            each_step(T, given, lambda place, row, index: _step(T, pool, place, row, index))
    return builder.get()


def _step(T: Any, pool: _Pool, place: Any, row: Any, index: Any) -> None:
    at = T.floormod(index, pool.window)
    with T.If(T.And(at == 0, index > 0)), T.Then():
        _turn(T, pool, row)
    with T.serial(0, pool.size) as f:
        T.buffer_store(pool.ring, pool.token[place, f], [row, at, f])
    with T.If(T.And(at > 0, index > 0)):
        with T.Then(), T.serial(0, pool.size) as f:
            before = pool.begin[row, T.floormod(index + 1, 2), f]
            T.buffer_store(pool.begin, joined(T, pool.kind, before, _wide(T, pool, place, f)),
                           [row, T.floormod(index, 2), f])
        with T.Else(), T.serial(0, pool.size) as f:
            T.buffer_store(pool.begin, _wide(T, pool, place, f),
                           [row, T.floormod(index, 2), f])
    _answer(T, pool, place, row, index)


def _wide(T: Any, pool: _Pool, place: Any, f: Any) -> Any:
    return T.cast(pool.token[place, f], pool.wide)


def _turn(T: Any, pool: _Pool, row: Any) -> None:
    with T.serial(1, pool.window) as step:
        at = pool.window - step
        with T.If(step > 1):
            with T.Then(), T.serial(0, pool.size) as f:
                value = T.cast(pool.ring[row, at, f], pool.wide)
                T.buffer_store(pool.ends, joined(T, pool.kind, pool.ends[row, at + 1, f], value),
                               [row, at, f])
            with T.Else(), T.serial(0, pool.size) as f:
                T.buffer_store(pool.ends, T.cast(pool.ring[row, at, f], pool.wide),
                               [row, at, f])


def _answer(T: Any, pool: _Pool, place: Any, row: Any, index: Any) -> None:
    following = T.floormod(index + 1, pool.window)
    seen = T.cast(T.max(T.int64(1), T.min(index + 1, pool.window)), pool.wide)

    def store(value: Any, f: Any) -> None:
        value = value / seen if pool.kind == "mean" else value
        T.buffer_store(pool.out, T.cast(value, pool.dtype), [place, f])

    with T.If(T.And(following > 0, index >= pool.window)):
        with T.Then(), T.serial(0, pool.size) as f:
            begun = pool.begin[row, T.floormod(index, 2), f]
            store(joined(T, pool.kind, pool.ends[row, following, f], begun), f)
        with T.Else(), T.serial(0, pool.size) as f:
            store(pool.begin[row, T.floormod(index, 2), f], f)
