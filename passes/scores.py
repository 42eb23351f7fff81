"""Scores: what happens between the product of query and key and the softmax.

A walk back from the softmax through a closed set of operators finds the product; a walk forward
then reads factors, added terms and masks as facets. Any other operator is a reason to refuse.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from bincompile.passes.axes import LAYOUTS, REGROUPS, Contraction, contraction, moved
from bincompile.passes.graph import arguments, aten, is_tensor, number, shape_of, value_of
from bincompile.passes.patterns import Context
from bincompile.passes.sizes import equal

CASTS = (aten._to_copy.default, aten.to.dtype)
DEEPEST = 60  # operators between a product and its softmax


class Declined(Exception):
    """The walk met something that attention does not have."""

    def __init__(self, reason: str, node: fx.Node) -> None:
        super().__init__(reason)
        self.reason, self.node = reason, node


@dataclasses.dataclass(frozen=True)
class Term:
    """A tensor that joins the scores: its factor, and the axes of the scores where it does.

    `axes` is (rank, left, right): the rank of the scores there and where the own axes stand;
    `sizes` is the shape there if it was regrouped since the product.
    """

    node: fx.Node
    axes: tuple[int, int, int]
    sizes: tuple[Any, ...] | None
    factor: float = 1.0
    inverted: bool = False


@dataclasses.dataclass(frozen=True)
class Scores:
    """A product and what was done to it."""

    product: Contraction
    axes: tuple[int, int, int]
    factor: float = 1.0
    sizes: tuple[Any, ...] | None = None
    learned: tuple[tuple[fx.Node, bool], ...] = ()  # tensor factors; True: divided by
    terms: tuple[Term, ...] = ()
    masks: tuple[Term, ...] = ()
    fill: float | None = None


def read_scores(end: fx.Node, context: Context) -> tuple[Scores, list[fx.Node]] | None:
    """The scores that end in this node, and the nodes from the product to it; None if no product.

    Raises `Declined` at an operator that can't be expressed as a facet.
    """
    path = _find(end, context, 0)
    if path is None:
        return None
    found = contraction(path[0][0])
    assert found is not None
    left, right = (found.axes.index(label) for label in found.own)
    scores = Scores(found, (len(found.axes), left, right), found.factor)
    if found.added is not None:
        term = Term(found.added[0], scores.axes, None, found.added[1])
        scores = dataclasses.replace(scores, terms=(term,))
    for node, operand in path[1:]:
        scores = step(scores, node, operand, context)
    return scores, [node for node, _ in path]


def step(scores: Scores, node: fx.Node, operand: int, context: Context) -> Scores:
    """The scores behind one operator of the closed set; `operand` is where they enter it."""
    return _STEPS[node.target][1](scores, node, operand, context)


def _find(node: fx.Node, context: Context, depth: int) -> list[tuple[fx.Node, int]] | None:
    """Nodes from a product to this one, each with the operand that comes from the one before."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or depth > DEEPEST:
        return None
    found = contraction(node)
    if found is not None:
        both = found.left in context.activations or found.right in context.activations
        return [(node, 0)] if both else None
    if node.target not in _STEPS:
        return None
    paths = []
    for operand in _STEPS[node.target][0]:
        if operand < len(node.args):
            path = _find(node.args[operand], context, depth + 1)
            if path is not None:
                paths.append([*path, (node, operand)])
    return min(paths, key=lambda p: (not _two_activations(p[0][0], context), len(p)), default=None)


def _two_activations(node: fx.Node, context: Context) -> bool:
    found = contraction(node)
    return found is not None and {found.left, found.right} <= context.activations


def _scale(scores: Scores, node: fx.Node, operand: int, context: Context) -> Scores:
    divided = node.target in (aten.div.Tensor, aten.div.Scalar)
    other = node.args[1 - operand]
    factor = number(context.graph_module, other)
    if factor is None:
        return _learned(scores, node, other, divided)
    if factor == 0 or not math.isfinite(factor):
        raise Declined(f"the scores are scaled by {factor}", node)
    factor = 1 / factor if divided else factor
    if scores.masks and (scores.fill is None or math.isinf(scores.fill)) and factor < 0:
        raise Declined("masked scores change their sign", node)
    terms = tuple(dataclasses.replace(t, factor=t.factor * factor) for t in scores.terms)
    fill = None if scores.fill is None else scores.fill * factor
    return dataclasses.replace(scores, factor=scores.factor * factor, terms=terms, fill=fill)


def _learned(scores: Scores, node: fx.Node, other: fx.Node, divided: bool) -> Scores:
    sizes = shape_of(other)
    if scores.terms or scores.masks:
        raise Declined("a tensor scales the scores after a mask was applied", node)
    if scores.sizes is not None or any(
            not equal(size, 1) for size in sizes[-2:]) or len(sizes) > scores.axes[0]:
        raise Declined("a tensor scales single scores, not whole heads", node)
    return dataclasses.replace(scores, learned=(*scores.learned, (other, divided)))


def _add(scores: Scores, node: fx.Node, operand: int, context: Context) -> Scores:
    found = arguments(node)
    other, alpha = node.args[1 - operand], float(found.get("alpha", 1))
    sign = -1.0 if node.target is aten.sub.Tensor else 1.0
    if operand == 1 and (sign < 0 or alpha != 1):
        raise Declined("the scores are subtracted from something", node)
    if not is_tensor(other):
        raise Declined("a number is added to the scores", node)
    if scores.fill is not None and scores.masks:
        raise Declined("a term is added after masked scores were given a finite value", node)
    term = Term(other, scores.axes, scores.sizes, sign * alpha)
    return dataclasses.replace(scores, terms=(*scores.terms, term))


def _mask(scores: Scores, node: fx.Node, mask: fx.Node, fill: Any, inverted: bool,
          context: Context) -> Scores:
    found = number(context.graph_module, fill)
    if found is None or math.isnan(found) or found == math.inf:
        raise Declined("masked scores are given values of a tensor", node)
    value = None if found == -math.inf else found
    if scores.masks and scores.fill != value:
        raise Declined("two masks with different values", node)
    term = Term(mask, scores.axes, scores.sizes, inverted=inverted)
    return dataclasses.replace(scores, masks=(*scores.masks, term), fill=value)


def _masked_fill(scores: Scores, node: fx.Node, operand: int, context: Context) -> Scores:
    return _mask(scores, node, node.args[1], node.args[2], True, context)


def _where(scores: Scores, node: fx.Node, operand: int, context: Context) -> Scores:
    return _mask(scores, node, node.args[0], node.args[3 - operand], operand == 2, context)


def _cast(scores: Scores, node: fx.Node, operand: int, context: Context) -> Scores:
    check_precision(scores, node)
    return scores


def check_precision(scores: Scores, node: fx.Node) -> None:
    """Raise if a node rounds to fewer bits than the product has: the operator would not."""
    before, after = value_of(scores.product.node).dtype, value_of(node).dtype
    if not after.is_floating_point or torch.finfo(after).eps > torch.finfo(before).eps:
        raise Declined(f"{before} is rounded to {after} between product and values", node)


def _regroup(scores: Scores, node: fx.Node, operand: int, context: Context) -> Scores:
    """The scores behind an operator that only moves or regroups axes."""
    rank, *own = scores.axes
    positions = moved(node, tuple(own))
    if positions is None:
        raise Declined("the axes of query and key are mixed with others", node)
    sizes = scores.sizes
    if node.target in REGROUPS:
        after = shape_of(node)
        if set(own) != {rank - 2, rank - 1} or positions != tuple(
                len(after) + axis - rank for axis in own):
            raise Declined("batch axes move behind those of query and key", node)
        sizes = tuple(node.args[1]) if node.target is aten.reshape.default else None
        if sizes is None or any(isinstance(s, int) and s < 0 for s in sizes):
            sizes = after
        if any(not isinstance(s, int | fx.Node) for s in sizes):
            raise Declined("batch axes are regrouped by sizes that are not in the graph", node)
    elif set(own) != set(positions) or sizes is not None:
        raise Declined("batch axes of the scores are reordered", node)
    left, right = positions
    return dataclasses.replace(scores, axes=(len(shape_of(node)), left, right), sizes=sizes)


_Step = Callable[[Scores, fx.Node, int, Context], Scores]
# Operators that may stand between product and softmax: which argument the scores are, and how
# the operator is read.
_STEPS: Mapping[Any, tuple[tuple[int, ...], _Step]] = {
    aten.mul.Tensor: ((0, 1), _scale), aten.mul.Scalar: ((0,), _scale),
    aten.div.Tensor: ((0,), _scale), aten.div.Scalar: ((0,), _scale),
    aten.add.Tensor: ((0, 1), _add), aten.sub.Tensor: ((0, 1), _add),
    aten.masked_fill.Scalar: ((0,), _masked_fill), aten.masked_fill.Tensor: ((0,), _masked_fill),
    aten.where.self: ((1, 2), _where), aten.where.ScalarOther: ((1,), _where),
    aten.where.ScalarSelf: ((2,), _where),
    **{target: ((0,), _cast) for target in CASTS},
    **{target: ((0,), _regroup) for target in LAYOUTS},
}
