"""A convolution of every feature with weights of its own, over the last tokens of a stream."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bincompile.errors import InputError
from bincompile.op import Operator, Sample
from bincompile.ops.stream_window import check_ring, stream_window
from bincompile.ops.ticks import CASES, bad_clock_samples, draw


def _reference(token, ring, rows, clock, weight, bias=None, rate=1, delay=0, fill=0.0, apart=1,
               back=0):
    read = stream_window.reference(token, ring, rows, clock, weight.shape[0], rate, delay, fill,
                                   apart, back)
    out = (read * weight).sum(1)
    return out if bias is None else out + bias


def _shape(token, ring, rows, clock, weight, bias=None, rate=1, delay=0, fill=0.0, apart=1,
           back=0):
    return torch.empty_like(token, memory_format=torch.contiguous_format)


def _check(token, ring, rows, clock, weight, bias=None, rate=1, delay=0, fill=0.0, apart=1,
           back=0):
    if token.ndim != 2 or not token.is_floating_point():
        raise InputError(f"tokens {token.dtype} of shape {tuple(token.shape)}",
                         "(rows, features) of a float dtype", "the token")
    if weight.ndim != 2 or weight.shape[1] != token.shape[1] or weight.dtype != token.dtype:
        raise InputError(f"weight {weight.dtype} of shape {tuple(weight.shape)}",
                         f"(taps, {token.shape[1]}) of {token.dtype}", "the weight")
    if bias is not None and tuple(bias.shape) != (token.shape[1],):
        raise InputError(f"bias of shape {tuple(bias.shape)}", f"({token.shape[1]},)", "the bias")
    if apart < 1 or back < 0:
        raise InputError(f"entries {apart} apart that end {back} back",
                         "at least 1, and at least 0", "the convolution")
    reach = (weight.shape[0] - 1) * apart + back + 1 if weight.shape[0] else 0
    check_ring(token, ring, rows, clock, reach, rate, delay)


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    forms = ((3, 4, 4, 1, 0), (17, 2, 9, 3, 2), (16, 1, 2, 1, 1), (33, 5, 5, 1, 0))
    for number, case in enumerate((*CASES, CASES[3])):
        features, taps, slots, apart, back = forms[number % len(forms)]
        dtype = torch.float32 if number != 1 else torch.float64
        bias = draw((features,), dtype, generator) if number % 3 else None
        yield Sample((draw((case.rows.shape[0], features), dtype, generator),
                      draw((case.clock.shape[0], slots, features), dtype, generator), case.rows,
                      case.clock, draw((taps, features), dtype, generator), bias),
                     {**case.timing, "fill": 1.5 * (number % 2), "apart": apart, "back": back})


def _bad_samples(generator: torch.Generator) -> Iterator[Sample]:
    token, ring, weight = torch.ones(1, 3), torch.zeros(2, 4, 3), torch.ones(2, 3)
    rows, clock = torch.tensor([1]), torch.tensor([0, 0])
    yield from bad_clock_samples(token, ring, middle=(weight, None))
    for given, error in (((token[0], ring, rows, clock, weight), "tokens"),
                         ((token.int(), ring, rows, clock, weight), "float dtype"),
                         ((token, ring[:1], rows, clock, weight), "ring of shape"),
                         ((token, ring, rows, clock, weight[:, :2]), "weight"),
                         ((token, ring, rows, clock, weight, weight[0, :2]), "bias of shape"),
                         ((token, ring, rows, clock, torch.ones(5, 3)), "a ring of 4 slots"),
                         ((token, ring, rows, clock, weight[:0]), "0 indices")):
        yield Sample(given, error=error)
    for named, error in (({"apart": 0}, "0 apart"), ({"back": -1}, "-1 back"),
                         ({"apart": 3, "back": 1}, "5 indices")):
        yield Sample((token, ring, rows, clock, weight), named, error=error)


stream_depthwise = Operator(
    name="stream_depthwise",
    schema="(Tensor token, Tensor(a!) ring, Tensor rows, Tensor clock, Tensor weight, "
           "Tensor? bias=None, int rate=1, int delay=0, float fill=0., int apart=1, int back=0) "
           "-> Tensor",
    reference=_reference,
    shape=_shape,
    check=_check,
    samples=_samples,
    bad_samples=_bad_samples,
    source="torch.nn.functional.conv1d with as many groups as channels",
)
