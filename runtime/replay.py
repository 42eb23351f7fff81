"""A step made again: the calls of a program at fixed sizes and addresses, run by one call of C.

While it is recorded a program runs node by node. Kernels that do nothing but call compiled
functions are kept as those calls; views are what they were then, since all memory stays where it
is; what else torch computes is called again in its place, into the memory that it had.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bincompile.errors import InputError
from bincompile.runtime import c_calls
from bincompile.runtime.bound import Bound
from bincompile.runtime.executor import Executable
from bincompile.runtime.recording import Recorded, recording

_ATEN = torch.ops.aten
DONE = -1  # what the library says when all calls were made
_FRESH = (_ATEN.empty.memory_format, _ATEN.empty_strided.default, _ATEN.new_empty.default,
          _ATEN.new_empty_strided.default)
_SIZES = (torch.Tensor.size, _ATEN.sym_size.int, _ATEN.sym_numel.default)
_TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class Unrepeatable(Exception):
    """Why a program can't be recorded."""


class _Watch(TorchDispatchMode):
    """Notes whether torch computes anything; making memory and views of it is nothing."""

    computes = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        is_view = not schema.is_mutable and bool(schema.returns) and all(
            given.alias_info is not None for given in schema.returns)
        self.computes |= not is_view and func not in _FRESH
        return func(*args, **(kwargs or {}))


@dataclasses.dataclass(frozen=True)
class Done:
    """What one node did.

    Args:
        node: its name.
        again: does it again, into the same memory.
        calls: the calls of compiled functions that do the same; None where there is more to it.
    """

    node: str
    again: Callable[[], Any]
    calls: tuple[Recorded, ...] | None = None


class _Recorder:
    """Runs a program node by node, and keeps what has to be done again."""

    def __init__(self, kernels: Mapping[str, Callable[..., Any]], moving: Iterable[Any]) -> None:
        self.kernels, self.done = kernels, list[Done]()
        self.constant = set[int]()  # the ids of tensors that no input's values are in
        self.kept = list(moving)  # so that no id and no address is given to another tensor

    def each(self, node: str, function: Callable[..., Any], args: tuple[Any, ...],
             kwargs: dict[str, Any]) -> Any:
        """The value of a node."""
        made = self._kernel(node, function, args) if node in self.kernels else \
            self._torch(node, function, args, kwargs)
        self.kept.append(made)
        return made

    def _kernel(self, node: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        results = function.fresh(*args) if isinstance(function, Bound) else ()
        run = functools.partial(function.into, *args, *results) \
            if isinstance(function, Bound) else functools.partial(function, *args)
        with _Watch() as watch, recording() as calls:
            made = run()
        if isinstance(function, Bound):
            made = results if function.several else results[0]
            again: Callable[[], Any] = run
        else:
            again = _into(run, made)
        plain = not watch.computes and all(map(c_calls.is_plain, calls))
        self.done.append(Done(node, again, tuple(calls) if plain else None))
        return made

    def _torch(self, node: str, function: Callable[..., Any], args: tuple[Any, ...],
               kwargs: dict[str, Any]) -> Any:
        if function is operator.getitem:
            return function(*args)
        run = functools.partial(function, *args, **kwargs)
        tags = getattr(function, "tags", ())
        if any(tag in tags for tag in _TAGS):
            raise Unrepeatable(f"{node}: its sizes, or its value, follow from what tensors hold")
        made = run()
        read, given = list(_tensors((args, kwargs))), list(_tensors(made))
        if not given:
            if read and function not in _SIZES:
                raise Unrepeatable(f"{node}: a number that follows from what tensors hold")
            return made
        schema = getattr(function, "_schema", None)
        writes = schema is not None and schema.is_mutable
        if torch.Tag.nondeterministic_seeded not in tags and not writes and all(
                id(tensor) in self.constant for tensor in read):
            self.constant.update(map(id, given))
            return made
        memory = {tensor.untyped_storage().data_ptr() for tensor in read}
        if writes or any(tensor.untyped_storage().data_ptr() not in memory for tensor in given):
            self.done.append(Done(node, _written(function, args, kwargs, made)
                                  or _into(run, made)))
        return made


def _into(run: Callable[[], Any], made: Any) -> Callable[[], None]:
    """`run`, whose results are copied to where those of the recording are."""
    places = list(_tensors(made))

    def again() -> None:
        for place, value in zip(places, _tensors(run()), strict=True):
            if value is not place:
                if value.shape != place.shape:
                    raise InputError(f"a result of shape {tuple(value.shape)}",
                                     f"{tuple(place.shape)}, as when the step was recorded",
                                     "a model whose sizes don't follow from values")
                place.copy_(value)

    return again


def _written(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any],
             made: Any) -> Callable[[], Any] | None:
    """The operator in its form that writes into given memory, if it has one that does the same."""
    variant = getattr(getattr(function, "overloadpacket", None), "out", None)
    if variant is None or not isinstance(made, torch.Tensor) or function._schema.is_mutable:
        return None
    run = functools.partial(variant, *args, **kwargs, out=made)
    before = made.clone()
    try:
        run()
    except (RuntimeError, TypeError):  # the form takes other arguments
        made.copy_(before)
        return None
    if not torch.equal(made.isnan(), before.isnan()) or not torch.equal(
            made.nan_to_num(), before.nan_to_num()):
        made.copy_(before)
        return None
    return run


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in arguments or results."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


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

    def __init__(self, executable: Executable, inputs: Sequence[Any], tokens: int) -> None:
        self._executable, self._fixed = executable, list(inputs[tokens:])
        self._staged = [_copied(token) for token in inputs[:tokens]]
        self._record()

    @classmethod
    def of(cls, executable: Executable, inputs: Sequence[Any], tokens: int) -> Replay:
        """Record a program, which runs once.

        Args:
            executable: the program.
            inputs: its flat inputs.
            tokens: how many of the first are given with each call; the others are read, and
                written where the program does, in the memory that they have now.
        """
        return cls(executable, inputs, tokens)

    @property
    def outside(self) -> tuple[str, ...] | None:
        """The nodes that C does not run; None where all of them are left to the executable."""
        return self._outside

    def __call__(self, *tokens: Any) -> tuple[Any, ...]:
        """The flat results, in memory of their own.

        Args:
            tokens: tensors of the sizes and dtypes of those that were recorded.

        Raises:
            InputError: other sizes or dtypes.
        """
        if torch.get_num_threads() != self._threads:
            self._record()
        run = self._run
        if run is None:
            return self._executable(*tokens, *self._fixed)
        results = [torch.empty_strided(size, strides, dtype=dtype)
                   for size, strides, dtype in self._sizes]
        said = run(self._first, 0, *tokens, *(results if self._alone else ()))
        if said != DONE:
            self._go_on(self._parts[0], said, tokens, results if self._alone else [])
        if not self._alone:
            self._rest(results)
        made = iter(results)
        return tuple(next(made) if is_made else value for is_made, value in self._template)

    def _record(self) -> None:
        self._threads, self._run, self._outside = torch.get_num_threads(), None, None
        library = c_calls.library()
        if library is None:
            return
        recorder = _Recorder(self._executable.bound, (*self._staged, *self._fixed))
        with torch.inference_mode(False), torch.no_grad():
            try:
                given = self._executable.observed()(recorder.each, *self._staged, *self._fixed)
            except Unrepeatable:
                return
            results = self._results(recorder, given)
        self._outside = tuple(done.node for done in recorder.done if done.calls is None)
        self._kept = recorder.kept
        self._parts = [_Part(list(entries) if in_c else [], [] if in_c else list(entries))
                       for in_c, entries in itertools.groupby(
                           recorder.done, key=lambda done: done.calls is not None)]
        self._close(results)
        self._run, self._first = library[0], self._parts[0].calls.address

    def _results(self, recorder: _Recorder, given: tuple[Any, ...]) -> list[torch.Tensor]:
        """The tensors that results are copied from, each in one piece of memory."""
        found: list[torch.Tensor] = []
        self._template = [(isinstance(value, torch.Tensor), value) for value in given]
        for value in (v for v in given if isinstance(v, torch.Tensor)):
            if not _is_dense(value):
                whole = value.contiguous()
                recorder.done.append(Done("output", functools.partial(whole.copy_, value)))
                recorder.kept.append(whole)
                value = whole
            found.append(value)
        self._sizes = [(tuple(v.shape), v.stride(), v.dtype) for v in found]
        return found

    def _close(self, results: Sequence[torch.Tensor]) -> None:
        """Give the first part the tokens and the last one the results."""
        if not self._parts or self._parts[0].outside:
            self._parts.insert(0, _Part([], []))
        if self._parts[-1].outside:
            self._parts.append(_Part([], []))
        for part in self._parts:
            part.close(self._staged if part is self._parts[0] else (),
                       results if part is self._parts[-1] else ())
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
                        self._go_on(part, said, (), last)

    def _go_on(self, part: _Part, said: int, tokens: Sequence[Any],
               results: list[torch.Tensor]) -> None:
        """Do what one call of C left: a token that lies otherwise, or a call that gave no 0."""
        run = self._run
        assert run is not None
        if said < DONE:
            staged = self._staged[:len(tokens)]
            laid = [_laid(token, like) for token, like in zip(tokens, staged, strict=True)]
            said = run(part.calls.address, 0, *laid, *results)
            tokens = laid
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

    def close(self, staged: Sequence[torch.Tensor], made: Sequence[torch.Tensor]) -> None:
        """Lay out the calls."""
        calls = [call for done in self.inside for call in done.calls or ()]
        self.calls = c_calls.Calls(calls, staged, made)

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
    if not isinstance(token, torch.Tensor) or token.shape != like.shape \
            or token.dtype != like.dtype or token.device != like.device:
        found = f"{token.dtype} {tuple(token.shape)} on {token.device}" \
            if isinstance(token, torch.Tensor) else type(token).__name__
        raise InputError(f"a token of {found}",
                         f"{like.dtype} {tuple(like.shape)} on {like.device}",
                         "the token, or record another replay")
    return token.detach().contiguous()


def _is_dense(value: torch.Tensor) -> bool:
    """Whether a tensor's elements fill one piece of memory."""
    size = 1
    for step, count in sorted((s, c) for s, c in zip(value.stride(), value.shape, strict=True)
                              if c != 1):
        if step != size:
            return False
        size *= count
    return True
