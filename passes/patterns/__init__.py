"""Patterns: how operators are spelled. A pattern is a value; a new spelling is a file here."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from bincompile.passes.graph import activations
from bincompile.program import Program, module_paths
from bincompile.record import Refusal


@dataclasses.dataclass(frozen=True)
class Context:
    """What patterns may ask about the graph that they look at."""

    graph_module: fx.GraphModule
    activations: frozenset[fx.Node]

    @classmethod
    def of(cls, program: Program) -> Context:
        """The context of a program's graph."""
        return cls(program.graph_module, frozenset(activations(program.graph)))


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A subgraph that looks like an operator, and what would stand in its place.

    Args:
        operator: "attention", "embedding", "embedding_bag" or "linear".
        anchor: the node that the pattern started from.
        inputs: the nodes that feed the subgraph, by role; a role ends in a number if it repeats.
        outputs: the nodes that are replaced.
        emit: `emit(build, values) -> results`: writes the operator through a `Build`, or runs it
            through an `Evaluate`; `values` maps roles to nodes or tensors.
        attrs: what is known of the operator.
        path: module path of the owner.
        fixed: roles whose stored value matters, so that a proof may not draw another.
    """

    operator: str
    anchor: fx.Node
    inputs: Mapping[str, fx.Node]
    outputs: tuple[fx.Node, ...]
    emit: Callable[[Any, Mapping[str, Any]], tuple[Any, ...]]
    attrs: Mapping[str, Any]
    path: str
    fixed: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Example:
    """A model and a call of it, for the tests of a pattern."""

    model: Callable[[], torch.nn.Module]
    args: Callable[[], tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class Pattern:
    """How one operator is recognised.

    Args:
        name: its name.
        operator: the operator that it finds.
        anchors: the node targets that it starts from.
        match: the candidate at a node, a refusal with a reason, or None where there is nothing.
        examples: models in which it must match exactly once.
        near_misses: models in which it must not.
        stage: "canonical", or "packed" for what is binary already.
    """

    name: str
    operator: str
    anchors: tuple[Any, ...]
    match: Callable[[fx.Node, Context], Candidate | Refusal | None]
    examples: tuple[Example, ...]
    near_misses: tuple[Example, ...]
    stage: str = "canonical"


def owner_of(nodes: Iterable[fx.Node]) -> str:
    """The longest module path that all these nodes were traced in."""
    stacks = [module_paths(n) for n in nodes if n.op == "call_function"]
    shared = ""
    for level in zip(*stacks, strict=False):
        if len(set(level)) != 1:
            break
        shared = level[0]
    return shared


@functools.cache
def patterns(stage: str | None = None) -> dict[str, Pattern]:
    """The patterns of a stage, or all, by name.

    Every file here that holds a `Pattern` is found by itself.
    """
    found: dict[str, Pattern] = {}
    for module in pkgutil.iter_modules(__path__):
        for value in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(value, Pattern) and stage in (None, value.stage):
                found[value.name] = value
    return dict(sorted(found.items()))
