"""Demand: which positions of every value are asked for, backward from the outputs."""

from __future__ import annotations

import operator

from torch import fx

from bincompile.passes.graph import is_sequence, is_tensor
from bincompile.passes.streaming.facts import Facts
from bincompile.passes.streaming.kinds import Pairwise, Refused, Still, parts_of
from bincompile.passes.streaming.rule import ALL, LAST, Rule


class RefusedAt(Exception):
    """A refusal, and the node that it is about."""

    def __init__(self, node: fx.Node, refused: Refused) -> None:
        super().__init__(refused.reason)
        self.node, self.refused = node, refused


def demanded(facts: Facts, chosen: dict[fx.Node, Rule]) -> dict[fx.Node, str]:
    """"last" or "all" for every node that an output needs.

    Raises:
        RefusedAt: a value that is known at the newest position alone is asked for at others.
    """
    asked: dict[fx.Node, str] = {}
    output = facts.program.graph.output_node()
    for node in output.all_input_nodes:
        _ask(asked, node, facts.continual.outputs, facts, output)
    for node in reversed(facts.program.graph.nodes):
        if node not in asked or node not in chosen or isinstance(facts.kind(node), Pairwise):
            continue
        for arg in node.all_input_nodes:
            if arg not in facts or not (is_tensor(arg) or is_sequence(arg)):
                continue
            try:
                wanted = chosen[node].demand(node, arg, asked[node], facts)
            except Refused as refused:
                raise RefusedAt(node, refused) from refused
            _ask(asked, arg, wanted, facts, node)
    return asked


def _ask(asked: dict[fx.Node, str], node: fx.Node, wanted: str, facts: Facts,
         reader: fx.Node) -> None:
    kinds = parts_of(facts.kind(node))
    if reader.target is operator.getitem:
        kinds = (kinds[reader.args[1]],)
    if all(isinstance(k, Still) or k.time_axis is None for k in kinds):
        wanted = LAST
    if wanted == ALL and any(getattr(k, "final", False) for k in kinds):
        raise RefusedAt(reader, Refused(
            "asks for other positions of a value that is known at the newest alone"))
    asked[node] = ALL if ALL in (wanted, asked.get(node)) else LAST
