"""Layouts and small pieces that the schedules of this folder share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

LANE = 16  # outputs of one vector
VECTORS = 4  # vectors of one panel
PANEL = LANE * VECTORS
WORD = 32  # bits of one packed word

# How the two outer loops run (blocks of rows, panels of outputs): "serial" for little work,
# "rows" for many rows, "panels" for few.
MODES = {"serial": ("serial", "serial"), "rows": ("parallel", "serial"),
         "panels": ("serial", "parallel")}


def ceil_div(value: Any, by: int) -> Any:
    """The quotient, rounded up."""
    return (value + by - 1) // by


def span(T: Any, start: Any, lanes: int = LANE) -> Any:
    """The index of consecutive elements."""
    return T.ramp(start, 1, lanes) if lanes > 1 else start


def return_flag(T: Any, flag: Any) -> None:
    """End the function with a flag where it is set; else it ends as it would.

    TVM gives scratch back behind the last statement, which a return in all calls would skip.
    """
    with T.If(flag[0] != 0), T.Then():
        T.Return(flag[0])


def load_tail(T: Any, x: Any, row: Any, column: int) -> Any:
    """One vector of a row that may end inside it; what lies behind the end is 0."""
    left = int(x.shape[1]) - column
    if left <= 0:
        return T.broadcast(T.float32(0), LANE)
    if left >= LANE:
        return x[row, span(T, column)]
    return T.call_extern("float32x16", "bincompile_tail", T.address_of(x[row, column]))


def tail_text(features: int) -> str:
    """LLVM text of `bincompile_tail`: loads the last features % 16 floats of a row."""
    mask = ", ".join(f"i1 {int(lane < features % LANE)}" for lane in range(LANE))
    return f"""
declare <16 x float> @llvm.masked.load.v16f32.p0(ptr, i32, <16 x i1>, <16 x float>)
define <16 x float> @bincompile_tail(ptr %p) alwaysinline {{
  %v = call <16 x float> @llvm.masked.load.v16f32.p0(
      ptr %p, i32 4, <16 x i1> <{mask}>, <16 x float> zeroinitializer)
  ret <16 x float> %v
}}
"""


def lanes(places: Iterable[int]) -> str:
    """LLVM text of the mask of a shuffle."""
    return f"<{', '.join(f'i32 {place}' for place in places)}>"


def halving(width: int, half: int) -> str:
    """LLVM text that adds the upper half of the vector %v{width} to the lower one: %v{half}."""
    source = f"<{width} x float> %v{width}, <{width} x float> poison, <{half} x i32>"
    return f"""%low{half} = shufflevector {source} {lanes(range(half))}
  %high{half} = shufflevector {source} {lanes(range(half, width))}
  %v{half} = fadd <{half} x float> %low{half}, %high{half}"""
