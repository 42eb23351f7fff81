"""Look-ups: ids of tokens become rows of tables."""

from __future__ import annotations

from torch import fx

from bincompile.ops.binary_embedding import binary_embedding
from bincompile.ops.binary_embedding_bag import binary_embedding_bag
from bincompile.ops.embedding import embedding
from bincompile.ops.embedding_bag import embedding_bag
from bincompile.passes.graph import arguments, aten, is_tensor, value_of
from bincompile.passes.streaming.facts import Facts, settled
from bincompile.passes.streaming.kinds import Kind, Refused, Still, plain
from bincompile.passes.streaming.rule import Rule
from bincompile.passes.streaming.rules.features import check_plain
from bincompile.passes.streaming.rules.linear import emit


def _looked_up(node: fx.Node, facts: Facts) -> Kind:
    """(...) ids become (..., features)."""
    given = arguments(node)
    indices = given["indices"]
    if any(not isinstance(facts.kind(n), Still) for n in node.all_input_nodes if n is not indices):
        raise Refused("looks up in a table that changes with time")
    kind = settled(facts.kind(indices))
    found: Kind = kind.with_axes((*kind.axes, plain(facts.shape(node)[-1])))
    return found


def _bagged(node: fx.Node, facts: Facts) -> Kind:
    """(bags, ids) become (bags, features): each bag is of one token."""
    given = arguments(node)
    indices, weights = given["indices"], given["weights"]
    if given["offsets"] is not None or value_of(indices).ndim < 2:
        raise Refused("puts tokens into bags of any length", "bags of one size, as (bags, ids)")
    stored = [n for n in node.all_input_nodes if n not in (indices, weights)]
    if any(not isinstance(facts.kind(n), Still) for n in stored):
        raise Refused("looks up in a table that changes with time")
    kind = facts.joined([a for a in (indices, weights) if is_tensor(a)])
    check_plain(kind.axes, (len(kind.axes) - 1,), "sums the ids of tokens over time")
    found: Kind = kind.with_axes((*kind.axes[:-1], plain(facts.shape(node)[-1])))
    return found


look_up = Rule((embedding.overload, binary_embedding.overload, aten.embedding.default),
               _looked_up, emit)
bags = Rule((embedding_bag.overload, binary_embedding_bag.overload), _bagged, emit)
