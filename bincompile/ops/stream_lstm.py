"""One step of an LSTM layer, with or without a projection of its output."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bincompile.errors import InputError
from bincompile.op import Operator, Sample
from bincompile.ops.recurrence import bad_layers, before, check_hidden, check_layer, gates, layers
from bincompile.ops.ticks import index_of, keep


def _reference(token, hidden, cell, rows, clock, weight_ih, weight_hh, bias_ih=None, bias_hh=None,
               weight_hr=None, initial_hidden=None, initial_cell=None, rate=1, delay=0):
    index = index_of(rows, clock, rate, delay)
    last = before(hidden, rows, index, initial_hidden)
    given, kept = gates(token, last, weight_ih, weight_hh, bias_ih, bias_hh)
    enter, forget, new, leave = (given + kept).chunk(4, -1)
    inside = (torch.sigmoid(forget) * before(cell, rows, index, initial_cell)
              + torch.sigmoid(enter) * torch.tanh(new))
    out = torch.sigmoid(leave) * torch.tanh(inside)
    out = out if weight_hr is None else torch.nn.functional.linear(out, weight_hr)
    keep(hidden, rows, index, out)
    keep(cell, rows, index, inside)
    return out, inside


def _shape(token, hidden, cell, rows, clock, weight_ih, weight_hh, bias_ih=None, bias_hh=None,
           weight_hr=None, initial_hidden=None, initial_cell=None, rate=1, delay=0):
    return (token.new_empty((token.shape[0], weight_hh.shape[1])),
            token.new_empty((token.shape[0], weight_hh.shape[0] // 4)))


def _check(token, hidden, cell, rows, clock, weight_ih, weight_hh, bias_ih=None, bias_hh=None,
           weight_hr=None, initial_hidden=None, initial_cell=None, rate=1, delay=0):
    check_layer(4, token, rows, clock, weight_ih, weight_hh, bias_ih, bias_hh, rate, delay)
    size, outputs = weight_hh.shape[0] // 4, weight_hh.shape[1]
    wanted = None if size == outputs and weight_hr is None else (outputs, size)
    if wanted is not None and (weight_hr is None or tuple(weight_hr.shape) != wanted):
        found = None if weight_hr is None else tuple(weight_hr.shape)
        raise InputError(f"weight_hr of shape {found}", str(wanted), "the projection's weight")
    check_hidden("hidden", hidden, initial_hidden, rows, clock, token, outputs)
    check_hidden("cell", cell, initial_cell, rows, clock, token, size)


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.5

    for number, (token, rows, clock, weight_ih, weight_hh, *biases, timing, size) in enumerate(
            layers(4, generator)):
        outputs = 3 if number == 4 else size
        weight_hh = weight_hh if outputs == size else draw(4 * size, outputs)
        projection = None if outputs == size else draw(outputs, size)
        states = draw(clock.shape[0], 2, outputs), draw(clock.shape[0], 2, size)
        initial = (draw(rows.shape[0], outputs), draw(rows.shape[0], size)) if number % 2 else ()
        yield Sample((token, *states, rows, clock, weight_ih, weight_hh, *biases, projection,
                      *initial), {**timing})


def _bad_samples(generator: torch.Generator) -> Iterator[Sample]:
    yield from bad_layers(4, 2)
    given = (torch.ones(1, 3), torch.zeros(2, 2, 4), torch.zeros(2, 2, 4), torch.tensor([1]),
             torch.tensor([0, 0]), torch.ones(16, 3), torch.ones(16, 4))
    yield Sample((*given, None, None, torch.ones(3, 4)), error="weight_hr of shape")
    yield Sample((*given[:6], torch.ones(16, 3)), error="weight_hr of shape")
    yield Sample(given, {"initial_cell": torch.ones(1, 3)}, error="an initial cell")


stream_lstm = Operator(
    name="stream_lstm",
    schema="(Tensor token, Tensor(a!) hidden, Tensor(b!) cell, Tensor rows, Tensor clock, "
           "Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih=None, Tensor? bias_hh=None, "
           "Tensor? weight_hr=None, Tensor? initial_hidden=None, Tensor? initial_cell=None, "
           "int rate=1, int delay=0) -> (Tensor, Tensor)",
    reference=_reference,
    shape=_shape,
    check=_check,
    samples=_samples,
    bad_samples=_bad_samples,
    source="torch.nn.LSTM; Hochreiter and Schmidhuber, Long Short-Term Memory (1997)",
)
