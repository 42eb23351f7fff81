"""Listings: the lines of a graph as HTML, in sections that open and close."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from bincompile.views.graph import GraphView, NodeView, Section, sections
from bincompile.views.marks import Mark, by_node

OPEN_LINES = 300  # lines that are visible at first; sections beyond stay closed
MOST_BADGES = 6  # marks that a closed section shows


class Sources:
    """Source lines, each kept once: nodes name them by number."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._numbers: dict[str, int] = {}

    def number(self, line: str) -> int:
        """The number of a line."""
        if line not in self._numbers:
            self._numbers[line] = len(self.lines)
            self.lines.append(line)
        return self._numbers[line]


def listing(graph: GraphView, found: Sequence[Mark], side: str,
            sources: Sources) -> tuple[str, str]:
    """The lines of a graph, and the ticks of its map, as HTML."""
    marked = by_node(found, side)
    items = sections(graph.nodes)
    return ("".join(_Lines(side, marked, sources, _opened(items)).write(items, "")),
            "".join(_ticks(graph, marked)))


def _opened(items: Sequence[Section | NodeView]) -> set[int]:
    """The sections that are open at first: all of one depth or none, as long as lines are few."""
    opened, visible = set[int](), len(items)
    level = [i for i in items if isinstance(i, Section)]
    while level and visible + (more := sum(len(s.items) for s in level)) <= OPEN_LINES:
        visible += more
        opened |= set(map(id, level))
        level = [i for s in level for i in s.items if isinstance(i, Section)]
    return opened


class _Lines:
    def __init__(self, side: str, marked: dict[str, list[Mark]], sources: Sources,
                 opened: set[int]) -> None:
        self.side, self.marked, self.sources, self.opened = side, marked, sources, opened

    def write(self, items: Sequence[Section | NodeView], parent: str) -> Iterator[str]:
        """The lines of these items; `parent` is the module that they stand in."""
        for item in items:
            if isinstance(item, NodeView):
                yield self.line(item, parent)
                continue
            nodes = list(item.nodes)
            own = item.path.removeprefix(parent)
            above = item.path[:len(item.path) - len(own)]
            state = " open" if id(item) in self.opened else ""
            yield (f'<details class="module"{state}><summary><span class="dim">{escape(above)}'
                   f'</span>{escape(own)} <span class="count">{len(nodes)}</span>'
                   f'{self.badges(nodes)}</summary><div class="inside">')
            yield from self.write(item.items, item.path)
            yield "</div></details>"

    def badges(self, nodes: Sequence[NodeView]) -> str:
        """The marks inside a section."""
        inside = {m.key: m for n in nodes for m in self.marked.get(n.name, ())}
        shown = [f'<span class="badge {_kind(m)}"{_style(m)} title="{escape(m.label)}"></span>'
                 for m in list(inside.values())[:MOST_BADGES]]
        more = f'<span class="dim">+{len(inside) - MOST_BADGES}</span>'
        return "".join(shown) + (more if len(inside) > MOST_BADGES else "")

    def line(self, node: NodeView, parent: str) -> str:
        """One node."""
        found = self.marked.get(node.name, [])
        keys = f' data-marks="{" ".join(m.key for m in found)}"' if found else ""
        reads = f' data-reads="{" ".join(node.inputs)}"' if node.inputs else ""
        source = f' data-line="{self.sources.number(node.source)}"' if node.source else ""
        kinds = "".join(f" {k}" for k in dict.fromkeys(map(_kind, found)))
        style = next((_style(m) for m in found if m.hue is not None), "")
        path = f'<span class="path">{escape(node.path)}</span>' if node.path != parent else ""
        operator, bracket, rest = node.call.partition("(")
        return (f'<div class="node{kinds}" id="{self.side}-{escape(node.name)}"{keys}{reads}'
                f"{source}{style}><b>{escape(node.name)}</b> <i>{escape(node.value)}</i> "
                f"<span><em>{escape(operator)}</em>{escape(bracket + rest)}</span>{path}</div>")


def _kind(mark: Mark) -> str:
    return "refused" if mark.hue is None else "coloured"


def _style(mark: Mark) -> str:
    return "" if mark.hue is None else f' style="--hue:{mark.hue}"'


def _ticks(graph: GraphView, marked: dict[str, list[Mark]]) -> Iterator[str]:
    """Where the marks are, from the first node at the top to the last at the bottom."""
    for index, node in enumerate(graph.nodes):
        for mark in marked.get(node.name, ())[:1]:
            top = 100 * index / max(1, len(graph.nodes) - 1)
            hue = "" if mark.hue is None else f";--hue:{mark.hue}"
            yield (f'<i class="{_kind(mark)}" data-mark="{mark.key}"'
                   f' style="top:{top:.2f}%{hue}"></i>')
