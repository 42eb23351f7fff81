"""The report: what its records say, where they point, and how it is shown in notebooks and DOT."""

from __future__ import annotations

import itertools
import pickle
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bincompile as bc
from bincompile import cli
from bincompile.errors import ConfigError
from bincompile.program import source_line
from bincompile.record import Match, Refusal, Rewrite
from bincompile.report import Report
from bincompile.views.graph import GraphView, NodeView, Section, sections
from bincompile.views.marks import marks, rewrites_of


class Core(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = q @ k.transpose(-2, -1) / 4
        return torch.softmax(scores, -1) @ v  # the line of Core


class Block(nn.Module):
    """An attention by hand, one of torch's, a table, and two softmaxes that are no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.core = nn.Embedding(9, 16), Core()
        self.torch_layer = nn.MultiheadAttention(16, 4, batch_first=True)
        self.gate, self.normalise = nn.Linear(16, 3), nn.Softmax(-1)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.table(ids)
        x = self.core(x, x, x)
        x = x + self.torch_layer(x, x, x)[0]  # the line of the layer
        wrong = torch.softmax(torch.relu(x @ x.mT), -1) @ x  # the line with relu
        return wrong, self.normalise(self.gate(x))  # the line of the gate


@pytest.fixture(scope="module")
def compiled() -> bc.CompiledModel:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return bc.optimize(Block().eval(), (torch.tensor([[0, 3, 1], [8, 8, 2]]),))


@pytest.fixture(scope="module")
def report(compiled: bc.CompiledModel) -> Report:
    return compiled.report


def matched(report: Report, path: str) -> Match:
    return next(m for m in report.matches if m.path == path)


def test_a_match_names_its_nodes_in_the_order_of_the_graph(report: Report) -> None:
    core = matched(report, "core")
    assert core.nodes == ("matmul", "div", "softmax", "matmul_1")
    before = [n.name for n in report.graphs["before"].nodes]
    assert [before.index(name) for name in core.nodes] == sorted(map(before.index, core.nodes))
    assert core.node in core.nodes


def test_every_rewrite_says_which_node_it_stands_for(report: Report) -> None:
    found = [r for r in report.rewrites if r.operator != "fused_rows"]
    assert {r.replaces for r in found} == {m.node for m in report.matches}
    before = {n.name for n in report.graphs["before"].nodes}
    assert {r.replaces for r in report.rewrites} <= before
    after = {n.name for n in report.graphs["after"].nodes}
    assert {r.node for r in report.rewrites} <= after


@pytest.mark.parametrize(("path", "line"), [("core", "the line of Core"),
                                            ("torch_layer", "the line of the layer")])
def test_the_source_of_a_match_is_a_line_of_the_user(report: Report, path: str, line: str) -> None:
    assert matched(report, path).source.endswith(f"# {line}")
    assert Path(__file__).name in matched(report, path).source


def test_a_refusal_names_the_first_diverging_node_and_the_line_of_the_user(report: Report) -> None:
    found = {r.source.partition("# the line ")[2]: r for r in report.refusals}
    assert set(found) == {"with relu", "of the gate"}
    assert found["with relu"].node.startswith("relu")
    assert "relu" in found["with relu"].reason
    assert "not over a product of two computed tensors" in found["of the gate"].reason


class Other(nn.Module):
    """Softmaxes over other things: what scores don't pass, layers, features, an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scores = torch.bmm(x, x.mT).unsqueeze(1)
        changed = torch.softmax(torch.sin(scores).squeeze(1) * 2, -1)  # the line of sin
        x = torch.bmm(changed, x) + x
        return (torch.softmax(self.layer(x), -1), torch.softmax(self.norm(x), -1),
                torch.softmax((x @ x.mT).sum(-1), -1))


def test_only_what_scores_would_pass_through_is_named() -> None:
    refusals = bc.inspect(Other().eval(), (torch.randn(2, 5, 8),)).refusals
    assert [r.node for r in refusals if "aten.sin stands between" in r.reason] == ["sin"]
    others = [r for r in refusals if r.node != "sin"]
    assert len(others) == 3
    assert {r.reason for r in others} == {
        "the softmax is not over a product of two computed tensors"}


def test_the_owner_of_a_refusal_is_not_the_softmax_layer(report: Report) -> None:
    assert {r.path for r in report.refusals} == {""}  # the module that holds gate and softmax


def test_a_node_without_a_frame_of_the_user_has_the_innermost_line() -> None:
    node = torch.fx.Graph().placeholder("x")
    inside = str(Path(torch.__file__).parent / "nn" / "modules" / "activation.py")
    node.meta["stack_trace"] = (f'File "{inside}", line 7, in forward\n    one\n'
                                f'  File "{inside}", line 9, in forward\n    two\n')
    assert source_line(node) == f"{inside}:9: two"
    node.meta["stack_trace"] = 'File "torch/fx/passes/x.py", line 24, in insert'
    assert source_line(node) == ""
    assert source_line(torch.fx.Graph().placeholder("x")) == ""


def test_a_copy_for_another_process_keeps_the_graphs_but_no_tensor(report: Report) -> None:
    content = pickle.dumps(report)
    again = pickle.loads(content)
    assert again == report and again.program is None
    assert again.graphs == report.graphs
    assert b"torch._utils" not in content


def test_a_rewrite_belongs_to_the_match_of_what_it_replaces() -> None:
    matches = [Match("embedding", "table", {}, "embedding")]
    rewrites = [Rewrite("binary_embedding", "table", "exact", node="bits", replaces="embedding"),
                Rewrite("binary_linear", "fc", "lossy", node="linear_bits", replaces="linear")]
    assert rewrites_of(matches, rewrites) == ["match-0", "rewrite-1"]
    found = {m.key: m for m in marks(matches, rewrites, [])}
    assert found["match-0"].after == ("bits",)
    assert (found["rewrite-1"].before, found["rewrite-1"].after) == (("linear",), ("linear_bits",))


@pytest.mark.parametrize("binary", [None, "w1a32"])
def test_what_replaces_a_replacement_stands_for_the_first_node(binary: str | None) -> None:
    table = nn.Embedding(9, 8)
    if binary is None:
        table.weight.data = table.weight.data.sign() * 0.5  # binary already: it is packed
    report = bc.optimize(table.eval(), (torch.tensor([[1, 2]]),), binary=binary, guard=None).report
    assert [(r.operator, r.replaces) for r in report.rewrites] == [
        ("binary_embedding", "embedding")]
    assert rewrites_of(report.matches, report.rewrites) == ["match-0"]


def test_hues_differ_and_keep_away_from_red() -> None:
    found = marks([Match("attention", str(i), {}, f"n{i}") for i in range(200)], [], [])
    hues = [m.hue for m in found if m.hue is not None]
    assert len(set(hues)) == 200 and min(hues) >= 40 and max(hues) <= 330
    assert all(abs(a - b) > 60 for a, b in itertools.pairwise(hues))


def view(*paths: str) -> list[NodeView]:
    return [NodeView(f"n{i}", "aten.relu(x)", "float32[2]", path, "", ())
            for i, path in enumerate(paths)]


def test_sections_keep_every_node_in_its_place() -> None:
    nodes = view("", "a", "a.b", "a.b", "a.b", "a.c", "a", "d.e", "d.e", "d.e", "d.e", "")
    items = sections(nodes)
    flat = [n for i in items for n in (i.nodes if isinstance(i, Section) else (i,))]
    assert flat == nodes
    assert [i.path for i in items if isinstance(i, Section)] == ["a", "d.e"]
    inner = next(i for i in items if isinstance(i, Section))
    assert [i.path for i in inner.items] == ["a", "a.b", "a.c", "a"]


TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|[A-Za-z_]+|[0-9.]+|->|[{}\[\]=;,])')


def parse_dot(text: str) -> tuple[dict[str, dict[str, str]], list[tuple[str, str]]]:
    """Nodes with their attributes, and edges, by the grammar of DOT as far as we write it."""
    tokens, at = [], 0
    while at < len(text.rstrip()):
        found = TOKEN.match(text, at)
        assert found, text[at:at + 40]
        tokens.append(found[1])
        at = found.end()
    assert tokens[0] == "digraph" and tokens[2] == "{"
    nodes: dict[str, dict[str, str]] = {}
    edges: list[tuple[str, str]] = []
    depth, i = 0, 2
    while i < len(tokens):
        token = tokens[i]
        if token in "{}":
            depth += 1 if token == "{" else -1
            assert depth > 0 or i == len(tokens) - 1
            i += 1
        elif token == "subgraph":
            assert tokens[i + 1].startswith('"cluster_') and tokens[i + 2] == "{"
            i += 2
        else:
            end = tokens.index(";", i)
            statement, i = tokens[i:end], end + 1
            if "->" in statement:
                edges.append((statement[0], statement[2]))
            elif statement[1] == "[":
                inside = statement[2:-1]
                assert statement[-1] == "]" and inside[3::4] == [","] * (len(inside) // 4)
                nodes[statement[0]] = dict(zip(inside[::4], inside[2::4], strict=True))
            else:
                assert statement[1] == "=" and len(statement) == 3
    assert depth == 0
    return nodes, edges


@pytest.mark.parametrize("side", ["before", "after"])
def test_dot_has_every_node_and_edge_and_colours_the_matches(report: Report, side: str) -> None:
    nodes, edges = parse_dot(report.to_dot(side))
    graph = report.graphs[side]
    assert set(nodes) - {"node"} == {f'"{n.name}"' for n in graph.nodes}
    assert len(edges) == sum(len(n.inputs) for n in graph.nodes)
    assert {name for edge in edges for name in edge} <= set(nodes)
    placed = [r.node for r in report.rewrites] if side == "after" else matched(report, "core").nodes
    assert all("fillcolor" in nodes[f'"{name}"'] for name in placed)
    refused = report.refusals[0].node
    assert "fillcolor" not in nodes[f'"{refused}"'] and "red" in nodes[f'"{refused}"']["color"]


def test_dot_quotes_what_would_end_a_name() -> None:
    node = NodeView("n", 'aten.f("\\")', 'a"b', 'm"{', "", ())
    nodes, _ = parse_dot(_dot(GraphView('le"vel', "M", (node,) * 3)))
    assert nodes['"n"']["tooltip"] == '"aten.f(\\"\\\\\\")"'


def _dot(graph: GraphView) -> str:
    from bincompile.views.dot import to_dot

    return to_dot(graph, (), "before")


def test_a_program_is_dot_at_every_stage(compiled: bc.CompiledModel) -> None:
    for stage in compiled.program.stages:
        nodes, _ = parse_dot(stage.to_dot())
        assert len(nodes) - 1 == len([n for n in stage.graph.nodes if n.op != "get_attr"])


def test_dot_of_a_graph_that_is_not_there_is_an_error(report: Report) -> None:
    for wrong in (Report(), report):
        with pytest.raises(ConfigError, match="side='middle'"):
            wrong.to_dot("middle")
    with pytest.raises(ConfigError, match="the report has them"):
        Report().to_dot()


class Cells(HTMLParser):
    """The tables of a notebook cell; fails where tags are not balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_a_notebook_shows_every_record(report: Report) -> None:
    rows = Cells(report._repr_html_()).rows
    assert [row[0] for row in rows if row[1:2] == ["embedding"]] == ["table", "table"]
    for refusal in report.refusals:
        assert ["(root)", "attention", refusal.node, refusal.reason, refusal.source] in rows
    assert all([note] in rows for note in report.notes)


def test_a_notebook_shows_text_as_text() -> None:
    hostile = Refusal("attention", "<b>", "</td><script>", "n", "a & b")
    assert ["<b>", "attention", "n", "</td><script>", "a & b"] in \
        Cells(Report(refusals=(hostile,))._repr_html_()).rows


def test_a_notebook_shows_a_program(compiled: bc.CompiledModel) -> None:
    text = compiled.program.at("normal")._repr_html_()
    Cells(text)
    assert "program at level <b>normal</b>" in text and "aten.softmax.int(div, -1)" in text


def test_inspect_writes_the_page_and_dot(tmp_path: Path,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "factory.py"
    file.write_text("import torch\n\ndef table():\n    return torch.nn.Embedding(5, 4).eval(), "
                    "(torch.tensor([[1, 2]]),), {}\n")
    html, dot = tmp_path / "report.html", tmp_path / "graph.dot"
    arguments = ["inspect", f"{file}:table", "--html", str(html), "--dot", str(dot)]
    assert cli.main(arguments) == cli.DONE
    assert capsys.readouterr().out.startswith("found and proven: 1 embedding")
    assert "<title>Embedding: bincompile report</title>" in html.read_text()
    assert '"embedding"' in parse_dot(dot.read_text())[0]
    assert cli.main([*arguments[:3], str(tmp_path / "no" / "x.html")]) == cli.MISUSED
    assert "can't be written" in capsys.readouterr().err
