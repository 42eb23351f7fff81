"""How a call becomes flat inputs, what those inputs may be, and how outputs become the result."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bincompile import conditions
from bincompile.errors import InputError, InputTypeError
from bincompile.quick import Quick, quick_check
from bincompile.structure import hold


@dataclasses.dataclass(frozen=True)
class TensorMeta:
    """Dtype and shape of a tensor that is not there yet; a size that is a string is symbolic."""

    dtype: torch.dtype
    shape: tuple[int | str, ...]

    @property
    def ndim(self) -> int:
        """The rank."""
        return len(self.shape)


class Result(dict[str, Any]):
    """Named results of a loaded model, also readable as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


pytree.register_pytree_node(
    Result, lambda r: (list(r.values()), list(r.keys())),
    lambda values, keys: Result(zip(keys, values, strict=True)),
    serialized_type_name="bincompile.signature.Result")


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """One flat input: a tensor of a dtype and shape, or a constant that was captured.

    A size that is a string is a symbol; equal symbols stand for equal sizes.
    """

    name: str
    dtype: torch.dtype | None = None
    shape: tuple[int | str, ...] = ()
    constant: Any = None

    def __str__(self) -> str:
        if self.dtype is None:
            return f"{self.name}={self.constant!r}"
        return f"{self.name}: {self.dtype} [{', '.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Signature:
    """The calling convention of a program.

    Args:
        inputs: the flat inputs, in order.
        in_spec: pytree of `(args, kwargs)` as captured.
        out_spec: pytree of the result.
        names: names of the positional parameters of the model's forward.
        defaults: their default values, where they have one.
        ranges: least and greatest size of each symbol (None: no limit).
        conditions: what else the graph takes for granted of the symbols, e.g. "s0 % 3 == 0".
    """

    inputs: tuple[InputSpec, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    names: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ranges: Mapping[str, tuple[int, int | None]] = dataclasses.field(default_factory=dict)
    conditions: tuple[str, ...] = ()

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The flat inputs of a call, checked; raises `InputError` or `InputTypeError`."""
        quick = self._quick(args, kwargs)
        if quick is not None:
            return quick
        if self._positional and not kwargs and len(args) == len(self.inputs):
            self.check(args)
            return list(args)
        flat, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.in_spec:
            args, kwargs = hold((args, kwargs))
            arranged = _ordered(self._arrange(args, kwargs), self.in_spec)
            flat, spec = pytree.tree_flatten(arranged)
        if spec != self.in_spec:
            raise InputTypeError(
                f"a call with {_structure(args, kwargs)}",
                f"{len(self.inputs)} inputs as captured: {', '.join(map(str, self.inputs))}",
                "the call, or pass these inputs to optimize as args= and kwargs=")
        self.check(flat)
        return flat

    def unflatten(self, outputs: Any) -> Any:
        """The result in the structure that the model returns."""
        if self._single:
            (result,) = outputs
            return result
        return pytree.tree_unflatten(list(outputs), self.out_spec)

    @functools.cached_property
    def _positional(self) -> bool:
        """Whether the captured call is nothing but the flat inputs, in order."""
        return self.in_spec == pytree.tree_structure((tuple(range(len(self.inputs))), {}))

    @functools.cached_property
    def _quick(self) -> Quick:
        """The check of calls as they mostly are."""
        return quick_check(self.inputs, self.in_spec, self.ranges, self.conditions)

    @functools.cached_property
    def _single(self) -> bool:
        """Whether the result is the one flat output."""
        return self.out_spec.is_leaf()

    def check(self, flat: Sequence[Any]) -> None:
        """Raise unless these flat inputs are of the captured dtypes, ranks and sizes."""
        sizes: dict[str, int] = {}
        for spec, value in zip(self.inputs, flat, strict=True):
            if spec.dtype is None:
                if not _same(value, spec.constant):
                    raise InputTypeError(f"{spec.name}={value!r}", f"{spec.constant!r}",
                                         f"{spec.name}, or pass the new value to optimize")
                continue
            if not isinstance(value, torch.Tensor):
                raise InputTypeError(f"{spec.name} is a {type(value).__name__}",
                                     f"a tensor: {spec}", f"the input {spec.name}")
            if value.dtype != spec.dtype:
                raise InputTypeError(f"{spec.name} of dtype {value.dtype}", f"{spec.dtype}",
                                     f"convert the input, e.g. {spec.name}.to({spec.dtype})")
            if value.ndim != len(spec.shape):
                raise InputError(f"{spec.name} of rank {value.ndim}, shape {tuple(value.shape)}",
                                 f"rank {len(spec.shape)}: {spec}", f"the input {spec.name}")
            for axis, (want, size) in enumerate(zip(spec.shape, value.shape, strict=True)):
                self._check_size(spec, axis, want, size, sizes)
        self._check_conditions(sizes)

    def _check_conditions(self, sizes: dict[str, int]) -> None:
        text = conditions.broken(self.conditions, sizes)
        if text is not None:
            given = ", ".join(f"{self.place(name)} = {sizes[name]}"
                              for name in sorted(conditions.names(text)))
            raise InputError(f"a call with {given}", conditions.tidy(text),
                             "these sizes, or pass an example of them to optimize: the model does "
                             "something else at them")

    def place(self, symbol: str) -> str:
        """Where a symbol stands first, e.g. "dimension 1 of input_ids (s0)"."""
        for spec in self.inputs:
            if symbol in spec.shape:
                return f"dimension {spec.shape.index(symbol)} of {spec.name} ({symbol})"
        return symbol

    def _check_size(self, spec: InputSpec, axis: int, want: int | str, size: int,
                    sizes: dict[str, int]) -> None:
        if isinstance(want, int):
            if size != want:
                raise _wrong_size(spec, axis, size, f"{want}: this size was fixed by the capture",
                                  f"{spec.name}, or pass an example of this size to optimize")
            return
        low, high = self.ranges.get(want, (0, None))
        if size < low or (high is not None and size > high):
            raise _wrong_size(spec, axis, size,
                              f"{low} to {'any size' if high is None else high}",
                              f"the input {spec.name}")
        if sizes.setdefault(want, size) != size:
            raise _wrong_size(spec, axis, size,
                              f"{sizes[want]}, as in an earlier input: {self.place(want)}",
                              "the inputs: these two sizes have to be equal")

    def _arrange(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        """The same call with arguments positional and named as they were when captured."""
        args_spec, kwargs_spec = self.in_spec.children()
        captured = list(kwargs_spec.context) if kwargs_spec.type is dict else []
        given = {**self.defaults, **dict(zip(self.names, args, strict=False)), **kwargs}
        positional = self.names[:args_spec.num_children]
        if len(args) > len(self.names) or any(n not in given for n in (*positional, *captured)):
            return args, kwargs
        extra = {k: v for k, v in given.items() if k not in positional and k not in captured
                 and not (k in self.defaults and _same(v, self.defaults[k]))}
        return (tuple(given[n] for n in positional),
                {n: given[n] for n in captured} | extra)


def _same(value: Any, constant: Any) -> bool:
    """Whether a value may stand for a captured one: equal, and of the same type and sign."""
    if value is constant:
        return True
    if type(value) is not type(constant):
        return False
    if isinstance(value, float | complex):
        return repr(value) == repr(constant)
    try:
        return bool(value == constant)
    except (RuntimeError, ValueError):  # arrays of several elements have no truth
        return False


def _wrong_size(spec: InputSpec, axis: int, size: int, allowed: str, change: str) -> InputError:
    return InputError(f"{spec.name} with size {size} in dimension {axis}", allowed, change)


def _ordered(value: Any, spec: pytree.TreeSpec) -> Any:
    """The value with its dicts in the order that the spec has them in."""
    if spec.is_leaf() or type(value) is not spec.type:
        return value
    children = spec.children()
    if spec.type is dict and value.keys() == set(spec.context):
        return {k: _ordered(value[k], c) for k, c in zip(spec.context, children, strict=True)}
    if spec.type in (tuple, list) and len(value) == len(children):
        return spec.type(_ordered(v, c) for v, c in zip(value, children, strict=True))
    return value


def _structure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    def one(value: Any) -> str:
        return f"tensor{list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)

    return f"({', '.join([*map(one, args), *(f'{k}={one(v)}' for k, v in kwargs.items())])})"[:200]
