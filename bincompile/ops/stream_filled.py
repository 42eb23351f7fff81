"""Which entries of a window there are already."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bincompile.errors import InputError
from bincompile.op import Operator, Sample, Tolerance
from bincompile.ops.ticks import CASES, bad_clock_samples, check_clock, index_of


def _reference(rows, clock, window, rate=1, delay=0):
    ages = torch.arange(window - 1, -1, -1, device=rows.device)
    return index_of(rows, clock, rate, delay)[:, None] >= ages


def _shape(rows, clock, window, rate=1, delay=0):
    return rows.new_empty((rows.shape[0], window), dtype=torch.bool)


def _check(rows, clock, window, rate=1, delay=0):
    check_clock(rows, clock, rate, delay)
    if window < 1:
        raise InputError(f"a window of {window}", "1 or more", "the window")


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    for case in CASES:
        for window in (1, 4):
            yield Sample((case.rows, case.clock, window), {**case.timing})


def _bad_samples(generator: torch.Generator) -> Iterator[Sample]:
    yield from bad_clock_samples(middle=(3,))
    yield Sample((torch.tensor([0]), torch.tensor([0]), 0), error="a window of 0")


stream_filled = Operator(
    name="stream_filled",
    schema="(Tensor rows, Tensor clock, int window, int rate=1, int delay=0) -> Tensor",
    reference=_reference,
    shape=_shape,
    check=_check,
    samples=_samples,
    bad_samples=_bad_samples,
    tolerance=Tolerance(bits=True),
    source="the mask of a window that is not full yet",
)
