"""The corpus: models as people write them, each with what it holds, declared by hand.

A file here holds `CASES`, a tuple of `Case`; tests and `bincompile bench match` loop over them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

Call = tuple[tuple[Any, ...], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A tiny model, calls of it, and the truth about it.

    Args:
        name: unique, "group/family/variant", e.g. "transformers/bert/eager".
        build: makes the model, in eval mode, with random weights.
        inputs: `inputs(batch, length)`: the arguments of a call. What has no length ignores it.
        attention: attention instances that one call runs.
        look_ups: table look-ups that one call runs, bags among them.
        sizes: (batch, length) of the example, then of the calls that the result is checked at.
        needs: modules that must be importable, e.g. "timm".
        uncapturable: why torch can't export this model; empty where it can.
        unusual: facets that make the case worth having, in words.
        unseen: "attention" or "look_ups" -> why counting calls at run time can't tell their number;
            the number declared here stands.
        declined: for each attention instance that is refused on purpose, why.

    Example:
        >>> from bincompile.models.corpus import cases
        >>> case = cases("torch")[0]
        >>> args, kwargs = case.inputs(*case.sizes[0])
        >>> result = case.build()(*args, **kwargs)
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], Call]
    attention: int
    look_ups: int = 0
    sizes: tuple[tuple[int, int], ...] = ((2, 7), (3, 11), (1, 4))
    needs: tuple[str, ...] = ()
    uncapturable: str = ""
    unusual: tuple[str, ...] = ()
    unseen: Mapping[str, str] = dataclasses.field(default_factory=dict)
    declined: tuple[str, ...] = ()

    @property
    def group(self) -> str:
        """The first part of the name: transformers, timm, torch, written, negative, tables."""
        return self.name.split("/")[0]

    @property
    def family(self) -> str:
        """The second part of the name; the default test run takes one variant of each."""
        return self.name.split("/")[1]


@functools.cache
def cases(group: str | None = None) -> tuple[Case, ...]:
    """Every case, or those of one group, in the order of the files.

    Example:
        >>> from bincompile.models.corpus import cases
        >>> len({case.name for case in cases()}) == len(cases())
        True
    """
    found: list[Case] = []
    for module in pkgutil.iter_modules(__path__):
        held = vars(importlib.import_module(f"{__name__}.{module.name}"))
        found += held.get("CASES", ())
    return tuple(c for c in found if group in (None, c.group))
