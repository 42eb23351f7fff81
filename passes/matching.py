"""Match, validate, canonicalise: from anchors to proven operators in the graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from torch import fx

from bincompile.ops import operator_of
from bincompile.passes.graph import (
    Build,
    between,
    copy_module,
    finish,
    put_in_order,
    weight_bytes,
)
from bincompile.passes.normalise import simplify
from bincompile.passes.overlap import Proven, circular, misfit, without_overlaps
from bincompile.passes.patterns import (
    Candidate,
    Context,
    Pattern,
    owner_of,
    patterns,
    starting_at,
)
from bincompile.passes.scores import Declined
from bincompile.passes.validate import signature_of, validate
from bincompile.program import Program, source_line
from bincompile.record import Evidence, Match, Refusal, Rewrite

HELD = "candidates"  # where a graph keeps those of `match` until `canonicalise` has placed them


def match(program: Program) -> Program:
    """Every candidate of every pattern, as a match without evidence or a refusal."""
    context = Context.of(program)
    matches, refusals = list[Match](), list[Refusal]()
    held = program.graph_module.meta[HELD] = dict[tuple[str, str], Candidate]()
    for pattern, node in anchors(program, "canonical"):
        found = candidate_at(pattern, node, context)
        if isinstance(found, Refusal):
            refusals.append(found)
        elif found is not None:
            matches.append(found_match(pattern, node, found))
            held[pattern.name, node.name] = found
    return program.next(program.graph_module, "matched", matches=tuple(matches),
                        refusals=(*program.refusals, *refusals))


def found_match(pattern: Pattern, node: fx.Node, found: Candidate) -> Match:
    """The record of a candidate at an anchor, not proven yet."""
    inside = between(found.outputs, set(found.inputs.values()))
    return Match(found.operator, found.path, dict(found.attrs), node.name,
                 pattern=pattern.name, nodes=tuple(n.name for n in inside if n.op != "get_attr"),
                 source=source_line(node))


def prove(program: Program) -> Program:
    """Every match with its evidence; one that fails becomes a refusal."""
    context, shared = Context.of(program), dict[str, Evidence | str]()
    nodes = {n.name: n for n in program.graph.nodes}
    proven, refusals = list[Proven](), list[Refusal]()
    for found in program.matches:
        candidate = _again(found, nodes[found.node], context)
        outcome = proof(found, candidate, program, shared)
        if isinstance(outcome, Match):
            proven.append((outcome, candidate))
        else:
            refusals.append(outcome)
    kept, overlapping = without_overlaps(proven)
    return program.next(program.graph_module, "validated", matches=tuple(m for m, _ in kept),
                        refusals=(*program.refusals, *refusals, *overlapping))


def proof(found: Match, candidate: Candidate, program: Program,
          shared: dict[str, Evidence | str]) -> Match | Refusal:
    """The match with its evidence, or a refusal; identical subgraphs share one proof."""
    text = signature_of(candidate, program.graph_module)
    known = shared.get(text)
    if known is None:
        known = shared[text] = circular(candidate) or validate(candidate, program.graph_module)
    elif isinstance(known, Evidence):
        known = dataclasses.replace(known, milliseconds=0.0)
    if isinstance(known, str):
        return refused(found, candidate, f"not proven: {known}")
    return dataclasses.replace(found, evidence=known)


def canonicalise(program: Program) -> Program:
    """The canonical operator in place of every proven match."""
    module, copies = copy_module(program.graph_module)
    nodes = {n.name: n for n in program.graph.nodes}
    context, rewrites = Context.of(program), []
    matches, refusals = list[Match](), list[Refusal]()
    for found in program.matches:
        candidate = _again(found, nodes[found.node], context)
        placed = apply(candidate, module, copies)
        if isinstance(placed, str):
            refusals.append(refused(found, candidate, placed))
            continue
        matches.append(found)
        rewrites.append(Rewrite(candidate.operator, found.path, "exact",
                                bytes_before=stored_bytes(candidate, context),
                                max_error=found.max_error, node=placed.name,
                                replaces=found.node))
    program.graph_module.meta.pop(HELD, None)
    put_in_order(module.graph)  # what reads the probabilities may stand before the product
    simplify(module)
    return program.next(finish(module), "canonical", matches=tuple(matches),
                        refusals=(*program.refusals, *refusals),
                        rewrites=(*program.rewrites, *rewrites))


def refused(found: Match, candidate: Candidate, reason: str) -> Refusal:
    """The refusal of a match that was found."""
    return Refusal(found.operator, found.path, reason, found.node, source_line(candidate.anchor))


def candidate_at(pattern: Pattern, node: fx.Node, context: Context) -> Candidate | Refusal | None:
    """What a pattern says of an anchor."""
    try:
        return pattern.match(node, context)
    except Declined as declined:
        walked = (node, *node.all_input_nodes[:1], declined.node)
        return Refusal(pattern.operator, owner_of(walked), declined.reason, declined.node.name,
                       source_line(declined.node) or source_line(node))
    except Exception as error:  # a pattern that fails is no reason for a model to fail
        reason = f"the pattern {pattern.name!r} fails: {type(error).__name__}: {error}"
        return Refusal(pattern.operator, owner_of((node,)), reason, node.name, source_line(node))


def apply(candidate: Candidate, module: fx.GraphModule, copies: dict[fx.Node, fx.Node],
          prefix: str = "") -> fx.Node | str:
    """Put a candidate's operator into a copy of its graph; returns its node, or why it can't be.

    `prefix` tells which of several operators of ours is meant.
    """
    at = copies[candidate.outputs[0]]
    build = Build(module.graph, at, like=at)
    values = {role: copies[n] for role, n in candidate.inputs.items()}
    before = set(module.graph.nodes)
    try:
        results = candidate.emit(build, values)
        pairs = list(zip(candidate.outputs, results, strict=True))
    except Exception as error:  # it ran in the proof, but can't be written into a graph
        return f"the rewritten form can't be written: {type(error).__name__}: {error}"
    if wrong := next(filter(None, (misfit(o, r) for o, r in pairs)), None):
        return f"the rewritten form is {wrong}"
    for output, result in pairs:
        copies[output].replace_all_uses_with(result)
        copies[output] = result
    added = [n for n in module.graph.nodes if n not in before]
    ours = (n for n in added if (found := operator_of(n.target)) and found.name.startswith(prefix))
    return next(ours, results[0])


def stored_bytes(candidate: Candidate, context: Context) -> int:
    """Bytes of the stored weights that a candidate's subgraph reads."""
    inside = between(candidate.outputs, set(candidate.inputs.values()))
    reads = {*candidate.inputs.values(), *(n for node in inside for n in node.all_input_nodes)}
    return weight_bytes(stored_sources(reads, context))


def stored_sources(nodes: Iterable[fx.Node], context: Context) -> set[fx.Node]:
    """The stored tensors behind those of these nodes that don't depend on an input."""
    pending, stored = [n for n in nodes if n not in context.activations], set()
    while pending:
        node = pending.pop()
        if node.op == "get_attr":
            stored.add(node)
        pending += node.all_input_nodes
    return stored


def anchors(program: Program, stage: str) -> Iterator[tuple[Pattern, fx.Node]]:
    """Every node of the graph that a pattern of this stage starts from."""
    for node in program.graph.nodes:
        if node.op == "call_function":
            for pattern in starting_at(node.target, stage):
                yield pattern, node


def _again(found: Match, node: fx.Node, context: Context) -> Candidate:
    held = context.graph_module.meta.get(HELD, {}).get((found.pattern, found.node))
    candidate = held or patterns("canonical")[found.pattern].match(node, context)
    assert isinstance(candidate, Candidate)
    return candidate
