"""One step of a GRU layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bincompile.op import Operator, Sample
from bincompile.ops.recurrence import bad_layers, before, check_hidden, check_layer, gates, layers
from bincompile.ops.ticks import index_of, keep


def _reference(token, hidden, rows, clock, weight_ih, weight_hh, bias_ih=None, bias_hh=None,
               initial=None, rate=1, delay=0):
    index = index_of(rows, clock, rate, delay)
    last = before(hidden, rows, index, initial)
    given, kept = gates(token, last, weight_ih, weight_hh, bias_ih, bias_hh)
    (reset, update, new), (old_reset, old_update, old) = given.chunk(3, -1), kept.chunk(3, -1)
    new = torch.tanh(new + torch.sigmoid(reset + old_reset) * old)
    update = torch.sigmoid(update + old_update)
    out = (1 - update) * new + update * last
    keep(hidden, rows, index, out)
    return out


def _shape(token, hidden, rows, clock, weight_ih, weight_hh, bias_ih=None, bias_hh=None,
           initial=None, rate=1, delay=0):
    return token.new_empty((token.shape[0], weight_hh.shape[1]))


def _check(token, hidden, rows, clock, weight_ih, weight_hh, bias_ih=None, bias_hh=None,
           initial=None, rate=1, delay=0):
    check_layer(3, token, rows, clock, weight_ih, weight_hh, bias_ih, bias_hh, rate, delay)
    check_hidden("hidden", hidden, initial, rows, clock, token, weight_hh.shape[0] // 3)


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    for number, (token, rows, clock, *weights, timing, size) in enumerate(layers(3, generator)):
        hidden = torch.randn(clock.shape[0], 2, size, generator=generator)
        initial = torch.randn(rows.shape[0], size, generator=generator) if number % 2 else None
        yield Sample((token, hidden, rows, clock, *weights, initial), {**timing})


def _bad_samples(generator: torch.Generator) -> Iterator[Sample]:
    yield from bad_layers(3, 1)


stream_gru = Operator(
    name="stream_gru",
    schema="(Tensor token, Tensor(a!) hidden, Tensor rows, Tensor clock, Tensor weight_ih, "
           "Tensor weight_hh, Tensor? bias_ih=None, Tensor? bias_hh=None, Tensor? initial=None, "
           "int rate=1, int delay=0) -> Tensor",
    reference=_reference,
    shape=_shape,
    check=_check,
    samples=_samples,
    bad_samples=_bad_samples,
    source="torch.nn.GRU; Cho et al., Learning Phrase Representations using RNN "
           "Encoder-Decoder (2014)",
)
