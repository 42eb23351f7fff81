"""Wrong rules for tests of the proof: a right candidate whose emitted operator is changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bincompile.ops import OPERATORS
from bincompile.passes.capture import capture
from bincompile.passes.matching import anchors, candidate_at
from bincompile.passes.normalise import normalise
from bincompile.passes.patterns import Candidate, Context
from bincompile.passes.validate import validate
from bincompile.record import Evidence

Arguments = dict[str, Any]


class Spelled(nn.Module):
    """A core `(q, k, v) -> out` on inputs of (batch, heads, tokens, features)."""

    def __init__(self, core: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.core = core

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.core(*tensors)


class Twisted:
    """A build that changes the arguments or the results of one operator."""

    def __init__(self, build: Any, operator: str, change: Callable[[Arguments], Any]) -> None:
        self.build, self.operator, self.change = build, OPERATORS[operator], change

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        if target is not self.operator.overload:
            return self.build.call(target, *args, **kwargs)
        changed = self.change(self.operator.bind(args, kwargs))
        return self.operator.reference(**changed) if isinstance(changed, dict) else changed

    def __getattr__(self, name: str) -> Any:
        return getattr(self.build, name)


def candidates(model: nn.Module, args: tuple[Any, ...]) -> tuple[Candidate, Any]:
    """The one candidate of a model, and the graph that it is in."""
    program = normalise(capture(model.eval(), args).program)
    context = Context.of(program)
    found = [candidate_at(pattern, node, context)
             for stage in ("canonical", "packed") for pattern, node in anchors(program, stage)]
    (candidate,) = [c for c in found if isinstance(c, Candidate)]
    return candidate, program.graph_module


def tensors(*more: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values with as many tokens as features, so that any may be swapped."""
    return (*(torch.randn(2, 3, 8, 8) for _ in range(3)), *(make() for make in more))


def put(**changes: Callable[[Arguments], Any]) -> Callable[[Arguments], Arguments]:
    """A change of some arguments, each computed from all of them."""
    return lambda a: {**a, **{name: make(a) for name, make in changes.items()}}


def verdict(candidate: Candidate, graph_module: Any, operator: str,
            change: Callable[[Arguments], Any]) -> Evidence | str:
    """What the proof says of a candidate whose operator is changed on the way."""
    wrong = dataclasses.replace(candidate, emit=lambda build, values: candidate.emit(
        Twisted(build, operator, change), values))
    return validate(wrong, graph_module)
