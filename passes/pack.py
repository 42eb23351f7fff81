"""Pack: what is binary already becomes bits, exactly."""

from __future__ import annotations

from bincompile.passes.graph import copy_module, finish
from bincompile.passes.matching import (
    anchors,
    apply,
    candidate_at,
    found_match,
    proof,
    refused,
    stored_bytes,
)
from bincompile.passes.overlap import Proven, without_overlaps
from bincompile.passes.patterns import Candidate, Context
from bincompile.program import Program, target_name
from bincompile.record import Evidence, Refusal, Rewrite, origin


def pack(program: Program) -> Program:
    """Packed operators in place of binary layers and of stored weights that are +-a per row."""
    context, shared = Context.of(program), dict[str, Evidence | str]()
    module, copies = copy_module(program.graph_module)
    matches, refusals = list(program.matches), list(program.refusals)
    rewrites = list(program.rewrites)
    matched, proven = {(m.operator, m.path) for m in matches}, list[Proven]()
    for pattern, node in anchors(program, "packed"):
        candidate = candidate_at(pattern, node, context)
        if isinstance(candidate, Refusal):
            refusals.append(candidate)
        if not isinstance(candidate, Candidate):
            continue
        found = proof(found_match(pattern, node, candidate), candidate, program, shared)
        if isinstance(found, Refusal):
            refusals.append(found)
        else:
            proven.append((found, candidate))
    kept, overlapping = without_overlaps(proven)
    refusals += overlapping
    for found, candidate in kept:
        placed = apply(candidate, module, copies, "binary")
        if isinstance(placed, str):
            refusals.append(refused(found, candidate, placed))
            continue
        rewrites.append(Rewrite(target_name(placed.target).removeprefix("bincompile."), found.path,
                                "exact", bytes_before=stored_bytes(candidate, context),
                                max_error=found.max_error, node=placed.name,
                                replaces=origin(found.node, program.rewrites)))
        if (found.operator, found.path) not in matched:
            matches.append(found)
    return program.next(finish(module), "packed", matches=tuple(matches),
                        refusals=tuple(refusals), rewrites=tuple(rewrites))


