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

from bincompile.passes.axes import LAYOUTS, REGROUPS, Contraction, readings
from bincompile.passes.graph import arguments, aten, is_tensor, number, shape_of, value_of
from bincompile.passes.mixing import MIXES, mix
from bincompile.passes.patterns import Context
from bincompile.passes.placed import Declined, Place, Scores, Term
from bincompile.passes.sizes import equal
from bincompile.passes.trail import permutation, regrouping

__all__ = ["Declined", "Place", "Scores", "Term", "check_precision", "read_scores", "step"]

CASTS = (aten._to_copy.default, aten.to.dtype)
DEEPEST = 60  # operators between a product and its softmax


def read_scores(end: fx.Node, softmax: fx.Node, axis: int,
                context: Context) -> tuple[Scores, list[fx.Node]] | None:
    """The scores that a softmax over `axis` of `end` reads, and the nodes from the product to it.

    None if there is no product. Raises `Declined` at an operator that can't be expressed.
    """
    path = _find(end, context, 0, {})
    if path is None:
        return None
    reason: Declined | None = None
    for product in readings(path[0][0]):
        try:
            scores = _walk(product, path, context)
            _check_axis(scores, softmax, axis)
            return scores, [node for node, _ in path]
        except Declined as declined:
            reason = reason or declined
    assert reason is not None
    raise reason


def _walk(product: Contraction, path: list[tuple[fx.Node, int]], context: Context) -> Scores:
    scores = Scores(product, Place((), (product.axes,), product.own), product.factor)
    if product.added is not None:
        term = Term(product.added[0], scores.place, product.added[1])
        scores = dataclasses.replace(scores, terms=(term,))
    for node, operand in path[1:]:
        scores = step(scores, node, operand, context)
    return scores


def _check_axis(scores: Scores, softmax: fx.Node, axis: int) -> None:
    labels = scores.place.labels
    if len(shape_of(softmax)) != len(labels):
        raise Declined("scores were broadcast to more axes before the softmax", softmax)
    place = axis % len(labels)
    if labels[place] is None or labels[place] not in scores.product.own:
        raise Declined(f"softmax over dimension {place - len(labels)} of the scores: it has to be "
                       "the axis of the keys", softmax)


def step(scores: Scores, node: fx.Node, operand: int, context: Context) -> Scores:
    """The scores behind one operator of the closed set; `operand` is where they enter it."""
    return STEPS[node.target][1](scores, node, operand, context)


Path = list[tuple[fx.Node, int]]


def _find(node: Any, context: Context, depth: int,
          known: dict[fx.Node, tuple[int, Path | None]]) -> Path | None:
    """Nodes from a product to this one, each with the operand that comes from the one before.

    `known`: what was found from a node at a depth; a search from nearer may find more.
    """
    if not isinstance(node, fx.Node) or node.op != "call_function" or depth > DEEPEST:
        return None
    before, path = known.get(node, (DEEPEST + 1, None))
    if before > depth:
        path = _best_path(node, context, depth, known)
        known[node] = (depth, path)
    return path


def _best_path(node: fx.Node, context: Context, depth: int,
               known: dict[fx.Node, tuple[int, Path | None]]) -> Path | None:
    found = next(iter(readings(node)), None)
    if found is not None and {found.left, found.right} <= context.activations:
        return [(node, 0)]
    paths = []
    for operand in STEPS[node.target][0] if _may_be_scores(node) else ():
        path = _find(operand_of(node, operand), context, depth + 1, known)
        if path is not None:
            paths.append([*path, (node, operand)])
    if found is not None and {found.left, found.right} & context.activations:
        paths.append([(node, 0)])
    return min(paths, key=lambda p: (not _two_activations(p[0][0], context), len(p)), default=None)


def _may_be_scores(node: fx.Node) -> bool:
    """Whether to look behind a node: what mixes heads has axes of heads, queries and keys."""
    return node.target in STEPS and (node.target not in MIXES or len(shape_of(node)) > 2)


def operand_of(node: fx.Node, operand: int) -> Any:
    """An argument that scores may enter by; those of cat and einsum stand in a list."""
    if node.target in (aten.cat.default, aten.einsum.default):
        tensors = node.args[0] if node.target is aten.cat.default else node.args[1]
        return tensors[operand] if operand < len(tensors) and len(tensors) == 2 else None
    return node.args[operand] if operand < len(node.args) else None


def _two_activations(node: fx.Node, context: Context) -> bool:
    return any({p.left, p.right} <= context.activations for p in readings(node))


def _scale(scores: Scores, node: fx.Node, operand: int, context: Context) -> Scores:
    divided = node.target in (aten.div.Tensor, aten.div.Scalar)
    other = node.args[1 - operand]
    factor = number(context.graph_module, other)
    if factor is None:
        return _gain(scores, node, other, divided)
    return _scaled(scores, node, 1 / factor if divided and factor else factor)


def _negated(scores: Scores, node: fx.Node, operand: int, context: Context) -> Scores:
    return _scaled(scores, node, -1.0)


def _scaled(scores: Scores, node: fx.Node, factor: float) -> Scores:
    if factor == 0 or not math.isfinite(factor):
        raise Declined(f"the scores are scaled by {factor}", node)
    if factor < 0 and (scores.masks or scores.late or scores.clamped):
        raise Declined("masked or clamped scores change their sign", node)

    def times(number: float | None) -> float | None:
        return None if number is None else number * factor

    def all_times(terms: tuple[Term, ...]) -> tuple[Term, ...]:
        return tuple(dataclasses.replace(t, factor=t.factor * factor) for t in terms)

    if scores.sink is not None:
        raise Declined("the scores are scaled after a sink was joined", node)
    return dataclasses.replace(
        scores, factor=scores.factor * factor, softcap=times(scores.softcap),
        terms=all_times(scores.terms), low=times(scores.low), high=times(scores.high),
        fill=times(scores.fill), late=all_times(scores.late), offset=scores.offset * factor)


def _gain(scores: Scores, node: fx.Node, other: Any, divided: bool) -> Scores:
    if scores.terms or scores.masks or scores.late:
        raise Declined("a tensor scales the scores after a mask was applied", node)
    if scores.mixing or scores.softcap or scores.clamped or scores.offset or scores.sink:
        raise Declined("a tensor scales the scores after they were changed otherwise", node)
    term = Term(other, scores.place, divides=divided)
    return dataclasses.replace(scores, gains=(*scores.gains, term))


def _add(scores: Scores, node: fx.Node, operand: int, context: Context) -> Scores:
    found = arguments(node)
    other, alpha = node.args[1 - operand], float(found.get("alpha", 1))
    own, others = 1.0, -alpha if node.target is aten.sub.Tensor else alpha
    if operand == 1:
        own, others = others, own
    scores = scores if own == 1 else _scaled(scores, node, own)
    constant = number(context.graph_module, other)
    if constant is not None:
        return _shifted(scores, node, constant * others)
    if not is_tensor(other):
        raise Declined("a number that is not known is added to the scores", node)
    return _with_term(scores, node, Term(other, scores.place, others))


def _shifted(scores: Scores, node: fx.Node, constant: float) -> Scores:
    if not math.isfinite(constant):
        raise Declined(f"{constant} is added to the scores", node)
    if scores.sink is not None:
        raise Declined("a number is added after a sink was joined", node)
    return dataclasses.replace(scores, offset=scores.offset + constant)


def _with_term(scores: Scores, node: fx.Node, term: Term) -> Scores:
    if scores.sink is not None:
        raise Declined("a tensor is added after a sink was joined", node)
    if scores.clamped or scores.late or (scores.masks and scores.fill is not None):
        return dataclasses.replace(scores, late=(*scores.late, term))
    return dataclasses.replace(scores, terms=(*scores.terms, term))


def _mask(scores: Scores, node: fx.Node, mask: fx.Node, fill: Any, inverted: bool,
          context: Context) -> Scores:
    found = number(context.graph_module, fill)
    if found is None or math.isnan(found) or found == math.inf:
        raise Declined("masked scores are given values of a tensor", node)
    if scores.sink is not None:
        raise Declined("a mask is applied after a sink was joined", node)
    value = None if found == -math.inf else found - scores.offset
    term = Term(mask, scores.place, inverted=inverted)
    if not scores.late and (not scores.masks or scores.fill == value):
        return dataclasses.replace(scores, masks=(*scores.masks, term), fill=value)
    if value is None:
        hidden = dataclasses.replace(term, hides=True)
        return dataclasses.replace(scores, late=(*scores.late, hidden))
    if scores.fill is None and not scores.late and not scores.clamped:
        hidden_terms = tuple(dataclasses.replace(m, hides=True) for m in scores.masks)
        return dataclasses.replace(scores, terms=(*scores.terms, *hidden_terms), masks=(term,),
                                   fill=value)
    raise Declined("two masks with different finite values", node)


def _masked_fill(scores: Scores, node: fx.Node, operand: int, context: Context) -> Scores:
    return _mask(scores, node, node.args[1], node.args[2], True, context)


def _where(scores: Scores, node: fx.Node, operand: int, context: Context) -> Scores:
    return _mask(scores, node, node.args[0], node.args[3 - operand], operand == 2, context)


def _tanh(scores: Scores, node: fx.Node, operand: int, context: Context) -> Scores:
    if scores.terms or scores.masks or scores.late or scores.clamped or scores.offset \
            or scores.softcap is not None or scores.sink:
        raise Declined("tanh of scores that were masked or changed otherwise", node)
    return dataclasses.replace(scores, softcap=1.0)


def _clamp(scores: Scores, node: fx.Node, operand: int, context: Context) -> Scores:
    found = arguments(node)
    if node.target in (*_MAXIMA, *_MINIMA):
        bound = node.args[1 - operand]
        limits = (bound, None) if node.target in _MAXIMA else (None, bound)
    else:
        names = ("min_val", "max_val") if "min_val" in found else ("min", "max")
        limits = (found.get(names[0]), found.get(names[1]))
    low, high = (None if n is None else number(context.graph_module, n) for n in limits)
    if (low is None) != (limits[0] is None) or (high is None) != (limits[1] is None):
        raise Declined("the scores are clamped to values of a tensor", node)
    if scores.clamped or scores.masks or scores.late or scores.sink:
        raise Declined("masked scores are clamped, or scores are clamped twice", node)
    low, high = (None if n is None else n - scores.offset for n in (low, high))
    return dataclasses.replace(scores, low=low, high=high)


_MAXIMA = (aten.maximum.default, aten.max.other)
_MINIMA = (aten.minimum.default, aten.min.other)


def _join(scores: Scores, node: fx.Node, operand: int, context: Context) -> Scores:
    """A sink: one more score for each row, behind the others."""
    axis = arguments(node)["dim"] % len(shape_of(node))
    other = node.args[0][1 - operand]
    if operand != 0 or scores.place.labels[axis] not in scores.product.own \
            or not equal(shape_of(other)[axis], 1) or scores.sink is not None:
        raise Declined("the scores are joined with others", node)
    if scores.offset:
        raise Declined("a number was added to the scores before a sink was joined", node)
    return dataclasses.replace(scores, sink=Term(other, scores.place))


def _cast(scores: Scores, node: fx.Node, operand: int, context: Context) -> Scores:
    check_precision(scores, node)
    return scores


def check_precision(scores: Scores, node: fx.Node) -> None:
    """Raise if a node rounds to fewer bits than the product has: the operator would not."""
    before, after = value_of(scores.product.node).dtype, value_of(node).dtype
    if not after.is_floating_point or torch.finfo(after).eps > torch.finfo(before).eps:
        raise Declined(f"{before} is rounded to {after} between product and values", node)


def _move(scores: Scores, node: fx.Node, operand: int, context: Context) -> Scores:
    """The scores behind an operator that only moves or regroups axes."""
    before, after = shape_of(node.args[0]), shape_of(node)
    if len(before) != len(scores.place.labels):
        raise Declined("scores were broadcast to more axes before their axes are moved", node)
    if node.target is aten.expand.default:
        if len(before) != len(after) or not all(map(equal, before, after)):
            raise Declined("the scores are broadcast", node)
        return scores
    move = regrouping(before, after) if node.target in REGROUPS else permutation(
        before, _order(node, len(before)))
    return dataclasses.replace(scores, place=scores.place.after(move))


def _order(node: fx.Node, rank: int) -> tuple[int, ...]:
    if node.target is aten.permute.default:
        return tuple(node.args[1])
    pair = node.args[1:] if node.target is aten.transpose.int else (-2, -1)
    order = list(range(rank))
    order[pair[0]], order[pair[1]] = order[pair[1]], order[pair[0]]
    return tuple(order)


_Step = Callable[[Scores, fx.Node, int, Context], Scores]
# Operators that may stand between product and softmax: which argument the scores are, and how
# the operator is read.
STEPS: Mapping[Any, tuple[tuple[int, ...], _Step]] = {
    aten.mul.Tensor: ((0, 1), _scale), aten.mul.Scalar: ((0,), _scale),
    aten.div.Tensor: ((0,), _scale), aten.div.Scalar: ((0,), _scale),
    aten.neg.default: ((0,), _negated),
    aten.add.Tensor: ((0, 1), _add), aten.sub.Tensor: ((0, 1), _add),
    aten.masked_fill.Scalar: ((0,), _masked_fill), aten.masked_fill.Tensor: ((0,), _masked_fill),
    aten.where.self: ((1, 2), _where), aten.where.ScalarOther: ((1,), _where),
    aten.where.ScalarSelf: ((2,), _where),
    aten.tanh.default: ((0,), _tanh),
    aten.clamp.default: ((0,), _clamp), aten.clamp_min.default: ((0,), _clamp),
    aten.clamp_max.default: ((0,), _clamp), aten.hardtanh.default: ((0,), _clamp),
    **{target: ((0, 1), _clamp) for target in (*_MAXIMA, *_MINIMA)},
    aten.cat.default: ((0, 1), _join),
    **{target: (operands, mix) for target, operands in MIXES.items()},
    **{target: ((0,), _cast) for target in CASTS},
    **{target: ((0,), _move) for target in LAYOUTS},
}
