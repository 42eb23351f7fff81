"""Elementary functions of float32 vectors, as LLVM text that is inlined: no call, no scalars.

A schedule imports what `helpers("exp", "gelu")` returns (`pragma_import_llvm`) and writes
`apply(T, "gelu", vector)`; both take `lanes` (16 where nothing is said, 1 for a number). The names
are those of `FUNCTIONS`. Products and sums are fused where the processor can (AVX2, AVX-512 and
NEON then agree bit for bit) and rounded one by one on older x86. Errors below are in units in the
last place, measured over every exponent in `tests/test_vector_math.py`.

| name | domain and edges | error |
|---|---|---|
| exp | all; overflows to inf, falls to 0 through subnormal numbers, nan stays | 1.5 |
| exp_nonpositive | up to 88; 0 below -87 and for -inf, nan stays (softmax, decay) | 1.5 |
| log | all; -inf at 0, nan below, subnormal numbers kept | 1.5 |
| tanh, erf | all | 2 |
| sigmoid | all | 3 |
| silu | all; nan for -inf like torch, -0.0 where the exponential overflows | 3.5 |
| gelu | 1e-6 of abs(x); nan for both infinities, as torch's eager kernel has it | |
| gelu_tanh | 1e-6 of abs(x); nan for -inf like torch | |
| rsqrt, reciprocal | all; as division and square root round | 1 |

Where binary operators follow, the sign of zero and of tiny values counts (`bits.sign`: a zero is
positive). In float32 torch's 1 + erf(x / sqrt 2) is 0 or 2**-24 between -5.4858 and -5.5426, as its
rounding falls, and 0 below; ours is negative down to where the exact erf rounds to -1 and zero
from there on. `gelu_tanh` is zero where torch's is.

Sources: Cody and Waite, Software Manual for the Elementary Functions (1980), for the reduction of
exp and log; the power of a polynomial for erfc is Hastings, Approximations for Digital Computers
(1955), sheet 61. Coefficients are minimax fits of our own, over the ranges named beside them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

from bincompile.runtime.schedules.common import LANE

LOG2_E = 1.4426950408889634
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4  # the first has 9 bits: its products are exact
ROUND = 12582912.0  # 1.5 * 2**23: what is added to it is rounded to an integer, in its low bits
GELU_ZERO = -5.542593002319336  # the exact erf rounds to -1 below
GELU_TANH_ZERO = -5.061380863189697  # torch's tanh is -1 from here on

EXP = (0.5, 0.16666521, 0.04166835, 0.00836873, 0.00138159)  # |r| <= ln 2 / 2, r**2 and up
LOG = (0.3333333135, -0.2500082254, 0.2000122666, -0.1662334651, 0.1420174092, -0.1316026449,
       0.1276176572, -0.0763454288)  # sqrt 1/2 - 1 to sqrt 2 - 1, f**3 and up
TANH = (-0.33333299, 0.13331918, -0.05378343, 0.02079476, -0.00589387)  # to 0.6, x**3 and up
ERF = (0.1283792257308960, -0.37612631916999817, 0.11283686012029648, -0.026858855038881302,
       0.005199665203690529, -0.0008127171895466745, 8.304822404170409e-05)  # to 0.93, x of its own
LOG_ERFC = (-0.00017473158368375152, -1.127761960029602, -0.6370370984077454,
            -0.10405900329351425, 0.022288456559181213, -0.0030587210785597563,
            0.00019752894877456129)  # 0.9 to 4
NORMAL_TAIL = (0.9170040624050462, -0.09145900194846464, -0.031916121720915874,
               -0.0007079805887458578, 0.0015570951640645095, -6.548195787813587e-06,
               -4.325429226996566e-05, 3.906240707747265e-06)  # 0 to 5.5426, its eighth power


class Code:
    """Lines of LLVM text on vectors of one length; a value is its text."""

    def __init__(self, lanes: int) -> None:
        """Nothing written yet."""
        self.lines: list[str] = []
        self.declared: set[str] = set()
        self._suffix = f"v{lanes}f32" if lanes > 1 else "f32"
        self.floats, self.integers, self.flags = (
            f"<{lanes} x {kind}>" if lanes > 1 else kind for kind in ("float", "i32", "i1"))

    def line(self, text: str) -> str:
        """Write one instruction, and return its value."""
        name = f"%t{len(self.lines)}"
        self.lines.append(f"{name} = {text}")
        return name

    def value(self, value: str | float) -> str:
        """A value as it is; a number in every lane."""
        if isinstance(value, str):
            return value
        single = struct.unpack("f", struct.pack("f", value))[0]
        return self._splat(f"float 0x{struct.pack('>d', single).hex().upper()}", self.floats)

    def integer(self, value: int) -> str:
        """An integer in every lane."""
        return self._splat(f"i32 {value}", self.integers)

    def _splat(self, text: str, kind: str) -> str:
        return f"splat ({text})" if kind.startswith("<") else text.split()[1]

    def binary(self, name: str, a: str | float, b: str | float) -> str:
        """An instruction of two floats, as `fadd`, `fsub`, `fmul`, `fdiv`."""
        return self.line(f"{name} {self.floats} {self.value(a)}, {self.value(b)}")

    def intrinsic(self, name: str, *values: str | float) -> str:
        """A function of LLVM's that stands for instructions of the processor."""
        full = f"@llvm.{name}.{self._suffix}"
        self.declared.add(f"declare {self.floats} {full}({', '.join([self.floats] * len(values))})")
        given = ", ".join(f"{self.floats} {self.value(value)}" for value in values)
        return self.line(f"call {self.floats} {full}({given})")

    def fma(self, a: str | float, b: str | float, c: str | float) -> str:
        """a * b + c, rounded once where the processor can."""
        return self.intrinsic("fmuladd", a, b, c)

    def bits(self, name: str, a: str, b: str) -> str:
        """An instruction of two integers, as `add`, `shl`, `ashr`."""
        return self.line(f"{name} {self.integers} {a}, {b}")

    def cast(self, a: str, to_bits: bool) -> str:
        """The same bits as integers, or as floats."""
        source, goal = self.floats, self.integers
        if not to_bits:
            source, goal = goal, source
        return self.line(f"bitcast {source} {a} to {goal}")

    def where(self, test: str, a: str | float, b: str | float, yes: str | float,
              no: str | float) -> str:
        """`yes` where the comparison of a with b holds, else `no`."""
        flag = self.line(f"fcmp {test} {self.floats} {self.value(a)}, {self.value(b)}")
        return self.line(f"select {self.flags} {flag}, {self.floats} {self.value(yes)}, "
                         f"{self.floats} {self.value(no)}")

    def horner(self, coefficients: Sequence[float], x: str) -> str:
        """A polynomial; the first coefficient is the constant."""
        total: str | float = coefficients[-1]
        for coefficient in coefficients[-2::-1]:
            total = self.fma(total, x, coefficient)
        return self.value(total)


def _reduced(code: Code, x: str) -> tuple[str, str]:
    """exp(x) = p * 2**n: p between 0.7 and 1.42, and n in the low bits of an integer."""
    rounded = code.fma(x, LOG2_E, ROUND)
    n = code.binary("fsub", rounded, ROUND)
    r = code.fma(n, -LN2_LOW, code.fma(n, -LN2_HIGH, x))
    p = code.fma(code.binary("fmul", r, r), code.horner(EXP, r), r)
    return code.binary("fadd", p, 1.0), code.cast(rounded, to_bits=True)


def _near_exp(code: Code, x: str) -> str:
    """exp(x) between -87 and 88, and of nan; anything elsewhere."""
    p, n = _reduced(code, x)
    return code.binary("fmul", p, _power(code, n))


def _power(code: Code, n: str) -> str:
    """2**n, of what is in the low 9 bits of n."""
    exponent = code.bits("shl", n, code.integer(23))
    one = code.integer(0x3F800000)
    return code.cast(code.bits("add", exponent, one), to_bits=False)


def _exp_nonpositive(code: Code, x: str) -> str:
    return code.where("olt", x, -87.0, 0.0, _near_exp(code, x))


def _exp(code: Code, x: str) -> str:
    low = code.where("olt", x, -104.5, -104.5, x)
    p, n = _reduced(code, code.where("ogt", low, 89.5, 89.5, low))
    whole = code.bits("sub", n, code.integer(0x4B400000))
    half = code.bits("ashr", whole, code.integer(1))
    for part in (half, code.bits("sub", whole, half)):
        p = code.binary("fmul", p, _power(code, part))
    return p


def _log(code: Code, x: str) -> str:
    large = code.where("olt", x, 2.0 ** -126, code.binary("fmul", x, 2.0 ** 23), x)
    lost = code.where("olt", x, 2.0 ** -126, -23.0, 0.0)
    given = code.cast(large, to_bits=True)
    shifted = code.bits("sub", given, code.integer(0x3F3504F3))  # sqrt 1/2
    exponent = code.bits("ashr", shifted, code.integer(23))
    scaled = code.bits("sub", given, code.bits("shl", exponent, code.integer(23)))
    f = code.binary("fsub", code.cast(scaled, to_bits=False), 1.0)
    e = code.binary(
        "fadd", code.line(f"sitofp {code.integers} {exponent} to {code.floats}"), lost)
    square = code.binary("fmul", f, f)
    tail = code.fma(code.binary("fmul", square, f), code.horner(LOG, f),
                    code.binary("fmul", e, LN2_LOW))
    tail = code.fma(square, -0.5, tail)
    out = code.fma(e, LN2_HIGH, code.binary("fadd", f, tail))
    out = code.where("olt", x, float("inf"), out, x)  # inf and nan are themselves
    out = code.where("oeq", x, 0.0, float("-inf"), out)
    return code.where("olt", x, 0.0, float("nan"), out)


def _tanh(code: Code, x: str) -> str:
    size = code.intrinsic("fabs", x)
    square = code.binary("fmul", x, x)
    near = code.fma(code.binary("fmul", square, size), code.horner(TANH, square), size)
    capped = code.where("ogt", size, 10.0, 10.0, size)
    power = _near_exp(code, code.binary("fadd", capped, capped))
    far = code.binary("fsub", 1.0, code.binary("fdiv", 2.0, code.binary("fadd", power, 1.0)))
    return code.intrinsic("copysign", code.where("olt", size, 0.6, near, far), x)


def _erf(code: Code, x: str) -> str:
    size = code.intrinsic("fabs", x)
    near = code.fma(size, code.horner(ERF, code.binary("fmul", x, x)), size)
    capped = code.where("ogt", size, 4.0, 4.0, size)
    far = code.binary("fsub", 1.0, _near_exp(code, code.horner(LOG_ERFC, capped)))
    return code.intrinsic("copysign", code.where("olt", size, 0.92, near, far), x)


def _one_more(code: Code, x: str) -> str:
    """1 + exp(-x)."""
    return code.binary("fadd", _exp(code, code.line(f"fneg {code.floats} {x}")), 1.0)


def _sigmoid(code: Code, x: str) -> str:
    return code.binary("fdiv", 1.0, _one_more(code, x))


def _silu(code: Code, x: str) -> str:
    return code.binary("fdiv", x, _one_more(code, x))


def _gelu(code: Code, x: str) -> str:
    """max(x, 0) - |x| * tail(|x|), where the tail of the normal distribution is p**8."""
    size = code.intrinsic("fabs", x)
    tail = code.horner(NORMAL_TAIL, code.where("olt", size, -GELU_ZERO, size, -GELU_ZERO))
    for _ in range(3):
        tail = code.binary("fmul", tail, tail)
    tail = code.where("olt", x, GELU_ZERO, 0.0, tail)
    positive = code.where("ogt", x, 0.0, x, 0.0)
    return code.fma(code.line(f"fneg {code.floats} {size}"), tail, positive)


def _gelu_tanh(code: Code, x: str) -> str:
    """x * sigmoid(2 u) = 0.5 x (1 + tanh(u)), u = sqrt(2 / pi) (x + 0.044715 x**3)."""
    square = code.binary("fmul", x, x)
    factor = code.fma(square, -2 * 0.7978845608028654 * 0.044715, -2 * 0.7978845608028654)
    power = _exp_nonpositive(code, code.binary("fmul", x, factor))
    share = code.binary("fdiv", 1.0, code.binary("fadd", power, 1.0))
    return code.binary("fmul", x, code.where("ole", x, GELU_TANH_ZERO, 0.0, share))


def _reciprocal(code: Code, x: str) -> str:
    return code.binary("fdiv", 1.0, x)


def _rsqrt(code: Code, x: str) -> str:
    return code.binary("fdiv", 1.0, code.intrinsic("sqrt", x))


FUNCTIONS: dict[str, Callable[[Code, str], str]] = {
    "erf": _erf, "exp": _exp, "exp_nonpositive": _exp_nonpositive, "gelu": _gelu,
    "gelu_tanh": _gelu_tanh, "log": _log, "reciprocal": _reciprocal, "rsqrt": _rsqrt,
    "sigmoid": _sigmoid, "silu": _silu, "tanh": _tanh}


def helpers(*names: str, lanes: int = LANE) -> str:
    """LLVM text of these functions (of all without a name) on vectors of so many lanes."""
    declared: set[str] = set()
    bodies = []
    for name in dict.fromkeys(names or FUNCTIONS):
        code = Code(lanes)
        result = FUNCTIONS[name](code, "%x")
        declared |= code.declared
        bodies.append("\n  ".join([
            f"define {code.floats} @{_symbol(name, lanes)}({code.floats} %x) alwaysinline {{",
            *code.lines, f"ret {code.floats} {result}"]) + "\n}")
    return "\n".join([*sorted(declared), *bodies, ""])


def apply(T: Any, name: str, x: Any, lanes: int = LANE) -> Any:
    """The function of this name of a vector; `helpers` has to be imported around it."""
    kind = f"float32x{lanes}" if lanes > 1 else "float32"
    return T.call_extern(kind, _symbol(name, lanes), x)


def _symbol(name: str, lanes: int) -> str:
    return f"bincompile_{name}_{lanes}"
