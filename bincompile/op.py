"""One object describes one operator: schema, reference, shapes, samples, limits.

Everything else is derived from it: the registration in `torch.ops.bincompile`, the fake kernel,
autograd, the tests, the kernel registry's calls and the table in the documentation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

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

    Args:
        name: its name.
        schema: arguments and results, as torch.library spells them.
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

    @property
    def overload(self) -> torch._ops.OpOverload:
        """The torch operator that graphs hold."""
        return getattr(torch.ops.bincompile, self.name).default

    @property
    def arguments(self) -> tuple[str, ...]:
        """The names of its arguments, in order."""
        return tuple(a.name for a in self.overload._schema.arguments)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Every argument by name, defaults filled in."""
        bound = {a.name: a.default_value for a in self.overload._schema.arguments}
        bound.update(zip(self.arguments, args, strict=False), **kwargs)
        return bound
