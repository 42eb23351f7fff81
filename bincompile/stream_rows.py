"""The rows of a stream: what each remembers, and how many steps it has taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bincompile.errors import ContinualError, InputError, InputTypeError
from bincompile.steps import State, StepProgram


class StreamRows:
    """States and clocks of the rows of a stream, in memory that stays where it is.

    Only `grow` and making other rows take new memory; `generation` counts up then.

    Args:
        steps: the step program.
        states: its states, in order.
        clock: (N,) int64, the steps that each row has taken.
    """

    def __init__(self, steps: StepProgram, states: Sequence[torch.Tensor],
                 clock: torch.Tensor) -> None:
        self.steps, self.states, self.clock = steps, list(states), clock
        self.generation = 0
        self._numbers = clock.numpy()  # the same memory
        with torch.inference_mode(False):
            self.rows = torch.arange(len(clock))
        self.settle()

    @classmethod
    def fresh(cls, steps: StepProgram, count: int,
              prepared: Sequence[torch.Tensor] = ()) -> StreamRows:
        """So many rows that have taken no step."""
        with torch.inference_mode(False), torch.no_grad():
            return cls(steps, steps.empty(count, prepared),
                       torch.zeros(count, dtype=torch.int64))

    @classmethod
    def none(cls, steps: StepProgram) -> StreamRows:
        """No rows, and no memory."""
        return cls(steps, [torch.empty(0, *state.shape, dtype=state.dtype)
                           for state in steps.states], torch.zeros(0, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the states and clocks."""
        return sum(state.nbytes for state in (*self.states, self.clock))

    @property
    def tail(self) -> list[torch.Tensor]:
        """The flat inputs of the step program behind the tokens, for all rows."""
        return [self.rows, self.clock, *self.states]

    def settle(self) -> None:
        """Look at the clocks again after they were written to."""
        self.least = int(self._numbers.min()) if len(self) else 0
        self.most = int(self._numbers.max()) if len(self) else 0

    def ticks(self, rows: torch.Tensor | None = None) -> list[int]:
        """The steps that rows have taken."""
        return (self.clock if rows is None else self.clock[rows]).tolist()

    def advance(self, rows: torch.Tensor | None) -> None:
        """Count one step of these rows, or of all; theirs is done."""
        if rows is not None:
            self._numbers[rows.numpy()] += 1
            self.settle()
            return
        if len(self._numbers) == 1:
            self._numbers[0] = self.most + 1  # a tenth of the time of the other way
        else:
            self._numbers += 1
        self.counted()

    def counted(self) -> None:
        """The clocks of all rows have been advanced by whoever took the step."""
        self.least += 1
        self.most += 1

    @property
    def room(self) -> int | None:
        """Steps that a row can have taken before states have to grow; None: they never do."""
        return room(self.steps.states, self.states)

    def grow(self, clock: int) -> None:
        """Make room for the step after so many; what is there stays in the same slots."""
        now = self.room
        if now is None or clock < now:
            return
        times = 2
        while now * times <= clock:
            times *= 2
        with torch.inference_mode(False), torch.no_grad():
            self.states = [tensor if state.grows is None else _grown(state, tensor, times)
                           for state, tensor in zip(self.steps.states, self.states, strict=True)]
        self.generation += 1

    def reset(self, rows: torch.Tensor) -> None:
        """Let these rows begin anew; what was prepared for them stays."""
        for state, tensor in zip(self.steps.states, self.states, strict=True):
            if state.prepared is None:
                tensor.index_fill_(0, rows, state.fill)
        self._numbers[rows.numpy()] = 0
        self.settle()

    def chosen(self, rows: torch.Tensor) -> StreamRows:
        """A copy of these rows, in this order."""
        with torch.inference_mode(False), torch.no_grad():
            return StreamRows(self.steps, [state[rows] for state in self.states],
                              self.clock[rows])

    def joined(self, others: StreamRows) -> StreamRows:
        """These rows and others behind them, in new memory."""
        mine, theirs = self.room, others.room
        if mine is not None and theirs is not None:
            self.grow(theirs - 1)
            others.grow(mine - 1)
        for state, own, other in zip(self.steps.states, self.states, others.states, strict=True):
            if own.shape[1:] != other.shape[1:]:
                raise ContinualError(f"new rows with {state.name} of {list(other.shape[1:])}",
                                     f"{list(own.shape[1:])}, as the other rows have",
                                     "the inputs given to join(), or a stream of their own")
        with torch.inference_mode(False), torch.no_grad():
            states = [torch.cat(pair) for pair in zip(self.states, others.states, strict=True)]
            return StreamRows(self.steps, states, torch.cat([self.clock, others.clock]))

    def kept(self) -> tuple[torch.Tensor, Mapping[int, torch.Tensor]]:
        """What several steps may write over: clocks, and the states that do not grow."""
        return self.clock.clone(), {
            index: tensor.clone() for index, (state, tensor) in enumerate(zip(
                self.steps.states, self.states, strict=True))
            if state.grows is None and state.prepared is None}

    def restore(self, kept: tuple[torch.Tensor, Mapping[int, torch.Tensor]]) -> None:
        """Put back what `kept` gave; slots behind the clock are nobody's."""
        clock, states = kept
        self.clock.copy_(clock)
        for index, tensor in states.items():
            self.states[index].copy_(tensor)
        self.settle()


def room(states: Sequence[State], tensors: Sequence[torch.Tensor]) -> int | None:
    """Tokens that the least of the growing states has room for; None: none grows."""
    return min((tensor.shape[1 + state.grows] * state.block for state, tensor in
                zip(states, tensors, strict=True) if state.grows is not None), default=None)


def _grown(state: State, tensor: torch.Tensor, times: int) -> torch.Tensor:
    assert state.grows is not None
    axis = 1 + state.grows
    sizes = list(tensor.shape)
    sizes[axis] *= times
    grown = torch.full(sizes, state.fill, dtype=tensor.dtype)
    grown.narrow(axis, 0, tensor.shape[axis]).copy_(tensor)
    return grown


def rows_of(rows: Any, count: int, batched: bool) -> torch.Tensor | None:
    """Rows of a call as distinct int64 indices; None: all.

    Args:
        rows: None, an index, indices, or a bool for each row.
        count: rows that there are.
        batched: whether the model has an axis for them.

    Raises:
        InputError: rows that do not exist, or twice.
        InputTypeError: neither indices nor bools.

    Example:
        >>> rows_of([False, True, True], 3, True)
        tensor([1, 2])
    """
    if rows is None:
        return None
    if not batched:
        raise InputError(f"rows={rows!r} of a model without an axis for a batch", "None",
                         "leave rows= out")
    try:
        found = torch.as_tensor(rows)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputTypeError(f"rows={rows!r}", "indices, or a bool for each row", "rows="
                             ) from error
    if not found.numel() and found.dtype == torch.get_default_dtype():
        found = found.long()  # an empty list has the dtype of floats
    if found.dtype.is_floating_point or found.dtype.is_complex or found.ndim > 1:
        raise InputTypeError(f"rows of {found.dtype}, shape {list(found.shape)}",
                             "indices, or a bool for each row", "rows=")
    if found.dtype == torch.bool:
        if list(found.shape) != [count]:
            raise InputError(f"{found.numel()} bools for rows", f"{count}, one for each row",
                             "rows=")
        return found.nonzero().view(-1)
    found = found.detach().cpu().long().reshape(-1)
    if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < count:
        raise InputError(f"rows {found.tolist()}", f"0 to {count - 1}", "rows=")
    if len(found.unique()) != len(found):
        raise InputError(f"rows {found.tolist()}", "each row once", "rows=")
    return found
