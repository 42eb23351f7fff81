"""Proofs of fusions: the nodes of a region beside its body, in float64, on hostile inputs too."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from bincompile.body import Name
from bincompile.passes.fuse_body import Written
from bincompile.passes.fuse_ops import INDICES, WHOLE
from bincompile.passes.graph import Evaluate, run_nodes, shape_of, value_of
from bincompile.passes.patterns import Candidate, owner_of
from bincompile.passes.sizes import Assignment, assignments, concrete, product
from bincompile.passes.validate import LIMIT, OFF_FLOAT32, SEEDS, TRIALS, Trial, difference
from bincompile.record import Evidence

LARGE = 2**31  # products of a linear's proof, above which one trial has to do
Drawn = dict[fx.Node, Any]


def _not_finite(role: str, value: torch.Tensor) -> torch.Tensor:
    changed = value.clone()
    for place, worst in enumerate((math.nan, math.inf, -math.inf, -0.0)):
        changed.view(-1)[place::7] = worst
    return changed


NOT_FINITE = Trial("not finite", _not_finite)
FIRST = (*(t for t in TRIALS if t.name in ("random 0", "random 1", "zeros", "1e4", "equal rows")),
         NOT_FINITE)


def candidate_of(written: Written) -> Candidate:
    """The region as a candidate, by which identical regions are told."""
    results = written.region.results
    inputs = {f"x{place}": node for place, (node, _) in enumerate(written.inputs)}
    inputs |= {f"size{place}": node for place, node in enumerate(written.sizes)}

    def emit(build: Any, values: Any) -> tuple[Any, ...]:
        return written.emit(build, {node: values[role] for role, node in inputs.items()})

    return Candidate("fused_rows", results[-1], inputs, results, emit, {},
                     owner_of(written.region.steps))


def prove_region(written: Written) -> Evidence | str:
    """The evidence that the body does what the nodes do, or why there is none."""
    start = time.perf_counter()
    nodes = _ordered(written)
    reads = [node for node, _ in written.inputs]
    error, tried = 0.0, 0
    for numbers, trials in _places(written, [*nodes, *reads, *written.sizes]):
        for trial in trials:
            outcome = _try(written, nodes, numbers, trial)
            if isinstance(outcome, str):
                return outcome
            if outcome is not None:
                error, tried = max(error, outcome * LIMIT / trial.limit), tried + 1
    if not tried:
        return "the region could not be run on its own at any sizes"
    return Evidence(tried, SEEDS[0], "float64", error, LIMIT, (time.perf_counter() - start) * 1e3)


def _ordered(written: Written) -> list[fx.Node]:
    order = {n: i for i, n in enumerate(written.region.results[0].graph.nodes)}
    return sorted({*written.region.steps, *written.region.views}, key=order.__getitem__)


def _places(written: Written,
            nodes: list[fx.Node]) -> Iterator[tuple[Assignment, tuple[Trial, ...]]]:
    """Sizes to try and on what inputs; the example's only where there are no others."""
    first, *others = assignments(nodes)
    rows = concrete(product(written.region.lead), first)
    work = rows * sum(shape_of(node)[0] * 8 * shape_of(node)[1] for node, how in written.inputs
                      if how == "whole" and value_of(node).dtype == torch.uint8)
    yield first, FIRST[:1] if work > LARGE else FIRST
    yield from ((numbers, FIRST[:1]) for numbers in others[:-1])


def _try(written: Written, nodes: list[fx.Node], numbers: Assignment,
         trial: Trial) -> float | str | None:
    """The error on one input; None where the model's own nodes can't run at these sizes."""
    env = _draw(written, numbers, trial)
    env.update((n, concrete(value_of(n), numbers)) for node in nodes
               for n in node.all_input_nodes if isinstance(value_of(n), torch.SymInt))
    given = dict(env)
    with torch.no_grad():
        try:
            run_nodes(nodes, env)
        except Exception:  # sizes that the model itself does not allow prove nothing
            return None
        try:
            found = written.emit(Evaluate(), given)
        except Exception as error:
            return f"the body fails where the nodes run: {type(error).__name__}: {error}"
    for node, value in zip(written.region.results, found, strict=True):
        if value.shape != env[node].shape or value.dtype != env[node].dtype:
            return f"{value.dtype} {tuple(value.shape)} where the nodes give {env[node].dtype} " \
                   f"{tuple(env[node].shape)}"
    worst = max(difference(env[node], value)
                for node, value in zip(written.region.results, found, strict=True))
    return worst if worst <= trial.limit else (
        f"error {worst:.2g} on inputs of kind '{trial.name}', allowed {trial.limit:.0e}")


def _draw(written: Written, numbers: Assignment, trial: Trial) -> Drawn:
    """A value for every input: floats by the trial, indices within their table."""
    generator = torch.Generator().manual_seed(trial.seed)
    drawn: Drawn = {}
    rows = _tables(written)
    for place, (node, how) in enumerate(written.inputs):
        value = value_of(node)
        shape = [concrete(size, numbers) for size in value.shape]
        if value.dtype.is_floating_point:
            made = torch.randn(shape, generator=generator).double() * OFF_FLOAT32
            drawn[node] = made if how == "whole" else trial.change("", made)
        elif value.dtype == torch.bool:
            drawn[node] = torch.rand(shape, generator=generator) > 0.4
        else:
            high = rows.get(place, 256 if value.dtype == torch.uint8 else 2)
            drawn[node] = torch.randint(high, shape, generator=generator).to(value.dtype)
    return drawn


def _tables(written: Written) -> dict[int, int]:
    """For each input that holds indices, the rows of the smallest table that it is used in."""
    found: dict[int, int] = {}
    for statement in written.body.statements:
        place = INDICES.get(statement.op)
        if place is not None:
            index, table = statement.args[place], statement.args[WHOLE[statement.op][0]]
            assert isinstance(index, Name) and isinstance(table, Name)
            size = shape_of(written.inputs[table.index][0])[0]
            found[index.index] = min(size, found.get(index.index, size))
    return found
