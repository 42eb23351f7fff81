"""Sums, means, maxima and minima of the last tokens, at a cost that their number has no part in.

The stream is cut into blocks of as many tokens as the window has. A window is then the end of one
block and the beginning of the next: the beginnings are running values, the ends are computed once
for each block, from its last token to its first, when the next one begins. Nothing is ever
subtracted, so that a nan or a large number leaves with its token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from bincompile.errors import InputError
from bincompile.op import Operator, Sample
from bincompile.ops.ticks import (
    CASES,
    bad_clock_samples,
    check_clock,
    check_latest,
    check_state,
    check_tokens,
    draw,
    index_of,
    keep,
    latest,
    wide_as,
)

KINDS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sum": torch.add, "mean": torch.add, "max": torch.maximum, "min": torch.minimum}
_RUNNING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda x: x.cumsum(1), "mean": lambda x: x.cumsum(1),
    "max": lambda x: x.cummax(1).values, "min": lambda x: x.cummin(1).values}


def _reference(token, ring, ends, begin, rows, clock, window, kind, rate=1, delay=0):
    index, wide = index_of(rows, clock, rate, delay), token.to(begin.dtype)
    place = index % window
    turned = rows[(place == 0) & (index > 0)]
    ends[turned, 1:] = _RUNNING[kind](ring[turned, 1:].to(ends.dtype).flip(1)).flip(1)
    ring[rows, place] = token
    inside = wide_as((place > 0) & (index > 0), wide)
    first = torch.where(inside, KINDS[kind](latest(begin, rows, index), wide), wide)
    keep(begin, rows, index, first)
    both = KINDS[kind](ends[rows, (place + 1) % window], first)
    out = torch.where(wide_as((place + 1 < window) & (index >= window), both), both, first)
    if kind == "mean":
        out = out / wide_as((index + 1).clamp(1, window), out)
    return out.to(token.dtype)


def _shape(token, ring, ends, begin, rows, clock, window, kind, rate=1, delay=0):
    return torch.empty_like(token, memory_format=torch.contiguous_format)


def _check(token, ring, ends, begin, rows, clock, window, kind, rate=1, delay=0):
    check_clock(rows, clock, rate, delay)
    check_tokens(token, rows)
    if window < 1:
        raise InputError(f"a window of {window}", "1 or more", "the window")
    if kind not in KINDS:
        raise InputError(f"pooling of kind {kind!r}", ", ".join(KINDS), "the kind")
    if kind == "mean" and not begin.is_floating_point():
        raise InputError(f"means of {begin.dtype}", "a float dtype", "the tokens")
    shape = tuple(token.shape[1:])
    check_state("ring", ring, clock, (window, *shape), token.dtype)
    check_state("ends", ends, clock, (window, *shape), begin.dtype)
    check_latest("begin", begin, clock, shape)


FORMS = (((), torch.float32, 1, "max"), ((3,), torch.float32, 4, "mean"),
         ((2, 3), torch.int64, 3, "max"), ((17,), torch.float32, 5, "sum"),
         ((5,), torch.float32, 2, "min"), ((16,), torch.float32, 40, "mean"))


def _sample(shape, dtype, rows, clock, window, kind, generator, **timing):
    streams = clock.shape[0]
    token = draw((rows.shape[0], *shape), dtype, generator)
    states = [draw((streams, count, *shape), dtype, generator) for count in (window, window, 2)]
    return Sample((token, *states, rows, clock, window, kind), timing)


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    for number, case in enumerate(CASES):
        shape, dtype, window, kind = FORMS[number % len(FORMS)]
        yield _sample(shape, dtype, case.rows, case.clock, window, kind, generator, **case.timing)
    for kind in KINDS:
        sample = _sample((2,), torch.float32, torch.randperm(32, generator=generator),
                         torch.arange(32), 6, kind, generator, delay=1)
        token, ring, ends, begin, *rest = sample.args
        token[3, 0], ring[7, 2, 1] = float("nan"), float("inf")
        ring[9, 3], begin[8, :, 0] = float("nan"), float("-inf")
        token = token.repeat(1, 2)[:, 1::2]
        yield Sample((token, ring, ends, begin, *rest), sample.kwargs)


def _bad_samples(generator: torch.Generator) -> Iterator[Sample]:
    token, ring, begin = torch.ones(1, 3), torch.zeros(2, 4, 3), torch.zeros(2, 2, 3)
    rows, clock = torch.tensor([1]), torch.tensor([0, 0])
    yield from bad_clock_samples(token, ring, ring.clone(), begin, middle=(4, "sum"))
    for given, error in (((token, ring[:, :3], ring, begin), "ring of shape"),
                         ((token, ring, ring[:, :3], begin), "ends of shape"),
                         ((token, ring, ring.double(), begin), "float64"),
                         ((token, ring, ring, begin[:, :1]), "begin of shape"),
                         ((token[:0], ring, ring, begin), "one token for each row")):
        yield Sample((*given, rows, clock, 4, "sum"), error=error)
    yield Sample((token, ring, ring.clone(), begin, rows, clock, 0, "sum"), error="window of 0")
    yield Sample((token, ring, ring.clone(), begin, rows, clock, 4, "prod"), error="kind 'prod'")
    yield Sample((token.long(), ring.long(), ring.long(), begin.long(), rows, clock, 4, "mean"),
                 error="means of")


stream_pool = Operator(
    name="stream_pool",
    schema="(Tensor token, Tensor(a!) ring, Tensor(b!) ends, Tensor(c!) begin, Tensor rows, "
           "Tensor clock, int window, str kind, int rate=1, int delay=0) -> Tensor",
    reference=_reference,
    shape=_shape,
    check=_check,
    samples=_samples,
    bad_samples=_bad_samples,
    source="van Herk, A fast algorithm for local minimum and maximum filters (1992)",
)
