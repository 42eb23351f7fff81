"""Float rows as what their binary bases stand for, with a straight-through gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bincompile.errors import InputError
from bincompile.op import Operator, Sample
from bincompile.ops import bases


def check_rows(x: torch.Tensor, count: int) -> None:
    """Raise unless x is a float tensor (..., D) and the number of bases is one that exists."""
    if x.ndim < 1 or not x.dtype.is_floating_point:
        raise InputError(f"{x.dtype} of shape {tuple(x.shape)}", "a float tensor (..., D)",
                         "the rows")
    if not 1 <= count <= bases.MOST:
        raise InputError(f"count={count}", f"1 to {bases.MOST}", "the number of bases")


def _reference(x, count):
    return bases.combine(*bases.residual(x, count))


def _shape(x, count):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:
    return None


def _backward(ctx, grad):
    """dx = g: the bases approximate x, so their gradient is taken to be that of x itself."""
    return grad, None


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    for count in range(1, bases.MOST + 1):
        for shape in ((1,), (3, 8), (2, 5, 17), (0, 9)):
            yield Sample((torch.randn(shape, generator=generator).requires_grad_(), count))
    yield Sample((torch.zeros(2, 4), 2))
    yield Sample((torch.randn(2, 4, generator=generator).bfloat16(), 1))


def _bad_samples(generator: torch.Generator) -> Iterator[Sample]:
    yield Sample((torch.ones(3, 8, dtype=torch.long), 1), error="float")
    yield Sample((torch.tensor(1.0), 1), error="(..., D)")
    yield Sample((torch.ones(3, 8), bases.MOST + 1), error="count=")


fake_binary_rows = Operator(
    name="fake_binary_rows",
    schema="(Tensor x, int count) -> Tensor",
    reference=_reference,
    shape=_shape,
    check=check_rows,
    samples=_samples,
    bad_samples=_bad_samples,
    backward=(_setup_context, _backward),
    source="residual binary bases, arXiv:1802.00150; straight-through, arXiv:1308.3432",
)
