"""Row programs one operation after the other: ours by kernels of their own, the rest by torch.

It is what the operations were before they were fused, for machines and bodies that have no kernel
for the whole, and what such a kernel is measured against.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bincompile.body import Body, Name, Statement
from bincompile.config import Target
from bincompile.ops import OPERATORS
from bincompile.ops.row_ops import ROW_OPS, interpret
from bincompile.runtime.kernels import Call, Dynamic, Kernel, choose, host_reason
from bincompile.runtime.timings import sizes

INPUTS = "inputs"


def _supports(call: Call) -> str | None:
    if not call.is_stored("body"):
        return "the body is known only at run time"
    if not any(s.op in OPERATORS for s in Body.parse(call.value("body")).statements):
        return "no operation with a kernel of its own"
    return host_reason(call)


@dataclasses.dataclass(frozen=True)
class _Step:
    """One statement as a function of some of the values so far, and those not read after it."""

    function: Callable[..., Any]
    reads: tuple[int, ...]
    last: tuple[int, ...]


def _bind(call: Call) -> Callable[..., list[torch.Tensor]]:
    """Values are numbered: the inputs first, then what the statements give."""
    body, inputs = Body.parse(call.value("body")), list(call.arguments[INPUTS])
    places = [i for i, value in enumerate(inputs) if isinstance(value, Dynamic)]
    steps = _steps(call.target, body, inputs)
    read = {i for step in steps for i in step.reads}  # not what a kernel holds in its own form
    stored = [value if i in read and i not in places else None for i, value in enumerate(inputs)]
    results = tuple(len(inputs) + name.index for name in body.results)

    def run(*given: torch.Tensor) -> list[torch.Tensor]:
        values: list[Any] = stored.copy()
        for place, value in zip(places, given, strict=True):
            values[place] = value
        for step in steps:
            values.append(step.function(*(values[i] for i in step.reads)))
            for i in step.last:
                values[i] = None
        return [values[i] for i in results]

    return run


def _steps(target: Target, body: Body, inputs: Sequence[Any]) -> list[_Step]:
    seen: list[tuple[Any, ...]] = []
    interpret(body, [_shape(value) for value in inputs], lambda _, args: seen.append(args))
    last: dict[int, int] = {}
    for step, statement in enumerate(body.statements):
        last |= {_number(name, inputs): step for name in statement.reads}
    kept = {_number(name, inputs) for name in body.results}
    steps = []
    for step, (statement, shapes) in enumerate(zip(body.statements, seen, strict=True)):
        make = _kernel if statement.op in OPERATORS else _torch
        function, reads = make(target, statement, shapes, inputs)
        done = tuple(i for i, at in last.items() if at == step and i not in kept)
        steps.append(_Step(function, reads, done))
    return steps


def _number(name: Name, inputs: Sequence[Any]) -> int:
    return name.index if name.is_input else len(inputs) + name.index


def _shape(value: Any) -> torch.Tensor:
    """A tensor without memory, of the example's sizes."""
    like = value.value if isinstance(value, Dynamic) else value
    return torch.empty(sizes(like), dtype=like.dtype, device="meta")


def _kernel(target: Target, statement: Statement, shapes: Sequence[Any],
            inputs: Sequence[Any]) -> tuple[Callable[..., Any], tuple[int, ...]]:
    """An operation of ours by the kernel that it has alone."""
    arguments, reads = [], []
    for arg, shape in zip(statement.args, shapes, strict=True):
        known = inputs[arg.index] if isinstance(arg, Name) and arg.is_input else None
        if not isinstance(arg, Name):
            arguments.append(arg)
        elif known is None or isinstance(known, Dynamic):
            arguments.append(Dynamic(shape))
            reads.append(_number(arg, inputs))
        else:
            arguments.append(known)
    operator = OPERATORS[statement.op]
    inner = Call(operator, operator.bind(tuple(arguments), {}), target)
    return choose(inner).bind(inner), tuple(reads)


def _torch(target: Target, statement: Statement, shapes: Sequence[Any],
           inputs: Sequence[Any]) -> tuple[Callable[..., Any], tuple[int, ...]]:
    """An operation of torch, of the values that it reads."""
    reference, template = ROW_OPS[statement.op].reference, list(statement.args)
    places = [i for i, arg in enumerate(template) if isinstance(arg, Name)]

    def run(*values: torch.Tensor) -> Any:
        args = template.copy()
        for place, value in zip(places, values, strict=True):
            args[place] = value
        return reference(*args)

    return run, tuple(_number(arg, inputs) for arg in template if isinstance(arg, Name))


KERNEL = Kernel("parts", "fused_rows", _supports, _bind, priority=5)
