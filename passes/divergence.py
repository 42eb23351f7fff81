"""Divergence: the operator because of which a softmax is not read as that of an attention."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import Any

from torch import fx

from bincompile.passes.axes import readings
from bincompile.passes.graph import aten, is_tensor, shape_of
from bincompile.passes.patterns import Context
from bincompile.passes.scores import Declined
from bincompile.program import target_name

LAYERS = (aten.linear.default, aten.conv2d.default)  # behind these are features, not scores
FARTHEST = 24  # operators between a softmax and a product that is looked for


def divergence(softmax: fx.Node, scores: fx.Node, known: Collection[Any],
               context: Context) -> Declined:
    """Why no product of two computed tensors was found behind `scores`.

    Args:
        softmax: the node that the search started from.
        scores: what it normalises.
        known: targets that may stand between a product and its softmax.
        context: of the graph.
    """
    for node in _back(scores, known):
        if node.target not in known and not readings(node) and node in context.activations \
                and _is_over_product(node, context):
            return Declined(f"{target_name(node.target)} stands between the product of query and "
                            "key and the softmax", node)
    return Declined("the softmax is not over a product of two computed tensors", softmax)


def _back(start: fx.Node, through: Collection[Any]) -> list[fx.Node]:
    """The nodes behind this one, nearest first, as far as targets let one through."""
    found, pending = [], deque([start])
    while pending and len(found) < FARTHEST:
        node = pending.popleft()
        if node in found or node.op != "call_function" or not is_tensor(node):
            continue
        found.append(node)
        if node.target in through and node.target not in LAYERS and not readings(node):
            pending += node.all_input_nodes
    return found


def _is_over_product(node: fx.Node, context: Context) -> bool:
    """Whether a product of two computed tensors is behind, with operators on its elements alone."""
    elements = shape_of(node)
    pending, seen = deque(node.all_input_nodes), set[fx.Node]()
    while pending and len(seen) < FARTHEST:
        found = pending.popleft()
        if found in seen or not is_tensor(found) or shape_of(found) != elements:
            continue
        seen.add(found)
        if any({p.left, p.right} <= context.activations for p in readings(found)):
            return True
        pending += found.all_input_nodes
    return False
