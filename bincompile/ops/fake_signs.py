"""Signs with a straight-through gradient, and a value of its own for zero."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bincompile.errors import InputError, InputTypeError
from bincompile.op import Operator, Sample, Tolerance

TIES = (0.0, 1.0)


def _reference(x, tie=1.0):
    return torch.where(x == 0, tie, torch.where(x > 0, 1.0, -1.0)).to(x.dtype)


def _shape(x, tie=1.0):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _check(x, tie=1.0):
    if not x.dtype.is_floating_point:
        raise InputTypeError(f"input of dtype {x.dtype}", "a float dtype", "the input's dtype")
    if tie not in TIES:
        raise InputError(f"tie={tie}", " or ".join(map(str, TIES)), "the tie argument")


def _setup_context(ctx, inputs, output) -> None:
    return None


def _backward(ctx, grad):
    """dx = g, everywhere."""
    return grad, None


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    for shape in ((), (3,), (2, 5), (0, 4)):
        yield Sample((torch.randn(shape, generator=generator).requires_grad_(),))
    yield Sample((torch.tensor([0.0, -0.0, 2.0, -1e-30, float("inf"), float("nan")]),))
    yield Sample((torch.tensor([0.0, -0.0, 2.0, -3.0]), 0.0))
    yield Sample((torch.randn(2, 5, generator=generator).half(), 0.0))


def _bad_samples(generator: torch.Generator) -> Iterator[Sample]:
    yield Sample((torch.ones(3, dtype=torch.long),), error="float")
    yield Sample((torch.ones(3), 0.5), error="tie=0.5")


fake_signs = Operator(
    name="fake_signs",
    schema="(Tensor x, float tie=1.0) -> Tensor",
    reference=_reference,
    shape=_shape,
    check=_check,
    samples=_samples,
    bad_samples=_bad_samples,
    tolerance=Tolerance(bits=True),
    backward=(_setup_context, _backward),
    source="straight-through estimator, arXiv:1308.3432",
)
