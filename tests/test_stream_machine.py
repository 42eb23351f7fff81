"""Streams in any order of calls, against a model that answers each row from its whole history."""

from __future__ import annotations

import copy
import io

import pytest
import safetensors.torch
import stream_forms
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from stream_forms import FIRST, WIDTH, expected

import bincompile as bc

MOST_STREAMS, MOST_ROWS = 3, 5
NUMBERS = st.integers(0, 2**31 - 1)
BAD = ("nan", "infinite", "shape", "rank", "dtype", "rows twice", "no such row", "too many inputs")


class Streams(RuleBasedStateMachine):
    """Some streams, each with the tokens that every row has taken since it began."""

    def __init__(self) -> None:
        super().__init__()
        self.streams = [(stream_forms.stream(2), [[], []])]
        self.saved = [(stream_forms.stream(1).state_dict(), [[]])]

    def chosen(self, number: int) -> tuple[bc.Stream, list[list[torch.Tensor]]]:
        """One of the streams."""
        return self.streams[number % len(self.streams)]

    @staticmethod
    def tokens(number: int, *sizes: int) -> torch.Tensor:
        """Whole numbers, so that sums are exact in any order."""
        generator = torch.Generator().manual_seed(number)
        return torch.randint(-9, 10, (*sizes, WIDTH), generator=generator).float()

    @staticmethod
    def part(number: int, rows: int) -> list[int]:
        """Some rows in any order, none twice."""
        generator = torch.Generator().manual_seed(number)
        count = int(torch.randint(0, rows + 1, (), generator=generator))
        return torch.randperm(rows, generator=generator)[:count].tolist()

    def wanted(self, histories: list[list[torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        """The answers of rows that have just taken a token, and which are valid."""
        valid = torch.tensor([len(history) > FIRST for history in histories], dtype=torch.bool)
        nothing = torch.full((WIDTH,), float("nan"))
        answers = [expected(h) if ok else nothing for h, ok in zip(histories, valid, strict=True)]
        return torch.stack(answers) if answers else torch.zeros(0, WIDTH), valid

    def take(self, stream: bc.Stream, histories: list[list[torch.Tensor]], tokens: torch.Tensor,
             rows: list[int] | None, as_bools: bool = False) -> None:
        """One step, and what it has to answer."""
        given = rows
        if as_bools and rows is not None:
            rows = sorted(rows)
            given = [row in rows for row in range(len(histories))]
        found = stream.step(tokens, rows=given)
        theirs = histories if rows is None else [histories[row] for row in rows]
        for history, token in zip(theirs, tokens, strict=True):
            history.append(token)
        wanted, valid = self.wanted(theirs)
        assert torch.equal(stream.valid, valid)
        assert (found is None) == (not bool(valid.any()))
        if found is not None:
            torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)

    @rule(which=NUMBERS, number=NUMBERS)
    def step(self, which: int, number: int) -> None:
        """A token for every row."""
        stream, histories = self.chosen(which)
        self.take(stream, histories, self.tokens(number, len(histories)), None)

    @rule(which=NUMBERS, number=NUMBERS, as_bools=st.booleans())
    def step_of_a_part(self, which: int, number: int, as_bools: bool) -> None:
        """A token for some rows."""
        stream, histories = self.chosen(which)
        rows = self.part(number, len(histories))
        self.take(stream, histories, self.tokens(number, len(rows)), rows, as_bools)

    @rule(which=NUMBERS, number=NUMBERS, length=st.integers(0, 12), whole=st.booleans())
    def steps(self, which: int, number: int, length: int, whole: bool) -> None:
        """Several tokens for some rows, or all."""
        stream, histories = self.chosen(which)
        rows = None if whole else self.part(number, len(histories))
        theirs = histories if rows is None else [histories[row] for row in rows]
        tokens, answers = self.tokens(number, len(theirs), length), []
        found = stream.steps(tokens, rows=rows)
        for index in range(length):
            for history, token in zip(theirs, tokens[:, index], strict=True):
                history.append(token)
            wanted, valid = self.wanted(theirs)
            answers += [wanted] if bool(valid.any()) else []
        assert (found is None) == (not answers)
        if found is not None:
            torch.testing.assert_close(found, torch.stack(answers, 1), rtol=0, atol=0,
                                       equal_nan=True)

    @rule(which=NUMBERS, number=NUMBERS, kind=st.sampled_from(BAD), several=st.booleans())
    def fail(self, which: int, number: int, kind: str, several: bool) -> None:
        """A call that is refused; what the next calls answer says that it changed nothing."""
        stream, histories = self.chosen(which)
        count = len(histories)
        tokens, rows = self.tokens(number, max(count, 1), *([3] if several else [])), None
        inputs = [tokens]
        if kind in ("nan", "infinite"):
            tokens[-1, ..., 0] = float(kind[:3])
            rows = [0] if not count else None
        elif kind in ("shape", "rank"):
            inputs = [tokens[..., 1:] if kind == "shape" else tokens[None]]
        elif kind == "dtype":
            inputs = [tokens.double()]
        elif kind == "rows twice":
            rows = [0] * max(count, 2)
        elif kind == "no such row":
            rows = [count]
        else:
            inputs = [tokens, tokens]
        before = stream.clock
        with pytest.raises((bc.InputError, bc.InputTypeError)):
            (stream.steps if several else stream.step)(*inputs, rows=rows)
        assert torch.equal(stream.clock, before)

    @rule(which=NUMBERS, number=NUMBERS)
    def break_off(self, which: int, number: int) -> None:
        """A step that wrote to its states and ended before its clock advanced."""
        stream, histories = self.chosen(which)
        if histories and max(map(len, histories)) < stream._ceiling:
            stream._form.executable(self.tokens(number, len(histories), 1), *stream._tail)

    @rule(which=NUMBERS, number=NUMBERS, whole=st.booleans())
    def reset(self, which: int, number: int, whole: bool) -> None:
        """Rows that begin anew."""
        stream, histories = self.chosen(which)
        rows = list(range(len(histories))) if whole else self.part(number, len(histories))
        stream.reset(None if whole else torch.tensor(rows, dtype=torch.int64))
        for row in rows:
            histories[row] = []

    @rule(which=NUMBERS)
    def fork(self, which: int) -> None:
        """A stream of its own from here on."""
        stream, histories = self.chosen(which)
        self.streams = self.streams[-MOST_STREAMS + 1:]
        self.streams.append((stream.fork(), copy.deepcopy(histories)))

    @rule(which=NUMBERS, way=st.sampled_from(("as it is", "torch", "safetensors")))
    def save(self, which: int, way: str) -> None:
        """The state of a stream, by way of a file or not."""
        stream, histories = self.chosen(which)
        state = stream.state_dict()
        if way == "torch":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        elif way == "safetensors":
            state = safetensors.torch.load(safetensors.torch.save(state))
        self.saved = [*self.saved[-2:], (state, copy.deepcopy(histories))]

    @rule(which=NUMBERS, saved=NUMBERS)
    def load(self, which: int, saved: int) -> None:
        """What was saved, in any stream."""
        stream, histories = self.chosen(which)
        state, then = self.saved[saved % len(self.saved)]
        stream.load_state_dict(state)
        histories[:] = copy.deepcopy(then)

    @rule(which=NUMBERS, count=st.integers(0, 2))
    def join(self, which: int, count: int) -> None:
        """New rows behind the others."""
        stream, histories = self.chosen(which)
        count = min(count, MOST_ROWS - len(histories))
        if count >= 0:
            found = stream.join(count)
            assert found.tolist() == list(range(len(histories), len(histories) + count))
            histories += [[] for _ in range(count)]

    @rule(which=NUMBERS, number=NUMBERS)
    def leave(self, which: int, number: int) -> None:
        """Rows that go; the others move down."""
        stream, histories = self.chosen(which)
        gone = self.part(number, len(histories))
        stream.leave(gone)
        histories[:] = [h for row, h in enumerate(histories) if row not in gone]

    @invariant()
    def clocks_agree(self) -> None:
        """Each row knows how many tokens it has taken."""
        for stream, histories in self.streams:
            assert stream.clock.tolist() == [len(history) for history in histories]
            assert len(stream) == len(histories)


@pytest.mark.parametrize("examples", [50, pytest.param(500, marks=pytest.mark.slow)])
def test_any_order_of_calls(examples: int) -> None:
    run_state_machine_as_test(Streams, settings=settings(
        max_examples=examples, stateful_step_count=25, deadline=None))
