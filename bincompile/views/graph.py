"""A graph as text: one line a node, in sections by module. Small, and free of tensors."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bincompile.program import Program

SMALLEST_SECTION = 3  # shorter runs of nodes of one module stand among their neighbours


@dataclasses.dataclass(frozen=True)
class NodeView:
    """A node as text.

    Args:
        name: its name in the graph.
        call: what it calls with which arguments, or "input", or what is returned.
        value: dtype and shape of its value.
        path: module path of the module that it was traced in.
        source: the user's source line.
        inputs: names of the nodes that it reads; stored tensors are named in `call` alone.
    """

    name: str
    call: str
    value: str
    path: str
    source: str
    inputs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class GraphView:
    """A graph as text: the level of its program, the name of its model if known, its nodes."""

    level: str
    model: str
    nodes: tuple[NodeView, ...]

    @classmethod
    def of(cls, program: Program) -> GraphView:
        """The view of a program.

        Example:
            >>> import torch, bincompile as bc
            >>> compiled = bc.optimize(torch.nn.Linear(4, 2).eval(), (torch.ones(3, 4),))
            >>> [node.name for node in GraphView.of(compiled.program).nodes]
            ['input_1', 'linear', 'output']
        """
        nodes = [n for n in program.graph.nodes if n.op != "get_attr"]
        return cls(program.level, _model(nodes), tuple(map(_view, nodes)))


def _view(node: Any) -> NodeView:
    from bincompile.program import call_text, describe, owner, source_line

    value = "" if node.op == "output" else describe(node.meta.get("val"))
    reads = tuple(n.name for n in node.all_input_nodes if n.op != "get_attr")
    return NodeView(node.name, call_text(node), value, owner(node), source_line(node), reads)


def _model(nodes: Sequence[Any]) -> str:
    """Name of the class of the model that was captured."""
    for node in nodes:
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
            if not path and name and not name.startswith("bincompile.passes."):
                return name.rpartition(".")[2]
    return ""


@dataclasses.dataclass(frozen=True)
class Section:
    """Nodes that follow each other in one module, with the sections inside."""

    path: str
    items: tuple[Section | NodeView, ...]

    @property
    def nodes(self) -> Iterator[NodeView]:
        """All nodes, those of inner sections too."""
        for item in self.items:
            if isinstance(item, NodeView):
                yield item
            else:
                yield from item.nodes


def sections(nodes: Sequence[NodeView], depth: int = 0) -> tuple[Section | NodeView, ...]:
    """The nodes in the order of the program, runs of a module as sections.

    Example:
        >>> def node(name, path):
        ...     return NodeView(name, "", "", path, "", ())
        >>> first, *rest = sections([node("x", ""), *(node(f"n{i}", "a.b") for i in range(3))])
        >>> first.name, rest[0].path, len(rest[0].items)
        ('x', 'a.b', 3)
    """
    found: list[Section | NodeView] = []
    paths = {n.path: n.path.split(".") if n.path else [] for n in nodes}
    for key, run in itertools.groupby(nodes, lambda n: paths[n.path][:depth + 1]):
        inside = list(run)
        if len(key) <= depth or len(inside) < SMALLEST_SECTION:
            found += inside
            continue
        items = sections(inside, depth + 1)
        whole = len(items) == 1 and isinstance(items[0], Section)
        found.append(items[0] if whole else Section(".".join(key), items))
    return tuple(found)
