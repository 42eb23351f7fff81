"""The index of a value that a step computes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bincompile.op import Operator, Sample, Tolerance
from bincompile.ops.ticks import CASES, bad_clock_samples, check_clock, index_of


def _reference(rows, clock, rate=1, delay=0):
    return index_of(rows, clock, rate, delay)


def _shape(rows, clock, rate=1, delay=0):
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    for case in CASES:
        yield Sample((case.rows, case.clock), {**case.timing})


def _bad_samples(generator: torch.Generator) -> Iterator[Sample]:
    yield from bad_clock_samples()


stream_index = Operator(
    name="stream_index",
    schema="(Tensor rows, Tensor clock, int rate=1, int delay=0) -> Tensor",
    reference=_reference,
    shape=_shape,
    check=check_clock,
    samples=_samples,
    bad_samples=_bad_samples,
    tolerance=Tolerance(bits=True),
    source="the step at which an output of a strided, delayed layer is complete",
)
