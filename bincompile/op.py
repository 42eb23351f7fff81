"""One object describes one operator: schema, reference, shapes, samples, limits.

Everything else is derived from it: the registration in `torch.ops.bincompile`, the fake kernel,
autograd, the tests, the kernel registry's calls and the table in the documentation.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from bincompile.errors import InputError

_LIBRARY = torch.library.Library("bincompile", "FRAGMENT")


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How far a kernel may be from the reference; `bits=True` means not at all."""

    bits: bool = False
    rtol: float = 1e-5
    atol: float = 1e-6


@dataclasses.dataclass(frozen=True)
class Sample:
    """Arguments of one call.

    Args:
        args: positional arguments.
        kwargs: named arguments.
        error: for a bad sample, a word of the message that it must raise.
        stored: places in a list of tensors of those that a model would store.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: str = ""
    stored: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Operator:
    """An operator of `torch.ops.bincompile`.

    One that writes to its arguments, as the schema says, has no gradient: to ask for one is an
    error when it is computed.

    Args:
        name: its name.
        schema: arguments and results, as torch.library spells them; `Tensor(a!)` is written to.
        reference: the specification, in plain torch; runs on any device and float dtype.
        shape: the same for shapes and dtypes only (the fake kernel).
        check: raises `InputError` or `InputTypeError` for arguments that are not allowed.
        samples: calls that must work, from a seeded generator.
        bad_samples: calls that must raise.
        tolerance: limit for every kernel against the reference.
        backward: `(setup_context, backward)` where the operator trains.
        signs_of: of its bound arguments, the tensors whose signs it takes: where rounding before
            it may flip a bit.
        doubtful_rows: of its bound arguments, a flag for each row in which a kernel that rounds
            otherwise may take another sign; None where it can't.
        source: the paper or API where the method is from.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    shape: Callable[..., Any]
    check: Callable[..., None]
    samples: Callable[[torch.Generator], Iterable[Sample]]
    bad_samples: Callable[[torch.Generator], Iterable[Sample]]
    tolerance: Tolerance = Tolerance()
    backward: tuple[Callable[..., None], Callable[..., Any]] | None = None
    signs_of: Callable[[Mapping[str, Any]], list[torch.Tensor]] | None = None
    doubtful_rows: Callable[[Mapping[str, Any]], torch.Tensor | None] | None = None
    source: str = ""

    def __post_init__(self) -> None:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.check(*args, **kwargs)
            return self.reference(*args, **kwargs)

        def fake(*args: Any, **kwargs: Any) -> Any:
            self.check(*args, **kwargs)
            return self.shape(*args, **kwargs)

        _LIBRARY.define(f"{self.name}{self.schema}", tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(self.name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"bincompile::{self.name}", fake, lib=_LIBRARY)
        if self.backward is not None:
            setup, backward = self.backward
            torch.library.register_autograd(
                f"bincompile::{self.name}", backward, setup_context=setup, lib=_LIBRARY)
        elif self.mutated:
            _LIBRARY.impl(self.name, functools.partial(_without_gradient, self), "Autograd")

    @property
    def overload(self) -> torch._ops.OpOverload:
        """The torch operator that graphs hold."""
        return getattr(torch.ops.bincompile, self.name).default

    @property
    def arguments(self) -> tuple[str, ...]:
        """The names of its arguments, in order."""
        return tuple(a.name for a in self.overload._schema.arguments)

    @property
    def mutated(self) -> tuple[str, ...]:
        """The names of the arguments that it writes to."""
        return tuple(a.name for a in self.overload._schema.arguments
                     if a.alias_info is not None and a.alias_info.is_write)

    def isolated(self, bound: Mapping[str, Any]) -> dict[str, Any]:
        """The same arguments by name, but copies of those that it writes to, of equal strides."""
        return {**bound, **{name: _copied(bound[name]) for name in self.mutated}}

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Every argument by name, defaults filled in."""
        bound = {a.name: a.default_value for a in self.overload._schema.arguments}
        bound.update(zip(self.arguments, args, strict=False), **kwargs)
        return bound


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    storage = tensor.detach().untyped_storage().clone()
    return tensor.new_empty(0).set_(storage, tensor.storage_offset(), tensor.shape,
                                    tensor.stride())


class _Refused(torch.autograd.Function):
    """The results of an operator that has no gradient, of arguments that ask for one."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: torch.Tensor) -> Any:
        ctx.name = name
        results = tuple(t.view_as(t) for t in tensors[:count])
        return results if count > 1 else results[0]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise InputError(f"a gradient through {ctx.name}, which writes to its state",
                         "steps of a stream that no gradient is asked of",
                         "run the step under torch.no_grad(), or train the whole sequence")


def _without_gradient(operator: Operator, *args: Any, **kwargs: Any) -> Any:
    given = operator.bind(args, kwargs)
    asking = [v for v in given.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    plain = {name: v.detach() if isinstance(v, torch.Tensor) and v.requires_grad else v
             for name, v in given.items()}
    with torch._C._AutoDispatchBelowAutograd():
        results = operator.overload(**plain)
    if not asking or not torch.is_grad_enabled():
        return results
    several = results if isinstance(results, tuple | list) else (results,)
    return _Refused.apply(operator.name, len(several), *several, *asking)
