"""One step of a plain recurrent layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bincompile.errors import InputError
from bincompile.op import Operator, Sample
from bincompile.ops.recurrence import bad_layers, before, check_hidden, check_layer, gates, layers
from bincompile.ops.ticks import index_of, keep

FUNCTIONS = {"tanh": torch.tanh, "relu": torch.relu}


def _reference(token, hidden, rows, clock, weight_ih, weight_hh, bias_ih=None, bias_hh=None,
               initial=None, nonlinearity="tanh", rate=1, delay=0):
    index = index_of(rows, clock, rate, delay)
    last = before(hidden, rows, index, initial)
    given, kept = gates(token, last, weight_ih, weight_hh, bias_ih, bias_hh)
    out = FUNCTIONS[nonlinearity](given + kept)
    keep(hidden, rows, index, out)
    return out


def _shape(token, hidden, rows, clock, weight_ih, weight_hh, bias_ih=None, bias_hh=None,
           initial=None, nonlinearity="tanh", rate=1, delay=0):
    return token.new_empty((token.shape[0], weight_hh.shape[1]))


def _check(token, hidden, rows, clock, weight_ih, weight_hh, bias_ih=None, bias_hh=None,
           initial=None, nonlinearity="tanh", rate=1, delay=0):
    check_layer(1, token, rows, clock, weight_ih, weight_hh, bias_ih, bias_hh, rate, delay)
    check_hidden("hidden", hidden, initial, rows, clock, token, weight_hh.shape[0])
    if nonlinearity not in FUNCTIONS:
        raise InputError(f"nonlinearity {nonlinearity!r}", ", ".join(FUNCTIONS),
                         "the nonlinearity")


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    for number, (token, rows, clock, *weights, timing, size) in enumerate(layers(1, generator)):
        hidden = torch.randn(clock.shape[0], 2, size, generator=generator)
        initial = torch.randn(rows.shape[0], size, generator=generator) if number % 2 else None
        yield Sample((token, hidden, rows, clock, *weights, initial),
                     {"nonlinearity": "relu" if number % 2 else "tanh", **timing})


def _bad_samples(generator: torch.Generator) -> Iterator[Sample]:
    yield from bad_layers(1, 1)
    yield Sample((torch.ones(1, 3), torch.zeros(2, 2, 4), torch.tensor([1]), torch.tensor([0, 0]),
                  torch.ones(4, 3), torch.ones(4, 4)), {"nonlinearity": "gelu"}, error="'gelu'")


stream_rnn = Operator(
    name="stream_rnn",
    schema="(Tensor token, Tensor(a!) hidden, Tensor rows, Tensor clock, Tensor weight_ih, "
           "Tensor weight_hh, Tensor? bias_ih=None, Tensor? bias_hh=None, Tensor? initial=None, "
           "str nonlinearity='tanh', int rate=1, int delay=0) -> Tensor",
    reference=_reference,
    shape=_shape,
    check=_check,
    samples=_samples,
    bad_samples=_bad_samples,
    source="torch.nn.RNN; Elman, Finding Structure in Time (1990)",
)
