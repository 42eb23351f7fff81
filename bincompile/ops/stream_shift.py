"""The token of some ticks ago: what a branch waits for that is faster than the other."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bincompile.errors import InputError
from bincompile.op import Operator, Sample, Tolerance
from bincompile.ops.stream_window import check_ring, ring_bad_samples, ring_samples
from bincompile.ops.ticks import index_of, wide_as


def _reference(token, ring, rows, clock, by, rate=1, delay=0, fill=0.0):
    slots, newest = ring.shape[1], index_of(rows, clock, rate, delay)
    ring[rows, newest % slots] = token
    found = ring[rows, (newest - by) % slots]
    empty = torch.full((), fill, dtype=ring.dtype, device=ring.device)
    return torch.where(wide_as(newest < by, found), empty, found)


def _shape(token, ring, rows, clock, by, rate=1, delay=0, fill=0.0):
    return torch.empty_like(token, memory_format=torch.contiguous_format)


def _check(token, ring, rows, clock, by, rate=1, delay=0, fill=0.0):
    if by < 0:
        raise InputError(f"a shift by {by}", "0 or more", "the shift")
    check_ring(token, ring, rows, clock, by + 1, rate, delay)


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    for number, ((*args, reach), kwargs) in enumerate(ring_samples(generator)):
        yield Sample((*args, reach - 1), kwargs | ({"fill": 2.0} if number == 3 else {}))


def _bad_samples(generator: torch.Generator) -> Iterator[Sample]:
    yield from ring_bad_samples(generator)
    yield Sample((torch.ones(1, 3), torch.zeros(1, 4, 3), torch.tensor([0]), torch.tensor([0]), 4),
                 error="5 indices")
    yield Sample((torch.ones(1, 3), torch.zeros(1, 4, 3), torch.tensor([0]), torch.tensor([0]),
                  -1), error="a shift by -1")


stream_shift = Operator(
    name="stream_shift",
    schema="(Tensor token, Tensor(a!) ring, Tensor rows, Tensor clock, int by, int rate=1, "
           "int delay=0, float fill=0.) -> Tensor",
    reference=_reference,
    shape=_shape,
    check=_check,
    samples=_samples,
    bad_samples=_bad_samples,
    tolerance=Tolerance(bits=True),
    source="a delay line, which keeps a residual in step with the branch that it is added to",
)
