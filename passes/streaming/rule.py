"""Rules: how an operator treats time, as values."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import fx

from bincompile.passes.streaming import rules
from bincompile.passes.streaming.kinds import Kinds

if TYPE_CHECKING:
    from bincompile.passes.streaming.builder import StepBuilder
    from bincompile.passes.streaming.facts import Facts

LAST, ALL = "last", "all"  # which positions of a value are asked for


def passed_on(node: fx.Node, arg: fx.Node, asked: str, facts: Facts) -> str:
    """The demand of operators that keep positions apart: of an argument what is asked of them."""
    return asked


def everything(node: fx.Node, arg: fx.Node, asked: str, facts: Facts) -> str:
    """The demand of operators that read all positions of every argument."""
    return ALL


@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
    """How some operators treat time.

    Args:
        targets: what the nodes call.
        kind: the kind of the node's value (a tuple of kinds where it has several), from those of
            what it reads; None where this rule does not take the node. Raises `Refused`. It is
            asked only for nodes that depend on the values of inputs.
        emit: the node of the step program; a node that holds a tuple where the kind is one. It is
            called for `Stepped` and `Windowed` values only.
        demand: which positions of one argument are read, "last" or "all", from which are asked of
            the node. Matters for `Windowed` values, and forbids "all" of values that are `final`.
        reference: the node's value in the named reference, over a whole sequence, from its
            arguments there; None: what the node calls. Shapes are those of the node's own value.
        general: tried after the rules that are not.
    """

    targets: tuple[Any, ...]
    kind: Callable[[fx.Node, Facts], Kinds | None]
    emit: Callable[[fx.Node, StepBuilder], fx.Node]
    demand: Callable[[fx.Node, fx.Node, str, Facts], str] = passed_on
    reference: Callable[[fx.Node, Facts, tuple[Any, ...], Mapping[str, Any]], Any] | None = None
    general: bool = False


@functools.cache
def rules_of() -> Mapping[Any, tuple[Rule, ...]]:
    """The rules of every file in `rules`, by what they are for; general ones come last."""
    found: dict[Any, list[Rule]] = {}
    for entry in sorted(pkgutil.iter_modules(rules.__path__), key=lambda e: e.name):
        module = importlib.import_module(f"{rules.__name__}.{entry.name}")
        for rule in dict.fromkeys(v for v in vars(module).values() if isinstance(v, Rule)):
            for target in rule.targets:
                known = found.setdefault(target, [])
                if rule not in known:
                    known.append(rule)
    return {target: tuple(sorted(known, key=lambda r: r.general))
            for target, known in found.items()}
