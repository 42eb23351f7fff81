"""Packing as an operator, so that graphs can say it and the compiler can fold it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bincompile.errors import InputError
from bincompile.op import Operator, Sample, Tolerance
from bincompile.ops import bits


def _shape(x):
    return x.new_empty((*x.shape[:-1], bits.packed_width(x.shape[-1])), dtype=torch.uint8)


def _check(x):
    if x.ndim < 1 or not x.dtype.is_floating_point:
        raise InputError(f"{x.dtype} of shape {tuple(x.shape)}", "a float tensor (..., K)",
                         "the tensor to pack")


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    for shape in ((1,), (3, 8), (2, 5, 17), (0, 9)):
        yield Sample((torch.randn(shape, generator=generator),))
    yield Sample((torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")]),))


def _bad_samples(generator: torch.Generator) -> Iterator[Sample]:
    yield Sample((torch.ones(3, 8, dtype=torch.long),), error="float")
    yield Sample((torch.tensor(1.0),), error="(..., K)")


pack_signs = Operator(
    name="pack_signs",
    schema="(Tensor x) -> Tensor",
    reference=bits.pack,
    shape=_shape,
    check=_check,
    samples=_samples,
    bad_samples=_bad_samples,
    tolerance=Tolerance(bits=True),
    source="bincompile.ops.bits: least significant bit first, 1 where x >= 0",
)
