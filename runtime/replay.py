"""A step made again: the calls of a program at fixed sizes and addresses, run by one call of C.

While it is recorded a program runs node by node. Kernels that do nothing but call compiled
functions are kept as those calls; views are what they were then, since all memory stays where it
is; what else torch computes is called again in its place, into the memory that it had.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bincompile.errors import InputError
from bincompile.runtime import c_calls
from bincompile.runtime.executor import Executable
from bincompile.runtime.recorder import Done, Recorder, Unrepeatable

DONE, STRICT = -1, -1  # what the library says when all calls were made, and is told
_empty_like = torch.empty_like  # of the ways to memory the one that takes least time


class Replay:
    """A program at fixed sizes, whose inputs but the first stay where they are in memory.

    What it gives is what the executable gives, bit for bit. It keeps memory of its own for all
    results inside, so that one thread at a time may call it. It holds where inputs lie: where one
    of them is replaced, or has another size, a new one has to be made.

    Example:
        >>> import torch, bincompile as bc
        >>> compiled = bc.optimize(torch.nn.Embedding(7, 4).eval(), (torch.tensor([[1, 2]]),))
        >>> replay = Replay.of(compiled.executable, [torch.tensor([[1, 2]])], 1)
        >>> given, = replay(torch.tensor([[3, 4]]))
        >>> torch.equal(given, compiled(torch.tensor([[3, 4]])))
        True
    """

    def __init__(self, executable: Executable, inputs: Sequence[Any], tokens: int,
                 drop: Sequence[int | None] = (), clock: torch.Tensor | None = None) -> None:
        self._executable, self._fixed = executable, list(inputs[tokens:])
        self._staged = [_copied(token) for token in inputs[:tokens]]
        self._drop, self._clock = drop, clock
        self._record()

    @classmethod
    def of(cls, executable: Executable, inputs: Sequence[Any], tokens: int,
           drop: Sequence[int | None] = (), clock: torch.Tensor | None = None) -> Replay:
        """Record a program, which runs once.

        Args:
            executable: the program.
            inputs: its flat inputs.
            tokens: how many of the first are given with each call; the others are read, and
                written where the program does, in the memory that they have now.
            drop: for each result an axis of size 1 that it is to lack, or None.
            clock: int64, contiguous, whose numbers are one more after each call that succeeds;
                the call that records does not count.
        """
        return cls(executable, inputs, tokens, drop, clock)

    @property
    def outside(self) -> tuple[str, ...] | None:
        """The nodes that C does not run; None where all of them are left to the executable."""
        return self._outside

    def __call__(self, *tokens: Any) -> tuple[Any, ...]:
        """The flat results, in memory of their own.

        Args:
            tokens: tensors of the sizes and dtypes of those that were recorded; axes of size 1
                may be missing.

        Raises:
            InputError: other sizes or dtypes.
        """
        run = self._ready()
        if run is None:
            return self._by_executable(tokens)
        results = [_empty_like(like) for like in self._likes]
        given = results if self._alone else ()
        said = run(self._first, 0, *tokens, *given)
        if said < DONE:
            said = run(self._first, 0, *map(_laid, tokens, self._staged), *given)
        return self._finished(said, results)

    def quick(self, *tokens: torch.Tensor) -> tuple[Any, ...] | None:
        """The same for tokens that lie as those that were recorded, and are finite; else None.

        Nothing was done then. Tokens have to be tensors on the processor without a gradient.
        """
        run = self._ready()
        if run is None:
            return None
        results = [_empty_like(like) for like in self._likes]
        said = run(self._first, STRICT, *tokens, *(results if self._alone else ()))
        if said == DONE and self._alone and self._template is None:
            return tuple(results)
        return None if said < DONE else self._finished(said, results)

    def _ready(self) -> Callable[..., int] | None:
        """What runs a part; recorded anew if the number of threads is another."""
        if torch.get_num_threads() != self._threads:
            self._record()
        return self._run

    def _by_executable(self, tokens: Sequence[Any]) -> tuple[Any, ...]:
        laid = [_laid(*pair) for pair in zip(tokens, self._staged, strict=True)]
        made = self._executable(*laid, *self._fixed)
        if self._clock is not None:
            self._clock += 1
        axes = itertools.chain(self._drop, itertools.repeat(None))
        return tuple(value if axis is None else value.squeeze(axis)
                     for value, axis in zip(made, axes, strict=False))

    def _finished(self, said: int, results: list[torch.Tensor]) -> tuple[Any, ...]:
        """The results, after what the first call of C left to do."""
        if said != DONE:
            self._go_on(self._parts[0], said, results if self._alone else [])
        if self._alone and self._template is None:
            return tuple(results)
        self._rest(results)
        made = iter(results)
        return tuple(results) if self._template is None else tuple(
            next(made) if is_made else value for is_made, value in self._template)

    def _record(self) -> None:
        self._threads, self._run, self._outside = torch.get_num_threads(), None, None
        library = c_calls.library()
        if library is None:
            return
        recorder = Recorder(self._executable.bound, (*self._staged, *self._fixed))
        with torch.inference_mode(False), torch.no_grad():
            try:
                given = self._executable.observed()(recorder.each, *self._staged, *self._fixed)
            except Unrepeatable:
                return
            results = self._results(recorder, given)
        if not all(map(c_calls.is_known, (*self._staged, *results))):
            return
        self._outside = tuple(done.node for done in recorder.done if done.calls is None)
        self._kept = recorder.kept
        self._parts = [_Part(list(entries) if in_c else [], [] if in_c else list(entries))
                       for in_c, entries in itertools.groupby(
                           recorder.done, key=lambda done: done.calls is not None)]
        self._close(results)
        self._run, self._first = library[0], self._parts[0].calls.address

    def _results(self, recorder: Recorder, given: tuple[Any, ...]) -> list[torch.Tensor]:
        """The tensors that results are copied from, each in one piece of memory."""
        found: list[torch.Tensor] = []
        self._template: list[tuple[bool, Any]] | None = None
        if not all(isinstance(value, torch.Tensor) for value in given):
            self._template = [(isinstance(value, torch.Tensor), value) for value in given]
        for value in (v for v in given if isinstance(v, torch.Tensor)):
            if not _is_dense(value) or not c_calls.is_known(value):
                whole = torch.empty_like(value, memory_format=torch.contiguous_format)
                whole.copy_(value)
                recorder.done.append(Done("output", functools.partial(whole.copy_, value)))
                recorder.kept.append(whole)
                value = whole
            found.append(value)
        axes = itertools.chain(self._drop, itertools.repeat(None))
        self._likes = [like if axis is None else like.squeeze(axis)
                       for like, axis in zip(found, axes, strict=False)]
        return found

    def _close(self, results: Sequence[torch.Tensor]) -> None:
        """Give the first part the tokens and the last one the results."""
        if not self._parts or self._parts[0].outside:
            self._parts.insert(0, _Part([], []))
        if self._parts[-1].outside:
            self._parts.append(_Part([], []))
        for part in self._parts:
            last = part is self._parts[-1]
            part.close(self._staged if part is self._parts[0] else (),
                       results if last else (), self._clock if last else None)
        self._alone = len(self._parts) == 1

    def _rest(self, results: list[torch.Tensor]) -> None:
        """The parts behind the first."""
        run = self._run
        assert run is not None
        with torch.no_grad():
            for part in self._parts[1:]:
                for done in part.outside:
                    done.again()
                if not part.outside:
                    last = results if part is self._parts[-1] else []
                    if (said := run(part.calls.address, 0, *last)) != DONE:
                        self._go_on(part, said, last)

    def _go_on(self, part: _Part, said: int, results: list[torch.Tensor]) -> None:
        """Do what one call of C left, from a call on that failed or gave no 0."""
        run = self._run
        assert run is not None
        while said != DONE:
            done, end = part.at(said)
            with torch.no_grad():
                done.again()  # raises what the kernel has to say
            said = run(part.calls.address, end, *results)


class _Part:
    """Nodes that C runs, or such that it does not."""

    def __init__(self, inside: list[Done], outside: list[Done]) -> None:
        self.inside, self.outside = inside, outside
        self.calls: c_calls.Calls

    def close(self, staged: Sequence[torch.Tensor], made: Sequence[torch.Tensor],
              clock: torch.Tensor | None) -> None:
        """Lay out the calls."""
        calls = [call for done in self.inside for call in done.calls or ()]
        self.calls = c_calls.Calls(calls, staged, made, clock)

    def at(self, place: int) -> tuple[Done, int]:
        """The node that the call at this place is of, and the first call behind it."""
        end = 0
        for done in self.inside:
            end += len(done.calls or ())
            if place < end:
                return done, end
        raise IndexError(place)


def _copied(token: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return token.detach().clone(memory_format=torch.contiguous_format)


def _laid(token: Any, like: torch.Tensor) -> torch.Tensor:
    """A token as the recording had it."""
    if not isinstance(token, torch.Tensor) or _wide(token) != _wide(like) \
            or token.dtype != like.dtype or token.device != like.device:
        found = f"{token.dtype} {tuple(token.shape)} on {token.device}" \
            if isinstance(token, torch.Tensor) else type(token).__name__
        raise InputError(f"a token of {found}",
                         f"{like.dtype} {tuple(like.shape)} on {like.device}",
                         "the token, or record another replay")
    return token.detach().contiguous().view(like.shape)


def _wide(value: torch.Tensor) -> list[int]:
    return [size for size in value.shape if size != 1]


def _is_dense(value: torch.Tensor) -> bool:
    """Whether a tensor's elements fill one piece of memory."""
    size = 1
    for step, count in sorted((s, c) for s, c in zip(value.stride(), value.shape, strict=True)
                              if c != 1):
        if step != size:
            return False
        size *= count
    return True
