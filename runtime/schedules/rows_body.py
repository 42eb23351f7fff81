"""What a row program does, as steps of which each is one loop's work on one vector.

The text of a body becomes values in order; norms, softmax and 1-bit linears are taken apart into
pointwise steps, reductions (a row to one number), packing (a row to its sign bits) and products.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
TRUTHS = (*COMPARISONS, "logical_and", "logical_or", "logical_not")
REDUCTIONS = ("sum", "mean", "amax", "amin", "row_scale")
LOOK_UPS = ("embedding", "binary_embedding")
PRODUCTS = ("linear", "product")  # with signs, with numbers
SINKS = (*REDUCTIONS, "pack")  # what they give is there only when the row is at its end


class Name(str):
    """An input, a value, or the bits of a value."""


class Step(NamedTuple):
    """`target` becomes `op(*args)`; a row of it has `width` numbers."""

    target: Name
    op: str
    args: tuple[Any, ...]
    width: int

    @property
    def reads(self) -> tuple[Name, ...]:
        """The names among its arguments."""
        return tuple(arg for arg in self.args if isinstance(arg, Name))


class Input(NamedTuple):
    """How an input is read.

    Args:
        role: "rows", "period" and "repeat" (rows of numbers, those of "period" beginning again
            at the end, each of "repeat" standing for several in turn), "indices" and
            "index_period" (one integer a row), "columns" (one number a column, or one in all),
            "panels" (a weight (outputs, inputs), packed), "padded" (columns, and zeros behind
            them), "weights" (numbers (outputs, inputs)), "table" (rows of numbers), "bits" (rows
            of packed signs), "scales" (numbers for each row of bits).
        shape: its sizes; None where only the run tells.
        dtype: that of its elements.
    """

    role: str
    shape: tuple[int | None, ...]
    dtype: str = "float32"

    @property
    def width(self) -> int:
        """Numbers in a row of it, or of what a packed weight gives."""
        outputs = self.role in ("panels", "weights")
        size = self.shape[0 if outputs else -1] if self.shape else 1
        return 1 if size is None or self.role in ("indices", "index_period") else size


def parse(body: str) -> tuple[list[tuple[Name, str, tuple[Any, ...]]], list[Name]]:
    """The statements (target, operation, arguments) of a body, and the names it returns."""
    lines: list[Any] = ast.parse("\n".join(line.replace("return ", "_ = ", 1)
                                           if line.startswith("return ") else line
                                           for line in body.splitlines())).body
    statements: list[tuple[Name, str, tuple[Any, ...]]] = []
    for line in lines:
        target, value = line.targets[0].id, line.value
        if target == "_":
            parts: list[Any] = value.elts if isinstance(value, ast.Tuple) else [value]
            return statements, [Name(part.id) for part in parts]
        statements.append((Name(target), value.func.id, tuple(map(_argument, value.args))))
    raise ValueError(f"a body without a return: {body}")


def _argument(node: ast.expr) -> Any:
    return Name(node.id) if isinstance(node, ast.Name) else ast.literal_eval(node)


def steps_of(body: str, inputs: tuple[Input, ...],
             ) -> tuple[list[Step], list[Name], dict[Name, int]]:
    """The steps of a body, the values it returns, and how wide each value and input is."""
    statements, results = parse(body)
    widths = {Name(f"x{place}"): given.width for place, given in enumerate(inputs)}
    steps: dict[Name, Step] = {}
    for target, op, args in statements:
        for step in _EXPAND.get(op, _pointwise)(target, op, args, widths):
            if step.target not in steps:  # bits and scales that an earlier linear made are shared
                steps[step.target] = step
                widths[step.target] = step.width
    return list(steps.values()), results, widths


def _pointwise(target: Name, op: str, args: tuple[Any, ...],
               widths: Mapping[Name, int]) -> Iterator[Step]:
    yield Step(target, op, args, max(widths[arg] for arg in args if isinstance(arg, Name)))


def _reduction(target: Name, op: str, args: tuple[Any, ...],
               widths: Mapping[Name, int]) -> Iterator[Step]:
    yield Step(target, op, args, 1)


def _layer_norm(target: Name, op: str, args: tuple[Any, ...],
                widths: Mapping[Name, int]) -> Iterator[Step]:
    x, weight, bias, eps = args
    name = _names(target)
    yield Step(mean := name("mean"), "mean", (x,), 1)
    yield Step(apart := name("apart"), "sub", (x, mean), widths[x])
    yield Step(square := name("square"), "mul", (apart, apart), widths[x])
    yield Step(variance := name("variance"), "mean", (square,), 1)
    # what is subtracted again costs less than what is kept and read again
    yield Step(again := name("again"), "sub", (x, mean), widths[x])
    yield from _normed(target, again, variance, (weight, bias), eps, widths)


def _rms_norm(target: Name, op: str, args: tuple[Any, ...],
              widths: Mapping[Name, int]) -> Iterator[Step]:
    x, weight, eps = args
    name = _names(target)
    yield Step(square := name("square"), "mul", (x, x), widths[x])
    yield Step(mean := name("mean"), "mean", (square,), 1)
    yield from _normed(target, x, mean, (weight, None), eps, widths)


def _normed(target: Name, x: Name, square: Name, affine: tuple[Name | None, Name | None],
            eps: float, widths: Mapping[Name, int]) -> Iterator[Step]:
    name = _names(target)
    yield Step(sum_ := name("plus_eps"), "add", (square, eps), 1)
    yield Step(factor := name("factor"), "rsqrt", (sum_,), 1)
    rest = [(op, arg) for op, arg in zip(("mul", "add"), affine, strict=True) if arg is not None]
    value, width = x, widths[x]
    for place, (op, arg) in enumerate([("mul", factor), *rest]):
        last = place == len(rest)
        width = max(width, widths[arg])
        yield Step(made := target if last else name(f"normed{place}"), op, (value, arg), width)
        value = made


def _softmax(target: Name, op: str, args: tuple[Any, ...],
             widths: Mapping[Name, int]) -> Iterator[Step]:
    x, = args
    name = _names(target)
    yield Step(most := name("most"), "amax", (x,), 1)
    yield Step(below := name("below"), "sub", (x, most), widths[x])
    yield Step(power := name("power"), "exp_nonpositive", (below,), widths[x])
    yield Step(total := name("total"), "sum", (power,), 1)
    yield Step(share := name("share"), "reciprocal", (total,), 1)
    yield Step(target, "mul", (power, share), widths[x])


def _linear(target: Name, op: str, args: tuple[Any, ...],
            widths: Mapping[Name, int]) -> Iterator[Step]:
    x, weight, weight_scale, bias, features, _, scale, shift = args
    if shift is not None:
        shifted = Name(f"{x}_plus_{shift}")
        yield Step(shifted, "add", (x, shift), features)
        x = shifted
    bits = Name(f"{x}_bits")
    yield Step(bits, "pack", (x,), features)
    if scale is None:
        scale = Name(f"{x}_scale")
        yield Step(scale, "row_scale", (x,), 1)
    yield Step(target, "linear", (bits, scale, weight, weight_scale, bias, features),
               widths[weight])


def _product(target: Name, op: str, args: tuple[Any, ...],
             widths: Mapping[Name, int]) -> Iterator[Step]:
    x, weight, bias = args
    made = target if bias is None else Name(f"{target}_product")
    yield Step(made, "product", (x, weight, widths[x]), widths[weight])
    if bias is not None:
        yield Step(target, "add", (made, bias), widths[weight])


def _look_up(target: Name, op: str, args: tuple[Any, ...],
             widths: Mapping[Name, int]) -> Iterator[Step]:
    yield Step(target, op, args, widths[args[0]] if op == "embedding" else args[3])


def _power(target: Name, op: str, args: tuple[Any, ...],
           widths: Mapping[Name, int]) -> Iterator[Step]:
    x, exponent = args
    yield Step(target, POWERS[exponent], (x,), widths[x])


def _gelu(target: Name, op: str, args: tuple[Any, ...],
          widths: Mapping[Name, int]) -> Iterator[Step]:
    x, kind = args
    yield Step(target, "gelu" if kind == "none" else "gelu_tanh", (x,), widths[x])


def _names(target: Name) -> Any:
    return lambda part: Name(f"{target}_{part}")


# Exponents of `pow` that a kernel has a step for.
POWERS: Mapping[float, str] = {0: "one", 1: "copy", 2: "square", 3: "cube", 0.5: "sqrt",
                               -0.5: "rsqrt", -1: "reciprocal", -2: "inverse_square"}
_EXPAND = {"layer_norm": _layer_norm, "rms_norm": _rms_norm, "softmax": _softmax,
           "binary_linear": _linear, "linear": _product, "embedding": _look_up,
           "binary_embedding": _look_up, "pow": _power, "gelu": _gelu,
           **{name: _reduction for name in REDUCTIONS}}
