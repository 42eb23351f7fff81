"""Layers over time against torch on the whole sequence, in float64: aligned, joined late, again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from bincompile.config import Continual
from bincompile.errors import ContinualError
from bincompile.passes.capture import capture
from bincompile.passes.normalise import normalise
from bincompile.passes.streaming.build import to_steps
from bincompile.steps import StepProgram

HOMES, STREAMS = (2, 0, 3), 4  # the rows of the state that the rows of a sequence live in
JOINS = (0, 3, 1)  # the step at which each row takes its first token
WRONG = 1e30  # what no answer may follow from


class Model(nn.Module):
    """A function of its layers and the tokens."""

    def __init__(self, function: Callable[..., torch.Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, *self.layers)


class Chomp(nn.Module):
    """A causal convolution: padded on both sides, the end cut off."""

    def __init__(self, inputs: int, outputs: int, taps: int, apart: int) -> None:
        super().__init__()
        self.extra = (taps - 1) * apart
        self.layer = nn.Conv1d(inputs, outputs, taps, padding=self.extra, dilation=apart)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.layer(x)[:, :, :-self.extra])


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its example's sizes with the batch first, and what its steps have to be."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    axis: int = 2
    rate: int = 1
    delay: int = 0
    reach: int | None = 1
    window: int | None = None
    seen: int | None = None  # tokens of the example, where a capture fixes their number
    slow: bool = False


def of(function: Callable[..., torch.Tensor], *layers: Callable[[], nn.Module]
       ) -> Callable[[], nn.Module]:
    return lambda: Model(function, *(layer() for layer in layers))


def layer(made: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: made(*args, **kwargs)


def padded(x, conv):
    return conv(functional.relu(functional.pad(x, (2, 0))))


def gated(x, conv):
    return x + functional.glu(conv(functional.pad(x, (4, 0))), 1)


def front(x, conv, linear):
    return linear(conv(x[:, None]).transpose(1, 2).flatten(2))


def module_of_conformer(x, wide, depth, norm):
    y = functional.silu(norm(depth(functional.glu(wide(x.transpose(1, 2)), 1))))
    return x + y.transpose(1, 2)


def last_of_lstm(x, lstm):
    out, (hidden, cell) = lstm(x)
    return out[:, -1] + hidden[-1] + cell[0]


CASES = [
    Case("causal", of(lambda x, c: c(functional.pad(x, (2, 0))), layer(nn.Conv1d, 4, 6, 3)),
         (3, 4, 14), reach=3),
    Case("looks ahead", layer(nn.Conv1d, 4, 6, 5, padding=2), (3, 4, 14), delay=2, reach=5),
    Case("even and same", layer(nn.Conv1d, 4, 6, 4, padding="same"), (3, 4, 14), delay=2, reach=4),
    Case("residual of a layer that looks ahead",
         of(lambda x, c: x + c(x), layer(nn.Conv1d, 4, 4, 3, padding=1)), (3, 4, 14), delay=1,
         reach=3),
    Case("a stem of strides", lambda: nn.Sequential(
        nn.Conv1d(4, 6, 3, padding=1), nn.GELU(), nn.Conv1d(6, 6, 3, stride=2, padding=1)),
        (3, 4, 16), rate=2, delay=2, reach=5),
    Case("a feature extractor", lambda: nn.Sequential(
        nn.Conv1d(1, 4, 6, stride=3), nn.GELU(), nn.Conv1d(4, 4, 2, stride=2)), (3, 1, 30),
        rate=6, delay=8, reach=9),
    Case("dilated and gated", lambda: Model(gated, nn.Conv1d(4, 8, 2, dilation=4)), (3, 4, 14),
         reach=5),
    Case("a stack that is cut at the end", lambda: nn.Sequential(
        Chomp(4, 5, 3, 1), Chomp(5, 5, 3, 2)), (3, 4, 16), reach=7),
    Case("groups", of(lambda x, c: c(functional.pad(x, (2, 0))),
                      layer(nn.Conv1d, 4, 8, 3, groups=2)), (3, 4, 14), reach=3),
    Case("a convolution module", of(
        module_of_conformer, layer(nn.Conv1d, 4, 8, 1),
        layer(nn.Conv1d, 4, 4, 5, padding=2, groups=4), layer(nn.BatchNorm1d, 4)), (3, 14, 4), 1,
        delay=2, reach=5),
    Case("padding passes a function", of(padded, layer(nn.Conv1d, 4, 6, 3)), (3, 4, 14), reach=3),
    Case("padding of another value",
         of(lambda x, c: c(functional.pad(x, (2, 0), value=1.5)), layer(nn.Conv1d, 4, 6, 3)),
         (3, 4, 14), reach=3),
    Case("time and frequency", of(front, lambda: nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2), nn.ReLU(), nn.Conv2d(3, 3, 3, stride=(1, 2), padding=1)),
        layer(nn.Linear, 6, 5)), (3, 17, 9), 1, rate=2, delay=4, reach=7),
    Case("a residual with a stride on each side", of(
        lambda x, a, b: a(x) + b(x), layer(nn.Conv1d, 4, 5, 3, 2, 1),
        layer(nn.Conv1d, 4, 5, 1, 2)), (3, 4, 14), rate=2, delay=1, reach=3),
    Case("merged channels", of(lambda x, c: c(x.flatten(1, 2)), layer(
        nn.Conv1d, 6, 5, 3, padding=1)), (3, 2, 3, 12), 3, delay=1, reach=3),
    Case("the token before", of(lambda x: x - functional.pad(x, (0, 0, 1, -1))), (3, 14, 4), 1,
         reach=2),
    Case("maxima of neighbours", layer(nn.MaxPool1d, 3, 2, 1), (3, 4, 14), rate=2, delay=1,
         reach=3),
    Case("means of neighbours", layer(nn.AvgPool1d, 5, 2, 2), (3, 4, 14), rate=2, delay=2,
         reach=5),
    Case("means of those that there are", layer(nn.AvgPool1d, 5, 1, 2, count_include_pad=False),
         (3, 4, 14), delay=2, reach=5),
    Case("maxima of zeros too", of(lambda x: functional.max_pool1d(
        functional.pad(x, (2, 0)), 3, 1)), (3, 4, 14), delay=2, reach=5),
    Case("squares of time and features", of(lambda x: functional.avg_pool2d(
        functional.max_pool2d(x[:, None], (2, 1)), (1, 2))), (3, 14, 6), 1, rate=2, delay=1,
        reach=2),
    Case("the mean so far", of(lambda x: x.mean(1)), (3, 14, 4), 1, reach=None),
    Case("the mean of a window", of(lambda x: x.mean(1)), (3, 14, 4), 1, reach=5, window=5),
    Case("the maximum so far", of(lambda x: x.amax(1, keepdim=True)), (3, 14, 4), 1, reach=None),
    Case("a sum by the number of tokens", of(lambda x: x.sum(1) / x.shape[1]), (3, 14, 4), 1,
         reach=None),
    Case("weighted means", of(lambda x: (x * x[..., :1].exp()).sum(1) / x[..., :1].exp().sum(1)),
         (3, 14, 4), 1, reach=None),
    Case("running values", of(lambda x: x.cumsum(1) + x.cummax(1)[0] + x.logcumsumexp(1)
                              + (x / 9).cumprod(1)), (3, 14, 4), 1, reach=None),
    Case("running means", of(lambda x: x.cumsum(1) / torch.arange(
        1, x.shape[1] + 1, device=x.device)[:, None]), (3, 14, 4), 1, reach=None),
    Case("differences", of(lambda x: torch.diff(x, dim=1)), (3, 14, 4), 1, delay=1, reach=2),
    Case("frames", of(lambda x, linear: linear(x.unfold(1, 4, 2).flatten(2)),
                      layer(nn.Linear, 16, 5)), (3, 14, 4), 1, rate=2, delay=3, reach=4),
    Case("recurrent layers of three kinds", of(
        lambda x, rnn, gru, lstm: lstm(gru(rnn(x)[0])[0])[0], layer(nn.RNN, 4, 1, batch_first=True),
        layer(nn.GRU, 1, 6, batch_first=True),
        layer(nn.LSTM, 6, 5, batch_first=True, proj_size=3)), (3, 14, 4), 1, reach=None, seen=2),
    Case("two GRU layers", of(lambda x, gru: gru(x)[0], layer(nn.GRU, 4, 6, 2, batch_first=True)),
         (3, 14, 4), 1, reach=None, seen=2, slow=True),
    Case("an LSTM with a projection", of(lambda x, lstm: lstm(x)[0], layer(
        nn.LSTM, 4, 6, 2, batch_first=True, proj_size=3)), (3, 14, 4), 1, reach=None,
         seen=2, slow=True),
    Case("what an LSTM holds at the end", of(last_of_lstm, layer(
        nn.LSTM, 4, 6, 2, batch_first=True, bias=False)), (3, 14, 4), 1, reach=None, seen=2,
         slow=True),
    Case("a plain recurrent layer of one feature", of(lambda x, rnn: rnn(x)[0], layer(
        nn.RNN, 1, 1, 3, nonlinearity="relu", batch_first=True)), (3, 14, 1), 1, reach=None,
         seen=2, slow=True),
]


def steps_of(model: nn.Module, case: Case) -> StepProgram:
    shape = list(case.shape)
    shape[case.axis] = case.seen or shape[case.axis]
    x = torch.zeros(shape, dtype=torch.float64)
    program = normalise(capture(model, (x,), {}).program)
    return to_steps(program, Continual(window=case.window, time_dim=case.axis))


def spoilt(steps: StepProgram) -> list[torch.Tensor]:
    """States of new rows that hold what no answer may follow from."""
    return [torch.full_like(s, WRONG) for s in steps.empty(STREAMS)]


def outcomes(steps: StepProgram, x: torch.Tensor, axis: int) -> list[list[torch.Tensor | None]]:
    """For each row its answers, None where there is none, as each joins and all go on."""
    states, clock = spoilt(steps), torch.zeros(STREAMS, dtype=torch.int64)
    found: list[list[torch.Tensor | None]] = [[] for _ in HOMES]
    for step in range(x.shape[axis] + max(JOINS)):
        moving = [r for r in range(len(HOMES)) if 0 <= step - JOINS[r] < x.shape[axis]]
        moving = moving[step % len(moving):] + moving[:step % len(moving)]
        homes = torch.tensor([HOMES[r] for r in moving])
        tokens = torch.stack([x[r].narrow(axis - 1, step - JOINS[r], 1) for r in moving])
        with torch.no_grad():
            steps.program.graph_module(torch.full_like(tokens, WRONG), homes, clock, *states)
            answer = steps.program.graph_module(tokens, homes, clock, *states)[0]
        for place, row in enumerate(moving):
            valid = steps.valid(int(clock[HOMES[row]]))
            found[row].append(answer[place] if valid else None)
        clock[homes] += 1
    return found


@pytest.mark.parametrize("case", [
    pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.slow else [])
    for case in CASES])
def test_steps_give_what_the_layer_gives_for_the_whole_sequence(case: Case) -> None:
    torch.manual_seed(0)
    model = case.build().eval().double()
    steps = steps_of(model, case)
    assert (steps.rate, steps.delay, steps.receptive_field) == (case.rate, case.delay, case.reach)
    x = torch.randn(case.shape, dtype=torch.float64)
    with torch.no_grad():
        whole, time = model(x), steps.answers[0]
        for row, answers in enumerate(outcomes(steps, x, case.axis)):
            assert len(answers) == x.shape[case.axis]
            for step, answer in enumerate(answers):
                assert (answer is None) == (step < case.delay or
                                            (step - case.delay) % case.rate > 0)
                if answer is None:
                    continue
                if time is not None:
                    wanted = whole[row].narrow(time - 1, (step - case.delay) // case.rate, 1)
                else:
                    first = 0 if case.window is None else max(0, step + 1 - case.window)
                    wanted = model(x[row:row + 1].narrow(case.axis, first, step + 1 - first))[0]
                torch.testing.assert_close(answer, wanted, rtol=1e-9, atol=1e-9)


REFUSED = [
    ("circular padding", layer(nn.Conv1d, 4, 6, 3, padding=1, padding_mode="circular"),
     (3, 4, 14), "circular"),
    ("transposed", layer(nn.ConvTranspose1d, 4, 6, 3), (3, 4, 14), "several tokens of one"),
    ("time as channels", of(lambda x, c: c(x.transpose(1, 2)), layer(nn.Conv1d, 14, 3, 3)),
     (3, 4, 14), "takes as channels time"),
    ("pooled behind what looks ahead", of(
        lambda x, c: c(x).mean(2), layer(nn.Conv1d, 4, 6, 3, padding=1)), (3, 4, 14),
     "looks ahead"),
    ("where a maximum was", of(lambda x: x.max(2)[1]), (3, 4, 14), "at which position"),
    ("where a neighbour was", of(lambda x: functional.max_pool1d(
        x, 2, return_indices=True)[1]), (3, 4, 14), "at which position"),
    ("both directions", of(lambda x, gru: gru(x.transpose(1, 2))[0], layer(
        nn.GRU, 4, 6, batch_first=True, bidirectional=True)), (3, 4, 2), "bidirectional"),
    ("backwards", of(lambda x: x.flip(2)), (3, 4, 14), "turns time around"),
    ("around", of(lambda x: x.roll(1, 2)), (3, 4, 14), "the last tokens before the first"),
    ("several places", of(lambda x: functional.adaptive_avg_pool1d(x, 2)), (3, 4, 14),
     "several places"),
]


@pytest.mark.parametrize(("build", "shape", "reason"), [
    pytest.param(*rest, id=name, marks=[pytest.mark.slow] if name == "both directions" else [])
    for name, *rest in REFUSED])
def test_what_no_step_can_give_is_refused_with_its_reason(
        build: Callable[[], nn.Module], shape: tuple[int, ...], reason: str) -> None:
    model = build().eval().double()
    with pytest.raises(ContinualError, match=reason) as caught:
        steps_of(model, Case("", build, shape))
    assert __file__ in caught.value.found or "torch" in caught.value.found
