"""Mixed heads: scores or probabilities of all heads multiplied by a small stored matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import fx

from bincompile.passes.axes import readings
from bincompile.passes.graph import arguments, aten, shape_of
from bincompile.passes.patterns import Context
from bincompile.passes.placed import Declined, Mixing, NoScores, Scores
from bincompile.passes.sizes import equal

# Operators that may mix heads, and which argument the scores are.
MIXES: Mapping[Any, tuple[int, ...]] = {
    aten.linear.default: (0,), aten.conv2d.default: (0,), aten.einsum.default: (0, 1),
    aten.matmul.default: (0, 1)}


def mix(scores: Scores, node: fx.Node, operand: int, context: Context) -> Scores:
    """The scores behind a mixture of heads."""
    mixing = mixing_of(scores, node, operand, context)
    if scores.masks or scores.softcap or scores.clamped or scores.late \
            or scores.mixing or scores.sink or scores.offset:
        raise Declined("heads are mixed after the scores were masked or changed otherwise", node)
    if any(t.hides for t in scores.terms):
        raise Declined("heads are mixed after the scores were masked", node)
    terms = tuple(dataclasses.replace(t, mixed=True) for t in scores.terms)
    return dataclasses.replace(scores, mixing=mixing, terms=terms)


def mixing_of(scores: Scores, node: fx.Node, operand: int, context: Context) -> Mixing:
    """The mixture of heads that a product with a stored matrix is."""
    labels, head = scores.place.labels, (scores.product.batch or (None,))[-1]
    reason = NoScores("a product is multiplied by stored weights along another axis than heads",
                      node)
    if node.target in (aten.linear.default, aten.conv2d.default):
        found = arguments(node)
        axis = len(labels) - 1 if node.target is aten.linear.default else len(labels) - 3
        matrix, shift, turned = found["weight"], found.get("bias"), False
        if any(found.get(k, v) not in (v, type(v)()) for k, v in _PLAIN_CONV.items()):
            raise reason
        if any(not equal(s, 1) for s in shape_of(matrix)[2:]):
            raise reason
    else:
        axis, matrix, shift, turned = _mixing_product(labels, node, operand, reason)
    if head is None or labels[axis] != head or matrix in context.activations or not all(
            map(equal, shape_of(matrix)[:2], [shape_of(node)[axis]] * 2)):
        raise reason
    return Mixing(matrix, turned, shift)


_PLAIN_CONV = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}


def _mixing_product(labels: tuple[str | None, ...], node: fx.Node, operand: int,
                    reason: Declined) -> tuple[int, fx.Node, None, bool]:
    """A matmul or an einsum with a matrix: which axis it replaces, and whether it is turned."""
    for product in readings(node):
        ours, theirs = ((product.left_axes, product.right_axes) if operand == 0
                        else (product.right_axes, product.left_axes))
        matrix = product.right if operand == 0 else product.left
        if len(theirs) != 2 or len(ours) != len(labels) or product.contracted not in theirs:
            continue
        axis = ours.index(product.contracted)
        fresh = next(a for a in theirs if a != product.contracted)
        kept = tuple(fresh if a == product.contracted else a for a in ours)
        if kept == product.axes:
            return axis, matrix, None, theirs.index(product.contracted) == 0
    raise reason
