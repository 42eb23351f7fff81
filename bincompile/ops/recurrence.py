"""What the recurrent layers of streams share: one linear layer of the token, one of the state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from bincompile.errors import InputError
from bincompile.op import Sample
from bincompile.ops.ticks import (
    CASES,
    Clock,
    Rows,
    bad_clock_samples,
    check_clock,
    check_latest,
    check_tokens,
    latest,
    wide_as,
)

Optional = torch.Tensor | None


def before(state: torch.Tensor, rows: Rows, index: torch.Tensor, initial: Optional) -> torch.Tensor:
    """The value of the index before; where there is none the initial one, zeros if not given."""
    found = latest(state, rows, index)
    if initial is None:
        initial = torch.zeros_like(found)
    return torch.where(wide_as(index > 0, found), found, initial)


def gates(token: torch.Tensor, hidden: torch.Tensor, weight_ih: torch.Tensor,
          weight_hh: torch.Tensor, bias_ih: Optional, bias_hh: Optional
          ) -> tuple[torch.Tensor, torch.Tensor]:
    """The two linear layers: (M, gates * H) each."""
    return (torch.nn.functional.linear(token, weight_ih, bias_ih),
            torch.nn.functional.linear(hidden, weight_hh, bias_hh))


def check_layer(count: int, token: torch.Tensor, rows: Rows, clock: Clock,
                weight_ih: torch.Tensor, weight_hh: torch.Tensor, bias_ih: Optional,
                bias_hh: Optional, rate: int, delay: int) -> None:
    """Raise unless the weights are those of a layer of so many gates over these tokens."""
    check_clock(rows, clock, rate, delay)
    check_tokens(token, rows)
    if token.ndim != 2:
        raise InputError(f"tokens of shape {tuple(token.shape)}", "(rows, features)", "the token")
    if weight_hh.ndim != 2 or weight_hh.shape[0] % count:
        raise InputError(f"weight_hh of shape {tuple(weight_hh.shape)}",
                         f"({count} * hidden size, size of the output)", "the weight")
    wide = weight_hh.shape[0]
    for name, value, shape in (("weight_ih", weight_ih, (wide, token.shape[1])),
                               ("bias_ih", bias_ih, (wide,)), ("bias_hh", bias_hh, (wide,))):
        if value is not None and tuple(value.shape) != shape:
            raise InputError(f"{name} of shape {tuple(value.shape)}", str(shape), f"the {name}")


def check_hidden(name: str, state: torch.Tensor, initial: Optional, rows: Rows, clock: Clock,
                 token: torch.Tensor, size: int) -> None:
    """Raise unless a state and what it begins with are of this size."""
    check_latest(name, state, clock, (size,), token.dtype)
    if initial is not None and tuple(initial.shape) != (rows.shape[0], size):
        raise InputError(f"an initial {name} of shape {tuple(initial.shape)}",
                         str((rows.shape[0], size)), f"the initial {name}")


FORMS = ((16, 17, True), (33, 7, False))  # features, hidden size, biases


def layers(count: int, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    """Token, rows, clock, weights, biases and timing of the samples of a layer, hidden size last.

    Every other one has no biases, and is to have an initial value.
    """
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.5

    for number, case in enumerate(CASES):
        features, size, biased = FORMS[number % 2]
        biases = (draw(count * size), draw(count * size)) if biased else (None, None)
        yield (draw(case.rows.shape[0], features), case.rows, case.clock,
               draw(count * size, features), draw(count * size, size), *biases, case.timing, size)


def bad_layers(count: int, states: int) -> Iterator[Sample]:
    """Bad samples that all recurrent layers share: token, states, rows, clock, weights, biases."""
    token, state = torch.ones(1, 3), [torch.zeros(2, 2, 4) for _ in range(states)]
    rows, clock = torch.tensor([1]), torch.tensor([0, 0])
    weight_ih, weight_hh = torch.ones(count * 4, 3), torch.ones(count * 4, 4)
    for sample in bad_clock_samples(token, *state):
        *given, bad_rows, bad_clock = sample.args
        yield Sample((*given, bad_rows, bad_clock, weight_ih, weight_hh), sample.kwargs,
                     error=sample.error)
    bias = torch.ones(5)
    yield Sample((token[:0], *state, rows, clock, weight_ih, weight_hh), error="for each row")
    yield Sample((token[None, 0, 0], *state, rows, clock, weight_ih, weight_hh), error="features")
    yield Sample((token, state[0][:, :1], *state[1:], rows, clock, weight_ih, weight_hh),
                 error="hidden of shape")
    yield Sample((token, *state, rows, clock, weight_ih[:2], weight_hh), error="weight_ih of")
    yield Sample((token, *state, rows, clock, weight_ih, weight_hh[0]), error="weight_hh of")
    yield Sample((token, *state, rows, clock, weight_ih, weight_hh, bias), error="bias_ih of")
    yield Sample((token, *state, rows, clock, weight_ih, weight_hh, None, bias),
                 error="bias_hh of")
    place = {"initial" if states == 1 else "initial_hidden": torch.ones(1, 9)}
    yield Sample((token, *state, rows, clock, weight_ih, weight_hh), place,
                 error="an initial hidden")
