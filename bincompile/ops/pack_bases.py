"""Packing of float rows into binary bases and their scales, for the compiler to fold."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bincompile.op import Operator, Sample, Tolerance
from bincompile.ops import bases, bits
from bincompile.ops.fake_binary_rows import check_rows


def _reference(x, count):
    signs, scales = bases.residual(x, count)
    return bases.join(signs), scales[..., 0].clone() if count == 1 else scales


def _shape(x, count):
    lead = x.shape[:-1]
    packed = x.new_empty((*lead, count * bits.packed_width(x.shape[-1])), dtype=torch.uint8)
    return packed, x.new_empty(lead if count == 1 else (*lead, count))


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    for count in range(1, bases.MOST + 1):
        for shape in ((3, 8), (5, 17), (0, 9)):
            yield Sample((torch.randn(shape, generator=generator), count))
    yield Sample((torch.zeros(2, 4), 2))


def _bad_samples(generator: torch.Generator) -> Iterator[Sample]:
    yield Sample((torch.ones(3, 8, dtype=torch.long), 1), error="float")
    yield Sample((torch.ones(3, 8), 0), error="count=0")


pack_bases = Operator(
    name="pack_bases",
    schema="(Tensor x, int count) -> (Tensor, Tensor)",
    reference=_reference,
    shape=_shape,
    check=check_rows,
    samples=_samples,
    bad_samples=_bad_samples,
    tolerance=Tolerance(bits=True),
    source="bincompile.ops.bases: residual binary bases, arXiv:1802.00150",
)
