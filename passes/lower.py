"""Lower: compute what is known, and say what each rewrite reads now."""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from bincompile.ops.fused_rows import fused_rows
from bincompile.passes.graph import (
    aten,
    copy_module,
    finish,
    is_sequence,
    is_tensor,
    run_as_is,
    store,
    value_of,
    weight_bytes,
)
from bincompile.program import Program, attribute

SMALL = 4096  # bytes of a result that is kept whatever it is computed from
CREATIONS = (aten.arange.default, aten.arange.start, aten.arange.start_step, aten.full.default,
             aten.ones.default, aten.zeros.default, aten.scalar_tensor.default,
             aten.linspace.default)


def lower(program: Program) -> Program:
    """The program with stored tensors computed as far as they are known."""
    module, _ = copy_module(program.graph_module)
    fold(module)
    finish(module)
    nodes = {n.name: n for n in module.graph.nodes}
    rewrites = tuple(r if nodes[r.node].target is fused_rows.overload else
                     dataclasses.replace(r, bytes_after=read_bytes(nodes[r.node]))
                     for r in program.rewrites if r.node in nodes)
    return program.next(module, "lowered", rewrites=rewrites)


def fold(module: fx.GraphModule) -> None:
    """Replace computations on stored tensors alone by their results, unless those are larger.

    An output is computed anew, or its caller would hold what the program reads.
    """
    known: dict[fx.Node, object] = {}
    for node in list(module.graph.nodes):
        if node.op == "get_attr":
            known[node] = attribute(module, node.target)
        elif node.op == "call_function" and (node.all_input_nodes or _is_small(node)) \
                and all(n in known for n in node.all_input_nodes) \
                and (is_tensor(node) or is_sequence(node)):
            known[node] = run_as_is(node, known)
    for node, value in known.items():
        outside = [u for u in node.users if u not in known and u.op != "output"]
        if node.op == "get_attr" or not outside or not isinstance(value, torch.Tensor):
            continue
        if value.nbytes <= max(SMALL, _source_bytes(node)):
            kept = store(module, f"folded.{node.name}", value)
            for user in outside:
                user.replace_input_with(node, kept)


def _is_small(node: fx.Node) -> bool:
    """Whether a node makes a small tensor of numbers alone."""
    return node.target in CREATIONS and value_of(node).nbytes <= SMALL


def _source_bytes(node: fx.Node) -> int:
    pending, stored = [node], set()
    while pending:
        found = pending.pop()
        if found.op == "get_attr":
            stored.add(found)
        pending += found.all_input_nodes
    return sum(n.meta["val"].nbytes for n in stored)


def read_bytes(node: fx.Node) -> int:
    """Bytes of the stored weights that a node reads."""
    return weight_bytes(n for n in node.all_input_nodes if n.op == "get_attr")
