"""LLVM text that row programs call: what TVM's expressions can't say. All of it is inlined.

Names end in how many of a vector's 16 lanes count: a row that is no multiple of 16 long ends in
such a vector, which is loaded and stored under a mask.
"""

from __future__ import annotations

from collections.abc import Iterable

from bincompile.runtime.schedules import vector_math
from bincompile.runtime.schedules.common import LANE, PANEL, halving, lanes

VECTOR, BITS = f"<{LANE} x float>", f"<{LANE} x i1>"

# A nan is negative (unordered), -0.0 is not. `sum` adds up lanes in the order of
# `bits.row_scale`. The fence keeps LLVM from fusing the addition of the bias with the product
# before it.
_ALWAYS = f"""
define i32 @bincompile_pack(ptr %words, i64 %half, {VECTOR} %v) alwaysinline {{
  %negative = fcmp ult {VECTOR} %v, zeroinitializer
  %word = bitcast {BITS} %negative to i16
  %p = getelementptr i16, ptr %words, i64 %half
  store i16 %word, ptr %p, align 2
  ret i32 0
}}
define float @bincompile_sum({VECTOR} %v16) alwaysinline {{
  {halving(16, 8)}
  {halving(8, 4)}
  {halving(4, 2)}
  {halving(2, 1)}
  %sum = extractelement <1 x float> %v1, i32 0
  ret float %sum
}}
define float @bincompile_first({VECTOR} %v) alwaysinline {{
  %r = extractelement {VECTOR} %v, i32 0
  ret float %r
}}
define {VECTOR} @bincompile_splat({VECTOR} %v) alwaysinline {{
  %r = shufflevector {VECTOR} %v, {VECTOR} poison, <{LANE} x i32> zeroinitializer
  ret {VECTOR} %r
}}
declare {VECTOR} @llvm.arithmetic.fence.v16f32({VECTOR})
define {VECTOR} @bincompile_rounded({VECTOR} %v) alwaysinline {{
  %r = call {VECTOR} @llvm.arithmetic.fence.v16f32({VECTOR} %v)
  ret {VECTOR} %r
}}
define {VECTOR} @bincompile_signed(i16 %word, float %scale) alwaysinline {{
  %signs = bitcast i16 %word to {BITS}
  %minus = fneg float %scale
  %p = insertelement {VECTOR} poison, float %scale, i32 0
  %plus = shufflevector {VECTOR} %p, {VECTOR} poison, <{LANE} x i32> zeroinitializer
  %n = insertelement {VECTOR} poison, float %minus, i32 0
  %negative = shufflevector {VECTOR} %n, {VECTOR} poison, <{LANE} x i32> zeroinitializer
  %r = select {BITS} %signs, {VECTOR} %plus, {VECTOR} %negative
  ret {VECTOR} %r
}}
define {VECTOR} @bincompile_signs_2(ptr %bytes, float %scale) alwaysinline {{
  %word = load i16, ptr %bytes, align 1
  %r = call {VECTOR} @bincompile_signed(i16 %word, float %scale)
  ret {VECTOR} %r
}}
define {VECTOR} @bincompile_signs_1(ptr %bytes, float %scale) alwaysinline {{
  %byte = load i8, ptr %bytes, align 1
  %word = zext i8 %byte to i16
  %r = call {VECTOR} @bincompile_signed(i16 %word, float %scale)
  ret {VECTOR} %r
}}
declare {VECTOR} @llvm.masked.load.v16f32.p0(ptr, i32, {BITS}, {VECTOR})
declare void @llvm.masked.store.v16f32.p0({VECTOR}, ptr, i32, {BITS})
"""


def _extremes() -> str:
    """The larger and the smaller of two; a nan stays. And those of all lanes."""
    text = ""
    for name in ("maximum", "minimum"):
        folds, width = "", LANE
        while width > 1:
            half = width // 2
            source = f"<{width} x float> %v{width}, <{width} x float> poison, <{half} x i32>"
            folds += f"""
  %low{half} = shufflevector {source} {lanes(range(half))}
  %high{half} = shufflevector {source} {lanes(range(half, width))}
  %v{half} = call <{half} x float> @llvm.{name}.v{half}f32(<{half} x float> %low{half},
                                                           <{half} x float> %high{half})"""
            width = half
        declared = "\n".join(f"declare <{n} x float> @llvm.{name}.v{n}f32(<{n} x float>, "
                             f"<{n} x float>)" for n in (16, 8, 4, 2, 1))
        text += f"""
{declared}
define {VECTOR} @bincompile_{name}({VECTOR} %a, {VECTOR} %b) alwaysinline {{
  %r = call {VECTOR} @llvm.{name}.v16f32({VECTOR} %a, {VECTOR} %b)
  ret {VECTOR} %r
}}
define float @bincompile_fold_{name}({VECTOR} %v16) alwaysinline {{{folds}
  %r = extractelement <1 x float> %v1, i32 0
  ret float %r
}}
"""
    return text


def _panels() -> str:
    """Four vectors as one and taken apart again."""
    quad, pair = f"<{PANEL} x float>", f"<{2 * LANE} x float>"
    low, high = (f"shufflevector {VECTOR} {a}, {VECTOR} {b}, <{2 * LANE} x i32> "
                 f"{lanes(range(2 * LANE))}" for a, b in (("%a", "%b"), ("%c", "%d")))
    parts = "".join(f"""
define {VECTOR} @bincompile_part_{place}({quad} %v) alwaysinline {{
  %r = shufflevector {quad} %v, {quad} poison, <{LANE} x i32> {lanes(range(start, start + LANE))}
  ret {VECTOR} %r
}}""" for place, start in enumerate(range(0, PANEL, LANE)))
    return f"""
define {quad} @bincompile_join({VECTOR} %a, {VECTOR} %b, {VECTOR} %c, {VECTOR} %d) alwaysinline {{
  %low = {low}
  %high = {high}
  %r = shufflevector {pair} %low, {pair} %high, <{PANEL} x i32> {lanes(range(PANEL))}
  ret {quad} %r
}}{parts}
"""


def _sums() -> str:
    """Sixteen vectors to the vector of their sums: halves are added, and two made one of."""
    text, names, half = "", [f"v{lane}" for lane in range(LANE)], LANE // 2
    while half:
        folded = list[str]()
        for left, right in zip(names[::2], names[1::2], strict=True):
            name = f"s{half}_{len(folded)}"
            folded.append(name)
            for part in (0, half):
                places = [i + part for i in range(2 * LANE) if i % (2 * half) < half]
                text += (f"\n  %{name}_{part} = shufflevector {VECTOR} %{left}, {VECTOR} %{right}, "
                         f"<{LANE} x i32> {lanes(places)}")
            text += f"\n  %{name} = fadd {VECTOR} %{name}_0, %{name}_{half}"
        names, half = folded, half // 2
    given = ", ".join(f"{VECTOR} %v{lane}" for lane in range(LANE))
    return f"""
define {VECTOR} @bincompile_sums({given}) alwaysinline {{{text}
  ret {VECTOR} %{names[0]}
}}
"""


def _masked(left: int) -> str:
    """Load, store and keep `left` lanes of a vector."""
    mask = f"<{', '.join(f'i1 {int(lane < left)}' for lane in range(LANE))}>"
    return f"""
define {VECTOR} @bincompile_load_{left}(ptr %p) alwaysinline {{
  %v = call {VECTOR} @llvm.masked.load.v16f32.p0(ptr %p, i32 4, {BITS} {mask},
                                                 {VECTOR} zeroinitializer)
  ret {VECTOR} %v
}}
define i32 @bincompile_store_{left}(ptr %p, {VECTOR} %v) alwaysinline {{
  call void @llvm.masked.store.v16f32.p0({VECTOR} %v, ptr %p, i32 4, {BITS} {mask})
  ret i32 0
}}
define {VECTOR} @bincompile_keep_{left}({VECTOR} %v, {VECTOR} %rest) alwaysinline {{
  %r = select {BITS} {mask}, {VECTOR} %v, {VECTOR} %rest
  ret {VECTOR} %r
}}
"""


def helpers(functions: Iterable[str], widths: Iterable[int]) -> str:
    """All that a program calls: functions of `vector_math`, and rows of these widths."""
    lefts = sorted({width % LANE for width in widths} - {0})
    used = sorted(set(functions) & set(vector_math.FUNCTIONS))
    return "".join([_ALWAYS, _extremes(), _panels(), _sums(), *map(_masked, lefts),
                    *(vector_math.helpers(*used, lanes=count) for count in (LANE, PANEL)
                      if used)])
