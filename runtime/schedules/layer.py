"""What the schedules of linear layers with bases share: arguments, and what becomes of the sums.

A base is a matrix of 1-bit weights with a scale for each output; a layer adds several up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from bincompile.runtime.schedules.common import LANE, WORD, ceil_div, span

SLICES = 16  # parts of the outputs that threads share, at most


class Layer(NamedTuple):
    """The buffers of a linear layer of symbolic rows; what it does without is None."""

    rows: Any
    x: Any
    weight: Any
    scale: Any
    bias: Any
    shift: Any
    out: Any


def declare(T: Any, name: str, features: int, outputs: int, bias: bool, shift: bool,
            weight: tuple[int, ...], dtype: str, padded: int) -> Layer:
    """Name the function being built, and declare its arguments in the order of `Layer`.

    Args:
        weight: shape of the packed weight, bases first.
        dtype: its dtype.
        padded: how many outputs it holds, those of padding included.
    """
    T.func_name(name)
    T.func_attr({"global_symbol": name, "tirx.noalias": True})
    rows = T.int64()

    def argument(label: str, shape: tuple[Any, ...], dtype: str = "float32",
                 align: int = 64) -> Any:
        return T.match_buffer(T.arg(label, T.handle()), shape, dtype, align=align)

    return Layer(
        rows,
        argument("x", (rows, features), align=4),
        argument("weight", weight, dtype),
        argument("weight_scale", (weight[0], padded)),
        argument("bias", (padded,)) if bias else None,
        argument("shift", (ceil_div(features, WORD) * WORD,)) if shift else None,
        argument("out", (rows, outputs), align=4))


def tiles(T: Any, rows: Any, first: Any, block: int, height: int,
          emit: Callable[[Any, int], None]) -> None:
    """`emit(row, height)` for the tiles of a block of rows; what is left over goes row by row."""
    count = T.min(T.int64(block), rows - first)
    with T.serial(0, T.floordiv(count, height)) as step:
        emit(first + step * height, height)
    with T.serial(0, T.floormod(count, height)) as step:
        emit(first + T.floordiv(count, height) * height + step, 1)


def store_outputs(T: Any, layer: Layer, row: Any, column: Any, values: Any,
                  lanes: int = LANE) -> None:
    """Add the bias to a vector of outputs and store it; those behind the last are padding."""
    outputs, padded = int(layer.out.shape[1]), int(layer.scale.shape[1])
    if layer.bias is not None:
        values = values + layer.bias[span(T, column, lanes)]
    if outputs == padded:
        T.buffer_store(layer.out, values, [row, span(T, column, lanes)])
        return
    with T.If(column + lanes <= outputs):
        with T.Then():
            T.buffer_store(layer.out, values, [row, span(T, column, lanes)])
        with T.Else():
            kept = T.alloc_buffer((lanes,), "float32")
            T.buffer_store(kept, values, [span(T, 0, lanes)])
            with T.serial(0, lanes) as lane, T.If(column + lane < outputs), T.Then():
                T.buffer_store(layer.out, kept[lane], [row, column + lane])
