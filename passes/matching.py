"""Match, validate, canonicalise: from anchors to proven operators in the graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import fx

from bincompile.passes.graph import Build, copy_module, finish
from bincompile.passes.patterns import Candidate, Context, Pattern, owner_of, patterns
from bincompile.passes.scores import Declined
from bincompile.passes.validate import signature_of, validate
from bincompile.program import Program, source_line
from bincompile.record import Evidence, Match, Refusal, Rewrite

NOT_ATTENTION = "the softmax is not over a product of two computed tensors"


def match(program: Program) -> Program:
    """Every candidate of every pattern, as a match without evidence or a refusal."""
    context, matches, refusals = Context.of(program), [], []
    for pattern, node in _anchors(program):
        found = candidate_at(pattern, node, context)
        if isinstance(found, Refusal):
            refusals.append(found)
        else:
            matches.append(Match(found.operator, found.path, dict(found.attrs), node.name,
                                 pattern=pattern.name))
    return program.next(program.graph_module, "matched", matches=tuple(matches),
                        refusals=(*program.refusals, *refusals))


def prove(program: Program) -> Program:
    """Every match with its evidence; one that fails becomes a refusal."""
    context, shared = Context.of(program), dict[str, Evidence | str]()
    nodes = {n.name: n for n in program.graph.nodes}
    matches, refusals = [], []
    for found in program.matches:
        node = nodes[found.node]
        candidate = _again(found, node, context)
        text = signature_of(candidate, program.graph_module)
        known = shared.get(text)
        if known is None:
            known = shared[text] = validate(candidate, program.graph_module)
        elif isinstance(known, Evidence):
            known = dataclasses.replace(known, milliseconds=0.0)
        if isinstance(known, str):
            refusals.append(Refusal(found.operator, found.path, f"not proven: {known}", found.node,
                                    source_line(node)))
        else:
            matches.append(dataclasses.replace(found, evidence=known))
    return program.next(program.graph_module, "validated", matches=tuple(matches),
                        refusals=(*program.refusals, *refusals))


def canonicalise(program: Program) -> Program:
    """The canonical operator in place of every proven match."""
    module, copies = copy_module(program.graph_module)
    nodes = {n.name: n for n in program.graph.nodes}
    context, rewrites = Context.of(program), []
    for found in program.matches:
        candidate = _again(found, nodes[found.node], context)
        name = apply(candidate, module, copies)
        rewrites.append(Rewrite(candidate.operator, found.path, "exact",
                                max_error=found.max_error, node=name))
    return program.next(finish(module), "canonical", rewrites=(*program.rewrites, *rewrites))


def candidate_at(pattern: Pattern, node: fx.Node, context: Context) -> Candidate | Refusal:
    """What a pattern says of an anchor."""
    try:
        found = pattern.match(node, context)
    except Declined as declined:
        return Refusal(pattern.operator, owner_of((node,)), declined.reason, declined.node.name,
                       source_line(declined.node) or source_line(node))
    if found is None:
        return Refusal(pattern.operator, owner_of((node,)), NOT_ATTENTION, node.name,
                       source_line(node))
    return found


def apply(candidate: Candidate, module: fx.GraphModule, copies: dict[fx.Node, fx.Node]) -> str:
    """Put a candidate's operator into a copy of its graph; returns the name of its node."""
    at = copies[candidate.outputs[0]]
    build = Build(module.graph, at, like=at)
    values = {role: copies[n] for role, n in candidate.inputs.items()}
    before = set(module.graph.nodes)
    results = candidate.emit(build, values)
    for output, result in zip(candidate.outputs, results, strict=True):
        copies[output].replace_all_uses_with(result)
    added = [n for n in module.graph.nodes if n not in before]
    ours = next(n for n in added if getattr(n.target, "namespace", "") == "bincompile")
    return ours.name


def _anchors(program: Program) -> Iterator[tuple[Pattern, fx.Node]]:
    for node in program.graph.nodes:
        for pattern in patterns().values():
            if node.op == "call_function" and node.target in pattern.anchors:
                yield pattern, node


def _again(found: Match, node: fx.Node, context: Context) -> Candidate:
    candidate = patterns()[found.pattern].match(node, context)
    assert isinstance(candidate, Candidate)
    return candidate
