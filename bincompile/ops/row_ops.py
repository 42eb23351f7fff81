"""The operations of a body: what acts on every row (last axis) of its arguments alike.

Names and orders of arguments are those of aten. A row operation more is a line in `ROW_OPS`, and
the code that a kernel emits for it.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from bincompile.body import Body, Name, Statement
from bincompile.errors import InputError
from bincompile.ops.binary_embedding import binary_embedding
from bincompile.ops.binary_linear import binary_linear
from bincompile.ops.embedding import embedding

Values = list[torch.Tensor]


def _is_number(arg: Any) -> bool:
    return isinstance(arg, int | float) and not isinstance(arg, bool)


# Kinds of arguments: what each allows in a body.
KINDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "value": ("a value or a number", lambda arg: isinstance(arg, Name | int | float)),
    "tensor": ("a value", lambda arg: isinstance(arg, Name)),
    "optional": ("a value or None", lambda arg: arg is None or isinstance(arg, Name)),
    "number": ("a number", _is_number),
    "limit": ("a number or None", lambda arg: arg is None or _is_number(arg)),
    "count": ("a positive integer",
              lambda arg: isinstance(arg, int) and not isinstance(arg, bool) and arg > 0),
    "text": ("a text", lambda arg: isinstance(arg, str)),
}


@dataclasses.dataclass(frozen=True)
class RowOp:
    """One operation on rows.

    Args:
        name: its name in a body.
        kinds: for each argument what it may be, one of `KINDS`.
        reference: the specification, in plain torch, in any float dtype.
        form: "pointwise", "reduction" (a row to one number), "norm" (a row to a row that depends
            on all of it), "linear" or "look-up".
        signs_of: the tensors whose signs it takes, of its arguments.
    """

    name: str
    kinds: tuple[str, ...]
    reference: Callable[..., torch.Tensor]
    form: str = "pointwise"
    signs_of: Callable[..., Values] | None = None


def _layer_norm(x, weight, bias, eps):
    return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _rms_norm(x, weight, eps):
    scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return scaled if weight is None else scaled * weight


def _reduced(reduce, x):
    return reduce(x, -1, keepdim=True)


def _called(name: str) -> Callable[..., torch.Tensor]:
    """The operator of ours of this name: its overload knows fake tensors and checks arguments."""
    def call(*args: Any) -> torch.Tensor:
        return getattr(torch.ops.bincompile, name).default(*args)

    return call


def _signs(*args: Any) -> Values:
    assert binary_linear.signs_of is not None
    return binary_linear.signs_of(binary_linear.bind(args, {}))


_ONE, _TWO, _TRUTHS = ("tensor",), ("value", "value"), ("tensor", "tensor")


def _pointwise() -> Iterator[RowOp]:
    for name in ("add", "sub", "mul", "truediv", "eq", "ne", "lt", "le", "gt", "ge"):
        yield RowOp(name.removeprefix("true"), _TWO, getattr(operator, name))
    for name in ("neg", "abs", "exp", "log", "sqrt", "rsqrt", "reciprocal", "relu", "sigmoid",
                 "tanh", "erf", "logical_not"):
        yield RowOp(name, _ONE, getattr(torch, name))
    for name in ("maximum", "minimum", "logical_and", "logical_or"):
        yield RowOp(name, _TRUTHS, getattr(torch, name))
    yield RowOp("silu", _ONE, functional.silu)
    yield RowOp("gelu", ("tensor", "text"), lambda x, kind: functional.gelu(x, approximate=kind))
    yield RowOp("clamp", ("tensor", "limit", "limit"), torch.clamp)
    yield RowOp("pow", ("tensor", "number"), torch.pow)
    yield RowOp("where", ("tensor", "value", "value"), torch.where)


def _of_rows() -> Iterator[RowOp]:
    for name in ("sum", "mean", "amax", "amin"):
        yield RowOp(name, _ONE, functools.partial(_reduced, getattr(torch, name)), "reduction")
    yield RowOp("softmax", _ONE, lambda x: torch.softmax(x, -1), "norm")
    yield RowOp("layer_norm", ("tensor", "optional", "optional", "number"), _layer_norm, "norm")
    yield RowOp("rms_norm", ("tensor", "optional", "number"), _rms_norm, "norm")


def _of_ours() -> Iterator[RowOp]:
    linear = ("tensor", "tensor", "tensor", "optional", "count", "text", "optional", "optional")
    yield RowOp("binary_linear", linear, _called(binary_linear.name), "linear", _signs)
    yield RowOp("linear", ("tensor", "tensor", "optional"), functional.linear, "linear")
    yield RowOp("embedding", ("tensor", "tensor"), _called(embedding.name), "look-up")
    yield RowOp("binary_embedding", ("tensor", "tensor", "tensor", "count"),
                _called(binary_embedding.name), "look-up")


ROW_OPS: Mapping[str, RowOp] = {
    op.name: op for table in (_pointwise, _of_rows, _of_ours) for op in table()}


def check_body(body: Body) -> None:
    """Raise unless every statement is an operation of the table with arguments that it takes.

    Raises:
        InputError: an operation that does not exist, or an argument of a wrong kind.

    Example:
        >>> check_body(Body.parse("t0 = gelu(x0, 'none')\\nreturn t0"))
    """
    for index, statement in enumerate(body.statements):
        op, line = ROW_OPS.get(statement.op), f"t{index} = {statement}"
        if op is None:
            raise InputError(f"the operation {statement.op!r} in {line!r}", ", ".join(ROW_OPS),
                             "the body")
        if len(statement.args) != len(op.kinds):
            raise InputError(f"{len(statement.args)} arguments in {line!r}",
                             f"{len(op.kinds)}: {', '.join(op.kinds)}", "the body")
        for arg, kind in zip(statement.args, op.kinds, strict=True):
            allowed, accepts = KINDS[kind]
            if not accepts(arg):
                raise InputError(f"the argument {arg!r} in {line!r}", allowed, "the body")


def interpret(body: Body, inputs: Sequence[torch.Tensor],
              watch: Callable[[Statement, tuple[Any, ...]], None] | None = None,
              ) -> list[torch.Tensor]:
    """What the body gives for these inputs, with torch's own operators and those of ours.

    Args:
        body: one that `check_body` accepts.
        inputs: at least as many tensors as it takes.
        watch: is told of every statement and the values of its arguments.

    Raises:
        InputError: values whose shapes or dtypes don't go together.

    Example:
        >>> body = Body.parse("t0 = add(x0, 1.0)\\nt1 = relu(t0)\\nreturn t1")
        >>> interpret(body, [torch.tensor([-3.0, 2.0])])
        [tensor([0., 3.])]
    """
    values: Values = []

    def known(arg: Any) -> Any:
        if not isinstance(arg, Name):
            return arg
        return inputs[arg.index] if arg.is_input else values[arg.index]

    for index, statement in enumerate(body.statements):
        args = tuple(map(known, statement.args))
        if watch is not None:
            watch(statement, args)
        try:
            values.append(ROW_OPS[statement.op].reference(*args))
        except (RuntimeError, TypeError) as error:
            if type(error).__module__.startswith("bincompile"):
                raise
            shapes = ", ".join(f"{a.dtype} {tuple(a.shape)}" for a in args
                               if isinstance(a, torch.Tensor))
            raise InputError(f"t{index} = {statement} of {shapes}",
                             f"shapes and dtypes of one {statement.op}: "
                             + str(error).partition("\n")[0], "the inputs or the body") from error
    return [values[name.index] for name in body.results]
