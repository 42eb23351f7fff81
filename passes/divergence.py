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
SOFTMAXES = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
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
                and _is_over_product(node, known, context):
            return Declined(f"{target_name(node.target)} stands between the product of query and "
                            "key and the softmax", node)
    return Declined("the softmax is not over a product of two computed tensors", softmax)


def _back(start: fx.Node, through: Collection[Any]) -> list[fx.Node]:
    """The nodes behind this one, nearest first, as far as targets let one through."""
    found, pending = list[fx.Node](), deque([start])
    while pending and len(found) < FARTHEST:
        node = pending.popleft()
        if node in found or node.op != "call_function" or not is_tensor(node):
            continue
        found.append(node)
        if node.target in through and node.target not in LAYERS and not readings(node):
            pending += node.all_input_nodes
    return found


def _is_over_product(node: fx.Node, known: Collection[Any], context: Context) -> bool:
    """Whether a product of two computed tensors is behind, and on the way to it only operators
    that scores go through, or that work on single elements."""
    pending, seen = deque((n, node) for n in node.all_input_nodes), set[fx.Node]()
    while pending and len(seen) < FARTHEST:
        found, reader = pending.popleft()
        if found in seen or not is_tensor(found) or found.target in LAYERS:
            continue
        if reader.target not in known and shape_of(found) != shape_of(reader):
            continue
        seen.add(found)
        products = readings(found)
        if any({p.left, p.right} <= context.activations for p in products) \
                and not any(n.target in SOFTMAXES for operand in found.all_input_nodes
                            for n in _back(operand, known)):  # that product is with the values
            return True
        pending += [] if products else [(n, found) for n in found.all_input_nodes]
    return False
