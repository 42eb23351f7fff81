"""Linear layer whose weight is a sum of binary bases, for float, int8 or 1-bit activations."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bincompile.errors import InputError
from bincompile.op import Operator, Sample, Tolerance
from bincompile.ops import bases
from bincompile.ops.binary_linear import (
    accumulate,
    check_input,
    check_outputs,
    shifted_input,
)


def combine(products: list[torch.Tensor], row: torch.Tensor | None, weight_scale: torch.Tensor,
            bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The sum over bases of (products * row) * scale, base by base in order, then the bias."""
    total: torch.Tensor | None = None
    for base, product in enumerate(products):
        found = product if row is None else product * row
        found = found * weight_scale[:, base].to(found.dtype)
        total = found if total is None else total + found
    assert total is not None
    return (total if bias is None else total + bias.to(total.dtype)).to(dtype)


def _reference(x, weight, weight_scale, bias, in_features, activation="float", shift=None):
    signs = bases.split(weight, weight_scale.shape[1], in_features, torch.float32)
    found = [accumulate(x, base, activation, None, shift) for base in signs.unbind(-2)]
    return combine([product for product, _ in found], found[0][1], weight_scale, bias, x.dtype)


def _shape(x, weight, weight_scale, bias, in_features, activation="float", shift=None):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _check(x, weight, weight_scale, bias, in_features, activation="float", shift=None):
    check_input(x, in_features, activation, shift)
    if weight_scale.ndim != 2 or not 1 <= weight_scale.shape[1] <= bases.MOST:
        raise InputError(f"weight_scale of shape {tuple(weight_scale.shape)}",
                         f"(out_features, bases) with 1 to {bases.MOST} bases", "the weight_scale")
    bases.check_table(weight, weight_scale if weight_scale.shape[1] > 1 else weight_scale[:, 0],
                      in_features)
    check_outputs(weight.shape[0], None, bias)


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    for count, (rows, features, outputs) in enumerate(((3, 1, 1), (5, 33, 17), (9, 300, 70),
                                                       (0, 16, 8)), 1):
        weight = bases.join(normal(outputs, count, features))
        for activation in ("float", "int8", "binary"):
            yield Sample((normal(rows, features), weight, normal(outputs, count), normal(outputs),
                          features, activation))
    weight, x = bases.join(normal(6, 2, 20)), normal(2, 3, 20)
    yield Sample((x, weight, normal(6, 2), None, 20, "float", normal(20)))
    hostile = x.clone()
    hostile[0, 0], hostile[0, 1, 2], hostile[0, 2, 3] = 0.0, float("nan"), float("inf")
    yield Sample((hostile, weight, normal(6, 2), None, 20, "int8", normal(20) * 1e-37))
    yield Sample((normal(3, 20).half(), weight, normal(6, 2).half(), normal(6), 20, "int8"))


def _bad_samples(generator: torch.Generator) -> Iterator[Sample]:
    x, weight = torch.randn(2, 16, generator=generator), torch.zeros(4, 4, dtype=torch.uint8)
    scale = torch.ones(4, 2)
    yield Sample((x[:, :15], weight, scale, None, 16), error="(..., 16)")
    yield Sample((x.long(), weight, scale, None, 16), error="float dtype")
    yield Sample((x, weight, torch.ones(4), None, 16), error="(out_features, bases)")
    yield Sample((x, weight, torch.ones(4, bases.MOST + 1), None, 16), error="bases")
    yield Sample((x, weight[:, :3], scale, None, 16), error="uint8")
    yield Sample((x, weight, scale, torch.ones(5), 16), error="bias")
    yield Sample((x, weight, scale, None, 16, "ternary"), error="activation")


binary_bases_linear = Operator(
    name="binary_bases_linear",
    schema="(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, int in_features, "
           "str activation='float', Tensor? shift=None) -> Tensor",
    reference=_reference,
    shape=_shape,
    check=_check,
    samples=_samples,
    bad_samples=_bad_samples,
    signs_of=shifted_input,
    tolerance=Tolerance(rtol=1e-5, atol=bases.MOST * 1e-5),  # each base as binary_linear's one
    source="binary bases of arXiv:1802.00150; int8: bincompile.ops.int8",
)
