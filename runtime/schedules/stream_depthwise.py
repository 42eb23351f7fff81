"""Convolutions of every feature by itself over the last tokens, read from their ring in place.

`depthwise`: token (M, F), ring (N, slots, F), rows, clock, rate, delay, weight (taps, F),
[bias (F)], out (M, F), `fill`, how many indices two taps are apart, how old the newest is.
"""

from __future__ import annotations

from typing import Any

from bincompile.runtime.schedules.ticks import each_step, function, steps, tensor


def build(bias: bool) -> Any:
    """The IRModule."""
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import ir as I

    with IRBuilder() as builder, I.ir_module(), function("depthwise") as T:
        count, streams, slots, size, taps = (T.int64() for _ in range(5))
        token = tensor(T, "token", (count, size), "float32")
        ring = tensor(T, "ring", (streams, slots, size), "float32")
        given = steps(T, count, streams)
        weight = tensor(T, "weight", (taps, size), "float32")
        shift = tensor(T, "bias", (size,), "float32") if bias else None
        out = tensor(T, "out", (count, size), "float32")
        fill = T.cast(T.arg("fill", T.float64()), "float32")
        apart, back = T.arg("apart", T.int64()), T.arg("back", T.int64())

        def body(place: Any, row: Any, index: Any) -> None:
            with T.serial(0, size) as f:
                T.buffer_store(ring, token[place, f], [row, T.floormod(index, slots), f])
            with T.serial(0, size) as f:
                T.buffer_store(out, T.float32(0) if shift is None else shift[f], [place, f])
            with T.serial(0, taps) as tap:
                at = index - back - (taps - 1 - tap) * apart
                with T.If(at >= 0):
                    with T.Then(), T.serial(0, size) as f:
                        read = ring[row, T.floormod(at, slots), f]
                        T.buffer_store(out, out[place, f] + read * weight[tap, f], [place, f])
                    with T.Else(), T.serial(0, size) as f:
                        T.buffer_store(out, out[place, f] + fill * weight[tap, f], [place, f])

        each_step(T, given, body)
    return builder.get()
