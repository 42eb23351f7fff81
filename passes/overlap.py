"""Overlap: of proven candidates that share nodes, which one is rewritten; and what none may do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from bincompile.passes.graph import depends, value_of
from bincompile.passes.patterns import Candidate, patterns
from bincompile.program import describe, source_line
from bincompile.record import Match, Refusal

Proven = tuple[Match, Candidate]


def without_overlaps(proven: Sequence[Proven]) -> tuple[list[Proven], list[Refusal]]:
    """Those that can be rewritten together, in their order, and a refusal for each that can't.

    Two overlap if one replaces a node that the other one is made of. The higher priority of its
    pattern wins, then the larger number of nodes, then the first name. What lies within the winner
    needs no refusal: it is part of it.
    """
    inside = [frozenset(match.nodes) for match, _ in proven]
    makers: dict[str, list[int]] = {}
    for index, nodes in enumerate(inside):
        for name in nodes:
            makers.setdefault(name, []).append(index)
    rivals: dict[int, set[int]] = {index: set() for index in range(len(proven))}
    for index, (_, candidate) in enumerate(proven):
        for output in candidate.outputs:
            for other in makers.get(output.name, ()):
                if other != index:
                    rivals[index].add(other)
                    rivals[other].add(index)
    known = patterns()

    def rank(index: int) -> tuple[int, int, str, int]:
        match = proven[index][0]
        return -known[match.pattern].priority, -len(inside[index]), match.pattern, index

    kept, refusals = set[int](), list[Refusal]()
    for index in sorted(rivals, key=rank):
        winner = next((other for other in sorted(rivals[index]) if other in kept), None)
        if winner is None:
            kept.add(index)
        elif not inside[index] <= inside[winner]:
            refusals.append(_refusal(proven[index], proven[winner][0]))
    return [pair for index, pair in enumerate(proven) if index in kept], refusals


def _refusal(loser: Proven, winner: Match) -> Refusal:
    match, candidate = loser
    return Refusal(match.operator, match.path, f"overlaps the {winner.operator} at {winner.node}, "
                   f"which the pattern {winner.pattern!r} takes first", match.node,
                   source_line(candidate.anchor))


def circular(candidate: Candidate) -> str | None:
    """Why a candidate can't stand in a graph: what it reads is computed from what it replaces."""
    for role, node in candidate.inputs.items():
        for output in candidate.outputs:
            if node is output or (output < node and depends(node, output)):
                return f"{role} ({node.name}) is computed from {output.name}, which it replaces"
    return None


def misfit(output: fx.Node, result: object) -> str | None:
    """How a result differs in kind from the node that it would replace."""
    if not isinstance(result, fx.Node):
        return f"{type(result).__name__} where a node is to stand"
    old, new = value_of(output), value_of(result)
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
        same = type(old) is type(new)
    else:
        same = old.ndim == new.ndim and old.dtype == new.dtype
    return None if same else f"{describe(new)} where the model has {describe(old)}"
