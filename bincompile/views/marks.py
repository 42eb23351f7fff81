"""Marks: which nodes of the graphs before and after belong to which record."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from bincompile.record import Match, Refusal, Rewrite
from bincompile.views.cells import match_facts, rewrite_text
from bincompile.views.graph import GraphView

# Steps of the golden section: neighbours differ, and no hue repeats early. Red is for refusals.
FIRST_HUE, HUES, GOLDEN = 40, 290, 0.618034


@dataclasses.dataclass(frozen=True)
class Mark:
    """A match, a rewrite without a match, or a refusal, and its nodes.

    Args:
        key: "match-0", "rewrite-3" or "refusal-1", by the place of the record in the report.
        label: operator and module, for a person.
        before: names of its nodes in the graph before.
        after: names of its nodes in the graph after.
        hue: its colour in degrees; None for a refusal, which has the colour of warnings.
        facts: what is known of it, each with its name.
    """

    key: str
    label: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    hue: float | None
    facts: tuple[tuple[str, str], ...] = ()


def marks(matches: Sequence[Match], rewrites: Sequence[Rewrite], refusals: Sequence[Refusal],
          after: GraphView | None = None) -> tuple[Mark, ...]:
    """The marks of a report; `after` says what reads the results of a placed operator.

    Example:
        >>> found = Match("embedding", "table", {}, "embedding", nodes=("embedding",))
        >>> placed = Rewrite("embedding", "table", "exact", node="ours", replaces="embedding")
        >>> [(m.key, m.before, m.after) for m in marks([found], [placed], [])]
        [('match-0', ('embedding',), ('ours',))]
    """
    owners = rewrites_of(matches, rewrites)
    placed: dict[str, list[str]] = {}
    made: dict[str, list[tuple[str, str]]] = {}
    for key, rewrite in zip(owners, rewrites, strict=True):
        placed.setdefault(key, []).extend(_placed(rewrite.node, after))
        made.setdefault(key, []).append(("rewrite", rewrite_text(rewrite)))
    found: list[tuple[str, Match | Rewrite, tuple[str, ...], tuple[tuple[str, str], ...]]]
    found = [(f"match-{i}", m, m.nodes or (m.node,), match_facts(m))
             for i, m in enumerate(matches)]
    found += [(f"rewrite-{i}", r, (r.replaces,), ())
              for i, r in enumerate(rewrites) if owners[i] == f"rewrite-{i}"]
    coloured = [Mark(key, _label(record), tuple(filter(None, before)), tuple(placed.get(key, ())),
                     _hue(index), (*facts, *made.get(key, ())))
                for index, (key, record, before, facts) in enumerate(found)]
    refused = [Mark(f"refusal-{i}", _label(r), (r.node,), (r.node,), None,
                    (("refused", r.reason), ("source", r.source)))
               for i, r in enumerate(refusals)]
    return (*coloured, *refused)


def rewrites_of(matches: Sequence[Match], rewrites: Sequence[Rewrite]) -> list[str]:
    """The key of the mark that each rewrite belongs to: of its match, or its own."""
    known = {m.node: f"match-{i}" for i, m in enumerate(matches)}
    return [known.get(r.replaces, f"rewrite-{i}") for i, r in enumerate(rewrites)]


def _hue(index: int) -> float:
    return round(FIRST_HUE + HUES * ((index + 0.5) * GOLDEN % 1), 1)


def _label(record: Match | Rewrite | Refusal) -> str:
    return f"{record.operator} {record.path or '(root)'}"


def _placed(name: str, after: GraphView | None) -> list[str]:
    results = [n.name for n in after.nodes
               if n.inputs == (name,) and n.call.startswith("getitem(")] if after else []
    return [name, *results]


def by_node(found: Sequence[Mark], side: str) -> dict[str, list[Mark]]:
    """The marks of each node of one side ("before" or "after"), matches first."""
    nodes: dict[str, list[Mark]] = {}
    for mark in found:
        for name in getattr(mark, side):
            nodes.setdefault(name, []).append(mark)
    return nodes
