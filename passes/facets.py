"""Facets: what is known of an attention beside its parts: heads, scale, kind of mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from bincompile.passes.axes import LAYOUTS, Contraction, source
from bincompile.passes.graph import aten, is_tensor, number, shape_of, value_of
from bincompile.passes.masks import is_causal
from bincompile.passes.patterns import Context
from bincompile.passes.scores import CASTS

if TYPE_CHECKING:
    from bincompile.passes.attention import Found


def of_softmax(found: Found, query: fx.Node, key: fx.Node, context: Context) -> dict[str, Any]:
    """What is known of an attention around a softmax."""
    first, scores = found.first, found.scores
    axes = first.left_axes if found.by_left else first.right_axes
    features = shape_of(query)[axes.index(first.contracted)]
    masks = ("additive" if scores.terms else "", "boolean" if scores.masks else "")
    return {
        "heads": _heads(query, axes, first, features),
        "head_dim": features if isinstance(features, int) else str(features),
        "scale": scores.factor * _upstream(query, context) * _upstream(key, context),
        "mask": "+".join(m for m in masks if m) or "none",
        "causal": any(is_causal(t.node, context, t.inverted)
                      for t in (*scores.terms, *scores.masks)),
        "masked_row": found.masked_row,
        "weights": found.need_weights,
    }


def _heads(query: fx.Node, axes: tuple[str, ...], first: Contraction, features: Any) -> int | None:
    """The number of heads, where a batch axis of its own or the projection's width tells it."""
    batch = [shape_of(query)[axes.index(a)] for a in first.batch if a in axes]
    if len(batch) >= 2:
        return next((s for s in reversed(batch) if isinstance(s, int)), None)
    origin, axis = source(query, axes.index(first.contracted))
    width = shape_of(origin)[axis]
    if isinstance(width, int) and isinstance(features, int) and width % features == 0:
        return width // features
    return None


def _upstream(node: fx.Node, context: Context) -> float:
    """The constant factors that query or key were scaled by before the product."""
    factor = 1.0
    while node.op == "call_function" and is_tensor(node):
        if node.target in (aten.mul.Tensor, aten.div.Tensor):
            found = number(context.graph_module, node.args[1])
            if not found:
                break
            factor *= found if node.target is aten.mul.Tensor else 1 / found
        elif node.target not in (*LAYOUTS, *CASTS):
            break
        node = node.args[0]
    return factor


def of_operator(node: fx.Node, found: Mapping[str, Any], scale: float,
                context: Context) -> dict[str, Any]:
    """What is known of one call of torch's scaled_dot_product_attention."""
    query, key, given = (found[n] for n in ("query", "key", "attn_mask"))
    is_mask = given is not None and value_of(given).dtype == torch.bool
    rank = len(shape_of(query))
    return {
        "heads": shape_of(query)[-3] if rank > 3 and isinstance(shape_of(query)[-3], int) else None,
        "head_dim": shape_of(query)[-1],
        "scale": scale * _upstream(query, context) * _upstream(key, context),
        "mask": "none" if given is None else "boolean" if is_mask else "additive",
        "causal": bool(found["is_causal"]) or (
            given is not None and is_causal(given, context, False)),
        "masked_row": "zero",
        "weights": False,
    }
