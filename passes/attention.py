"""Attention candidates: from a softmax, or from torch's own operator, to one `attention`."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from bincompile.ops.attention import attention
from bincompile.passes.axes import LAYOUTS, Contraction, readings, source
from bincompile.passes.emit_attention import (
    Found,
    emit,
    inputs_of,
    moves_of,
    plain_axes,
    total_trail,
)
from bincompile.passes.facets import of_operator, of_softmax
from bincompile.passes.graph import aten, depends, number, shape_of, users, value_of
from bincompile.passes.heads import Shared, shared_heads
from bincompile.passes.mixing import MIXES, mixing_of
from bincompile.passes.patterns import Candidate, Context, owner_of
from bincompile.passes.placed import Declined, Mixing, NoScores, Place, Scores
from bincompile.passes.scores import CASTS, check_precision, read_scores, step
from bincompile.passes.sizes import equal
from bincompile.passes.trail import plan_of

Values = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Softmax:
    """A softmax as it is spelled.

    Args:
        node: where the probabilities are, or where they would be but for their sums.
        scores: what it is taken of.
        axis: the axis that it is taken over.
        masked_row: what a row of -inf alone gives.
        totals: sums that the product with the values is divided by, where the probabilities are
            not; with the node of that division.
        overflows: exp is taken of the scores as they are.
    """

    node: fx.Node
    scores: fx.Node
    axis: int
    masked_row: str = "nan"
    totals: tuple[fx.Node, fx.Node] | None = None
    overflows: bool = False


def around_softmax(softmax: Softmax, context: Context) -> Candidate | None:
    """The candidate around a softmax; None if there is no product before it."""
    node = softmax.node
    try:
        read = read_scores(softmax.scores, node, softmax.axis, context)
    except NoScores:
        read = None
    if read is None:
        return None
    scores, path = read
    check_precision(scores, node)
    labels = scores.place.labels
    by_left = labels[softmax.axis % len(labels)] == scores.product.own[1]
    query, key = _operands(scores.product, by_left)
    if key not in context.activations:
        raise Declined("the softmax is not over a product of two computed tensors: the keys are "
                       "stored weights", path[0])
    _check_features(scores.product, context)
    found = _find_values(softmax, scores, by_left, context)
    if found.value not in context.activations:
        raise Declined("the values are stored weights, not computed from an input",
                       found.product.node)
    found = dataclasses.replace(found, shared=_shared(found, key))
    inputs, found = _with_sizes(found, query, key)
    attrs = of_softmax(found, query, key, context)
    if softmax.overflows:
        attrs = {**attrs, "overflows": True}
    outputs = (found.result, *(found.weights or ())[:1])
    return Candidate("attention", softmax.node, inputs, outputs,
                     lambda build, values: emit(found, build, values), attrs,
                     owner_of((path[0], node, found.product.node)))


def _operands(product: Contraction, by_left: bool) -> tuple[fx.Node, fx.Node]:
    return (product.left, product.right) if by_left else (product.right, product.left)


def _check_features(product: Contraction, context: Context) -> None:
    """Attention sums over features; channel attention sums over tokens and is something else."""
    for node, axes in ((product.left, product.left_axes), (product.right, product.right_axes)):
        origin, axis = source(node, axes.index(product.contracted))
        features = _features_of(origin, context)
        if features and axis not in features:
            raise Declined("query and key are multiplied over tokens, not over features",
                           product.node)


_FEATURE_AXIS = {aten.linear.default: -1, aten.conv1d.default: 1, aten.conv2d.default: 1,
                 aten.conv3d.default: 1}


def _features_of(projection: fx.Node, context: Context) -> set[int]:
    """The axes of a product with stored weights that the weights bring; empty for anything else."""
    if projection.target in _FEATURE_AXIS:
        return {_FEATURE_AXIS[projection.target] % len(shape_of(projection))}
    found = set()
    for product in readings(projection):
        for side, operand in enumerate((product.left, product.right)):
            if operand not in context.activations:
                found.add(product.axes.index(product.own[side]))
    return found


@dataclasses.dataclass(frozen=True)
class _Probabilities:
    """The probabilities on their way to the values."""

    node: fx.Node
    at: Scores
    row: str
    shared: tuple[fx.Node, Place] | None = None  # the first node that has several readers
    coarsest: float = 0.0  # the largest relative rounding of a cast
    changed: fx.Node | None = None  # the last node that changed them
    mixing: Mixing | None = None


def _find_values(softmax: Softmax, scores: Scores, by_left: bool, context: Context) -> Found:
    """Follow the probabilities to the product that sums over the keys."""
    reason = Declined("no product with values follows the softmax", softmax.node)
    pending = [_Probabilities(softmax.node, scores, softmax.masked_row)]
    while pending:
        now = pending.pop()
        reads = [n for n in users(now.node) if softmax.totals is None or n not in softmax.totals]
        if now.shared is None and len(reads) > 1:
            now = dataclasses.replace(now, shared=(now.node, now.at.place))
        for user in (n for n in reads if n.op != "output"):
            try:
                found = _next(now, user, softmax, scores, by_left, context)
            except Declined as declined:
                reason = declined
                continue
            if isinstance(found, Found):
                return found
            pending.append(found)
    raise reason


def _next(now: _Probabilities, user: fx.Node, softmax: Softmax, scores: Scores, by_left: bool,
          context: Context) -> Found | _Probabilities:
    operand = next((i for i, n in enumerate(user.all_input_nodes) if n is now.node), 0)
    if user.target is aten.mul.Tensor and len(user.users) == 1:
        user = next(iter(user.users)) if readings(next(iter(user.users))) else user
    both = [r for r in readings(user) if {r.left, r.right} <= context.activations]
    if both:
        return _at_values(user, both, now, softmax, scores, by_left)
    if user.target in CASTS:
        if value_of(user).dtype.is_floating_point:
            rounding = torch.finfo(value_of(user).dtype).eps
            return dataclasses.replace(now, node=user, coarsest=max(now.coarsest, rounding))
        raise Declined("the probabilities are rounded to whole numbers", user)
    if user.target in LAYOUTS:
        return dataclasses.replace(now, node=user, at=step(now.at, user, 0, context))
    if user.target is aten.nan_to_num.default and not any(user.args[1:2]):
        return dataclasses.replace(now, node=user, row="zero", changed=user)
    if user.target is aten.slice.Tensor and _drops_sink(now, user):
        return dataclasses.replace(now, node=user, changed=user)
    if user.target in _FILLS and _hides_again(now, user, context):
        return dataclasses.replace(now, node=user, row="hidden", changed=user)
    if user.target in MIXES and now.mixing is None:
        return dataclasses.replace(now, node=user, changed=user,
                                   mixing=mixing_of(now.at, user, operand, context))
    raise Declined(f"{user.target} changes the probabilities", user)


_FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self, aten.where.ScalarOther)


def _hides_again(now: _Probabilities, user: fx.Node, context: Context) -> bool:
    """Whether probabilities are set to 0 where the one mask of the scores hides a key."""
    filled = user.target in _FILLS[:2]
    mask, value = (user.args[1], user.args[2]) if filled else (user.args[0], user.args[2])
    terms = now.at.masks
    return number(context.graph_module, value) == 0 and len(terms) == 1 and now.row == "nan" \
        and terms[0].node is mask and terms[0].inverted == filled \
        and terms[0].place == now.at.place


def _drops_sink(now: _Probabilities, user: fx.Node) -> bool:
    """Whether a slice leaves out the last score, which the sink has."""
    axis, start = (*list(user.args[1:3]), 0)[:2]
    labels = now.at.place.labels
    before, after = shape_of(now.node), shape_of(user)
    return now.at.sink is not None and start in (0, None) and labels[axis] in now.at.product.own \
        and equal(before[axis], after[axis] + 1)


def _at_values(user: fx.Node, products: list[Contraction], now: _Probabilities, softmax: Softmax,
               scores: Scores, by_left: bool) -> Found:
    reason = Declined("the probabilities are multiplied by themselves or scaled", user)
    for product in products:
        if (product.left is now.node) == (product.right is now.node) or product.added \
                or product.factor != 1:
            continue
        is_left = product.left is now.node
        axes = product.left_axes if is_left else product.right_axes
        found = Found(scores, by_left, softmax.node, product, now.at.place, is_left,
                      now.row, now.shared, user, now.mixing)
        labels = now.at.place.labels
        if len(axes) != len(labels) or not {found.query_label, found.key_label} <= set(labels):
            reason = Declined("the axes of query and key are mixed with others", user)
            continue
        query, key = labels.index(found.query_label), labels.index(found.key_label)
        if axes[key] != product.contracted or axes[query] != product.own[not is_left]:
            reason = Declined("the product after the softmax doesn't sum over the axis that the "
                              "softmax normalises", user)
            continue
        _check_shared(found, now, softmax)
        if softmax.totals is not None:
            return _divided(found, softmax)
        return found
    raise reason


def _check_shared(found: Found, now: _Probabilities, softmax: Softmax) -> None:
    if now.at.sink is not None and (now.changed is None or now.changed.target in MIXES):
        raise Declined("the sink takes part in the product with the values", found.product.node)
    dtype = value_of(found.value).dtype
    if value_of(now.node).dtype != dtype or now.coarsest > torch.finfo(dtype).eps:
        raise Declined(f"probabilities are rounded to less than {dtype}, which the values have",
                       found.product.node)
    if now.shared is None:
        return
    node = now.shared[0]
    if now.changed is not None and node is not now.node:
        raise Declined("the probabilities are read before they were changed", node)
    if value_of(node).dtype != dtype:
        raise Declined("the probabilities are read in another dtype than the values", node)
    if depends(found.value, node):
        raise Declined("the values are computed from the probabilities", found.product.node)


def _divided(found: Found, softmax: Softmax) -> Found:
    """The probabilities are normalised only behind the product with the values."""
    assert softmax.totals is not None
    if found.weights is not None:
        raise Declined("the powers are read before they are normalised", softmax.node)
    return dataclasses.replace(found, result=softmax.totals[1])


def _shared(found: Found, key: fx.Node) -> tuple[Shared, Shared] | None:
    """Keys and values before both are repeated along the axis of heads; None if they are not."""
    both, plain = (shared_heads(key), shared_heads(found.value)), plain_axes(found)
    if both[0] is None or both[1] is None or plain is None or not found.first.batch \
            or both[0].groups != both[1].groups or found.scores.mixing is not None:
        return None
    key_axes = found.first.right_axes if found.by_left else found.first.left_axes
    heads = (key_axes[both[0].axis], found.value_axes[1][both[1].axis])
    return (both[0], both[1]) if heads == (found.first.batch[-1], plain[-1]) else None


def _with_sizes(found: Found, query: fx.Node, key: fx.Node) -> tuple[dict[str, fx.Node], Found]:
    """The inputs, and the attention with a plan for every size that it writes."""
    inputs = dict(inputs_of(found, query, key))
    for term in found.scores.tensors:
        if len(shape_of(term.node)) > len(term.place.labels) and total_trail(found, term.place):
            raise Declined("a tensor broadcasts scores whose axes are reordered", term.node)
    try:
        plan, sizes = plan_of(inputs, moves_of(found))
    except KeyError as error:
        raise Declined(f"axes of the scores are regrouped by the size {error.args[0]}, which is "
                       "not in the graph", found.product.node) from error
    return {**inputs, **sizes}, dataclasses.replace(found, plan=plan)


def _repeated(build: Any, query: Any, *others: Any) -> list[Any]:
    """Keys and values with each head repeated for its group of query heads."""
    repeated = []
    for tensor in others:
        heads, kept = build.size(query, -3), build.size(tensor, -3)
        both = isinstance(heads, int) and isinstance(kept, int)
        groups = heads // kept if both else build.call(operator.floordiv, heads, kept)
        repeated.append(build.call(aten.repeat_interleave.self_int, tensor, groups, -3))
    return repeated


def around_operator(node: fx.Node, found: Mapping[str, Any], context: Context) -> Candidate:
    """The candidate for one call of torch's scaled_dot_product_attention."""
    query, key, value, given = (found[n] for n in ("query", "key", "value", "attn_mask"))
    if found["dropout_p"]:
        raise Declined(f"dropout of {found['dropout_p']} in attention", node)
    features, scale = shape_of(query)[-1], found["scale"]
    if scale is None and not isinstance(features, int):
        raise Declined("the scale depends on a symbolic size", node)
    scale = 1 / math.sqrt(features) if scale is None else float(scale)
    is_mask = given is not None and value_of(given).dtype.is_floating_point is False
    inputs = {"query": query, "key": key, "value": value}
    if given is not None:
        inputs["mask_0" if is_mask else "bias_0"] = given
    heads = [shape_of(t)[-3] for t in (query, key, value)] if found.get("enable_gqa") else []
    fixed = all(isinstance(h, int) for h in heads) and len(set(heads[1:])) <= 1

    def emit_call(build: Any, values: Values) -> tuple[Any, ...]:
        tensors = [values["query"], values["key"], values["value"]]
        if heads and not fixed:
            tensors[1:] = _repeated(build, *tensors)
        groups = {"groups": heads[0] // heads[1]} if heads and fixed else {}
        pair = build.call(attention.overload, *tensors, values.get("bias_0"),
                          values.get("mask_0"), scale, causal=bool(found["is_causal"]),
                          masked_row="zero", **groups)
        return (build.item(pair, 0),)

    return Candidate("attention", node, inputs, (node,), emit_call,
                     of_operator(node, found, scale, context), owner_of((node,)))
