"""Pack: what is binary already becomes bits, exactly."""

from __future__ import annotations

from bincompile.passes.graph import copy_module, finish
from bincompile.passes.matching import anchors, apply, candidate_at, proof, stored_bytes
from bincompile.passes.patterns import Candidate, Context
from bincompile.program import Program, target_name
from bincompile.record import Evidence, Match, Refusal, Rewrite


def pack(program: Program) -> Program:
    """Packed operators in place of binary layers and of stored weights that are +-a per row."""
    context, shared = Context.of(program), dict[str, Evidence | str]()
    module, copies = copy_module(program.graph_module)
    matches, refusals = list(program.matches), list(program.refusals)
    rewrites = list(program.rewrites)
    matched = {(m.operator, m.path) for m in matches}
    for pattern, node in anchors(program, "packed"):
        candidate = candidate_at(pattern, node, context)
        if not isinstance(candidate, Candidate):
            continue
        found = proof(Match(candidate.operator, candidate.path, dict(candidate.attrs), node.name,
                            pattern=pattern.name), candidate, program, shared)
        if isinstance(found, Refusal):
            refusals.append(found)
            continue
        placed = apply(candidate, module, copies, "binary")
        rewrites.append(Rewrite(target_name(placed.target).removeprefix("bincompile."), found.path,
                                "exact", bytes_before=stored_bytes(candidate, context),
                                max_error=found.max_error, node=placed.name))
        if (found.operator, found.path) not in matched:
            matches.append(found)
    return program.next(finish(module), "packed", matches=tuple(matches),
                        refusals=tuple(refusals), rewrites=tuple(rewrites))


