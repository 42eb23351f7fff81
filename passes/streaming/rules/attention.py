"""Attention: of tokens to tokens within a band or a window, or to what does not move with time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from bincompile.passes.streaming import attending
from bincompile.passes.streaming.attending import Bound
from bincompile.passes.streaming.attention_forms import ATTENTIONS, bound_to, computed
from bincompile.passes.streaming.attention_steps import emit_attention
from bincompile.passes.streaming.banded import banded
from bincompile.passes.streaming.builder import StepBuilder
from bincompile.passes.streaming.demand import RefusedAt
from bincompile.passes.streaming.distances import sight_of
from bincompile.passes.streaming.facts import Facts
from bincompile.passes.streaming.kinds import Kind, Refused
from bincompile.passes.streaming.rule import ALL, Rule


def bound_of(node: fx.Node) -> Bound:
    """The arguments of an attention, by name."""
    return bound_to(node.target, node.args, node.kwargs)


def kind(node: fx.Node, facts: Facts) -> tuple[Kind, Kind]:
    """The kinds of the result and of the weights."""
    return attending.attention_kind(node, bound_of(node), facts)


def emit(node: fx.Node, build: StepBuilder) -> tuple[fx.Node]:
    """The result; nobody reads the weights."""
    return (emit_attention(node, bound_of(node), build),)


def demand(node: fx.Node, arg: fx.Node, asked: str, facts: Facts) -> str:
    """Keys and values are read at all positions, queries where the result is asked for."""
    bound = bound_of(node)
    case = attending.case_of(bound, facts)
    if case in (attending.WITHIN, attending.MEMORY):
        return asked
    mixed = asked == ALL and any(attending.is_mixed(bound[n], facts) for n in ("key", "value"))
    if mixed and not attending.read_at_one_place(node, facts):
        raise RefusedAt(node, Refused(attending.THIRD, "two layers of attention at most, a causal "
                                      "model, or Continual(semantics='banded')"))
    return asked if arg is bound["query"] and arg not in (bound["key"], bound["value"]) else ALL


def reference(node: fx.Node, facts: Facts, args: tuple[Any, ...],
              kwargs: Mapping[str, Any]) -> Any:
    """The attention over a whole sequence, within its band."""
    given = bound_to(node.target, args, kwargs)
    bound = bound_of(node)
    case = attending.case_of(bound, facts)
    if facts.semantics == "window" or case in (attending.WITHIN, attending.MEMORY):
        return computed(given)
    if case == attending.POOL:
        last = slice(None) if facts.window is None else slice(-facts.window, None)
        given.update(key=given["key"][..., last, :], value=given["value"][..., last, :])
        return computed(given)
    return banded(given, sight_of(bound, facts))


rule = Rule(ATTENTIONS, kind, emit, demand, reference)
