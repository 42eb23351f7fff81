"""The last tokens of a stream, from a ring that the new one is written into.

Entries are `apart` indices from one another, and the newest of them is `back` indices old; with
`last` they are along the last axis.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bincompile.errors import InputError
from bincompile.op import Operator, Sample, Tolerance
from bincompile.ops.ticks import (
    CASES,
    bad_clock_samples,
    check_clock,
    check_state,
    check_tokens,
    draw,
    index_of,
    wide_as,
)


def _reference(token, ring, rows, clock, window, rate=1, delay=0, fill=0.0, apart=1, back=0,
               last=False):
    slots, newest = ring.shape[1], index_of(rows, clock, rate, delay)
    ring[rows, newest % slots] = token
    ages = torch.arange(window - 1, -1, -1, device=rows.device) * apart + back
    wanted = newest[:, None] - ages
    found = ring[rows[:, None], wanted % slots]
    empty = torch.full((), fill, dtype=ring.dtype, device=ring.device)
    out = torch.where(wide_as(wanted < 0, found), empty, found)
    return out.movedim(1, -1).contiguous() if last else out


def _shape(token, ring, rows, clock, window, rate=1, delay=0, fill=0.0, apart=1, back=0,
           last=False):
    shape = (*token.shape[1:], window) if last else (window, *token.shape[1:])
    return token.new_empty((token.shape[0], *shape))


def check_ring(token, ring, rows, clock, reach, rate, delay):
    """Raise unless a ring holds the tokens of so many indices."""
    check_clock(rows, clock, rate, delay)
    check_tokens(token, rows)
    check_state("ring", ring, clock, (None, *token.shape[1:]), token.dtype)
    if reach < 1 or ring.shape[1] < reach:
        raise InputError(f"{reach} indices of a ring of {ring.shape[1]} slots",
                         f"1 to {ring.shape[1]}", "the ring, or how far back it is read")


def _check(token, ring, rows, clock, window, rate=1, delay=0, fill=0.0, apart=1, back=0,
           last=False):
    if apart < 1 or back < 0:
        raise InputError(f"entries {apart} apart that end {back} back",
                         "at least 1, and at least 0", "the window")
    reach = (window - 1) * apart + back + 1 if window > 0 else 0
    check_ring(token, ring, rows, clock, reach, rate, delay)


FORMS = (((), torch.float32, 1, 1), ((3,), torch.float32, 4, 4), ((2, 3), torch.int64, 3, 5),
         ((5,), torch.bool, 2, 2), ((17,), torch.float16, 3, 3), ((2,), torch.float64, 2, 9),
         ((0,), torch.float32, 2, 2), ((16,), torch.bfloat16, 2, 2), ((3, 1), torch.uint8, 3, 3),
         ((2,), torch.int32, 2, 2))


def ring_samples(generator: torch.Generator) -> Iterator[tuple]:
    """Arguments up to how far back is read, and named ones, of all forms and cases in turn."""
    for number, case in enumerate((*CASES, *CASES[1:5])):
        shape, dtype, reach, slots = FORMS[number]
        token = draw((case.rows.shape[0], *shape), dtype, generator)
        ring = draw((case.clock.shape[0], slots, *shape), dtype, generator)
        yield (token, ring, case.rows, case.clock, reach), {**case.timing}
    token = draw((33, 4), torch.float32, generator)[:, 1::2][1:]  # neither in one piece nor aligned
    ring = draw((32 * 6 * 2 + 1,), torch.float32, generator)[1:].view(32, 6, 2)
    rows = torch.randperm(32, generator=generator)
    yield (token, ring, rows, torch.arange(32) * 2, 6), {"rate": 2, "delay": 3}


def ring_bad_samples(generator: torch.Generator) -> Iterator[Sample]:
    """Bad samples that the operators with a ring share."""
    token, ring = torch.ones(1, 3), torch.zeros(2, 4, 3)
    rows, clock = torch.tensor([1]), torch.tensor([0, 0])
    yield from bad_clock_samples(token, ring, middle=(3,))
    yield Sample((token, ring[:1], rows, clock, 3), error="ring of shape")
    yield Sample((token, ring[..., :2], rows, clock, 3), error="ring of shape")
    yield Sample((token, ring.double(), rows, clock, 3), error="float64")
    yield Sample((torch.ones(2, 3), ring, rows, clock, 3), error="one token for each row")
    yield Sample((token, ring, rows, clock, 5), error="a ring of 4 slots")


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    for number, (args, kwargs) in enumerate(ring_samples(generator)):
        yield Sample(args, kwargs | ({"fill": float("-inf")} if number in (1, 4) else {}))
    for shape, last in (((), True), ((3, 2), True), ((17,), False)):
        yield Sample((draw((2, *shape), torch.float32, generator),
                      draw((3, 9, *shape), torch.float32, generator), torch.tensor([2, 0]),
                      torch.tensor([5, 3, 20]), 3),
                     {"delay": 1, "fill": 2.0, "apart": 3, "back": 2, "last": last})


def _bad_samples(generator: torch.Generator) -> Iterator[Sample]:
    yield from ring_bad_samples(generator)
    given = (torch.ones(1, 3), torch.zeros(1, 4, 3), torch.tensor([0]), torch.tensor([0]))
    yield Sample((*given, 0), error="0 indices")
    yield Sample((*given, 2), {"apart": 0}, error="0 apart")
    yield Sample((*given, 2), {"back": -1}, error="-1 back")
    yield Sample((*given, 2), {"apart": 3, "back": 1}, error="5 indices")


stream_window = Operator(
    name="stream_window",
    schema="(Tensor token, Tensor(a!) ring, Tensor rows, Tensor clock, int window, int rate=1, "
           "int delay=0, float fill=0., int apart=1, int back=0, bool last=False) -> Tensor",
    reference=_reference,
    shape=_shape,
    check=_check,
    samples=_samples,
    bad_samples=_bad_samples,
    tolerance=Tolerance(bits=True),
    source="the state of a streamed convolution, as a ring in place of a shifted buffer",
)
