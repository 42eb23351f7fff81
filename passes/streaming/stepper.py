"""Stepping a step program by hand: rows in another order, that join late, steps taken again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from bincompile.passes.streaming.double import wide
from bincompile.passes.streaming.draw import Sequences
from bincompile.passes.streaming.reference import placed
from bincompile.steps import State, StepProgram

JOINS = 3  # the step at which the second row joins
PAUSES = 7  # it is left out of every so manieth step
AGAIN = 5  # every so manieth step is first taken with another token, and not counted
HOMES = (2, 0)  # rows of the state that the rows of a proof live in; the one between stays unused
ROWS = 3


@dataclasses.dataclass
class Stepper:
    """A stream of `ROWS` rows, two of which are used.

    Args:
        steps: what is stepped.
        function: from its flat inputs to its flat outputs.
        double: whether floats are in float64.
        states: as they are now.
        clock: steps that each row has taken.
    """

    steps: StepProgram
    function: Callable[..., Sequence[Any]]
    double: bool
    states: list[torch.Tensor]
    clock: torch.Tensor

    @classmethod
    def of(cls, steps: StepProgram, function: Callable[..., Sequence[Any]], double: bool,
           prepared: Sequence[torch.Tensor]) -> Stepper:
        """A stream that has taken no step; `prepared` has `ROWS` rows."""
        states = steps.empty(ROWS, prepared)
        return cls(steps, function, double, list(map(wide, states)) if double else states,
                   torch.zeros(ROWS, dtype=torch.int64))

    def take(self, rows: torch.Tensor, tokens: Sequence[torch.Tensor]) -> Sequence[Any]:
        """The flat outputs of one step of these rows, each token (rows, 1, ...); no clock moves."""
        self.grow(int(self.clock[rows].max()))
        flat = [placed(token, taken, 1)
                for token, taken in zip(tokens, self.steps.inputs, strict=True)]
        if self.double:
            flat = list(map(wide, flat))
        with torch.no_grad():
            return self.function(*flat, rows, self.clock, *self.states)

    def grow(self, clock: int) -> None:
        """Double every growing state while a slot for this step is missing."""
        while any(s.grows is not None and clock >= t.shape[s.grows + 1] * s.block
                  for s, t in zip(self.steps.states, self.states, strict=True)):
            self.states = [_doubled(s, t)
                           for s, t in zip(self.steps.states, self.states, strict=True)]


def _doubled(state: State, held: torch.Tensor) -> torch.Tensor:
    if state.grows is None:
        return held
    return torch.cat([held, torch.full_like(held, state.fill)], state.grows + 1)


def walk(stepper: Stepper, sequences: Sequences, length: int,
         ) -> Iterator[tuple[list[int], list[int], Sequence[Any]]]:
    """Take so many steps, and yield the sequences that moved, their steps, and the flat outputs.

    The second sequence joins late and pauses at times; the order of the rows changes with every
    step; some steps are taken with a wrong token first, as one that failed would have been.
    """
    rows = len(HOMES) if stepper.steps.inputs[0].batched else 1
    for step in range(length):
        moving = [0, *(row for row in range(1, rows) if step >= JOINS and step % PAUSES)]
        moving = moving[::-1] if step % 2 else moving
        homes = torch.tensor([HOMES[row] for row in moving])
        clocks = stepper.clock[homes].tolist()
        if step % AGAIN == AGAIN - 2:
            wrong = [(clock + 1) % max(1, min(length, sequences.length)) for clock in clocks]
            stepper.take(homes, _tokens(sequences, moving, wrong))
        found = stepper.take(homes, _tokens(sequences, moving, clocks))
        yield moving, clocks, found
        stepper.clock[homes] += 1


def _tokens(sequences: Sequences, rows: list[int], steps: list[int]) -> list[torch.Tensor]:
    return [tokens[rows, steps].unsqueeze(1) for tokens in sequences.tokens]
