"""Attention in time: which class an attention is of, and what its result is once time passes."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

from torch import fx

from bincompile.passes.graph import activations, aten, is_tensor, value_of
from bincompile.passes.patterns import Context
from bincompile.passes.streaming.attention_forms import ATTENTIONS
from bincompile.passes.streaming.distances import Sight, moves_in_pairs, sight_of
from bincompile.passes.streaming.facts import Facts, settled
from bincompile.passes.streaming.kinds import (
    TIME,
    Axes,
    Indexed,
    Kind,
    Pairwise,
    Refused,
    Stepped,
    Still,
    Windowed,
    axis_size,
    parts_of,
    plain,
)
from bincompile.passes.upstream import upstream
from bincompile.program import owner

Bound = Mapping[str, Any]

WITHIN = "within one token"  # tokens are apart: what is attended to is an axis of one token
MEMORY = "static memory"
STREAM = "tokens of the stream"
POOL = "one query over the stream"  # that does not move with time
PARTS = ("query", "key", "value")
THIRD = ("attends for all tokens of the window to what another attention has mixed already: every "
         "layer between the first and the last would be computed anew at every step")


def attention_kind(node: fx.Node, bound: Bound, facts: Facts) -> tuple[Kind, Kind]:
    """The kinds of an attention's two results.

    Raises:
        Refused: it can't be had one token at a time.
    """
    if any(n.target is operator.getitem and n.args[1] == 1 and n.users for n in node.users):
        raise Refused("returns its weights, whose number grows with every token",
                      "need_weights=False")
    if bound.get("drop") is not None:
        raise Refused("drops shares of its attention by a tensor", "the model in eval mode")
    case = case_of(bound, facts)
    axes = axes_of(node, bound, facts)
    out = {WITHIN: _apart, MEMORY: _apart, STREAM: _stream, POOL: _pool}[case](
        node, bound, axes, facts)
    return out, Still((plain(0),))


def case_of(bound: Bound, facts: Facts) -> str:
    """Where query, key and value have time.

    Raises:
        Refused: not where an attention could be taken one token at a time.
    """
    places = [_place(facts.kind(bound[name])) for name in PARTS]
    query, key, value = places
    if "features" in places:
        raise Refused("multiplies queries and keys over time", "an attention over features")
    if "lead" in places:
        if "tokens" in places:
            raise Refused("attends to tokens that are apart in time and along another axis at once")
        return WITHIN
    if key != value:
        raise Refused("has keys that move with time and values that do not, or the other way round")
    if key is None:
        return MEMORY
    return STREAM if query == key else POOL


def _place(kind: Kind) -> str | None:
    if isinstance(kind, Indexed | Pairwise):
        raise Refused("attends to positions alone, not to tokens")
    axis = kind.time_axis
    if axis is None:
        return None
    behind = len(kind.axes) - axis
    if behind == 2 and len(kind.axes[axis]) > 1:
        raise Refused("attends to tokens and to another axis that is merged with them")
    return {1: "features", 2: "tokens"}.get(behind, "lead")


def axes_of(node: fx.Node, bound: Bound, facts: Facts) -> Axes:
    """What the axes of the result hold.

    Raises:
        Refused: keys or values have axes in front that the queries lack.
    """
    query, value = facts.kind(bound["query"]), facts.kind(bound["value"])
    axes = (*query.axes[:-1], value.axes[-1])
    sizes = tuple(map(facts.size, value_of(node)[0].shape))
    both = (*axes[:-1], value.axes[-1]), value.axes
    padded = [((),) * (len(sizes) - len(found)) + found for found in both]
    lead = [own if axis_size(own) == size else other
            for own, other, size in zip(*padded, sizes, strict=True)]
    if [axis_size(axis) for axis in lead] != list(sizes):
        raise Refused("has keys or values of heads or rows that the queries do not have")
    return tuple(lead)


def together(bound: Bound, facts: Facts, names: tuple[str, ...] = PARTS) -> Any:
    """What query, key and value are together: their rate, and the delay of the last of them."""
    return facts.join([settled(facts.kind(bound[name])).with_axes(()) for name in names])


def _apart(node: fx.Node, bound: Bound, axes: Axes, facts: Facts) -> Kind:
    """An attention that does not look at other tokens."""
    if any(moves_in_pairs(bound.get(n), facts) for n in ("bias", "mask", "late_bias", "gain")) \
            and case_of(bound, facts) == MEMORY:
        raise Refused("has a mask for each pair of tokens, and its keys do not move with time")
    if bound["causal"] and case_of(bound, facts) == MEMORY:
        raise Refused("is causal, and its keys do not move with time: what a token sees of them "
                      "depends on its place", "a cross-attention that is not causal")
    operands = [bound[n] for n in bound if is_tensor(bound[n])]
    kinds = [settled(facts.kind(n)) for n in operands]
    found = facts.join([k.with_axes(()) for k in kinds if not isinstance(k, Indexed)])
    return found.with_axes(axes)


def _stream(node: fx.Node, bound: Bound, axes: Axes, facts: Facts) -> Kind:
    """An attention of tokens to tokens."""
    joint = together(bound, facts)
    if facts.semantics == "window":
        _check_window(bound, facts)
        facts.windows.append((owner(node), facts.window))
        return Windowed(axes, facts.positions(facts.kind(bound["query"]).length), joint.final)
    sight = sight_of(bound, facts)
    if isinstance(joint, Windowed):
        raise Refused("reads a whole window under banded semantics")
    facts.truncates |= sight.truncates
    facts.windows.append((owner(node), sight.window))
    late = sight.ahead * joint.rate
    return dataclasses.replace(
        joint, axes=axes, delay=joint.delay + late, first=joint.first + late,
        reach=_reach(joint, sight))


def _reach(joint: Stepped, sight: Sight) -> int | None:
    if joint.reach is None or sight.window is None:
        return None
    return joint.reach + (sight.window - 1) * joint.rate


def _pool(node: fx.Node, bound: Bound, axes: Axes, facts: Facts) -> Kind:
    """An attention of queries that do not move with time to all tokens so far."""
    joint = together(bound, facts)
    if bound["causal"] or any(is_tensor(bound.get(n)) for n in (
            "bias", "mask", "late_bias", "gain", "sink")):
        raise Refused("has a mask or bias, and its queries do not move with time",
                      "queries without a mask")
    facts.windows.append((owner(node), facts.window))
    if facts.semantics == "window":
        _check_window(bound, facts)
        return Windowed(axes, facts.window or 0, final=True)
    facts.truncates |= facts.window is not None
    return dataclasses.replace(joint, axes=axes, final=True,
                               reach=_reach(joint, pool_sight(facts)))


def pool_sight(facts: Facts) -> Sight:
    """What a query that does not move sees: the tokens of the window."""
    return Sight(None if facts.window is None else facts.window - 1)


def _check_window(bound: Bound, facts: Facts) -> None:
    """Raise where tokens of a window are not what they would be in a model run on it alone."""
    for name in PARTS:
        kind = facts.kind(bound[name])
        if isinstance(kind, Still):
            continue
        facts.lift(settled(kind))
        if isinstance(kind, Stepped) and kind.reach != 1:
            raise Refused(f"reads {name}s that depend on more than their own token: those near "
                          "the start of a window would see what the model pads it with",
                          "Continual(semantics='banded'), or layers that see one token")
    query, key, value = (getattr(facts.kind(bound[n]), "placed", False) for n in PARTS)
    if facts.continual.positions == "recycle" or not (query or key or value):
        return
    if value or query != key or not _by_difference(bound, facts):
        raise Refused("reads tokens joined with their place in the window, which moves",
                      "positions by distance, Continual(positions='recycle') with a table of at "
                      "least 2 * window - 1 entries, or semantics='banded'", placed=True)


def _by_difference(bound: Bound, facts: Facts) -> bool:
    """Whether queries and keys are turned by their positions, so that only differences count."""
    context = Context(facts.module, frozenset(activations(facts.module.graph)))
    turns = [upstream(bound[name], context).rope for name in ("query", "key")]
    return turns[0] is not None and turns[0] == turns[1]


def is_mixed(arg: fx.Node, facts: Facts) -> bool:
    """Whether an attention has joined the tokens of the window that a value is of."""
    pending, met = [arg], set[fx.Node]()
    while pending:
        node = pending.pop()
        if node in met or node not in facts or not any(
                isinstance(part, Windowed) for part in parts_of(facts.kind(node))):
            continue
        if node.target in ATTENTIONS:
            return True
        met.add(node)
        pending += node.all_input_nodes
    return False


def read_at_one_place(node: fx.Node, facts: Facts) -> bool:
    """Whether all that is read of a window in the end is one of its positions."""
    pending, met = [node], set[fx.Node]()
    while pending:
        found = pending.pop()
        for user in (u for u in found.users if u not in met):
            met.add(user)
            if user.op == "output" or user.target in ATTENTIONS:
                return False
            if any(isinstance(part, Windowed) for part in parts_of(facts.kind(user))):
                pending.append(user)
            elif user.target not in (aten.select.int, aten.slice.Tensor):
                return False
    return True


def is_windowed(bound: Bound, facts: Facts) -> bool:
    """Whether keys are computed anew for the whole window."""
    return any(isinstance(facts.kind(bound[n]), Windowed) for n in ("key", "value"))


def has_time(kind: Kind) -> bool:
    """Whether any axis holds time."""
    return any(a.role == TIME for a in kind.atoms)
