"""Attention candidates: from a softmax, or from torch's own operator, to one `attention`."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from bincompile.ops.attention import attention
from bincompile.passes.axes import LAYOUTS, Contraction, contraction, source
from bincompile.passes.facets import of_operator, of_softmax
from bincompile.passes.graph import aten, depends, shape_of, users, value_of
from bincompile.passes.patterns import Candidate, Context, owner_of
from bincompile.passes.scores import (
    CASTS,
    Declined,
    Scores,
    Term,
    check_precision,
    read_scores,
    step,
)

Values = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Found:
    """The parts of an attention around a softmax; `by_left`: the queries are the left operand."""

    scores: Scores
    by_left: bool
    softmax: fx.Node
    product: Contraction  # with the values
    at_values: Scores  # axes of the probabilities where they meet the values
    probabilities_left: bool
    need_weights: bool
    masked_row: str

    @property
    def places(self) -> tuple[Scores | Term, ...]:
        """Everything that has axes of its own."""
        return (self.scores, self.at_values, *self.scores.terms, *self.scores.masks)

    @property
    def first(self) -> Contraction:
        """The product of query and key."""
        return self.scores.product

    def oriented(self, axes: tuple[int, int, int]) -> tuple[int, int]:
        """Where the queries and the keys stand."""
        _, left, right = axes
        return (left, right) if self.by_left else (right, left)


def around_softmax(softmax: fx.Node, axis: int, masked_row: str,
                   context: Context) -> Candidate | None:
    """The candidate around a softmax over `axis`; None if there is no product before it."""
    read = read_scores(softmax.args[0], context)
    if read is None:
        return None
    scores, path = read
    check_precision(scores, softmax)
    rank, left, right = scores.axes
    if axis % rank not in (left, right):
        raise Declined(f"softmax over dimension {axis % rank - rank} of the scores: it has to be "
                       "the axis of the keys", softmax)
    by_left = axis % rank == right
    query, key = _operands(scores.product, by_left)
    if key not in context.activations:
        raise Declined("the keys are stored weights, not computed from an input", path[0])
    _check_features(scores.product, query, key)
    found = _find_values(softmax, scores, by_left, masked_row, context)
    value = _value(found)
    if value not in context.activations:
        raise Declined("the values are stored weights, not computed from an input",
                       found.product.node)
    return Candidate("attention", softmax, dict(_inputs(found, query, key, value)),
                     (found.product.node, *([softmax] if found.need_weights else [])),
                     lambda build, values: _emit(found, build, values),
                     of_softmax(found, query, key, context),
                     owner_of((path[0], softmax, found.product.node)))


def _operands(product: Contraction, by_left: bool) -> tuple[fx.Node, fx.Node]:
    return (product.left, product.right) if by_left else (product.right, product.left)


def _value(found: Found) -> fx.Node:
    return found.product.right if found.probabilities_left else found.product.left


def _check_features(product: Contraction, query: fx.Node, key: fx.Node) -> None:
    """Attention sums over features; channel attention sums over tokens and is something else."""
    for node, axes in ((product.left, product.left_axes), (product.right, product.right_axes)):
        origin, axis = source(node, axes.index(product.contracted))
        if origin.target is aten.linear.default and axis != len(shape_of(origin)) - 1:
            raise Declined("query and key are multiplied over tokens, not over features",
                           product.node)


def _find_values(softmax: fx.Node, scores: Scores, by_left: bool, masked_row: str,
                 context: Context) -> Found:
    """Follow the probabilities to the product that sums over the keys."""
    reason = Declined("no product with values follows the softmax", softmax)
    pending: list[tuple[fx.Node, Scores, str, bool]] = [(softmax, scores, masked_row, False)]
    while pending:
        node, at, row, shared = pending.pop()
        reads = list(users(node))
        shared = shared or len(reads) > 1
        for user in reads:
            product = contraction(user)
            if product is not None:
                found = _at_values(user, product, node, at, softmax, scores, by_left, row, shared)
                if isinstance(found, Found):
                    return found
                reason = found
            elif user.target in (*LAYOUTS, *CASTS):
                try:
                    pending.append((user, step(at, user, 0, context), row, shared))
                except Declined as declined:
                    reason = declined
            elif user.target is aten.nan_to_num.default and not any(user.args[1:2]):
                pending.append((user, at, "zero", shared))
            else:
                reason = Declined(f"{user.target} changes the probabilities", user)
    raise reason


def _at_values(user: fx.Node, product: Contraction, node: fx.Node, at: Scores, softmax: fx.Node,
               scores: Scores, by_left: bool, row: str, shared: bool) -> Found | Declined:
    if (product.left is node) == (product.right is node) or product.added or product.factor != 1:
        return Declined("the probabilities are multiplied by themselves or scaled", user)
    is_left = product.left is node
    axes = product.left_axes if is_left else product.right_axes
    found = Found(scores, by_left, softmax, product, at, is_left, shared, row)
    query, key = found.oriented(at.axes)
    if axes[key] != product.contracted or axes[query] != product.own[not is_left]:
        return Declined("the product after the softmax doesn't sum over the axis that the softmax "
                        "normalises", user)
    if shared and value_of(softmax).dtype != value_of(_value(found)).dtype:
        return Declined("the probabilities are read in another dtype than the values", softmax)
    if shared and depends(_value(found), softmax):
        return Declined("the values are computed from the probabilities", user)
    canonical = (*scores.product.batch, *scores.product.own)
    if scores.learned and (scores.product.axes != canonical or not by_left):
        return Declined("a tensor scales scores whose axes are reordered", user)
    return found


def _inputs(found: Found, query: fx.Node, key: fx.Node, value: fx.Node,
            ) -> Iterator[tuple[str, fx.Node]]:
    yield from (("query", query), ("key", key), ("value", value))
    scores = found.scores
    groups = (("bias", [t.node for t in scores.terms]), ("mask", [t.node for t in scores.masks]),
              ("factor", [node for node, _ in scores.learned]))
    for role, nodes in groups:
        yield from ((f"{role}_{i}", node) for i, node in enumerate(nodes))
    sizes = {s for at in found.places for s in at.sizes or () if isinstance(s, fx.Node)}
    yield from ((f"size_{s.name}", s) for s in sizes)


def _emit(found: Found, build: Any, values: Values) -> tuple[Any, ...]:
    first, scores = found.first, found.scores
    left = arrange(build, values["query" if found.by_left else "key"], first.left_axes,
                   (*first.batch, first.own[0], first.contracted))
    right = arrange(build, values["key" if found.by_left else "query"], first.right_axes,
                    (*first.batch, first.own[1], first.contracted))
    query, key = (left, right) if found.by_left else (right, left)
    for index, (_, divided) in enumerate(scores.learned):
        scaling = aten.div.Tensor if divided else aten.mul.Tensor
        query = build.call(scaling, query, values[f"factor_{index}"])
    full = _full_shape(found, build, query, key)
    bias = _bias(found, build, values, full)
    mask = _mask(found, build, values, full)
    value = _value_layout(found, build, values, full)
    pair = build.call(attention.overload, query, key, value, bias, mask, scores.factor,
                      fill=scores.fill if scores.masks else None, masked_row=found.masked_row,
                      need_weights=found.need_weights)
    out = _out_layout(found, build, values, build.item(pair, 0))
    if not found.need_weights:
        return (out,)
    return out, _back(found, build, values, build.item(pair, 1), scores)


def arrange(build: Any, node: Any, axes: tuple[str, ...], wanted: tuple[str, ...]) -> Any:
    """A tensor with its axes in the wanted order; axes that it lacks get size 1, but in front."""
    present = [a for a in wanted if a in axes]
    order = [axes.index(a) for a in present]
    if order != sorted(order):
        node = build.call(aten.permute.default, node, order)
    lead = next(i for i, a in enumerate(wanted) if a in axes)
    for index, label in enumerate(wanted[lead:]):
        if label not in axes:
            node = build.call(aten.unsqueeze.default, node, index)
    return node


def _full_shape(found: Found, build: Any, query: Any, key: Any) -> tuple[Any, ...] | None:
    """Sizes of the scores, asked for only where batch axes are regrouped."""
    if all(at.sizes is None for at in found.places):
        return None
    whole = query if len(build.shape(query)) >= len(build.shape(key)) else key
    return (*build.shape(whole)[:-2], build.size(query, -2), build.size(key, -2))


def _place(found: Found, build: Any, tensor: Any, term: Term, values: Values,
           full: tuple[Any, ...] | None) -> Any:
    """A tensor that broadcasts to the scores, brought to (batch axes, queries, keys)."""
    rank = term.axes[0]
    query, key = found.oriented(term.axes)
    if (query, key) != (rank - 2, rank - 1) or term.sizes is not None:
        for _ in range(rank - len(build.shape(tensor))):
            tensor = build.call(aten.unsqueeze.default, tensor, 0)
        sizes = None if term.sizes is None else _sizes(term.sizes, values)
        if sizes is not None:
            tensor = build.call(aten.expand.default, tensor, sizes)
        order = [*(i for i in range(rank) if i not in (query, key)), query, key]
        if order != sorted(order):
            tensor = build.call(aten.permute.default, tensor, order)
        if sizes is not None:
            tensor = build.call(aten.reshape.default, tensor, list(full or ()))
    return tensor


def _sizes(sizes: tuple[Any, ...], values: Values) -> list[Any]:
    return [values[f"size_{s.name}"] if isinstance(s, fx.Node) else s for s in sizes]


def _bias(found: Found, build: Any, values: Values, full: tuple[Any, ...] | None) -> Any:
    total = None
    for index, term in enumerate(found.scores.terms):
        tensor = values[f"bias_{index}"]
        if term.factor != 1:
            tensor = build.call(aten.mul.Tensor, tensor, term.factor)
        tensor = _place(found, build, tensor, term, values, full)
        total = tensor if total is None else build.call(aten.add.Tensor, total, tensor)
    return total


def _mask(found: Found, build: Any, values: Values, full: tuple[Any, ...] | None) -> Any:
    total = None
    for index, term in enumerate(found.scores.masks):
        tensor = values[f"mask_{index}"]
        if term.inverted:
            tensor = build.call(aten.logical_not.default, tensor)
        tensor = _place(found, build, tensor, term, values, full)
        total = tensor if total is None else build.call(aten.logical_and.default, total, tensor)
    return total


def _value_layout(found: Found, build: Any, values: Values, full: tuple[Any, ...] | None) -> Any:
    product, left = found.product, found.probabilities_left
    axes, probabilities = ((product.right_axes, product.left_axes) if left
                           else (product.left_axes, product.right_axes))
    value = arrange(build, values["value"], axes,
                    (*_batch(found, probabilities), product.contracted, product.own[left]))
    if found.at_values.sizes is not None:
        lead = _sizes(found.at_values.sizes, values)[:-2]
        rest = (build.size(value, -2), build.size(value, -1))
        value = build.call(aten.expand.default, value, [*lead, *rest])
        value = build.call(aten.reshape.default, value, [*(full or ())[:-2], *rest])
    return value


def _batch(found: Found, probabilities: tuple[str, ...]) -> tuple[str, ...]:
    own = found.oriented(found.at_values.axes)
    return tuple(a for i, a in enumerate(probabilities) if i not in own)


def _out_layout(found: Found, build: Any, values: Values, out: Any) -> Any:
    product, left = found.product, found.probabilities_left
    probabilities = product.left_axes if left else product.right_axes
    if found.at_values.sizes is not None:
        lead = _sizes(found.at_values.sizes, values)[:-2]
        out = build.call(aten.reshape.default, out,
                         [*lead, build.size(out, -2), build.size(out, -1)])
    axes = (*_batch(found, probabilities), product.own[not left], product.own[left])
    order = [axes.index(a) for a in product.axes if a in axes]
    if order != sorted(order):
        out = build.call(aten.permute.default, out, order)
    return out


def _back(found: Found, build: Any, values: Values, weights: Any, at: Scores) -> Any:
    """The probabilities from (batch axes, queries, keys) to the axes of the softmax."""
    rank = at.axes[0]
    query, key = found.oriented(at.axes)
    order = [*(i for i in range(rank) if i not in (query, key)), query, key]
    if at.sizes is not None:
        lead = _sizes(at.sizes, values)[:-2]
        weights = build.call(aten.reshape.default, weights,
                             [*lead, build.size(weights, -2), build.size(weights, -1)])
    if order != sorted(order):
        weights = build.call(aten.permute.default, weights, [order.index(i) for i in range(rank)])
    return weights


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
    is_mask = given is not None and value_of(given).dtype == torch.bool
    inputs = {"query": query, "key": key, "value": value}
    if given is not None:
        inputs["mask_0" if is_mask else "bias_0"] = given

    def emit(build: Any, values: Values) -> tuple[Any, ...]:
        tensors = [values["query"], values["key"], values["value"]]
        if found.get("enable_gqa"):
            tensors[1:] = _repeated(build, *tensors)
        pair = build.call(attention.overload, *tensors, values.get("bias_0"),
                          values.get("mask_0"), scale, causal=bool(found["is_causal"]),
                          masked_row="zero")
        return (build.item(pair, 0),)

    return Candidate("attention", node, inputs, (node,), emit,
                     of_operator(node, found, scale, context), owner_of((node,)))
