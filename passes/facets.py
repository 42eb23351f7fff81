"""Facets: what is known of an attention beside its parts: heads, scale, kind of mask, origins."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import fx

from bincompile.passes.axes import LAYOUTS, SPLITS
from bincompile.passes.graph import aten, is_tensor, shape_of
from bincompile.passes.masks import DROPPED, OPAQUE, Kept, Mask, verdict
from bincompile.passes.patterns import Context
from bincompile.passes.regions import NORMS
from bincompile.passes.scores import CASTS
from bincompile.passes.sizes import equal
from bincompile.passes.upstream import Upstream, heads_of, upstream

if TYPE_CHECKING:
    from bincompile.passes.emit_attention import Found
    from bincompile.passes.placed import Term

Facets = dict[str, Any]

ADDS = 2  # sums that a token may have gone through since another one split off


def of_softmax(found: Found, query: fx.Node, key: fx.Node, context: Context) -> dict[str, Any]:
    """What is known of an attention around a softmax."""
    first, scores = found.first, found.scores
    sides = (first.left_axes, first.right_axes)
    labels = sides if found.by_left else sides[::-1]
    sizes = dict(zip(first.axes, shape_of(first.node), strict=True))
    tokens = (sizes[found.query_label], sizes[found.key_label])
    features = shape_of(query)[labels[0].index(first.contracted)]
    batch = [[s for a, s in zip(names, shape_of(node), strict=True) if a in first.batch]
             for names, node in zip(labels, (query, key), strict=True)]

    def masks(terms: Iterable[Term]) -> list[Mask]:
        return [Mask.of(t, (t.axes[0], *found.oriented(t.axes)), tokens)
                for t in terms if t.axes is not None]

    hidden = scores.fill is None or scores.fill <= DROPPED
    hiding = [*(scores.masks if hidden else ()), *(t for t in scores.late if t.hides)]
    added = [*scores.terms, *(t for t in scores.late if not t.hides)]
    plain = (hidden or not scores.masks) and all(t.axes is not None for t in hiding)
    heads, origin, factor = _made((query, key, found.value), batch, features, context)
    return {
        **heads,
        "scale": scores.factor * factor,
        **_mask_facets(masks(added), masks(hiding), Kept() if plain else OPAQUE, context),
        **origin,
        "softcap": scores.softcap,
        "sink": scores.sink is not None,
        "mixing": scores.mixing is not None or found.mixing is not None,
        "masked_row": found.masked_row,
        "weights": found.need_weights,
    }


def of_operator(node: fx.Node, found: Mapping[str, Any], scale: float,
                context: Context) -> dict[str, Any]:
    """What is known of one call of torch's scaled_dot_product_attention."""
    query, key, value, given = (found[n] for n in ("query", "key", "value", "attn_mask"))
    rank, tokens = len(shape_of(query)), (shape_of(query)[-2], shape_of(key)[-2])
    corner = None if equal(*tokens) else "top-left"
    known = Kept(after=0, corner=corner) if found["is_causal"] else Kept()
    masks = [] if given is None else [Mask(given, (rank, rank - 2, rank - 1), tokens)]
    batch = [list(shape_of(n)[:-2]) for n in (query, key)]
    heads, origin, factor = _made((query, key, value), batch, shape_of(query)[-1], context)
    return {
        **heads,
        "scale": scale * factor,
        **_mask_facets([m for m in masks if not m.boolean], [m for m in masks if m.boolean],
                       known, context),
        **origin,
        "softcap": None,
        "sink": False,
        "mixing": False,
        "masked_row": "zero",
        "weights": False,
    }


def _mask_facets(added: Sequence[Mask], boolean: Sequence[Mask], known: Kept,
                 context: Context) -> dict[str, Any]:
    """The class of all masks together, and how many added terms are none.

    `known` is what is hidden without a tensor.
    """
    kept, forms, biases = known, set[str](), 0
    for mask in added:
        parts = list(_parts(mask, context))
        masks = [p for p in parts if p is not None]
        biases += len(parts) - len(masks) if masks else 1
        for found in masks:
            kept = kept & found
            forms |= {"additive"} if found != Kept() else set()
    for mask in boolean:
        found = verdict(mask, context) or OPAQUE
        kept = kept & found
        forms |= {"boolean"} if found != Kept() else set()
    return {
        "mask": kept.kind,
        "window": kept.window,
        "mask_form": "+".join(sorted(forms)) or None,
        "causal": kept.causal,
        "alignment": kept.corner,
        "bias": biases or None,
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


_MADE: weakref.WeakKeyDictionary[fx.GraphModule, dict[Any, tuple[Facets, Facets, float]]] = \
    weakref.WeakKeyDictionary()


def _made(nodes: Sequence[fx.Node], batch: Sequence[Sequence[Any]], features: Any,
          context: Context) -> tuple[Facets, Facets, float]:
    """Facets of heads and of origin, and the constants that query and key were multiplied by.

    Every stage that looks at a match again asks for them again: they are remembered by graph.
    """
    known = _MADE.setdefault(context.graph_module, {})
    asked = (*(n.name for n in nodes), str(batch), str(features))
    if asked not in known:
        made = [upstream(n, context) for n in nodes]
        known[asked] = (_head_facets(made, batch, features), _origin_facets(made),
                        made[0].factor * made[1].factor)
    return known[asked]


def _head_facets(made: Sequence[Upstream], batch: Sequence[Sequence[Any]],
                 features: Any) -> dict[str, Any]:
    """Heads of queries and of keys: from the width of a projection, else from the batch axes."""
    heads = heads_of(made[0], features) or _heads_by_axes(batch[0])
    kept = heads_of(made[1], features)
    return {
        "heads": heads,
        "kv_heads": kept if kept is not None or heads is None else _heads_by_axes(batch[1]),
        "head_dim": features if isinstance(features, int) else str(features),
    }


def _heads_by_axes(batch: Sequence[Any]) -> int | None:
    """The heads, where they have the one batch axis behind the first."""
    return batch[1] if len(batch) == 2 and isinstance(batch[1], int) else None


def _origin_facets(made: Sequence[Upstream]) -> dict[str, Any]:
    query, key, _ = made
    return {
        "rope": query.rope if query.rope == key.rope else None,
        "norm": _norm(query, key),
        "projection": _projection(made),
        "cross": _is_cross(query, key),
    }


def _norm(query: Upstream, key: Upstream) -> str | None:
    """The norm of queries and keys; one that both share is that of their source."""
    if query.norm is None or key.norm is None:
        return None
    (kind, node), (other, place) = query.norm, key.norm
    return kind if kind == other and node is not place else None


def _projection(made: Sequence[Upstream]) -> str | None:
    """How queries, keys and values are projected, where all that are projected are alike."""
    kinds = {m.projection for m in made if m.projection is not None}
    if kinds != {"linear"}:
        return "none" if not kinds else kinds.pop() if len(kinds) == 1 else None
    query, key, value = (m.end for m in made)
    if len({query, key, value}) == 3:
        return "separate"
    return "fused" if query is key is value else "fused kv" if key is value else None


def _is_cross(query: Upstream, key: Upstream) -> bool | None:
    """Whether the keys come from another source than the queries; None if that is not certain."""
    if query.source is key.source or _origins(query.source) & _origins(key.source):
        return False
    certain = all(m.projection is not None or m.end.op == "placeholder" for m in (query, key))
    return True if certain else None


def _origins(node: fx.Node) -> set[fx.Node]:
    """Where tokens come from: through layout, slices, norms and the sums of a few layers."""
    found, pending = set[fx.Node](), [(node, 0)]
    while pending:
        node, adds = pending.pop()
        if node in found or not isinstance(node, fx.Node):
            continue
        found.add(node)
        adds += node.target is aten.add.Tensor
        if node.target in _SAME_TOKENS and adds <= ADDS:
            pending += [(n, adds) for n in node.all_input_nodes if is_activation(n)]
    return found


def is_activation(node: fx.Node) -> bool:
    """Whether a node holds a tensor that was computed."""
    return node.op != "get_attr" and (is_tensor(node) or node.op == "call_function")


_SAME_TOKENS = (*LAYOUTS, *CASTS, *SPLITS, *NORMS, operator.getitem, aten.slice.Tensor,
                aten.select.int, aten.cat.default, aten.add.Tensor, aten.mul.Tensor,
                aten.rsqrt.default)
