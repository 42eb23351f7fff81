"""Streams: what a step takes and answers, what it refuses, and where its state can go."""

from __future__ import annotations

import dataclasses
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import stream_forms
import torch
from stream_forms import FIRST, SLOTS, WIDTH, expected, step_program, whole_signature

import bincompile as bc
from bincompile.config import Target
from bincompile.steps import TimeInput
from bincompile.stream_call import TokenCall
from bincompile.stream_form import StreamForm, fingerprint_of


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Tokens of some rows, whole numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-9, 10, (rows, length, WIDTH), generator=generator).float()


def answers(x: torch.Tensor) -> torch.Tensor:
    """What the steps on whole sequences answer, from the first valid one on."""
    return torch.stack([torch.stack([expected(list(row[:t + 1])) for row in x])
                        for t in range(FIRST, x.shape[1])], 1)


def limited(stream: bc.Stream, **changes: Any) -> bc.Stream:
    """A stream of the same graph with another step program around it."""
    steps = dataclasses.replace(stream._form.steps, **changes)
    form = dataclasses.replace(stream._form, steps=steps)
    return bc.Stream(form, form.rows(len(stream), {}))


def test_a_step_answers_from_the_first_valid_one_on() -> None:
    x, stream = tokens(2, 20), stream_forms.stream(2)
    found = [stream.step(x[:, t]) for t in range(20)]
    assert found[:FIRST] == [None] * FIRST
    assert torch.equal(torch.stack(found[FIRST:], 1), answers(x))
    assert stream.valid.tolist() == [True, True]
    assert stream.clock.tolist() == [20, 20]


@pytest.mark.parametrize("cuts", [(20,), (1,) * 20, (7, 1, 0, 12), (2, 18)])
def test_any_chunking_gives_the_same(cuts: tuple[int, ...]) -> None:
    x, stream, start, found = tokens(2, 20), stream_forms.stream(2), 0, []
    for length in cuts:
        found.append(stream.steps(x[:, start:start + length]))
        start += length
    whole = torch.cat([y for y in found if y is not None], 1)
    assert torch.equal(whole, answers(x))


def test_rows_that_are_not_valid_hold_nan() -> None:
    x, stream = tokens(2, 20), stream_forms.stream(2)
    stream.steps(x[:1, :5], rows=[0])
    y = stream.step(torch.stack([x[0, 5], x[1, 0]]))
    assert torch.equal(y[0], expected(list(x[0, :6])))
    assert y[1].isnan().all()
    assert stream.valid.tolist() == [True, False]
    assert stream.clock.tolist() == [6, 1]


def test_a_rate_answers_only_at_its_ticks() -> None:
    x, stream = tokens(1, 9), limited(stream_forms.stream(1), rate=3, delay=1, first=4)
    found = [stream.step(x[:, t]) is not None for t in range(9)]
    assert found == [False] * 4 + [True, False, False, True, False]
    assert (stream.rate, stream.delay) == (3, 1)


def test_a_stream_grows_and_remembers() -> None:
    x, stream = tokens(1, 5 * SLOTS), stream_forms.stream(1)
    before, found = stream.nbytes, []
    for t in range(5 * SLOTS):
        found.append(stream.step(x[:, t]))
    assert torch.equal(torch.stack(found[FIRST:], 1), answers(x))
    assert stream.nbytes == before + 7 * SLOTS * WIDTH * 4


def test_what_is_returned_is_the_callers() -> None:
    x, stream = tokens(1, 12), stream_forms.stream(1)
    for t in range(12):
        y = stream.step(x[:, t])
        if y is not None:
            assert torch.equal(y, expected(list(x[0, :t + 1]))[None])
            y.fill_(99.0)
    state = stream.state_dict()
    for tensor in state.values():
        tensor.zero_()
    stream.clock.zero_()
    assert stream.clock.tolist() == [12]


def test_modes_of_torch_change_nothing() -> None:
    x, stream = tokens(1, 12), stream_forms.stream(1)
    modes: list[Callable[[], Any]] = [torch.no_grad, torch.enable_grad, torch.inference_mode,
                                      lambda: torch.autocast("cpu", dtype=torch.bfloat16)]
    for t in range(12):
        with modes[t % 4]():
            y = stream.step(x[:, t].clone().requires_grad_(t % 3 == 0))
        if y is not None:
            assert y.dtype == torch.float32 and not y.requires_grad
            assert torch.equal(y, expected(list(x[0, :t + 1]))[None])


def good(rows: int = 2) -> torch.Tensor:
    return torch.ones(rows, WIDTH)


BAD_STEPS: dict[str, tuple[Callable[[bc.Stream], Any], type[Exception], str]] = {
    "feature size": (lambda s: s.step(torch.ones(2, WIDTH + 1)), bc.InputError, "of shape"),
    "batch": (lambda s: s.step(good(3)), bc.InputError, "of shape"),
    "time axis": (lambda s: s.step(good()[:, None]), bc.InputError, "without time"),
    "dtype": (lambda s: s.step(good().double()), bc.InputTypeError, "float64"),
    "device": (lambda s: s.step(good().to("meta")), bc.InputTypeError, "meta"),
    "nan": (lambda s: s.step(good() * float("nan")), bc.InputError, "NaN"),
    "infinite": (lambda s: s.step(good() / 0), bc.InputError, "infinite"),
    "both infinities": (lambda s: s.step(torch.tensor([[1.0, -1], [0, 1]]) / 0), bc.InputError,
                        "NaN"),
    "no tensor": (lambda s: s.step([1.0, 2.0]), bc.InputTypeError, "list"),
    "nothing": (lambda s: s.step(), bc.InputTypeError, "without x"),
    "two": (lambda s: s.step(good(), good()), bc.InputTypeError, "2 inputs"),
    "twice": (lambda s: s.step(good(), x=good()), bc.InputTypeError, "twice"),
    "unknown": (lambda s: s.step(good(), mask=good()), bc.InputTypeError, "'mask'"),
    "row twice": (lambda s: s.step(good(), rows=[0, 0]), bc.InputError, "each row once"),
    "no such row": (lambda s: s.step(good(1), rows=[2]), bc.InputError, "0 to 1"),
    "row from behind": (lambda s: s.step(good(1), rows=-1), bc.InputError, "0 to 1"),
    "too few bools": (lambda s: s.step(good(1), rows=[True]), bc.InputError, "1 bools"),
    "rows of floats": (lambda s: s.step(good(1), rows=[0.0]), bc.InputTypeError, "float"),
    "rows of text": (lambda s: s.step(good(1), rows="first"), bc.InputTypeError, "first"),
    "nan among steps": (lambda s: s.steps(torch.tensor([1.0, float("nan")]).expand(2, 5, 2)),
                        bc.InputError, "NaN"),
    "no time in steps": (lambda s: s.steps(good()), bc.InputError, "time in dimension 1"),
    "join of none": (lambda s: s.join(-1), bc.InputError, "from 0 up"),
    "join of what": (lambda s: s.join(1, memory=good()), bc.InputTypeError, "'memory'"),
    "reset of none": (lambda s: s.reset([5]), bc.InputError, "0 to 1"),
    "leave of none": (lambda s: s.leave([5]), bc.InputError, "0 to 1"),
}


@pytest.mark.parametrize("name", BAD_STEPS)
def test_bad_input_changes_nothing(name: str) -> None:
    call, kind, word = BAD_STEPS[name]
    x, stream = tokens(2, 9), stream_forms.stream(2)
    stream.steps(x[:, :8])
    before = stream.state_dict()
    with pytest.raises(kind, match=word):
        call(stream)
    after = stream.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(stream.step(x[:, 8]), answers(x)[:, -1])


def test_a_row_ends_with_its_positions() -> None:
    x, stream = tokens(2, 9), limited(stream_forms.stream(2), limit=4)
    stream.steps(x[:, :3])
    with pytest.raises(bc.ContinualError, match="2 more steps of row 0"):
        stream.steps(x[:, 3:5])
    assert stream.clock.tolist() == [3, 3]
    stream.step(x[:, 3])
    with pytest.raises(bc.ContinualError, match="has taken 4"):
        stream.step(x[:, 4])
    stream.reset([0])
    stream.step(x[:1, 4], rows=[0])
    with pytest.raises(bc.ContinualError, match="row 1"):
        stream.step(x[:, 5])
    assert stream.clock.tolist() == [1, 4]


def test_a_closed_stream_takes_nothing() -> None:
    with stream_forms.stream(2) as stream:
        stream.step(good())
    assert stream.closed and stream.nbytes == 0 and repr(stream) == "Stream(closed)"
    stream.close()
    calls = (lambda: stream.step(good()), lambda: stream.step(good(0)), stream.reset,
             lambda: stream.steps(tokens(2, 3)), stream.fork, stream.state_dict, stream.join)
    for call in calls:
        with pytest.raises(bc.StreamClosedError, match="stream\\(\\)"):
            call()


def test_two_threads_at_once_are_an_error() -> None:
    inside, go_on = threading.Event(), threading.Event()
    stream = stream_forms.stream(1)
    form = dataclasses.replace(stream._form)

    def slow(*given: Any) -> Any:
        inside.set()
        assert go_on.wait(30)
        return stream_forms.form().executable(*given)

    object.__setattr__(form, "executable", slow)
    stream = bc.Stream(form, form.rows(1, {}))
    thread = threading.Thread(target=stream.step, args=(good(1),))
    thread.start()
    assert inside.wait(30)
    for call in (lambda: stream.step(good(1)), stream.reset, stream.fork, stream.close):
        with pytest.raises(bc.StreamBusyError, match="fork"):
            call()
    go_on.set()
    thread.join()
    assert stream.clock.tolist() == [1]


def test_a_failure_among_steps_of_indices_takes_all_of_them_back(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TokenCall, "fallible", True)  # as if tokens were indices of a table
    x, stream, calls = tokens(1, 19), stream_forms.stream(1), []
    whole, run = stream.fork(), stream._run

    def fails(given: list[torch.Tensor]) -> Any:
        found = run(given)  # it has written to its states
        calls.append(1)
        if len(calls) == 15:
            raise IndexError("no such row of a table")
        return found

    stream.steps(x[:, :3])
    whole.steps(x[:, :3])
    monkeypatch.setattr(stream, "_run", fails)
    with pytest.raises(IndexError, match="table"):
        stream.steps(x[:, 3:] + 5)
    assert stream.clock.tolist() == [3]
    assert torch.equal(stream.steps(x[:, 3:]), whole.steps(x[:, 3:]))


@pytest.mark.parametrize("way", ["as it is", "torch", "safetensors"])
def test_a_state_moves(way: str) -> None:
    x, stream = tokens(2, 30), stream_forms.stream(2)
    stream.steps(x[:, :20])
    state = stream.state_dict()
    if way == "torch":
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    elif way == "safetensors":
        state = safetensors.torch.load(safetensors.torch.save(state))
    other = stream_forms.stream(1)
    other.load_state_dict(state)
    assert len(other) == 2
    assert torch.equal(other.steps(x[:, 20:]), answers(x)[:, 20 - FIRST:])
    assert stream.clock.tolist() == [20, 20]


def changed(state: dict[str, torch.Tensor], **values: torch.Tensor | None) -> dict[str, Any]:
    """The state with some values replaced, or left out."""
    return {key: value for key, value in {**state, **values}.items() if value is not None}


BAD_STATES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "nothing": (lambda s: {}, "no state of a stream"),
    "no dict": (lambda s: [1], "list"),
    "no tensors": (lambda s: {"about": "me"}, "dict of tensors"),
    "no text": (lambda s: changed(s, about=s["about"][:-3]), "no state of a stream"),
    "version": (lambda s: changed(s, about=torch.tensor(list(bytes(s["about"].tolist()).replace(
        b'"version": 1', b'"version": 9')), dtype=torch.uint8)), "version 9"),
    "model": (lambda s: stream_forms.stream(1, factor=3.0).state_dict(), "another model"),
    "semantics": (lambda s: stream_forms.stream(1, first=1).state_dict(), "another model"),
    "lacks one": (lambda s: changed(s, **{"state.ring": None}), "state.ring"),
    "one more": (lambda s: changed(s, extra=torch.zeros(1)), "extra"),
    "rows": (lambda s: changed(s, clock=torch.zeros(2, dtype=torch.int64)), "ring"),
    "clock": (lambda s: changed(s, clock=torch.tensor([-1])), "clocks"),
    "clock dtype": (lambda s: changed(s, clock=torch.tensor([1.0])), "clocks"),
    "late clock": (lambda s: changed(s, clock=torch.tensor([SLOTS + 1])), "a clock of 9"),
    "dtype": (lambda s: changed(s, **{"state.ring": s["state.ring"].double()}), "float64"),
    "shape": (lambda s: changed(s, **{"state.ring": s["state.ring"][:, 1:]}), "ring"),
    "length": (lambda s: changed(s, **{"state.long": s["state.long"][:, 1:]}), "long"),
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_a_state_that_does_not_fit_changes_nothing(name: str) -> None:
    change, word = BAD_STATES[name]
    x, stream = tokens(1, 9), stream_forms.stream(1)
    stream.steps(x[:, :8])
    with pytest.raises((bc.InputError, bc.InputTypeError), match=word):
        stream.load_state_dict(change(stream.state_dict()))
    assert torch.equal(stream.step(x[:, 8]), answers(x)[:, -1])


def test_names_that_users_of_continual_inference_know() -> None:
    x, stream = tokens(2, 9), stream_forms.stream(2)
    first = stream.forward_steps(x[:, :8])
    assert torch.equal(torch.cat([first, stream.forward_step(x[:, 8])[:, None]], 1), answers(x))
    stream.clean_state()
    assert stream.clock.tolist() == [0, 0] and stream.receptive_field == 6
    assert repr(stream).startswith("Stream(2 rows, clock 0, ")


def test_a_fingerprint_follows_from_what_is_computed() -> None:
    prints = {fingerprint_of(step_program(**options)) for options in
              ({}, {"factor": 3.0}, {"first": 1}, {"rate": 2})}
    assert len(prints) == 4
    assert fingerprint_of(step_program()) == stream_forms.form().fingerprint


def test_tokens_of_several_inputs_by_place_and_name() -> None:
    call = TokenCall((TimeInput("audio", 0, 2, True, (3,), torch.float32),
                      TimeInput("ids", 1, 1, True, (), torch.int64),
                      TimeInput("gain", 2, 0, False, (), torch.float16)))
    audio, ids, gain = torch.ones(2, 3), torch.tensor([4, 5]), torch.ones((), dtype=torch.float16)
    for found in (call.quick((audio, ids, gain), {}, 2), call.tokens((audio, ids, gain), {}, 2),
                  call.tokens((audio,), {"gain": gain, "ids": ids}, 2)):
        assert [list(t.shape) for t in found] == [[2, 3, 1], [2, 1], [1]]
    assert call.quick((audio, ids, gain / 0), {}, 2) is None
    assert call.quick((audio * 3e38, ids, gain), {}, 2) is None  # a doubt, and no more than that
    assert len(call.tokens((audio * 3e38, ids, gain), {}, 2)) == 3
    given, length = call.sequences((torch.ones(2, 3, 7), torch.ones(2, 7, dtype=torch.int64),
                                    torch.ones(7, dtype=torch.float16)), {}, 2)
    assert length == 7 and [t.shape[a] for t, a in zip(given, (2, 1, 0), strict=True)] == [7] * 3
    with pytest.raises(bc.InputError, match="ids of shape"):
        call.sequences((torch.ones(2, 3, 7), torch.ones(2, 6, dtype=torch.int64),
                        torch.ones(7, dtype=torch.float16)), {}, 2)


def test_a_model_without_rows_has_one_stream() -> None:
    steps = step_program()
    (known,) = steps.inputs
    steps = dataclasses.replace(steps, inputs=(dataclasses.replace(known, batched=False),))
    form = StreamForm.bound(steps, whole_signature(), Target("cpu"), "")
    for call in (lambda: form.rows(2, {}), lambda: bc.Stream(form, form.rows(1, {})).leave([0]),
                 lambda: bc.Stream(form, form.rows(1, {})).step(torch.ones(WIDTH), rows=[0])):
        with pytest.raises(bc.InputError, match="for a batch"):
            call()


def test_inputs_that_do_not_change_are_given_once() -> None:
    form, x, memory = stream_forms.with_memory(), tokens(2, 3), torch.tensor([[1.0, 2], [3, 4]])
    stream = bc.Stream(form, form.rows(2, {"memory": memory}))
    memory_then = memory.clone()
    memory.zero_()
    assert torch.equal(stream.step(x[:, 0]), x[:, 0] + 2 * memory_then)
    assert stream.join(1, memory=torch.full((1, WIDTH), 5.0)).tolist() == [2]
    stream.reset([0])
    found = stream.step(torch.cat([x[:, 1], torch.zeros(1, WIDTH)]))
    expected = torch.cat([x[:, 1] + 2 * memory_then, torch.full((1, WIDTH), 10.0)])
    assert torch.equal(found, expected)
    again = bc.Stream(form, form.rows(0, {"memory": torch.zeros(0, WIDTH)}))
    again.load_state_dict(stream.state_dict())
    assert torch.equal(again.step(x[:1, 2], rows=[1]), x[:1, 2] + 2 * memory_then[1:])


@pytest.mark.parametrize(("statics", "error", "word"), [
    ({}, bc.InputTypeError, "without memory"),
    ({"memory": torch.zeros(1, WIDTH)}, bc.InputError, "2: one for each row"),
    ({"memory": torch.zeros(2, WIDTH + 1)}, bc.InputError, "size 3"),
    ({"memory": torch.zeros(2, WIDTH).double()}, bc.InputTypeError, "float64"),
    ({"memory": torch.zeros(2, WIDTH) / 0}, bc.InputError, "NaN"),
    ({"memory": 3}, bc.InputTypeError, "int"),
    ({"memory": torch.zeros(2, WIDTH), "more": 1}, bc.InputTypeError, "'more'")])
def test_wrong_inputs_that_do_not_change(statics: dict[str, Any], error: type[Exception],
                                         word: str) -> None:
    with pytest.raises(error, match=word):
        stream_forms.with_memory().rows(2, statics)
