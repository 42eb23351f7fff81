"""Tokens written into rings, and the last ones, or a single one of them, read again.

All functions take token (M, F), ring (N, slots, F), rows, clock, rate, delay, out, `fill`.
`window`: out (M, window, F), then how many indices its entries are apart, and how many the newest
is old. `columns`: the same, but out (M, F, window). `shift`: out (M, F), then how old it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from bincompile.runtime.schedules.ticks import Steps, each_step, function, steps, tensor


def build(dtype: str) -> Any:
    """The IRModule, with the functions `window`, `columns` and `shift`."""
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import ir as I

    with IRBuilder() as builder, I.ir_module():
        _window(dtype, last=False)
        _window(dtype, last=True)
        _shift(dtype)
    return builder.get()


class _Ring(NamedTuple):
    count: Any
    slots: Any
    size: Any
    token: Any
    ring: Any
    steps: Steps


def _ring(T: Any, dtype: str) -> _Ring:
    count, streams, slots, size = (T.int64() for _ in range(4))
    token = tensor(T, "token", (count, size), dtype)
    ring = tensor(T, "ring", (streams, slots, size), dtype)
    return _Ring(count, slots, size, token, ring, steps(T, count, streams))


def _append(T: Any, given: _Ring, place: Any, row: Any, index: Any) -> None:
    with T.serial(0, given.size) as f:
        T.buffer_store(given.ring, given.token[place, f],
                       [row, T.floormod(index, given.slots), f])


def _window(dtype: str, last: bool) -> None:
    with function("columns" if last else "window") as T:
        given, window = _ring(T, dtype), T.int64()
        shape = (given.size, window) if last else (window, given.size)
        out = tensor(T, "out", (given.count, *shape), dtype)
        fill = T.cast(T.arg("fill", T.float64()), dtype)
        apart, back = T.arg("apart", T.int64()), T.arg("back", T.int64())

        def store(value: Any, place: Any, entry: Any, f: Any) -> None:
            T.buffer_store(out, value, [place, f, entry] if last else [place, entry, f])

        def body(place: Any, row: Any, index: Any) -> None:
            _append(T, given, place, row, index)
            with T.serial(0, window) as entry:
                at = index - back - (window - 1 - entry) * apart
                with T.If(at >= 0):
                    with T.Then(), T.serial(0, given.size) as f:
                        store(given.ring[row, T.floormod(at, given.slots), f], place, entry, f)
                    with T.Else(), T.serial(0, given.size) as f:
                        store(fill, place, entry, f)

        each_step(T, given.steps, body)


def _shift(dtype: str) -> None:
    with function("shift") as T:
        given = _ring(T, dtype)
        out = tensor(T, "out", (given.count, given.size), dtype)
        fill = T.cast(T.arg("fill", T.float64()), dtype)
        by = T.arg("by", T.int64())

        def body(place: Any, row: Any, index: Any) -> None:
            _append(T, given, place, row, index)
            with T.If(index >= by):
                with T.Then(), T.serial(0, given.size) as f:
                    T.buffer_store(out, given.ring[row, T.floormod(index - by, given.slots), f],
                                   [place, f])
                with T.Else(), T.serial(0, given.size) as f:
                    T.buffer_store(out, fill, [place, f])

        each_step(T, given.steps, body)
