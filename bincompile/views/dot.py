"""DOT: a graph as text for Graphviz, modules as clusters, nodes coloured by their match."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bincompile.views.graph import GraphView, NodeView, Section, sections
from bincompile.views.marks import Mark, by_node

WIDEST = 60  # characters of a line in a node


def to_dot(graph: GraphView, found: Sequence[Mark], side: str) -> str:
    """The graph as DOT.

    Args:
        graph: the nodes.
        found: the marks of a report.
        side: whether the graph is the one "before" or "after" the rewrites.

    Example:
        >>> node = NodeView("relu", "aten.relu(x)", "float32[2]", "act", "", ())
        >>> print(to_dot(GraphView("normal", "", (node,)), (), "before"))
        digraph "program, normal" {
          rankdir=TB;
          node [shape=box, style="rounded,filled", fillcolor=white, fontname=Helvetica];
          "relu" [label="relu\\nfloat32[2]", tooltip="aten.relu(x)"];
        }
    """
    marked, known = by_node(found, side), {n.name for n in graph.nodes}
    title = f"{graph.model or 'program'}, {graph.level}"
    lines = [f"digraph {_quoted(title)} {{",
             "  rankdir=TB;",
             '  node [shape=box, style="rounded,filled", fillcolor=white, fontname=Helvetica];',
             *_inside(sections(graph.nodes), marked, [0], "  "),
             *(f"  {_quoted(source)} -> {_quoted(node.name)};"
               for node in graph.nodes for source in node.inputs if source in known),
             "}"]
    return "\n".join(lines)


def _inside(items: Sequence[Section | NodeView], marked: dict[str, list[Mark]],
            counter: list[int], indent: str) -> Iterator[str]:
    for item in items:
        if isinstance(item, NodeView):
            yield f"{indent}{_quoted(item.name)} [{_attributes(item, marked.get(item.name, []))}];"
            continue
        counter[0] += 1  # a module may run in several pieces, and a cluster's name is its identity
        yield f"{indent}subgraph {_quoted(f'cluster_{counter[0]}')} {{"
        yield f"{indent}  label={_quoted(item.path)}; style=rounded; color=gray;"
        yield from _inside(item.items, marked, counter, f"{indent}  ")
        yield f"{indent}}}"


def _attributes(node: NodeView, found: Sequence[Mark]) -> str:
    operator = node.call.partition("(")[0].removeprefix("aten.")
    operator = "output" if operator.startswith("return") else operator
    text = "\n".join(dict.fromkeys(filter(None, (node.name, operator[:WIDEST],
                                                 node.value[:WIDEST]))))
    given = {"label": text, "tooltip": node.call}
    hue = next((m.hue for m in found if m.hue is not None), None)
    if hue is not None:
        given["fillcolor"] = f"{hue / 360:.3f} 0.25 0.98"
        given["tooltip"] = f"{found[0].label}: {node.call}"
    elif found:
        given |= {"color": "red", "penwidth": "2", "tooltip": f"refused: {found[0].label}"}
    return ", ".join(f"{name}={_quoted(value)}" for name, value in given.items())


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
