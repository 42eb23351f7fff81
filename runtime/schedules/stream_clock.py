"""Which index a step computes for each row, and which entries of a window there are then.

`index`: rows, clock, rate, delay, out (M) int64. `filled`: the same, but out (M, window) bool.
"""

from __future__ import annotations

from typing import Any

from bincompile.runtime.schedules.ticks import each_step, function, steps, tensor


def build() -> Any:
    """The IRModule, with the functions `index` and `filled`."""
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import ir as I

    with IRBuilder() as builder, I.ir_module():
        _index()
        _filled()
    return builder.get()


def _index() -> None:
    with function("index") as T:
        count, streams = T.int64(), T.int64()
        given = steps(T, count, streams)
        out = tensor(T, "out", (count,), "int64")
        each_step(T, given, lambda place, row, index: T.buffer_store(out, index, [place]))


def _filled() -> None:
    with function("filled") as T:
        count, streams, window = T.int64(), T.int64(), T.int64()
        given = steps(T, count, streams)
        out = tensor(T, "out", (count, window), "bool")

        def body(place: Any, row: Any, index: Any) -> None:
            with T.serial(0, window) as entry:
                T.buffer_store(out, index - window + 1 + entry >= 0, [place, entry])

        each_step(T, given, body)
