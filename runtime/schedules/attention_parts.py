"""Pieces of attention kernels: rows that end inside a vector, signs, and powers of scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from bincompile.runtime.schedules.common import LANE, WORD, halving, lanes, span
from bincompile.runtime.schedules.vector_math import LOG2_E, Code

# 2**f to 1.5e-7 for f from 0 to 1, exactly 1 at 0.
EXP2 = (1.0, 0.6931513118124532, 0.24016445006437478, 0.05579991342562036, 0.00901702987955242,
        0.0018671302768059443)
LOWEST = -126.0  # powers of 2 up to this are 0 without AVX-512


class Columns(NamedTuple):
    """The last axis of a buffer at one place of the others."""

    buffer: Any
    place: tuple[Any, ...]
    length: Any


def helpers(avx512: bool) -> str:
    """LLVM text of what is called below."""
    return "\n".join([_MEMORY, _SIGNS, _reduction("total", halving),
                      _reduction("largest", _larger_half), _power(avx512),
                      _DOT if avx512 else ""])


_FIRST = f"""%i = insertelement <16 x i32> poison, i32 %n, i32 0
  %b = shufflevector <16 x i32> %i, <16 x i32> poison, <16 x i32> zeroinitializer
  %m = icmp slt <16 x i32> {lanes(range(LANE))}, %b"""

_MEMORY = f"""
declare <16 x float> @llvm.masked.load.v16f32.p0(ptr, i32, <16 x i1>, <16 x float>)
declare <16 x i8> @llvm.masked.load.v16i8.p0(ptr, i32, <16 x i1>, <16 x i8>)
declare void @llvm.masked.store.v16f32.p0(<16 x float>, ptr, i32, <16 x i1>)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
define i32 @bincompile_ask(ptr %p) alwaysinline {{
  call void @llvm.prefetch.p0(ptr %p, i32 0, i32 3, i32 1)
  ret i32 0
}}
define <16 x float> @bincompile_some(ptr %p, i32 %n) alwaysinline {{
  {_FIRST}
  %v = call <16 x float> @llvm.masked.load.v16f32.p0(
      ptr %p, i32 4, <16 x i1> %m, <16 x float> zeroinitializer)
  ret <16 x float> %v
}}
define <16 x i8> @bincompile_some_bytes(ptr %p, i32 %n) alwaysinline {{
  {_FIRST}
  %v = call <16 x i8> @llvm.masked.load.v16i8.p0(
      ptr %p, i32 1, <16 x i1> %m, <16 x i8> zeroinitializer)
  ret <16 x i8> %v
}}
define i32 @bincompile_keep_some(ptr %p, <16 x float> %v, i32 %n) alwaysinline {{
  {_FIRST}
  call void @llvm.masked.store.v16f32.p0(<16 x float> %v, ptr %p, i32 4, <16 x i1> %m)
  ret i32 0
}}"""

# A nan is negative (unordered), -0.0 is not.
_SIGNS = f"""
define i32 @bincompile_word(<16 x float> %low, <16 x float> %high) alwaysinline {{
  %both = shufflevector <16 x float> %low, <16 x float> %high, <32 x i32> {lanes(range(32))}
  %negative = fcmp ult <32 x float> %both, zeroinitializer
  %word = bitcast <32 x i1> %negative to i32
  ret i32 %word
}}
define <16 x float> @bincompile_as_rounded(<16 x float> %v) alwaysinline {{
  %r = call <16 x float> @llvm.arithmetic.fence.v16f32(<16 x float> %v)
  ret <16 x float> %r
}}"""

_DOT = """
declare <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32>, <16 x i32>, <16 x i32>)
define <16 x i32> @bincompile_dot(<16 x i32> %sum, <16 x i32> %codes,
    <16 x i32> %signs) alwaysinline {
  %r = call <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32> %sum, <16 x i32> %codes,
      <16 x i32> %signs)
  ret <16 x i32> %r
}
"""


def _reduction(name: str, step: Callable[[int, int], str]) -> str:
    steps = "\n  ".join(step(width, width // 2) for width in (16, 8, 4, 2))
    return f"""define float @bincompile_{name}(<16 x float> %v16) alwaysinline {{
  {steps}
  %r = extractelement <1 x float> %v1, i32 0
  ret float %r
}}"""


def _larger_half(width: int, half: int) -> str:
    source = f"<{width} x float> %v{width}, <{width} x float> poison, <{half} x i32>"
    return f"""%low{half} = shufflevector {source} {lanes(range(half))}
  %high{half} = shufflevector {source} {lanes(range(half, width))}
  %more{half} = fcmp ogt <{half} x float> %low{half}, %high{half}
  %v{half} = select <{half} x i1> %more{half}, <{half} x float> %low{half},
      <{half} x float> %high{half}"""


def _power(avx512: bool) -> str:
    """exp(x) of x <= 0: 0 for -inf, and nan stays."""
    code = Code(LANE)
    t = code.binary("fmul", "%x", LOG2_E)
    result = _scaled(code, t) if avx512 else _shifted(code, t)
    code.declared.add(f"declare {code.floats} @llvm.arithmetic.fence.v16f32({code.floats})")
    body, declared = "\n  ".join(code.lines), "\n".join(sorted(code.declared))
    return f"""{declared}
define {code.floats} @bincompile_power({code.floats} %x) alwaysinline {{
  {body}
  ret {code.floats} {result}
}}"""


def _scaled(code: Code, t: str) -> str:
    """2**t by vreduceps (the fraction of t; 0 for -inf) and vscalefps (times 2**floor(t))."""
    fraction = _masked(code, "reduce", f"{code.floats} {t}, i32 9")
    return _masked(code, "scalef",
                   f"{code.floats} {code.horner(EXP2, fraction)}, {code.floats} {t}")


def _masked(code: Code, name: str, given: str) -> str:
    """An AVX-512 instruction with every lane on."""
    full, rest = f"@llvm.x86.avx512.mask.{name}.ps.512", f"{code.floats} zeroinitializer, i16 -1"
    kinds = ", ".join(part.split(" %")[0].removesuffix(" 9") for part in given.split(", "))
    code.declared.add(f"declare {code.floats} {full}({kinds}, {code.floats}, i16, i32)")
    return code.line(f"call {code.floats} {full}({given}, {rest}, i32 4)")


def _shifted(code: Code, t: str) -> str:
    """The same in other instructions, bit for bit: the fraction is rounded down there."""
    t = code.intrinsic("arithmetic.fence", t)
    least = code.where("olt", t, LOWEST, LOWEST, t)
    whole = code.intrinsic("floor", least)
    near = code.binary("fsub", least, whole)
    above = code.line(f"fcmp ogt {code.floats} {code.binary('fadd', near, whole)}, {least}")
    last = code.line(f"sext {code.flags} {above} to {code.integers}")
    fraction = code.cast(code.bits("add", code.cast(near, to_bits=True), last), to_bits=False)
    p = code.cast(code.horner(EXP2, fraction), to_bits=True)
    n = code.line(f"fptosi {code.floats} {whole} to {code.integers}")
    scaled = code.bits("add", p, code.bits("shl", n, code.integer(23)))
    return code.where("ole", t, LOWEST, 0.0, code.cast(scaled, to_bits=False))


def load(T: Any, row: Columns, column: Any, count: Any = None) -> Any:
    """One vector of a row; `count` says how many numbers are left where that is not known yet."""
    if count is None:
        left = int(row.length) - column
        if left <= 0:
            return T.broadcast(T.float32(0), LANE)
        if left >= LANE:
            return row.buffer[(*row.place, span(T, column))]
        count = T.int32(left)
    return T.call_extern("float32x16", "bincompile_some",
                         T.address_of(row.buffer[(*row.place, column)]), count)


def ask(T: Any, row: Columns) -> None:
    """Ask memory for a row that is read soon; it need not exist."""
    for column in range(0, int(row.length), LANE):
        T.evaluate(T.call_extern("int32", "bincompile_ask",
                                 T.address_of(row.buffer[(*row.place, column)])))


def store(T: Any, row: Columns, column: int, values: Any) -> None:
    """Store one vector of a row as far as the row goes."""
    left = int(row.length) - column
    if left >= LANE:
        T.buffer_store(row.buffer, values, [*row.place, span(T, column)])
    else:
        T.evaluate(T.call_extern("int32", "bincompile_keep_some",
                                 T.address_of(row.buffer[(*row.place, column)]), values,
                                 T.int32(left)))


def pack_row(T: Any, row: Columns, keep_word: Callable[[int, Any], Any] | None,
             keep_scale: Callable[[Any], Any]) -> None:
    """Sign bits of a row, a word at a time, and its mean |x| in the order of `bits.row_scale`."""
    features = int(row.length)
    sums = T.alloc_buffer((LANE,), "float32")
    T.buffer_store(sums, T.broadcast(T.float32(0), LANE), [span(T, 0)])
    for k in range(0, features, WORD):
        halves = [load(T, row, k + place) for place in (0, LANE)]
        for half in halves[:1 if features - k <= LANE else 2]:
            T.buffer_store(sums, sums[span(T, 0)] + T.fabs(half), [span(T, 0)])
        if keep_word is not None:
            keep_word(k // WORD, T.call_extern("uint32", "bincompile_word", *halves))
    keep_scale(total(T, sums[span(T, 0)]) / T.float32(features))


def total(T: Any, vector: Any) -> Any:
    """The sum of a vector, in the order of `bits.row_scale`."""
    return T.call_extern("float32", "bincompile_total", vector)


def largest(T: Any, vector: Any) -> Any:
    """The largest number of a vector without nan."""
    return T.call_extern("float32", "bincompile_largest", vector)


def power(T: Any, vector: Any) -> Any:
    """exp of numbers that are not positive."""
    return T.call_extern("float32x16", "bincompile_power", vector)


def signs_as_masks(T: Any, values: Any) -> Any:
    """-1 where negative, else 0, as integers."""
    return T.Select(values >= T.broadcast(T.float32(0), LANE), T.broadcast(T.int32(0), LANE),
                    T.broadcast(T.int32(-1), LANE))


def signs_as_bytes(T: Any, rows: list[Any]) -> Any:
    """+1 or -1 of up to four vectors, in the bytes of a word."""
    words = T.broadcast(T.int32(0), LANE)
    for place, values in enumerate(rows):
        plus, minus = 1 << 8 * place, 0xFF << 8 * place
        words = words | T.Select(values >= T.broadcast(T.float32(0), LANE),
                                 T.broadcast(T.int32(plus), LANE),
                                 T.broadcast(T.int32(minus - (minus >> 31 << 32)), LANE))
    return words
