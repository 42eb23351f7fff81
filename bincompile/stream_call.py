"""What a step is given: its tokens taken from the call, checked, and with an axis of time."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from bincompile.errors import InputError, InputTypeError
from bincompile.steps import TimeInput

Quick = Callable[[tuple[Any, ...], Mapping[str, Any], int], list[torch.Tensor] | None]


@dataclasses.dataclass(frozen=True)
class TokenCall:
    """The calling convention of a step: one tensor for each input that is a stream.

    Args:
        inputs: those inputs, in the order of the model's call.

    Example:
        >>> call = TokenCall((TimeInput("x", 0, 1, True, (3,), torch.float32),))
        >>> [t.shape for t in call.tokens((torch.ones(2, 3),), {}, 2)]
        [torch.Size([2, 1, 3])]
    """

    inputs: tuple[TimeInput, ...]

    @functools.cached_property
    def quick(self) -> Quick:
        """The same as `tokens` for calls as they mostly are; None where it has a doubt."""
        count = len(self.inputs)
        scope: dict[str, Any] = {"Tensor": torch.Tensor, "inf": math.inf}
        lines = [f"if named or len(given) != {count}: return None",
                 f"{''.join(f'v{i}, ' for i in range(count))}= given"]
        for index, known in enumerate(self.inputs):
            lines += _quick_lines(f"v{index}", known)
            scope[f"dtype_v{index}"] = known.dtype
        axes = ", ".join(f"v{i}.unsqueeze({known.time_axis})"
                         for i, known in enumerate(self.inputs))
        text = "\n    ".join(["def quick(given, named, rows):", *lines, f"return [{axes}]"])
        exec(compile(text, "<bincompile tokens>", "exec"), scope)
        return scope["quick"]

    @functools.cached_property
    def plain(self) -> Callable[[tuple[Any, ...]], bool]:
        """Whether these are as many plain tensors on the processor, without a gradient."""
        tests = [f"type(v{i}) is Tensor and v{i}.is_cpu and not v{i}.requires_grad"
                 for i in range(len(self.inputs))]
        text = (f"def plain(given):\n    if len(given) != {len(tests)}: return False\n"
                f"    {''.join(f'v{i}, ' for i in range(len(tests)))}= given\n"
                f"    return {' and '.join(tests)}\n")
        scope: dict[str, Any] = {"Tensor": torch.Tensor}
        exec(compile(text, "<bincompile tokens>", "exec"), scope)
        return scope["plain"]

    @property
    def fallible(self) -> bool:
        """Whether a step may find that a token is not allowed: an index behind a table."""
        return any(not known.dtype.is_floating_point for known in self.inputs)

    def tokens(self, given: Sequence[Any], named: Mapping[str, Any],
               rows: int) -> list[torch.Tensor]:
        """The tokens of one step for so many rows, each with a time axis of 1.

        Raises:
            InputError: another number of inputs, another shape, or a value that is not finite.
            InputTypeError: no tensor, another dtype or device.
        """
        values = self._arranged(given, named)
        for known, value in zip(self.inputs, values, strict=True):
            self._check(known, value, _shape(known, rows), "one token of each row, without time")
        return [value.detach().contiguous().unsqueeze(known.time_axis)
                for known, value in zip(self.inputs, values, strict=True)]

    def sequences(self, given: Sequence[Any], named: Mapping[str, Any],
                  rows: int) -> tuple[list[torch.Tensor], int]:
        """The tokens of several steps, each input with its axis of time, and how many they are."""
        values, steps = self._arranged(given, named), None
        for known, value in zip(self.inputs, values, strict=True):
            if isinstance(value, torch.Tensor) and value.ndim == len(_shape(known, rows)) + 1:
                steps = value.shape[known.time_axis] if steps is None else steps
            shape = list(_shape(known, rows))
            shape.insert(known.time_axis, 0 if steps is None else steps)
            self._check(known, value, tuple(shape),
                        f"the tokens of each row, time in dimension {known.time_axis}")
        assert steps is not None
        return [value.detach() for value in values], steps

    def _arranged(self, given: Sequence[Any], named: Mapping[str, Any]) -> list[Any]:
        """The inputs in order."""
        names = [known.name for known in self.inputs]
        found = dict(zip(names, given, strict=False))
        twice = sorted(found.keys() & named.keys())
        found |= named
        if len(given) > len(names) or twice or found.keys() != set(names):
            missing = [name for name in names if name not in found]
            unknown = sorted(found.keys() - set(names))
            what = (f"a step without {missing[0]}" if missing else
                    f"{unknown[0]!r} of a step" if unknown else
                    f"{twice[0]!r} twice" if twice else f"a step with {len(given)} inputs")
            raise InputTypeError(what, ", ".join(map(_told, self.inputs)),
                                 "the inputs of the step; those that do not change with time are "
                                 "given to stream()")
        return [found[name] for name in names]

    def _check(self, known: TimeInput, value: Any, shape: tuple[int, ...], what: str) -> None:
        if not isinstance(value, torch.Tensor):
            raise InputTypeError(f"{known.name} is a {type(value).__name__}",
                                 f"a tensor of {known.dtype} {list(shape)}",
                                 f"the input {known.name}")
        if value.dtype != known.dtype:
            raise InputTypeError(f"{known.name} of dtype {value.dtype}", f"{known.dtype}",
                                 f"convert it, e.g. {known.name}.to({known.dtype})")
        if value.device.type != "cpu" or value.layout is not torch.strided:
            raise InputTypeError(f"{known.name} on {value.device}, layout {value.layout}",
                                 "a dense tensor on the CPU", f"the input {known.name}")
        if tuple(value.shape) != shape:
            raise InputError(f"{known.name} of shape {list(value.shape)}",
                             f"{list(shape)}: {what}", f"the input {known.name}")
        if not _finite(value):
            raise InputError(f"{known.name} has values that are NaN or infinite",
                             "finite numbers", f"the input {known.name}: a stream would hold "
                             "them for as long as its window is")


def _quick_lines(value: str, known: TimeInput) -> list[str]:
    """The lines that look at one token."""
    sizes = ", ".join([*(["rows"] if known.batched else []), *map(str, known.token)])
    lines = [f"if type({value}) is not Tensor or {value}.dtype is not dtype_{value} "
             f"or not {value}.is_cpu or {value}.shape != ({sizes}{',' if sizes else ''}) "
             f"or not {value}.is_contiguous() or {value}.requires_grad: return None"]
    if known.dtype.is_floating_point or known.dtype.is_complex:  # one reduction: a doubt at most
        lines.append(f"if not abs({value}.sum().item()) < inf: return None")
    return lines


def _finite(value: torch.Tensor) -> bool:
    if not (value.dtype.is_floating_point or value.dtype.is_complex):
        return True
    return bool(torch.isfinite(value.detach()).all())


def _shape(known: TimeInput, rows: int) -> tuple[int, ...]:
    return (rows, *known.token) if known.batched else known.token


def _told(known: TimeInput) -> str:
    sizes = [*(["rows"] if known.batched else []), *map(str, known.token)]
    return f"{known.name}: {known.dtype} [{', '.join(sizes)}]"
