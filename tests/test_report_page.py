"""The page of a report: sound HTML that needs nothing else, says all, and works in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bincompile as bc
from bincompile.errors import ConfigError
from bincompile.record import Evidence, Match, Refusal, Rewrite
from bincompile.report import Report
from bincompile.views.graph import GraphView, NodeView
from bincompile.views.listing import OPEN_LINES
from bincompile.views.page import page

VOID = ("meta", "link", "input")
HOSTILE = "</script><script>alert(1)</script>&<b>"


class Page(HTMLParser):
    """A page taken apart; fails where tags are not balanced or an id is there twice."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.ids: dict[str, dict[str, str | None]] = {}
        self.rows: dict[str, str] = {}  # text of each table row that has an id
        self.scripts: list[str] = []
        self._row = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        found = dict(attrs)
        self.elements.append((tag, found))
        if "id" in found:
            assert found["id"] not in self.ids
            self.ids[found["id"]] = found
        if tag == "tr":
            self._row = found.get("id", "")
        if tag == "script":
            self.scripts.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif "tr" in self.open and self._row:
            self.rows[self._row] = self.rows.get(self._row, "") + data

    @property
    def data(self) -> dict[str, Any]:
        """What the script reads."""
        return json.loads(self.scripts[0])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(9, 8), nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.inner(self.table(ids))
        x = torch.softmax(x @ x.mT * 0.3, -1) @ x
        return torch.softmax(torch.relu(x @ x.mT), -1) @ x


@pytest.fixture(scope="module")
def compiled() -> bc.CompiledModel:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return bc.optimize(Attention().eval(), (torch.tensor([[0, 3, 1], [8, 8, 2]]),))


def written(report: Report, folder: Path) -> str:
    report.to_html(folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_page_shows_every_record_and_every_node(compiled: bc.CompiledModel,
                                                    tmp_path: Path) -> None:
    report = compiled.report
    shown = Page(written(report, tmp_path))
    for name, texts in {
        "match": [(m.operator, m.path) for m in report.matches],
        "rewrite": [(r.operator, r.path, r.kernel, r.kind) for r in report.rewrites],
        "refusal": [(r.node, r.reason) for r in report.refusals],
    }.items():
        assert texts
        for index, row in enumerate(texts):
            assert all(text in shown.rows[f"{name}-{index}"] for text in row)
    for side, graph in report.graphs.items():
        assert {f"{side}-{n.name}" for n in graph.nodes} <= set(shown.ids)


def test_a_mark_joins_its_rows_its_nodes_before_and_after(compiled: bc.CompiledModel,
                                                          tmp_path: Path) -> None:
    shown = Page(written(compiled.report, tmp_path))
    keys = {m["key"] for m in shown.data["marks"]}
    assert {e["data-mark"] for _, e in shown.elements if "data-mark" in e} == keys
    for mark in shown.data["marks"]:
        for side in ("before", "after"):
            for name in mark[side]:
                node = shown.ids.get(f"{side}-{name}")
                assert node is None or mark["key"] in str(node["data-marks"]).split()
        assert any(f"before-{name}" in shown.ids for name in mark["before"])
    attention = next(m for m in shown.data["marks"] if m["label"].startswith("attention"))
    calls = {n.name: n.call for n in compiled.report.graphs["before"].nodes}
    assert [calls[name].partition("(")[0] for name in attention["before"]] == [
        "aten.matmul", "aten.mul.Tensor", "aten.softmax.int", "aten.matmul"]
    assert attention["after"] == ["attention_default", "getitem"]
    assert dict(attention["facts"])["proof"].endswith("trials in float64")


def test_the_page_needs_nothing_else(compiled: bc.CompiledModel, tmp_path: Path) -> None:
    text = written(compiled.report, tmp_path)
    for tag, found in Page(text).elements:
        assert "src" not in found
        assert tag not in ("iframe", "object", "embed", "base", "img")
        assert found.get("href", "data:,") == "data:,"
    assert not re.search(r"@import|url\(|https?:|fetch\(|XMLHttpRequest|innerHTML", text)


def test_what_a_model_is_called_stays_text() -> None:
    node = NodeView("n", f"f({HOSTILE})", HOSTILE, HOSTILE, HOSTILE, ("n",))
    graph = GraphView(HOSTILE, HOSTILE, (node,))
    match = Match(HOSTILE, HOSTILE, {HOSTILE: HOSTILE}, "n", None, HOSTILE, ("n",), HOSTILE)
    refusal = Refusal(HOSTILE, HOSTILE, HOSTILE, "n", HOSTILE)
    shown = Page(page(HOSTILE, [match], [Rewrite(HOSTILE, HOSTILE, "exact", HOSTILE, node="n")],
                      [refusal], [HOSTILE], {"before": graph, "after": graph}))
    assert [tag for tag, _ in shown.elements].count("script") == 2
    assert [tag for tag, _ in shown.elements].count("title") == 1
    assert all(HOSTILE in shown.rows[key] for key in ("match-0", "rewrite-0", "refusal-0"))
    assert shown.data["sources"] == [HOSTILE]


def test_a_loaded_model_says_that_the_graph_before_is_not_there(
        compiled: bc.CompiledModel, tmp_path: Path) -> None:
    compiled.save(tmp_path / "model.bcz")
    report = bc.load(tmp_path / "model.bcz").report
    assert list(report.graphs) == ["after"]
    assert [m.nodes for m in report.matches] == [m.nodes for m in compiled.report.matches]
    text = written(report, tmp_path)
    shown = Page(text)
    assert "The graph before is not there" in text and "before" not in shown.ids
    placed = report.rewrites[0].node
    assert shown.ids[f"after-{placed}"]["data-marks"] == "match-0"


def test_records_alone_make_a_page() -> None:
    shown = page("nothing", [], [], [], [], {})
    assert "The graphs are not there" in shown
    Page(shown)


def test_a_page_that_can_t_be_written_leaves_the_old_one(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Report().to_html(tmp_path / "report.html")
    old = (tmp_path / "report.html").read_text()

    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ConfigError, match="no space left"):
        Report(notes=("new",)).to_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == old
    assert [f.name for f in tmp_path.iterdir()] == ["report.html"]


def test_a_page_in_a_folder_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a folder that exists"):
        Report().to_html(tmp_path / "no" / "report.html")


def deep(layers: int, each: int) -> tuple[list[Match], list[Refusal], GraphView]:
    """A graph of many layers, one match and one refusal in each."""
    nodes = [NodeView(f"n{layer}_{i}", f"aten.mul(n{layer}_{i - 1}, 2)", "float32[s0, 16, 64]",
                      f"encoder.{layer}.{'self' if i < each // 2 else 'mlp'}", f"a.py:{i}: x",
                      (f"n{layer}_{i - 1}",) if i else ())
             for layer in range(layers) for i in range(each)]
    matches = [Match("attention", f"encoder.{i}.self", {"heads": 4}, f"n{i}_5",
                     Evidence(13, 0, "float64", 1e-16, 1e-9), "p", (f"n{i}_4", f"n{i}_5"))
               for i in range(layers)]
    refusals = [Refusal("attention", f"encoder.{i}.mlp", "no product", f"n{i}_{each - 1}")
                for i in range(layers)]
    return matches, refusals, GraphView("validated", "Deep", tuple(nodes))


def test_3000_nodes_are_closed_sections_at_first() -> None:
    matches, refusals, graph = deep(60, 50)
    text = page("many", matches, [], refusals, [], {"before": graph, "after": graph})
    shown = Page(text)
    nodes = [found for _, found in shown.elements if str(found.get("class")).startswith("node")]
    assert len(nodes) == 6000
    modules = [found for _, found in shown.elements if found.get("class") == "module"]
    opened = [found for found in modules if "open" in found]
    assert 0 < len(opened) < len(modules)
    assert len(opened) <= OPEN_LINES
    assert len(text) < 3e6


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def browsed(file: Path, fragment: str, folder: Path) -> str:
    """The document after its script ran, in headless Chromium."""
    found = subprocess.run(
        [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu",
         f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=3000", "--dump-dom",
         f"file://{file}#{fragment}"], capture_output=True, text=True, timeout=120, check=True)
    return found.stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_follows_a_match_a_refusal_a_node_and_a_search(tmp_path: Path) -> None:
    matches, refusals, graph = deep(8, 10)
    file = tmp_path / "report.html"
    file.write_text(page("few", matches, [], refusals, [], {"before": graph, "after": graph}))
    at_match = Page(browsed(file, "match-3", tmp_path))
    assert "hidden" not in at_match.ids["sheet"]
    assert {key for key, e in at_match.ids.items() if "selected" in str(e.get("class"))} == {
        "match-3", "before-n3_4", "before-n3_5"}
    at_refusal = Page(browsed(file, "refusal-2", tmp_path))
    assert "selected" in str(at_refusal.ids["after-n2_9"]["class"])
    at_node = browsed(file, "before-n1_3", tmp_path)
    assert "current" in str(Page(at_node).ids["before-n1_3"]["class"])
    assert "user" in str(Page(at_node).ids["before-n1_4"]["class"])
    assert "a.py:3: x" in at_node
    searched = browsed(file, "find=n5_", tmp_path)
    assert "10 before, 10 after" in searched
    hits = [k for k, e in Page(searched).ids.items() if "hit" in str(e.get("class")).split()]
    assert hits == [f"{side}-n5_{i}" for side in ("before", "after") for i in range(10)]
    assert "hidden" in Page(browsed(file, "", tmp_path)).ids["sheet"]
