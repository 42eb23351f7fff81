"""The analysis of time: what every value of a model is once time passes, or why it can't be."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import fx

from bincompile.config import Continual
from bincompile.errors import ContinualError
from bincompile.passes.graph import is_sequence, is_tensor
from bincompile.passes.streaming.demand import RefusedAt, demanded
from bincompile.passes.streaming.facts import Facts
from bincompile.passes.streaming.free import position_references
from bincompile.passes.streaming.kinds import (
    BATCH,
    Atom,
    Axis,
    Indexed,
    Kind,
    Kinds,
    Pairwise,
    Refused,
    Still,
    parts_of,
    plain,
)
from bincompile.passes.streaming.rule import Rule, rules_of
from bincompile.passes.streaming.spelling import needed, spelled
from bincompile.program import Program, owner, source_line, target_name


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What every value of a model is once time passes.

    Args:
        facts: the kinds, and what else was found.
        chosen: the rule of each node that depends on an input.
        asked: of each node that an output needs, which positions are: "last" or "all".
    """

    facts: Facts
    chosen: Mapping[fx.Node, Rule]
    asked: Mapping[fx.Node, str]

    @property
    def semantics(self) -> str:
        """"banded" or "window"."""
        return self.facts.semantics

    @property
    def window(self) -> int | None:
        """Tokens that each attention sees; None: as many as the model lets it."""
        return self.facts.window

    @property
    def references(self) -> Mapping[str, Callable[..., Any]]:
        """How nodes run in the named reference, by name, where that is not what they call."""
        own = {node.name: functools.partial(_run, rule.reference, node, self.facts)
               for node, rule in self.chosen.items() if rule.reference is not None}
        return {**position_references(self.facts), **own}


def _run(reference: Callable[..., Any], node: fx.Node, facts: Facts, *args: Any,
         **kwargs: Any) -> Any:
    return reference(node, facts, args, kwargs)


def analyse(program: Program, continual: Continual) -> Analysis:
    """What every value is once time passes, under the first semantics that takes the model.

    Raises:
        ContinualError: it can't run one step at a time; the message has the node, the user's line
            and the reason.
    """
    first: RefusedAt | None = None
    program = spelled(program)
    for semantics, lifted in _tries(continual):
        try:
            return _analysed(Facts(program, continual, semantics, lifted))
        except RefusedAt as refused:
            first = _better(first, refused)
    assert first is not None
    raise error_of(first.node, first.refused) from first


def _tries(continual: Continual) -> Iterator[tuple[str, bool]]:
    if continual.semantics != "window":
        yield "banded", False
    if continual.semantics != "banded" and continual.window is not None:
        yield from (("window", False), ("window", True))


def _better(known: RefusedAt | None, found: RefusedAt) -> RefusedAt:
    """Which of two refusals says more: what stands in the way under every semantics."""
    if known is None or known.refused.by_window or known.refused.placed:
        return found
    return known


def error_of(node: fx.Node, refused: Refused) -> ContinualError:
    """The error for a node that can't run one step at a time."""
    line, path = source_line(node), owner(node)
    called = target_name(node.target) if node.op == "call_function" else node.op
    where = "".join((f" of {path}" if path else "", f" ({line})" if line else ""))
    return ContinualError(f"{node.name} ({called}){where} {refused.reason}",
                          "operators that give the same value one token at a time",
                          refused.change)


def _analysed(facts: Facts) -> Analysis:
    chosen: dict[fx.Node, Rule] = {}
    wanted = needed(facts.program.graph)
    for node in facts.program.graph.nodes:
        if node.op == "placeholder":
            facts.kinds[node] = facts.inputs.kinds.get(node, Still(()))
        elif node not in wanted:
            continue
        elif node.op == "call_function" and node in facts and (
                is_tensor(node) or is_sequence(node)):
            try:
                facts.kinds[node], rule = _kind(node, facts)
            except Refused as refused:
                raise RefusedAt(node, refused) from refused
            if rule is not None:
                chosen[node] = rule
    try:
        _check_outputs(facts)
    except Refused as refused:
        raise RefusedAt(facts.program.graph.output_node(), refused) from refused
    return Analysis(facts, chosen, demanded(facts, chosen))


def _kind(node: fx.Node, facts: Facts) -> tuple[Kinds, Rule | None]:
    for rule in rules_of().get(node.target, ()):
        try:
            kind = rule.kind(node, facts)
        except Refused:
            if _still(node, facts):
                break
            raise
        if kind is not None:
            return kind, rule
    if _still(node, facts):
        return _from_sizes(node, facts), None
    raise Refused(f"is not known in its use of time: no rule says how {target_name(node.target)} "
                  "treats it", "the operator, or run the model on whole sequences")


def _still(node: fx.Node, facts: Facts) -> bool:
    """Whether nothing that a node reads changes with time."""
    return all(isinstance(k, Still) for n in node.all_input_nodes
               if is_tensor(n) or is_sequence(n) for k in parts_of(facts.kind(n)))


def _from_sizes(node: fx.Node, facts: Facts) -> Kinds:
    """The kind of a value that does not change with time, by its sizes."""
    def axis_of(size: Any) -> Axis:
        size, batch = facts.size(size), facts.inputs.batch
        if isinstance(size, int):
            return plain(size)
        many = size / batch if batch is not None else size
        if not many.is_Integer:
            raise Refused(f"has the size {size}")
        return (Atom(BATCH, batch), *plain(int(many)))

    value = node.meta["val"]
    values = value if isinstance(value, tuple | list) else (value,)
    found = tuple(Still(tuple(map(axis_of, v.shape)), prepared=True) for v in values)
    return found if isinstance(value, tuple | list) else found[0]


def _check_outputs(facts: Facts) -> None:
    output = facts.program.graph.output_node()
    rates = set()
    for node in output.all_input_nodes:
        if not is_tensor(node):
            raise RefusedAt(node, Refused("is an output that is no tensor"))
        kind: Kind = facts.kind(node)
        if isinstance(kind, Indexed | Pairwise):
            raise RefusedAt(node, Refused("is an output that no token takes part in",
                                          "the outputs of the model"))
        if getattr(kind, "placed", False):
            raise RefusedAt(node, Refused(
                "is an output that depends on the place in the window, which moves",
                "positions by distance, or Continual(semantics='banded')", placed=True))
        rates.add(getattr(kind, "rate", 1))
    if len(rates) > 1:
        raise RefusedAt(output, Refused(f"joins outputs that come every {sorted(rates)} steps"))
