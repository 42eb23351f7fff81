"""What a program does at fixed sizes and addresses: run node by node, and kept to be done again."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bincompile.errors import InputError
from bincompile.runtime import c_calls
from bincompile.runtime.bound import Bound
from bincompile.runtime.recording import Recorded, recording

_ATEN = torch.ops.aten
_FRESH = (_ATEN.empty.memory_format, _ATEN.empty_strided.default, _ATEN.new_empty.default,
          _ATEN.new_empty_strided.default)
_MOVES = (_ATEN.clone.default, _ATEN.reshape.default, _ATEN.contiguous.default,
          _ATEN._reshape_copy.default, _ATEN.view_copy.default)
_SIZES = (torch.Tensor.size, _ATEN.sym_size.int, _ATEN.sym_numel.default)
_TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class Unrepeatable(Exception):
    """Why a program can't be recorded."""


class _Watch(TorchDispatchMode):
    """Notes whether torch computes anything; making memory and views of it is nothing.

    Args:
        calls: where copies are added that C makes as well.
    """

    def __init__(self, calls: list[Recorded]) -> None:
        super().__init__()
        self.calls, self.computes = calls, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        is_view = not schema.is_mutable and bool(schema.returns) and all(
            given.alias_info is not None for given in schema.returns)
        made = func(*args, **(kwargs or {}))
        copies = _copies(func, args, made)
        if copies is not None:
            self.calls.extend(copies)
        else:
            self.computes |= not is_view and func not in _FRESH
        return made


def _copies(function: Any, args: tuple[Any, ...], made: Any) -> list[Recorded] | None:
    """What an operator that only moves elements copies; None for any other."""
    if function is _ATEN.copy_.default:
        pairs = [(args[1].expand_as(args[0]), args[0])]
    elif function in _MOVES and made.is_contiguous():
        pairs = [(args[0], made.view(args[0].shape))]
    elif function is _ATEN.clone.default:
        pairs = [(args[0], made)]
    elif function is _ATEN.cat.default:
        sources = [source for source in args[0] if source.shape != (0,)]
        sizes = [source.shape[args[1] if len(args) > 1 else 0] for source in sources]
        pairs = list(zip(sources, made.split(sizes, *args[1:]), strict=True))
    else:
        return None
    found = [c_calls.copied(*pair) for pair in pairs]
    return None if None in found else [one for one in found if one is not None]


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


class Recorder:
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
        with recording() as calls, _Watch(calls) as watch:
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
            copies = None if kwargs else _copies(function, args, made)
            again = _into(run, made) if copies is not None else (
                _written(function, args, kwargs, made) or _into(run, made))
            self.done.append(Done(node, again, None if copies is None else tuple(copies)))
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
