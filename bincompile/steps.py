"""A step program: a model's graph for one token, with everything it remembers as tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from bincompile.errors import InputError
from bincompile.program import Program
from bincompile.record import Evidence


@dataclasses.dataclass(frozen=True)
class TimeInput:
    """An input of the model of which a step takes one token.

    Args:
        name: of the placeholder, in the model's program and in the step program.
        position: among the model's flat inputs.
        time_axis: the axis that a step lacks.
        batched: whether the first other axis is the batch.
        token: sizes of one token of one row, without batch and time.
        dtype: of the token.
    """

    name: str
    position: int
    time_axis: int
    batched: bool
    token: tuple[int, ...]
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class State:
    """A tensor that a stream remembers: `(rows, *shape)`, a placeholder of the step program.

    A step writes no part of it that the step before could still be asked for: until the row's
    clock has advanced, a step that failed can be taken again.

    Args:
        name: of the placeholder.
        shape: of one row.
        dtype: its dtype.
        fill: what a new row holds.
        grows: the axis of `shape` that holds one slot for each token since the row began and
            grows with them; None where the size is fixed.
        block: how many of those slots one index of that axis holds.
        prepared: for what follows from inputs that do not change with time, which output of the
            `prepare` program it is; no step writes it.
        path: module path of the layer that it belongs to.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: float = 0.0
    grows: int | None = None
    block: int = 1
    prepared: int | None = None
    path: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes for each row."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """One token in, one answer out.

    The flat inputs of `program` are the tokens (each with a time axis of 1), `rows` (M,) int64 the
    rows of the state that they belong to, `clock` (N,) int64 the steps that each row has taken,
    and the states in order. States are written in place; the clock is not.

    Args:
        program: the graph; at level "steps", or a later one.
        inputs: those that a step takes a token of.
        states: what is remembered, in the order of the placeholders.
        answers: for each flat output the axis of time, of size 1 or of the window's; None where
            the output has none, as after pooling.
        semantics: what it equals, as the report says it, e.g. "banded(64), truncates".
        windows: module path of each attention or pooling and how many tokens it sees; None: all.
        receptive_field: tokens that an answer depends on; None: all since the row began.
        rate: steps between two answers.
        delay: answer i is of token i * rate, and is given at step i * rate + delay.
        first: the first step, from 0, whose answer is valid.
        limit: steps that a row can take; None: no limit.
        statics: positions of the model's flat inputs that do not change with time.
        prepare: from those, in their order, to the states that are `prepared`.
        evidence: the proof; None before it.
        notes: what else a reader should know.
    """

    program: Program
    inputs: tuple[TimeInput, ...]
    states: tuple[State, ...]
    answers: tuple[int | None, ...]
    semantics: str
    windows: tuple[tuple[str, int | None], ...] = ()
    receptive_field: int | None = None
    rate: int = 1
    delay: int = 0
    first: int = 0
    limit: int | None = None
    statics: tuple[int, ...] = ()
    prepare: Program | None = None
    evidence: tuple[Evidence, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of state for each row, before anything has grown."""
        return sum(state.nbytes for state in self.states)

    def empty(self, rows: int, prepared: Sequence[torch.Tensor] = (),
              device: torch.device | str = "cpu") -> list[torch.Tensor]:
        """The states of so many new rows.

        Args:
            rows: how many.
            prepared: outputs of the `prepare` program, each (rows, ...).
            device: where they are made.
        """
        if rows < 0:
            raise InputError(f"{rows} rows", "0 or more", "the batch size")
        return [prepared[s.prepared].clone() if s.prepared is not None else
                torch.full((rows, *s.shape), s.fill, dtype=s.dtype, device=device)
                for s in self.states]

    def valid(self, clock: int) -> bool:
        """Whether the step that a row takes after `clock` others has a valid answer."""
        return clock >= self.first and (clock - self.delay) % self.rate == 0

    def valid_at(self, clock: torch.Tensor) -> torch.Tensor:
        """The same for a tensor of clocks."""
        return (clock >= self.first) & ((clock - self.delay) % self.rate == 0)
