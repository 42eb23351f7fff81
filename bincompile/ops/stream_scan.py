"""Running sums, means, products, maxima and minima over all tokens since a row began."""

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
    check_tokens,
    draw,
    index_of,
    keep,
    latest,
    wide_as,
)

KINDS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sum": torch.add, "mean": torch.add, "prod": torch.mul, "max": torch.maximum,
    "min": torch.minimum, "logsumexp": torch.logaddexp}


def _reference(token, total, rows, clock, kind, rate=1, delay=0):
    index, wide = index_of(rows, clock, rate, delay), token.to(total.dtype)
    before = latest(total, rows, index)
    out = torch.where(wide_as(index > 0, wide), KINDS[kind](before, wide), wide)
    keep(total, rows, index, out)
    if kind == "mean":
        out = out / wide_as((index + 1).clamp(min=1), out)
    return out.to(token.dtype)


def _shape(token, total, rows, clock, kind, rate=1, delay=0):
    return torch.empty_like(token, memory_format=torch.contiguous_format)


def _check(token, total, rows, clock, kind, rate=1, delay=0):
    check_clock(rows, clock, rate, delay)
    check_tokens(token, rows)
    check_latest("total", total, clock, tuple(token.shape[1:]))
    if kind not in KINDS:
        raise InputError(f"a scan of kind {kind!r}", ", ".join(KINDS), "the kind")
    if kind in ("mean", "logsumexp") and not total.is_floating_point():
        raise InputError(f"a {kind} in a total of {total.dtype}", "a float dtype", "the total")


FORMS = (((3,), torch.float32, torch.float64, "mean"), ((2, 3), torch.int64, torch.int64, "max"),
         ((17,), torch.float32, torch.float32, "logsumexp"),
         ((), torch.float32, torch.float64, "sum"))


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    for number, case in enumerate(CASES):
        shape, dtype, wide, kind = FORMS[number % len(FORMS)]
        yield Sample((draw((case.rows.shape[0], *shape), dtype, generator),
                      draw((case.clock.shape[0], 2, *shape), wide, generator),
                      case.rows, case.clock, kind), {**case.timing})
    token = draw((33, 4), torch.float32, generator)[:, 1::2][1:]  # neither in one piece nor aligned
    token[3, 0], token[4, 1], token[5, 0] = float("nan"), float("inf"), float("-inf")
    for kind in KINDS:
        total = draw((32 * 4 + 1,), torch.float32, generator)[1:].view(32, 2, 2)
        total[6, :, 0], total[5, :, 1] = float("nan"), float("-inf")
        yield Sample((token, total, torch.arange(32), torch.arange(32), kind), {"rate": 2})


def _bad_samples(generator: torch.Generator) -> Iterator[Sample]:
    token, total = torch.ones(1, 3), torch.zeros(2, 2, 3)
    rows, clock = torch.tensor([1]), torch.tensor([0, 0])
    yield from bad_clock_samples(token, total, middle=("sum",))
    yield Sample((token, total[:, :1], rows, clock, "sum"), error="total of shape")
    yield Sample((token[:0], total, rows, clock, "sum"), error="one token for each row")
    yield Sample((token, total, rows, clock, "median"), error="kind 'median'")
    yield Sample((token.long(), total.long(), rows, clock, "logsumexp"), error="float dtype")


stream_scan = Operator(
    name="stream_scan",
    schema="(Tensor token, Tensor(a!) total, Tensor rows, Tensor clock, str kind, int rate=1, "
           "int delay=0) -> Tensor",
    reference=_reference,
    shape=_shape,
    check=_check,
    samples=_samples,
    bad_samples=_bad_samples,
    source="torch.cumsum, cumprod, cummax, cummin and logcumsumexp, one token at a time",
)
