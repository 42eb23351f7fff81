"""Fuse: stretches of a graph that treat every row alike become one operator each.

What stands between two attention cores (a linear, its bias, the residual, a layer norm, the next
linears) is one region, whose bits stay bits. Each region is proven like a match; those that are
alike share the proof, and later the kernel.
"""

from __future__ import annotations

import dataclasses

from torch import fx

from bincompile.ops.fused_rows import fused_rows
from bincompile.passes.fuse_body import Written, write
from bincompile.passes.fuse_linear import join_biases, split_biases
from bincompile.passes.fuse_numbers import raise_factors
from bincompile.passes.fuse_ops import rules_of
from bincompile.passes.fuse_proof import candidate_of, prove_region
from bincompile.passes.fuse_regions import Region, regions_of
from bincompile.passes.fuse_same import share
from bincompile.passes.fuse_views import raise_pointwise
from bincompile.passes.graph import Build, copy_module, finish, put_in_order
from bincompile.passes.lower import fold, read_bytes
from bincompile.passes.patterns import owner_of
from bincompile.passes.validate import signature_of
from bincompile.program import Program, source_line
from bincompile.record import Evidence, Refusal, Rewrite, origin

STEPS = "steps"  # the level of programs that take one token, of as many rows as there are streams
SIGNS = "signs"  # where a node keeps the names of those whose signs its body takes


def fuse(program: Program) -> Program:
    """The program with its row programs in place; the same program where there are none."""
    module, _ = copy_module(program.graph_module)
    fold(module)
    finish(module)
    raise_factors(module)
    few = any(stage.level == STEPS for stage in program.stages)
    if few:
        share(module)
        raise_pointwise(module)
    least = 1 if few else 2  # a step that runs nothing but kernels is one call of C
    split = [] if few else split_biases(module)
    found, shared = list[tuple[Written, Evidence]](), dict[str, Evidence | str]()
    refusals = list(program.refusals)
    for region in regions_of(module.graph, rules_of(few), least):
        written = write(region)
        if written is None:
            continue
        text = signature_of(candidate_of(written), module)
        known = shared[text] = shared[text] if text in shared else prove_region(written)
        if isinstance(known, str):
            refusals.append(_refused(region, known))
        else:
            found.append((written, known))
    join_biases(split, {n for written, _ in found for n in written.region.steps})
    if not found and not few:
        return dataclasses.replace(program, refusals=tuple(refusals))
    rewrites, now = list(program.rewrites), dict[fx.Node, fx.Node]()
    for written, evidence in found:
        placed = _place(module, written, now)
        swallowed = {n.name: n for n in written.region.steps}
        rewrites = [_moved(r, swallowed, placed) for r in rewrites]
        rewrites.append(Rewrite(
            fused_rows.name, owner_of(written.region.steps), "exact",
            max_error=evidence.max_error, node=placed.name,
            replaces=origin(written.region.results[-1].name, program.rewrites)))
    put_in_order(module.graph)
    return program.next(finish(module), "fused", rewrites=tuple(rewrites),
                        refusals=tuple(refusals))


def before_fusion(program: Program) -> Program:
    """The last stage that holds no row program, or the program itself if it never had one."""
    return next((stage.parent for stage in program.stages
                 if stage.level == "fused" and stage.parent is not None), program)


def signs_within(node: fx.Node) -> tuple[str, ...]:
    """The names of the nodes whose signs a row program takes, in the order of its body."""
    return node.meta.get(SIGNS, ())


def _refused(region: Region, reason: str) -> Refusal:
    last = region.results[-1]
    return Refusal(fused_rows.name, owner_of(region.steps), f"not proven: {reason}", last.name,
                   source_line(last))


def _place(module: fx.GraphModule, written: Written, now: dict[fx.Node, fx.Node]) -> fx.Node:
    """Put the operator in place of a region's results; the nodes within are dead then.

    Args:
        now: what stands for results of the regions before; those of this one are added.
    """
    results, steps = written.region.results, written.region.steps
    build = Build(module.graph, results[-1], like=results[-1])
    made = written.emit(build, {node: now.get(node, node) for node in
                                (*(n for n, _ in written.inputs), *written.sizes)})
    for old, new in zip(results, made, strict=True):
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in steps)
        now[old] = new
    placed = made[0]
    while placed.target is not fused_rows.overload:
        placed = placed.args[0]
    placed.meta[SIGNS] = tuple(node.name for node in written.signs)
    return placed


def _moved(rewrite: Rewrite, swallowed: dict[str, fx.Node], placed: fx.Node) -> Rewrite:
    node = swallowed.get(rewrite.node)
    if node is None:
        return rewrite
    return dataclasses.replace(rewrite, node=placed.name, bytes_after=read_bytes(node))
