"""The binary bases that fit float rows best, by least squares, for the compiler to fold."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from bincompile.op import Operator, Sample, Tolerance
from bincompile.ops import bases, bits
from bincompile.ops.fake_binary_rows import check_rows

# What was fitted to a weight, by its version: a search over layers fits each weight once.
_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _reference(x, count):
    if x.is_inference():
        return _fitted(x, count)
    version = (x._version, count)
    if x not in _known or _known[x][0] != version:
        _known[x] = version, _fitted(x, count)
    return tuple(tensor.clone() for tensor in _known[x][1])


def _fitted(x, count):
    signs, scales = bases.fitted(x, count)
    return bases.join(signs), scales.contiguous()


def _shape(x, count):
    lead = x.shape[:-1]
    packed = x.new_empty((*lead, count * bits.packed_width(x.shape[-1])), dtype=torch.uint8)
    return packed, x.new_empty((*lead, count))


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    for count in (1, 2, 4):
        for shape in ((3, 8), (5, 17), (0, 9)):
            yield Sample((torch.randn(shape, generator=generator), count))
    yield Sample((torch.zeros(2, 4), 2))


def _bad_samples(generator: torch.Generator) -> Iterator[Sample]:
    yield Sample((torch.ones(3, 8, dtype=torch.long), 1), error="float")
    yield Sample((torch.ones(3, 8), bases.MOST + 1), error="count=")


fit_bases = Operator(
    name="fit_bases",
    schema="(Tensor x, int count) -> (Tensor, Tensor)",
    reference=_reference,
    shape=_shape,
    check=check_rows,
    samples=_samples,
    bad_samples=_bad_samples,
    tolerance=Tolerance(bits=True),
    source="bincompile.ops.bases: alternating multi-bit quantisation, arXiv:1802.00150",
)
