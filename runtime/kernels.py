"""Which kernel runs an operator: kernels are values, and the first that accepts a call is taken.

A new kernel is one file in `runtime/library/` that holds a `Kernel`, or a tuple of them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch

from bincompile.config import Target
from bincompile.errors import KernelError
from bincompile.op import Operator, Sample
from bincompile.runtime.bound import Bound as Bound
from bincompile.runtime.tvm import Recipe

REFERENCE = "reference"


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """An argument that is known only at run time; `value` has its dtype and shape."""

    value: Any


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of an operator, as known before it runs.

    Args:
        operator: what is called.
        arguments: every argument by name: a stored tensor as itself, a run-time value as a
            `Dynamic`, a list of tensors as a list of both, anything else as a plain value.
        target: the machine that it is to run on.

    Example:
        >>> import torch
        >>> from bincompile.ops import OPERATORS
        >>> embedding = OPERATORS["embedding"]
        >>> arguments = embedding.bind((torch.ones(4, 2), Dynamic(torch.tensor([1]))), {})
        >>> call = Call(embedding, arguments, Target.host())
        >>> choose(call).bind(call)(torch.tensor([3]))
        tensor([[1., 1.]])
    """

    operator: Operator
    arguments: Mapping[str, Any]
    target: Target

    @property
    def dynamic(self) -> tuple[str, ...]:
        """Names of the arguments that are known, or of which a part is known, only at run time."""
        return tuple(name for name in self.operator.arguments if not self.is_stored(name))

    def value(self, name: str) -> Any:
        """The argument, or for a run-time one the value that has its dtype and shape."""
        return _each(lambda part: part.value if isinstance(part, Dynamic) else part,
                     self.arguments[name])

    def is_stored(self, name: str) -> bool:
        """Whether the argument is known now (stored tensors, a plain value, or None)."""
        return not any(isinstance(part, Dynamic) for part in parts_of(self.arguments[name]))

    def run_time(self, given: Mapping[str, Any]) -> tuple[Any, ...]:
        """Of all arguments of a call those of run time, lists taken apart, as a kernel takes them.

        Args:
            given: every argument by name.
        """
        return tuple(
            value for name in self.dynamic
            for known, value in zip(parts_of(self.arguments[name]), parts_of(given[name]),
                                    strict=True) if isinstance(known, Dynamic))

    def partial(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` of all arguments in order, as a function of the run-time values only."""
        template = [self.arguments[name] for name in self.operator.arguments]
        if any(isinstance(argument, list | tuple) and not self.is_stored(name)
               for name, argument in self.arguments.items()):
            return _with_lists(template, function)
        places = [self.operator.arguments.index(name) for name in self.dynamic]

        def run(*values: Any) -> Any:
            arguments = template.copy()
            for place, value in zip(places, values, strict=True):
                arguments[place] = value
            return function(*arguments)

        return run


def parts_of(argument: Any) -> tuple[Any, ...]:
    """The elements of an argument that is a list, else the argument itself, alone."""
    return tuple(argument) if isinstance(argument, list | tuple) else (argument,)


def sample_call(operator: Operator, sample: Sample, target: Target,
                stored: Collection[str]) -> Call:
    """The call of a sample; `stored` names the tensors that a model would store.

    Of a list of tensors those at the places `sample.stored` are stored.
    """
    def known(name: str, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [v if place in sample.stored or not isinstance(v, torch.Tensor) else Dynamic(v)
                    for place, v in enumerate(value)]
        return Dynamic(value) if isinstance(value, torch.Tensor) and name not in stored else value

    given = operator.bind(sample.args, sample.kwargs)
    return Call(operator, {name: known(name, value) for name, value in given.items()}, target)


def _each(change: Callable[[Any], Any], argument: Any) -> Any:
    if isinstance(argument, list | tuple):
        return type(argument)(map(change, argument))
    return change(argument)


def _with_lists(template: list[Any], function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*values: Any) -> Any:
        rest = iter(values)
        return function(*(_each(lambda part: next(rest) if isinstance(part, Dynamic) else part,
                                argument) for argument in template))

    return run


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One way to run an operator.

    Args:
        name: its name, unique for the operator.
        operator: name of the operator.
        supports: None if it can run the call, else the reason why not.
        bind: does all work that is needed once, and returns a function of the call's run-time
            values, in order and with lists taken apart, that returns the operator's result:
            a plain function, or a `Bound` whose results may be put into planned memory.
        priority: kernels are tried from the highest to the lowest.
        recipe: what `bind` compiles for a call; the kernels of a program are compiled together.
    """

    name: str
    operator: str
    supports: Callable[[Call], str | None]
    bind: Callable[[Call], Callable[..., Any]]
    priority: int = 0
    recipe: Callable[[Call], Recipe] | None = None


@functools.cache
def _registry() -> dict[str, tuple[Kernel, ...]]:
    found = sorted(_discover(), key=lambda kernel: -kernel.priority)
    operators = sorted({kernel.operator for kernel in found})
    return {name: tuple(k for k in found if k.operator == name) for name in operators}


def _discover() -> Iterator[Kernel]:
    package = importlib.import_module("bincompile.runtime.library")
    for entry in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{entry.name}")
        for value in vars(module).values():
            yield from (k for k in (value if isinstance(value, tuple) else (value,))
                        if isinstance(k, Kernel))


def kernels_of(operator: str) -> tuple[Kernel, ...]:
    """The kernels of an operator, in the order in which they are tried."""
    return _registry()[operator]


def choose(call: Call, prefer: str | None = None) -> Kernel:
    """The kernel that `prefer` names if it accepts the call, else the first that accepts."""
    kernels = kernels_of(call.operator.name)
    if prefer is not None and prefer not in {k.name for k in kernels}:
        raise KernelError(f"kernel {prefer!r} for {call.operator.name}",
                          ", ".join(k.name for k in kernels), "the chosen kernel's name")
    ordered = sorted(kernels, key=lambda kernel: kernel.name != prefer)
    return next(k for k in ordered if k.supports(call) is None)


def explain(call: Call) -> list[tuple[str, str]]:
    """Every kernel of the operator with "chosen", "accepts", or its reason against the call."""
    chosen = choose(call)
    return [(kernel.name, "chosen" if kernel is chosen else kernel.supports(call) or "accepts")
            for kernel in kernels_of(call.operator.name)]


def host_reason(call: Call) -> str | None:
    """Why a kernel for the processor can't run this call, if it can't."""
    if call.target.kind != "cpu":
        return f"the target is {call.target}"
    for name in call.operator.arguments:
        for value in parts_of(call.value(name)):
            if isinstance(value, torch.Tensor) and value.device.type not in ("cpu", "meta"):
                return f"{name} is on {value.device}"
    return None
