"""Row programs: many operations that treat each row alike, as one operator.

A body (`bincompile.body`) says what is done; inputs broadcast against each other as in torch. Its
leading axes are the rows; a kernel walks them in blocks, and what stands between two operations is
never written out whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from bincompile.body import Body
from bincompile.errors import InputError
from bincompile.op import Operator, Sample, Tolerance
from bincompile.ops import bits
from bincompile.ops.row_ops import ROW_OPS, check_body, interpret

DOUBTFUL = 1e-6  # of its row's scale: a value whose sign rounding before it may change


def _reference(inputs, body):
    return interpret(Body.parse(body), inputs)


def _shape(inputs, body):
    return interpret(Body.parse(body), inputs)


def _check(inputs, body):
    parsed = Body.parse(body)
    check_body(parsed)
    if len(inputs) != parsed.inputs:
        raise InputError(f"{len(inputs)} inputs of a body that reads x0 to x{parsed.inputs - 1}",
                         f"{parsed.inputs} inputs", "the inputs or the body")


def sign_inputs(bound: Mapping[str, Any]) -> list[torch.Tensor]:
    """The values whose signs the body takes, in the order of its statements."""
    found: list[torch.Tensor] = []

    def watch(statement: Any, args: tuple[Any, ...]) -> None:
        signs_of = ROW_OPS[statement.op].signs_of
        if signs_of is not None:
            found.extend(signs_of(*args))

    interpret(Body.parse(bound["body"]), bound["inputs"], watch)
    return found


def doubtful_rows(bound: Mapping[str, Any]) -> torch.Tensor | None:
    """Which rows may differ by more than rounding: a sign is taken of what is nearly 0 there.

    Nearly 0 is below `DOUBTFUL` of its row's scale, or within a few times its own rounding, as the
    body in float64 shows it.

    Returns:
        bool (rows,), the leading axes flattened; None if no sign is taken.
    """
    signs = sign_inputs(bound)
    if not signs:
        return None
    wide = [x.double() if x.dtype.is_floating_point else x for x in bound["inputs"]]
    exact = sign_inputs({**bound, "inputs": wide})
    lead = torch.broadcast_shapes(*(x.shape[:-1] for x in signs))
    doubt = torch.zeros(lead, dtype=torch.bool, device=signs[0].device)
    for x, y in zip(signs, exact, strict=True):
        near = (x.abs() < DOUBTFUL * bits.row_scale(x)) | ((y - x).abs() > x.abs() / 4)
        doubt = doubt | near.any(-1)
    return doubt.flatten()


_FFN = """t0 = binary_linear(x0, x1, x2, x3, {0}, 'binary', None, None)
t1 = gelu(t0, 'none')
t2 = binary_linear(t1, x4, x5, x6, {1}, 'binary', None, None)
t3 = add(t2, x0)
t4 = layer_norm(t3, x7, x8, 1e-12)
return t4"""
_LOOK_UP = """t0 = embedding(x0, x1)
t1 = add(t0, x2)
t2 = binary_embedding(x1, x3, x4, {0})
t3 = sub(t1, t2)
t4 = rms_norm(t3, x5, 1e-06)
return t3, t4"""
_FLOATS = """t0 = layer_norm(x0, x1, x3, 1e-05)
t1 = linear(t0, x2, x3)
t2 = gelu(t1, 'none')
t3 = linear(t2, x4, None)
t4 = add(t3, x0)
t5 = linear(x0, x4, x5)
t6 = mul(t4, t5)
t7 = mean(t6)
return t1, t4, t7"""
_GATE = """t0 = silu(x0)
t1 = mul(t0, x1)
t2 = amax(t1)
t3 = sub(t1, t2)
t4 = softmax(t3)
t5 = gt(t4, x2)
t6 = where(t5, t4, -1.5)
t7 = clamp(t6, -1.0, None)
return t1, t2, t7"""


def packed_layer(outputs: int, features: int, generator: torch.Generator) -> list[torch.Tensor]:
    """A random packed weight, its scales and a bias."""
    return [bits.pack(torch.randn(outputs, features, generator=generator)),
            0.1 * torch.rand(outputs, generator=generator),
            torch.randn(outputs, generator=generator)]


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    for lead, columns, inner in (((5,), 48, 96), ((2, 3), 33, 17), ((0,), 16, 64)):
        layers = [*packed_layer(inner, columns, generator),
                  *packed_layer(columns, inner, generator)]
        yield Sample(([normal(*lead, columns), *layers, normal(columns), normal(columns)],
                      _FFN.format(columns, inner)), stored=tuple(range(1, 9)))
    for lead, columns in (((2, 4), 24), ((3,), 7)):
        table, scale, _ = packed_layer(9, columns, generator)
        position = normal(1, 4, columns) if len(lead) == 2 else normal(columns)
        yield Sample(([normal(9, columns), torch.randint(9, lead, generator=generator), position,
                       table, scale, normal(columns)], _LOOK_UP.format(columns)),
                     stored=(0, 3, 4, 5))
    for lead, columns in (((1,), 33), ((2, 3), 16), ((19,), 70), ((0, 2), 5), ((3,), 1)):
        inputs = [normal(*lead, columns), normal(columns), normal(columns, columns) / columns**0.5,
                  normal(columns), normal(columns, columns) / columns**0.5, normal(columns)]
        yield Sample((inputs, _FLOATS), stored=(1, 2, 3, 4, 5))
    x, gate = normal(3, 5, 20), normal(3, 5, 20)
    yield Sample(([x, gate, torch.tensor(0.05)], _GATE), stored=(2,))
    yield Sample(([x, normal(3, 1, 20), torch.tensor(0.05)], _GATE), stored=(2,))
    yield Sample(([x.double(), gate.double(), torch.tensor(0.05).double()], _GATE), stored=(2,))
    x = x.clone()
    x[0, 0, :3] = torch.tensor([float("inf"), float("nan"), -0.0])
    yield Sample(([x.transpose(0, 1)], "t0 = relu(x0)\nt1 = mul(t0, 2)\nreturn t0, t1"))


def _bad_samples(generator: torch.Generator) -> Iterator[Sample]:
    x = torch.randn(2, 8, generator=generator)
    for inputs, body, error in (
            ([x], "t0 = add(x0, x1)\nreturn t0", "1 inputs"),
            ([x, x[:, :5]], "t0 = add(x0, x1)\nreturn t0", "t0 = add(x0, x1)"),
            ([x], "t0 = matmul(x0, x0)\nreturn t0", "matmul"),
            ([x], "t0 = gelu(x0)\nreturn t0", "1 arguments"),
            ([x], "t0 = pow(x0, x0)\nreturn t0", "argument x0"),
            ([x], "t0 = relu(t0)\nreturn t0", "not assigned"),
            ([x], "t0 = relu(x0)\nreturn x0", "a result"),
            ([x], "t0 = relu(x0)\nreturn t0, t0", "returned once"),
            ([x], "t1 = relu(x0)\nreturn t1", "assigns t0"),
            ([x], "t0 = x0.exp()\nreturn t0", "not a statement"),
            ([x], "t0 = relu(x0[0])\nreturn t0", "not a name"),
            ([x], "t0 = relu(x0)", "end in a return"),
            ([x], "return (", "body"),
            ([x, torch.tensor([0, 2])], "t0 = embedding(x0, x1)\nreturn t0", "index 2")):
        yield Sample((inputs, body), error=error)


fused_rows = Operator(
    name="fused_rows",
    schema="(Tensor[] inputs, str body) -> Tensor[]",
    reference=_reference,
    shape=_shape,
    check=_check,
    samples=_samples,
    bad_samples=_bad_samples,
    tolerance=Tolerance(rtol=1e-5, atol=1e-5),
    signs_of=sign_inputs,
    doubtful_rows=doubtful_rows,
    source="operator fusion by rows, arXiv:1802.04799; reference: torch's own operators in order",
)
