"""Running values: of all tokens since a row began.

`scan`: token (M, F), total (N, 2, F), rows, clock, rate, delay, out (M, F).
"""

from __future__ import annotations

from typing import Any

from bincompile.runtime.schedules.joining import joined, text
from bincompile.runtime.schedules.ticks import each_step, function, steps, tensor


def build(kind: str, dtype: str, wide: str) -> Any:
    """The IRModule; `dtype` of the tokens, `wide` of the total."""
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import ir as I

    with IRBuilder() as builder, I.ir_module(), function("scan") as T:
        count, streams, size = T.int64(), T.int64(), T.int64()
        token = tensor(T, "token", (count, size), dtype)
        total = tensor(T, "total", (streams, 2, size), wide)
        given = steps(T, count, streams)
        out = tensor(T, "out", (count, size), dtype)

        def body(place: Any, row: Any, index: Any) -> None:
            def store(value: Any, f: Any) -> None:
                T.buffer_store(total, value, [row, T.floormod(index, 2), f])
                kept = total[row, T.floormod(index, 2), f]
                if kind == "mean":
                    kept = kept / T.cast(T.max(index + 1, T.int64(1)), wide)
                T.buffer_store(out, T.cast(kept, dtype), [place, f])

            with T.If(index > 0):
                with T.Then(), T.serial(0, size) as f:
                    before = total[row, T.floormod(index + 1, 2), f]
                    store(joined(T, kind, before, T.cast(token[place, f], wide)), f)
                with T.Else(), T.serial(0, size) as f:
                    store(T.cast(token[place, f], wide), f)

        with T.attr(0, "pragma_import_llvm", text(kind)):
            each_step(T, given, body)
    return builder.get()
