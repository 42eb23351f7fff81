"""Recorded steps: the bits of the executable, whatever fails, wherever tokens lie."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stream_forms import WIDTH, step_program
from torch import fx, nn

from bincompile.config import Target
from bincompile.errors import InputError
from bincompile.passes.capture import capture
from bincompile.passes.pipeline import EXACT, LOWER, run
from bincompile.runtime import c_calls
from bincompile.runtime.executor import Executable, bind
from bincompile.runtime.recording import recording
from bincompile.runtime.replay import Replay
from bincompile.steps import StepProgram

ROWS, FEATURES, STEPS = 3, WIDTH, 12


@pytest.fixture(scope="module")
def step() -> tuple[StepProgram, Executable]:
    """A step program and its kernels: compiled rings, torch's operators in between."""
    steps = step_program()
    return steps, bind(steps.program, Target.host())


def inputs_of(steps: StepProgram) -> list[Any]:
    return [torch.zeros(ROWS, 1, FEATURES), torch.arange(ROWS), torch.zeros(ROWS).long(),
            *steps.empty(ROWS)]


def of(function: Callable[..., Any], *args: torch.Tensor) -> Executable:
    """A function as an executable."""
    with torch.no_grad():
        return bind(run(LOWER, run(EXACT, capture(Of(function).eval(), args).program)),
                    Target.host())


class Of(nn.Module):
    """A function as a model."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(*args)


def test_many_steps_have_the_bits_of_the_executable(step: tuple[StepProgram, Executable]) -> None:
    steps, executable = step
    plain, recorded = inputs_of(steps), inputs_of(steps)
    replay = Replay.of(executable, recorded, 1)
    assert replay.outside == ("sum_dim_int_list", "mul_tensor", "add_tensor")
    held = []
    for _ in range(STEPS):
        x = torch.randn(ROWS, 1, FEATURES)
        expected, found = executable(x, *plain[1:]), replay(x)
        held.append((expected, found))
        plain[2] += 1
        recorded[2] += 1
    for expected, found in held:  # no later step has written over what an earlier one gave
        assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, plain[3:], recorded[3:]))


def test_the_clock_is_advanced_and_axes_are_dropped(step: tuple[StepProgram, Executable]) -> None:
    steps, executable = step
    plain, recorded = inputs_of(steps), inputs_of(steps)
    replay = Replay.of(executable, recorded, 1, (1,), recorded[2])
    assert recorded[2].tolist() == [0] * ROWS
    for taken in range(1, 4):
        x = torch.randn(ROWS, FEATURES)
        expected = executable(x.unsqueeze(1), *plain[1:])
        found = replay.quick(x) if taken % 2 else replay(x)
        plain[2] += 1
        assert found is not None and recorded[2].tolist() == [taken] * ROWS
        assert found[0].shape == (ROWS, FEATURES)
        assert torch.equal(found[0], expected[0].squeeze(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 4, 7])
def test_quick_takes_finite_tokens_only(dtype: torch.dtype, size: int) -> None:
    example = torch.zeros(2, size, dtype=dtype)
    replay = Replay.of(of(torch.cos, example), [example], 1)
    usual = torch.linspace(-1, 1, 2 * size).view(2, size).to(dtype)
    usual.view(-1)[0], usual.view(-1)[-1] = torch.finfo(dtype).max, torch.finfo(dtype).min
    found = replay.quick(usual)
    assert found is not None and torch.equal(found[0], torch.cos(usual))
    for place in range(2 * size):
        for worst in (math.nan, -math.nan, math.inf, -math.inf):
            x = usual.clone()
            x.view(-1)[place] = worst
            assert replay.quick(x) is None
            assert torch.equal(replay(x)[0].isnan(), torch.cos(x).isnan())


def test_tokens_may_lie_anywhere_and_have_to_fit() -> None:
    example = torch.zeros(2, 1, 6)
    executable = of(lambda x: torch.relu(x) + 1, example)
    replay = Replay.of(executable, [example], 1)
    wide = torch.randn(2, 1, 12)
    for token in (wide[..., ::2], wide[..., 1:7], torch.randn(1, 2, 6).transpose(0, 1),
                  torch.randn(2, 6), torch.randn(2, 1, 6, requires_grad=True)):
        assert torch.equal(replay(token)[0], executable(token.detach().view(2, 1, 6))[0])
    assert replay.quick(wide[..., ::2]) is None
    with torch.inference_mode():
        assert torch.equal(replay(wide[..., :6])[0], executable(wide[..., :6])[0])
    for wrong in (torch.randn(2, 1, 5), torch.randn(2, 1, 6, dtype=torch.float64), 3):
        with pytest.raises(InputError, match="a token of"):
            replay(wrong)


def test_a_kernel_that_refuses_raises_its_own_error_and_the_next_step_is_right() -> None:
    table = nn.Embedding(5, 8).eval()
    example = torch.tensor([[1]])
    executable = of(lambda i: torch.relu(table(i)) * 2, example)
    replay = Replay.of(executable, [example], 1)
    assert replay.outside == ()
    with pytest.raises(InputError, match="index 9") as recorded:
        replay(torch.tensor([[9]]))
    with pytest.raises(InputError, match="index 9") as plain:
        executable(torch.tensor([[9]]))
    assert str(recorded.value) == str(plain.value)
    assert torch.equal(replay(torch.tensor([[4]]))[0], executable(torch.tensor([[4]]))[0])


def test_operators_between_kernels_are_called_in_their_places() -> None:
    weight = torch.randn(6, 6)

    def function(x: torch.Tensor) -> Any:
        y = torch.relu(x) + 1
        cut = torch.cat([y.transpose(0, 1).reshape(2, 9), torch.ones(2, 3)], 1)[:, ::2]
        return cut.cumsum(1) @ weight, y[:, 1], torch.sort(y)[0].mul(2), x.shape[0]

    example = torch.randn(3, 6)
    executable = of(function, example)
    replay = Replay.of(executable, [example], 1)
    for _ in range(3):
        x = torch.randn(3, 6)
        for found, expected in zip(replay(x), executable(x), strict=True):
            assert torch.equal(found, expected) if isinstance(expected, torch.Tensor) \
                else found == expected


def test_sizes_that_follow_from_values_are_left_to_the_executable() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.ops.aten.nonzero.default, (x,)),))
    executable = Executable({}, {}, {}, lambda x: (x.nonzero(),), None, lambda: (  # type: ignore
        lambda each, x: (each("nonzero", torch.ops.aten.nonzero.default, (x,), {}),)))
    replay = Replay.of(executable, [torch.tensor([0.0, 1.0])], 1)
    assert replay.outside is None and replay.quick(torch.ones(2)) is None
    assert replay(torch.tensor([1.0, 1.0]))[0].tolist() == [[0], [1]]


def test_two_threads_with_a_replay_each(step: tuple[StepProgram, Executable]) -> None:
    steps, executable = step
    tokens = torch.randn(40, ROWS, 1, FEATURES)
    found: dict[int, list[torch.Tensor]] = {}

    def take(name: int) -> None:
        own = inputs_of(steps)
        replay = Replay.of(executable, own, 1, (), own[2])
        found[name] = [replay(token * name)[0] for token in tokens]

    threads = [threading.Thread(target=take, args=(name,)) for name in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    both = dict(found)
    for name in (1, 2):
        take(name)
        assert all(map(torch.equal, found[name], both[name]))


def test_another_number_of_threads_is_recorded_anew(step: tuple[StepProgram, Executable]) -> None:
    steps, executable = step
    inputs, before = inputs_of(steps), torch.get_num_threads()
    replay, x = Replay.of(executable, inputs, 1), torch.randn(ROWS, 1, FEATURES)
    expected = replay(x)
    try:
        torch.set_num_threads(1 + before % 2)
        assert all(map(torch.equal, replay(x), expected))
    finally:
        torch.set_num_threads(before)


def test_without_the_library_the_executable_runs(step: tuple[StepProgram, Executable],
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    steps, executable = step
    inputs = inputs_of(steps)
    recorded, x = Replay.of(executable, inputs, 1, (1,)), torch.randn(ROWS, FEATURES)
    monkeypatch.setattr(c_calls, "library", lambda: None)
    plain = Replay.of(executable, inputs, 1, (1,), inputs[2])
    assert plain.outside is None and plain.quick(x) is None
    assert all(map(torch.equal, plain(x), recorded(x))) or inputs[2].tolist() == [1] * ROWS


def test_a_recording_has_the_calls_of_its_own_thread_alone() -> None:
    table = nn.Embedding(5, 8).eval()
    x = torch.tensor([[1]])
    executable = of(lambda i: torch.relu(table(i)) * 2, x)
    with recording() as calls:
        executable(x)
        with recording() as inner:
            executable(x)
        other = threading.Thread(target=executable, args=(x,))
        other.start()
        other.join()
        executable(x)
    executable(x)
    assert len(calls) == 2 and len(inner) == 1 and all(map(c_calls.is_plain, calls))


def test_copies_between_kernels_are_made_by_c() -> None:
    table = nn.Embedding(5, 8).eval()

    def function(i: torch.Tensor, x: torch.Tensor) -> Any:
        y = torch.relu(table(i)) * 2
        turned = y.view(3, 2, 4).transpose(0, 1)
        whole = torch.cat([turned.reshape(2, 12), x[:, ::2], x[:0, :3].reshape(2, 0)], 1)
        return turned.contiguous(), whole, torch.cat([y, y[:1]]), x.transpose(0, 1).clone()

    example = torch.tensor([1, 2, 3]), torch.randn(2, 6)
    executable = of(function, *example)
    replay = Replay.of(executable, example, 2)
    assert replay.outside == ()
    for _ in range(3):
        i, x = torch.randint(5, (3,)), torch.randn(2, 6)
        assert all(map(torch.equal, replay(i, x), executable(i, x)))


def test_numbers_that_memory_holds_otherwise_are_what_they_mean() -> None:
    executable = of(lambda x: (torch.conj(x), torch.imag(torch.conj(x)), x * 2),
                    torch.zeros(2, 3, dtype=torch.complex64))
    replay = Replay.of(executable, [torch.zeros(2, 3, dtype=torch.complex64)], 1)
    x = torch.randn(2, 3, dtype=torch.complex64)
    assert all(map(torch.equal, replay(x), executable(x)))
