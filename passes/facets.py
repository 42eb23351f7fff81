"""Facets: what is known of an attention beside its parts: heads, scale, kind of mask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import fx

from bincompile.passes.axes import LAYOUTS, Contraction, source
from bincompile.passes.graph import aten, is_tensor, number, shape_of
from bincompile.passes.masks import DROPPED, OPAQUE, Kept, Mask, verdict
from bincompile.passes.patterns import Context
from bincompile.passes.scores import CASTS, Term
from bincompile.passes.sizes import equal

if TYPE_CHECKING:
    from bincompile.passes.attention import Found


def of_softmax(found: Found, query: fx.Node, key: fx.Node, context: Context) -> dict[str, Any]:
    """What is known of an attention around a softmax."""
    first, scores = found.first, found.scores
    axes = first.left_axes if found.by_left else first.right_axes
    features = shape_of(query)[axes.index(first.contracted)]
    own = found.oriented((0, *(first.axes.index(a) for a in first.own)))
    tokens = (shape_of(first.node)[own[0]], shape_of(first.node)[own[1]])

    def masks(terms: Iterable[Term]) -> list[Mask]:
        return [Mask.of(t, found.oriented(t.axes), tokens) for t in terms]

    hides = scores.fill is None or scores.fill <= DROPPED
    return {
        "heads": _heads(query, axes, first, features),
        "head_dim": features if isinstance(features, int) else str(features),
        "scale": scores.factor * _upstream(query, context) * _upstream(key, context),
        **_mask_facets(masks(scores.terms), masks(scores.masks), Kept(), hides, context),
        "masked_row": found.masked_row,
        "weights": found.need_weights,
    }


def _mask_facets(added: list[Mask], boolean: list[Mask], known: Kept, hides: bool,
                 context: Context) -> dict[str, Any]:
    """The class of all masks together, and how many added terms are none.

    Args:
        known: what is hidden without a tensor.
        hides: the boolean masks drop keys, and don't just give them another score.
    """
    kept, forms, biases = known, list[str](), 0
    for mask in added:
        parts = list(_parts(mask, context))
        verdicts = [v for v in parts if v is not None]
        biases += len(parts) - len(verdicts) if verdicts else 1
        for found in verdicts:
            kept = kept & found
            forms += ["additive"] * (found != Kept())
    for mask in boolean:
        proven = verdict(mask, context) if hides else OPAQUE
        kept = kept & (proven or OPAQUE)
        forms += ["boolean"] * (proven != Kept())
    return {
        "mask": kept.kind,
        "window": kept.window,
        "mask_form": "+".join(f for f in ("additive", "boolean") if f in forms) or None,
        "causal": kept.causal,
        "alignment": kept.corner,
        "bias": biases,
    }


def _parts(mask: Mask, context: Context) -> Iterable[Kept | None]:
    """The verdicts on an added term: on the whole if it is a mask, else on what it is a sum of."""
    whole = verdict(mask, context)
    node = mask.node
    if whole is None and node.target is aten.add.Tensor and not node.kwargs \
            and all(map(is_tensor, node.args)):
        for part in node.args:
            yield from _parts(Mask(part, mask.axes, mask.tokens, factor=mask.factor), context)
    else:
        yield whole


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
    rank = len(shape_of(query))
    rows, columns = shape_of(query)[-2], shape_of(key)[-2]
    corner = None if equal(rows, columns) else "top-left"
    known = Kept(after=0, corner=corner) if found["is_causal"] else Kept()
    masks = [] if given is None else [Mask(given, (rank, rank - 2, rank - 1), (rows, columns))]
    boolean = [m for m in masks if m.boolean]
    return {
        "heads": shape_of(query)[-3] if rank > 3 and isinstance(shape_of(query)[-3], int) else None,
        "head_dim": shape_of(query)[-1],
        "scale": scale * _upstream(query, context) * _upstream(key, context),
        **_mask_facets([m for m in masks if not m.boolean], boolean, known, True, context),
        "masked_row": "zero",
        "weights": False,
    }
