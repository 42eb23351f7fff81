"""Step programs: what a model becomes for one token, whatever its layout, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from bincompile.config import Continual
from bincompile.errors import ContinualError
from bincompile.passes.capture import capture
from bincompile.passes.graph import copy_module, finish
from bincompile.passes.normalise import normalise
from bincompile.passes.streaming.build import to_steps
from bincompile.program import Program
from bincompile.steps import StepProgram

FEATURES, TOKENS, ROWS, LONG = 12, 5, 3, 11
TIME_AXES = {"batch first": 1, "time first": 0, "flattened": 1}


class Module(nn.Module):
    """A model of one function over a linear layer of its own."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, FEATURES)
        self.register_buffer("table", torch.randn(LONG, FEATURES))
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def model(function: Callable[..., Any]) -> Module:
    """It in eval mode and float64."""
    torch.manual_seed(0)
    return Module(function).eval().double()


def captured(module: nn.Module, *args: torch.Tensor, dynamic: bool = True) -> Program:
    """The program of one call in normal spelling."""
    return normalise(capture(module, args, {}, "auto" if dynamic else None).program)


def only(program: Program, index: int) -> Program:
    """The program with one of its outputs: many small models share one capture."""
    module, _ = copy_module(program.graph_module)
    output = module.graph.output_node()
    output.args = ((output.args[0][index],),)
    return program.next(finish(module), program.level)


def tokens(*sizes: int, seed: int = 1) -> torch.Tensor:
    """Random tokens in float64."""
    return torch.randn(sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def stepped(steps: StepProgram, x: torch.Tensor, axis: int,
            prepared: list[torch.Tensor] | None = None) -> list[list[torch.Tensor]]:
    """The outputs of every step over a sequence; states begin with what must never be read."""
    rows = x.shape[1 - axis] if x.ndim > 2 else 1
    states = [s if state.prepared is not None else torch.full_like(s, 77)
              for s, state in zip(steps.empty(rows, prepared or ()), steps.states, strict=True)]
    found = []
    for at in range(x.shape[axis]):
        clock = torch.full((rows,), at)
        with torch.no_grad():
            found.append(steps.program.graph_module(
                x.narrow(axis, at, 1).contiguous(), torch.arange(rows), clock, *states))
    return found


def assert_equals(steps: StepProgram, module: nn.Module, x: torch.Tensor, axis: int) -> None:
    """Raise unless every valid step gives what the model gives, on the whole or on a prefix."""
    found, compared = stepped(steps, x, axis), 0
    with torch.no_grad():
        whole = module(x)
        for at, outputs in enumerate(found):
            if not steps.valid(at):
                continue
            prefix = module(x.narrow(axis, 0, at + 1)) if None in steps.answers else whole
            for output, time, all_of, some in zip(outputs, steps.answers, whole, prefix,
                                                  strict=True):
                wanted = some if time is None else all_of.narrow(
                    time, (at - steps.delay) // steps.rate, 1)
                torch.testing.assert_close(output, wanted, rtol=1e-12, atol=1e-12)
                compared += 1
    assert compared


def _layouts(m: Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Every spelling of a layout over (A, B, features), with something that depends on order."""
    a, b, f = x.shape
    y = m.linear(x)
    heads = y.reshape(a, b, 3, 4)
    parts = y.view(a, b, 3, 4).permute(2, 0, 1, 3)
    third, _, first = y.split([4, 4, 4], -1)
    joined = torch.cat([third, x[..., 2:5]], -1)
    return (
        heads.transpose(1, 2).softmax(1).transpose(1, 2).flatten(2),
        (parts[0] * parts[2]).contiguous(),
        y.unflatten(-1, (2, 6)).movedim(2, 0).unbind(0)[1] + 1.0,
        torch.stack([third, first], 2).sum(2),
        joined.cumsum(-1),
        y.reshape(a * b, f).chunk(3, 1)[1].reshape(a, b, 4),
        heads.permute(0, 2, 1, 3).reshape(a * 3, b, 4).tanh().view(a, 3, b, 4).transpose(1, 2),
        heads.transpose(0, 1).reshape(b, a * 3, 4).mul(2.0).reshape(b, a, 12).transpose(0, 1),
        y.unsqueeze(1).squeeze(1).unsqueeze(-1).expand(a, b, f, 2).sum(-1),
        torch.einsum("abf,fg->abg", x, m.linear.weight),
        y.mT.sort(1).values.mT,
        functional.layer_norm(y, (f,)).flip(-1).roll(2, -1),
        x @ m.linear.weight.t() + m.linear.bias,
        torch.where(y > 0, y, x).max(-1, keepdim=True).values.expand(a, b, 2),
        y.repeat(1, 1, 2).repeat_interleave(2, 2).narrow(2, 3, 4),
        (y.view(a, b, 3, 4) @ m.linear.weight[:4, :4]).flatten(2).argmax(-1),
        y.topk(3, -1).values, x.square().mean(-1, keepdim=True) * y,
        functional.pad(y, (1, 2)), y.reshape(a, b, 4, 3).select(3, 1), y[..., [3, 0, 7]],
        y.gather(2, x.argsort(-1)[..., :4]), heads[:, :, torch.tensor([2, 0])].flatten(2),
    )


def _flattened(m: Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same on one axis of rows and time together."""
    rows, count, f = x.shape
    y = m.linear(x.reshape(rows * count, f)).relu()
    z = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True) + 1.0)
    heads = z.view(rows * count, 3, 4).transpose(0, 1)
    mixed = torch.bmm(heads, m.linear.weight.view(3, 4, 12)[:, :, :4])
    return (y.view(rows, count, f), z.view(rows, count, 4, 3),
            mixed.transpose(0, 1).reshape(rows, count, f),
            heads.reshape(3, rows, count, 4).permute(2, 1, 0, 3))


SPELLINGS = {"batch first": _layouts, "time first": _layouts, "flattened": _flattened}


CAPTURES = [(layout, dynamic) for layout in SPELLINGS for dynamic in (True, False)]
DEFAULT = {("batch first", True), ("time first", False), ("flattened", True),
           ("flattened", False)}


@pytest.mark.parametrize("layout, dynamic", [
    pytest.param(*case, marks=() if case in DEFAULT else pytest.mark.slow) for case in CAPTURES])
def test_every_layout_runs_one_token_at_a_time(layout: str, dynamic: bool) -> None:
    axis, module = TIME_AXES[layout], model(SPELLINGS[layout])
    x = tokens(*((TOKENS, ROWS) if axis == 0 else (ROWS, TOKENS)), FEATURES)
    steps = to_steps(captured(module, x, dynamic=dynamic), Continual(time_dim=axis))
    assert_equals(steps, module, x, axis)
    assert not steps.states and steps.receptive_field == 1 and steps.delay == 0
    assert steps.inputs[0].time_axis == axis and steps.inputs[0].token == (FEATURES,)


def test_other_batches_than_the_captured_one_run() -> None:
    module, x = model(_flattened), tokens(ROWS, TOKENS, FEATURES)
    steps = to_steps(captured(module, x, dynamic=False), Continual())
    assert_equals(steps, module, tokens(7, 4, FEATURES), 1)


def test_a_model_without_a_batch_has_one_row() -> None:
    module, x = model(lambda m, x: (m.linear(x).view(-1, 3, 4).transpose(0, 1),)), tokens(5, 12)
    steps = to_steps(captured(module, x), Continual(time_dim=0))
    assert_equals(steps, module, tokens(9, 12), 0)
    assert not steps.inputs[0].batched


TIMES: dict[str, tuple[Callable[..., Any], int, int, int, int | None]] = {
    # what it computes; then delay, first step, rate, and tokens that it depends on
    "newest": (lambda m, x: m.linear(x)[:, -1], 0, 0, 1, 1),
    "newest three": (lambda m, x: m.linear(x)[:, -3:].flatten(1), 0, 2, 1, 3),
    "some tokens ago": (lambda m, x: m.linear(x)[:, -3], 0, 2, 1, 3),
    "without the first": (lambda m, x: m.linear(x)[:, 2:], 2, 2, 1, 1),
    "without the last": (lambda m, x: m.linear(x)[:, :-2][:, -1], 0, 2, 1, 3),
    "differences": (lambda m, x: x[:, 1:] - x[:, :-1], 1, 1, 1, 2),
    "every third": (lambda m, x: m.linear(x)[:, 1::3], 1, 1, 3, 1),
    "shifted": (lambda m, x: functional.pad(m.linear(x), (0, 0, 2, -2)) + x, 0, 0, 1, 3),
    "shifted by joining": (
        lambda m, x: torch.cat([torch.zeros_like(x[:, :2]), m.linear(x)[:, :-2]], 1) + x,
        0, 0, 1, 3),
    "padded by ones": (lambda m, x: functional.pad(x[:, :-1], (0, 0, 1, 0), value=1.0) * x,
                       0, 0, 1, 2),
    "positions": (lambda m, x: x + m.table[:x.shape[1]], 0, 0, 1, 1),
    "late by two": (lambda m, x: functional.pad(m.linear(x)[:, 2:], (0, 0, 0, 2))[:, :-2]
                    + x[:, :-2], 2, 2, 1, 3),
}


@pytest.fixture(scope="module")
def times() -> tuple[Module, Program]:
    """All of them in one model, and its program."""
    module = model(lambda m, x: tuple(function(m, x) for function, *_ in TIMES.values()))
    return module, captured(module, tokens(2, 8, FEATURES))


@pytest.mark.parametrize("name", TIMES)
def test_selections_and_shifts_of_time_are_delays(times: Any, name: str) -> None:
    module, index = times[0], [*TIMES].index(name)
    _, *wanted = TIMES[name]
    steps = to_steps(only(times[1], index), Continual())
    assert [steps.delay, steps.first, steps.rate, steps.receptive_field] == wanted
    x = tokens(2, LONG, FEATURES)
    with torch.no_grad():
        whole = module(x)[index]
        for at, (output,) in enumerate(stepped(steps, x, 1)):
            if not steps.valid(at) or at < 2:  # the model itself needs 3 tokens
                continue
            answer = (at - steps.delay) // steps.rate
            expected = module(x[:, :at + 1])[index] if steps.answers[0] is None else \
                whole[:, answer, None]
            torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


def test_outputs_wait_for_the_latest_of_them() -> None:
    module = model(lambda m, x: (m.linear(x), functional.pad(x[:, 2:], (0, 0, 0, 2))))
    steps = to_steps(captured(module, tokens(2, 8, FEATURES)), Continual())
    assert steps.delay == 2 and len(steps.states) == 1
    x = tokens(2, 9, FEATURES)
    y, _ = module(x)
    for at, (first, second) in enumerate(stepped(steps, x, 1)[2:]):
        torch.testing.assert_close(first[:, 0], y[:, at])
        torch.testing.assert_close(second[:, 0], x[:, at + 2])


def test_static_inputs_are_prepared_once_for_each_row() -> None:
    module = model(lambda m, x, c, z: (
        m.linear(x).view(x.shape[0], -1, 3, 4) * m.linear(c).view(-1, 1, 3, 4) + z.view(3, 4),))
    x, c, z = tokens(2, 6, FEATURES), tokens(2, FEATURES), tokens(12)
    steps = to_steps(captured(module, x, c, z), Continual())
    assert steps.statics == (1, 2) and steps.prepare is not None
    assert "linear" in str(steps.prepare) and str(steps.program).count("aten.linear") == 1
    prepared = [p.expand(2, *p.shape[1:]) for p in steps.prepare.graph_module(c, z)]
    (y,) = module(x, c, z)
    for at, (output,) in enumerate(stepped(steps, x, 1, prepared)):
        torch.testing.assert_close(output[:, 0], y[:, at])


def test_rows_have_clocks_of_their_own() -> None:
    """By hand: a token plus twice the one before it, and what is stored for its index."""
    module = model(lambda m, x: (x + 2 * functional.pad(x, (0, 0, 1, -1)) + m.table[:x.shape[1]],))
    steps = to_steps(captured(module, tokens(2, 6, FEATURES)), Continual())
    assert steps.limit == LONG
    states, x = steps.empty(3), tokens(9, FEATURES)
    taken = {2: x[0], 0: x[1]}
    run = steps.program.graph_module
    run(torch.stack([taken[2], taken[0]])[:, None], torch.tensor([2, 0]), torch.tensor([4, 0, 0]),
        *states)
    (found,) = run(x[2:4, None], torch.tensor([0, 2]), torch.tensor([5, 0, 1]), *states)
    torch.testing.assert_close(found[0, 0], x[2] + 2 * x[1] + module.table[5])
    torch.testing.assert_close(found[1, 0], x[3] + 2 * x[0] + module.table[1])


def test_a_step_that_is_taken_again_gives_the_same() -> None:
    module = model(lambda m, x: (x + functional.pad(m.linear(x), (0, 0, 3, -3)),))
    steps = to_steps(captured(module, tokens(2, 6, FEATURES)), Continual())
    states, x, run = steps.empty(2), tokens(2, 9, FEATURES), steps.program.graph_module
    (y,) = module(x)
    for at in range(9):
        clock = torch.full((2,), at)
        run(torch.full((2, 1, FEATURES), 9.0).double(), torch.arange(2), clock, *states)
        (found,) = run(x[:, at:at + 1], torch.arange(2), clock, *states)
        torch.testing.assert_close(found[:, 0], y[:, at])


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "flip": (lambda m, x: x.flip(1), "turns time around"),
    "softmax over time": (lambda m, x: x.softmax(1), "computes softmax over time"),
    "roll": (lambda m, x: x.roll(1, 1), "brings the last tokens before the first"),
    "sort": (lambda m, x: x.sort(1).values, "computes sort over time"),
    "norm over time": (lambda m, x: functional.layer_norm(x, x.shape[1:]), "over time"),
    "first token": (lambda m, x: x[:, 0], "a stream does not come back to"),
    "first tokens": (lambda m, x: x[:, :2], "a stream does not come back to"),
    "all pairs": (lambda m, x: x @ x.mT, "joins every token with every other"),
    "all pairs by pointwise": (lambda m, x: (x[:, :, None] - x[:, None]).abs().sum(2),
                               "joins every token with every other"),
    "time into features": (lambda m, x: x.reshape(x.shape[0], 3, x.shape[1] * 4),
                           "cut into parts"),
    "number of tokens": (lambda m, x: x / x.shape[1], "computes with the number of tokens"),
    "rows of the batch": (lambda m, x: x - x.mean(0), "over the rows of the batch"),
    "fft": (lambda m, x: torch.fft.rfft(x, dim=1).abs(), "no rule says"),
    "newest for all": (lambda m, x: (x + x[:, -1:]).cumsum(2)[:, -2],
                       "known at the newest alone"),
    "last with padding": (lambda m, x: functional.pad(x[:, 2:], (0, 0, 0, 2))[:, -1],
                          "padding behind the last token"),
}


@pytest.fixture(scope="module")
def refusable() -> Program:
    """The program of all of them."""
    return captured(model(lambda m, x: tuple(f(m, x) for f, _ in REFUSED.values())),
                    tokens(2, 6, FEATURES))


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_the_same_one_token_at_a_time_is_refused(refusable: Program,
                                                             name: str) -> None:
    program = only(refusable, [*REFUSED].index(name))
    with pytest.raises(ContinualError, match=REFUSED[name][1]) as refused:
        to_steps(program, Continual())
    assert "test_steps.py:" in refused.value.found and refused.value.change


def test_inputs_that_are_no_streams_are_named() -> None:
    program = captured(model(lambda m, x: (m.linear(x),)), tokens(2, 6, FEATURES))
    with pytest.raises(ContinualError, match="names the input 'y'"):
        to_steps(program, Continual(time_dim={"y": 1}))
    with pytest.raises(ContinualError, match="time_dim=4"):
        to_steps(program, Continual(time_dim=4))
