"""Streams: a compiled model that takes one token a step and remembers what later steps need."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from bincompile.compiled import run
from bincompile.errors import ContinualError, StreamBusyError, StreamClosedError
from bincompile.runtime.replay import Replay
from bincompile.stream_form import StreamForm
from bincompile.stream_rows import StreamRows, rows_of
from bincompile.stream_saved import restored, saved

RECORDED_AFTER = 3  # steps of the same rows, after which their calls are recorded


class Stream:
    """Rows of tokens, each with a clock of its own, taken one step at a time.

    A call that raises changes nothing and can be made again. Nothing that is returned is memory of
    the stream, and results carry no gradient. One thread uses a stream at a time; streams of one
    model share its weights and run beside each other.

    Args:
        form: the bound step program.
        rows: what its rows remember.

    Source: Continual Inference (arXiv:2204.03418), Continual Transformers (arXiv:2201.06268).

    Example:
        >>> import torch, bincompile as bc
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()).eval()
        >>> x = torch.randn(2, 6, 4)
        >>> stream = bc.optimize(model, (x,), continual=8).stream(batch_size=2)
        >>> torch.allclose(stream.step(x[:, 0]), model(x)[:, 0], atol=1e-6)
        True
        >>> stream.steps(x[:, 1:]).shape, stream.clock.tolist()
        (torch.Size([2, 5, 4]), [6, 6])
    """

    def __init__(self, form: StreamForm, rows: StreamRows) -> None:
        self._form, self._lock = form, threading.Lock()
        self._quick, self._plain = form.call.quick, form.call.plain
        self._result = form.answers.result
        self._steady = form.steps.first if form.steps.rate == 1 else math.inf
        self._taken: int | torch.Tensor = torch.zeros(0, dtype=torch.int64)
        self._seen, self._repeats, self._ceiling = 0, 0, 0.0
        self._replay: Replay | None = None
        self._place(rows)

    def step(self, *tokens: Any, rows: Any = None, **named: Any) -> Any:
        """Take one token of each row.

        Args:
            tokens: for each input that is a stream its token: the model's input without the axis
                of time, as (B, E) for (B, T, E) or (B, C) for (B, C, T).
            rows: indices, or a bool for each row: the tokens are theirs alone, in this order.
                None: all rows.
            named: tokens by the names of the model's inputs.

        Returns:
            What the model returns, without the axis of time, or with that of the window for
            `outputs="all"`. Rows that are not valid hold NaN, or 0 in whole numbers; `valid` says
            which. None if no row is valid.

        Raises:
            InputError: another shape, a value that is not finite, rows that do not exist.
            InputTypeError: another dtype, device or number of inputs.
            ContinualError: a row has come to the end of its positions.
            StreamBusyError: another call of this stream runs.
            StreamClosedError: after `close`.
        """
        if not self._lock.acquire(False):
            raise _busy()
        try:
            state = self._rows
            if rows is None and not named and state.most < self._ceiling:
                parts = self._at_once(tokens)
                if parts is not None:
                    return self._result(parts) if state.least > self._steady \
                        else self._told(parts)
            return self._general(tokens, named, rows)
        finally:
            self._lock.release()

    def _at_once(self, tokens: tuple[Any, ...]) -> Sequence[Any] | None:
        """The flat answers of a step of all rows as it mostly is; None, and no step, in doubt."""
        state = self._rows
        if self._replay is not None and self._plain(tokens) \
                and not torch.is_autocast_enabled("cpu"):
            parts = self._replay.quick(*tokens)
            if parts is not None:
                self._taken = state.least if state.least == state.most else state.clock - 1
                state.counted()
            return parts
        given = self._quick(tokens, {}, self._seen)
        return None if given is None else self._take(given, None)

    def steps(self, *sequences: Any, rows: Any = None, **named: Any) -> Any:
        """Take several tokens of each row, one step after another.

        Args:
            sequences: the model's inputs with the axis of time, e.g. (B, T, E).
            rows: as in `step`.
            named: sequences by the names of the model's inputs.

        Returns:
            What the model returns, with time where the model has it and, for outputs that have
            none, behind the axis of the rows. Steps without a valid row are left out; in the
            others rows that are not valid are as in `step`. None if nothing is left. However a
            sequence is cut into calls, the bits are the same.

        Raises:
            The errors of `step`; no step has been taken then.
        """
        with self._alone():
            chosen = rows_of(rows, len(self._rows), self._form.batched)
            count = len(self._rows) if chosen is None else len(chosen)
            given, length = self._form.call.sequences(sequences, named, count)
            self._check_limit(chosen, length)
            kept = self._rows.kept() if length > 1 and self._form.call.fallible else None
            try:
                found = list(self._each(given, length, chosen))
            except BaseException:
                if kept is not None:
                    self._rows.restore(kept)
                raise
            answers = self._form.answers
            return answers.result(answers.stacked(found)) if found else None

    def _run(self, tokens: list[torch.Tensor]) -> Sequence[Any]:
        """The flat answers to tokens of all rows, and their clocks advanced.

        The calls are recorded when these rows have been here before.
        """
        form, state = self._form, self._rows
        if self._replay is None and self._repeats == RECORDED_AFTER:
            self._replay = Replay.of(form.executable, [*tokens, *self._tail], len(tokens),
                                     form.answers.drop, state.clock)
        self._repeats += 1
        if self._replay is not None and not torch.is_autocast_enabled("cpu"):
            replayed = self._replay(*tokens)
            state.counted()
            return replayed
        parts = form.answers.parts(run(form.executable, tokens + self._tail))
        state.advance(None)
        return parts

    def _each(self, given: Sequence[torch.Tensor], length: int,
              chosen: torch.Tensor | None) -> Iterator[Sequence[Any]]:
        """The flat answers of the steps that have one."""
        axes = [known.time_axis for known in self._form.steps.inputs]
        for index in range(length):
            tokens = [sequence.narrow(axis, index, 1).contiguous()
                      for sequence, axis in zip(given, axes, strict=True)]
            parts = self._parts(self._take(tokens, chosen))
            if parts is not None:
                yield parts

    def _general(self, tokens: tuple[Any, ...], named: Mapping[str, Any], rows: Any) -> Any:
        """A step that is looked at closely."""
        self._check_open()
        chosen = rows_of(rows, len(self._rows), self._form.batched)
        count = len(self._rows) if chosen is None else len(chosen)
        given = self._form.call.tokens(tokens, named, count)
        self._check_limit(chosen, 1)
        return self._told(self._take(given, chosen))

    def _take(self, tokens: list[torch.Tensor], chosen: torch.Tensor | None) -> Sequence[Any]:
        """One step of tokens that were checked; the flat answers, valid or not."""
        state = self._rows
        parts: Sequence[Any] = ()
        if chosen is None:
            taken: int | torch.Tensor = state.least if state.least == state.most \
                else state.clock.clone()
            self._grow(state.most)
            parts = self._run(tokens) if self._seen else ()
        else:
            taken = state.clock[chosen]
            if len(chosen):
                self._grow(int(taken.max()))
                parts = self._form.answers.parts(
                    run(self._form.executable, [*tokens, chosen, *self._tail[1:]]))
                state.advance(chosen)
        self._taken = taken
        return parts

    def _told(self, parts: Sequence[Any]) -> Any:
        """The result of the step just taken; None if no row is valid."""
        found = self._parts(parts)
        return None if found is None else self._result(found)

    def _parts(self, parts: Sequence[Any]) -> Sequence[Any] | None:
        """Of the step just taken the flat answers with nothing where rows are not valid."""
        if isinstance(self._taken, int) and self._seen:  # all rows are alike
            return parts if self._form.steps.valid(self._taken) else None
        valid = self._valid()
        if not bool(valid.any()):
            return None
        return parts if bool(valid.all()) else self._form.answers.blanked(parts, valid)

    def _valid(self) -> torch.Tensor:
        if isinstance(self._taken, int):
            self._taken = torch.full((self._seen,), self._taken)
        return self._form.steps.valid_at(self._taken)

    def reset(self, rows: Any = None) -> None:
        """Let rows, or all, begin anew; what was given for them once stays.

        Raises:
            InputError: rows that do not exist, or twice.
        """
        with self._alone():
            chosen = rows_of(rows, len(self._rows), self._form.batched)
            self._rows.reset(self._rows.rows if chosen is None else chosen)

    def join(self, count: int = 1, **statics: Any) -> torch.Tensor:
        """Add rows that begin now, behind those that are there.

        Args:
            count: how many.
            statics: for them, the inputs that do not change with time.

        Returns:
            The indices of the new rows.

        Raises:
            InputError, InputTypeError: as `CompiledModel.stream`.
        """
        with self._alone():
            before = len(self._rows)
            self._place(self._rows.joined(self._form.rows(count, statics)))
            return torch.arange(before, len(self._rows))

    def leave(self, rows: Any) -> None:
        """Drop rows; each row behind them moves down, in the same order.

        Raises:
            InputError: rows that do not exist, or twice.
        """
        with self._alone():
            chosen = rows_of(rows, len(self._rows), self._form.batched)
            keep = torch.ones(len(self._rows), dtype=torch.bool)
            keep[slice(None) if chosen is None else chosen] = False
            self._place(self._rows.chosen(keep.nonzero().view(-1)))

    def fork(self) -> Stream:
        """A stream that goes on from here by itself."""
        with self._alone():
            return Stream(self._form, self._rows.chosen(self._rows.rows))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copies of all that it remembers, as tensors alone: torch.save, torch.load with
        `weights_only=True` and safetensors take it. It fits every stream of the same model,
        weights and options, in any process and on any machine."""
        with self._alone():
            return saved(self._form, self._rows)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `state_dict` gave, with as many rows as it had.

        Raises:
            InputError: of another model or version, or damaged; nothing has changed then.
            InputTypeError: no dict of tensors.
        """
        with self._alone():
            self._place(restored(self._form, state))

    @property
    def valid(self) -> torch.Tensor:
        """For each row of the last step whether its answer was valid."""
        return self._valid()

    @property
    def clock(self) -> torch.Tensor:
        """Steps that each row has taken, (rows,) int64; a copy."""
        return self._rows.clock.clone()

    @property
    def receptive_field(self) -> int | None:
        """Tokens that an answer depends on; None: all since the row began."""
        return self._form.steps.receptive_field

    @property
    def delay(self) -> int:
        """Steps from a token to the answer for it."""
        return self._form.steps.delay

    @property
    def rate(self) -> int:
        """Steps between two answers."""
        return self._form.steps.rate

    @property
    def nbytes(self) -> int:
        """Bytes that its rows take."""
        return self._rows.nbytes

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._ceiling < 0

    def close(self) -> None:
        """Free what the rows remember; every step after it is an error."""
        if not self.closed:
            with self._alone():
                self._place(StreamRows.none(self._form.steps))
                self._ceiling = -1

    forward_step = step
    forward_steps = steps

    def clean_state(self) -> None:
        """The same as `reset()`, as continual-inference calls it."""
        self.reset()

    def _place(self, rows: StreamRows) -> None:
        """Go on with these rows."""
        if isinstance(self._taken, int):
            self._taken = torch.full((self._seen,), self._taken)
        self._rows, self._seen = rows, len(rows)
        limits = [limit for limit in (rows.room, self._form.steps.limit) if limit is not None]
        self._ceiling = min(limits, default=math.inf) if self._seen else 0
        self._tail, self._repeats = rows.tail, 0
        self._replay = None

    def _grow(self, clock: int) -> None:
        if self._rows.room is not None and clock >= self._rows.room:
            self._rows.grow(clock)
            self._place(self._rows)

    def _check_limit(self, chosen: torch.Tensor | None, steps: int) -> None:
        """Raise if a row can't take so many steps more."""
        limit = self._form.steps.limit
        if limit is None:
            return
        ticks = self._rows.ticks(chosen)
        if ticks and max(ticks) + steps > limit:
            row = ticks.index(max(ticks))
            row = row if chosen is None else int(chosen[row])
            raise ContinualError(
                f"{steps} more steps of row {row}, which has taken {max(ticks)}",
                f"{limit} steps: its table of positions ends there",
                f"reset([{row}]), or Continual(positions=\"recycle\"), which changes the model")

    def _check_open(self) -> None:
        if self.closed:
            raise StreamClosedError("a call of a stream that was closed", "one that is open",
                                    "make another with stream() of the compiled model")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other call runs inside of it."""
        if not self._lock.acquire(False):
            raise _busy()
        try:
            self._check_open()
            yield
        finally:
            self._lock.release()

    def __len__(self) -> int:
        return len(self._rows)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self.closed:
            return "Stream(closed)"
        ticks = self._rows.ticks()
        clock = "" if not ticks else f", clock {min(ticks)}" + (
            f" to {max(ticks)}" if min(ticks) < max(ticks) else "")
        return (f"Stream({len(self)} row{'s' * (len(self) != 1)}{clock}, {self.nbytes:,} bytes, "
                f"{self._form.steps.semantics})")


def _busy() -> StreamBusyError:
    return StreamBusyError("a call of a stream in which another call runs", "one at a time",
                           "give each thread a stream of its own, e.g. fork(), or use a lock")
