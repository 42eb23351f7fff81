"""The frame of the speed suites: processes, tables, and how they fail."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bincompile import bench, bench_match
from bincompile.errors import ConfigError, KernelError
from bincompile.models.corpus import Case
from bincompile.suites import costs
from bincompile.suites import rows as parts
from bincompile.suites.rows import Row


def test_the_import_is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "PROCESSES", 3)
    (row,) = (row for case in costs.imports() for row in case.measure())
    assert 0 < row["ms"]["bincompile"] <= 300


def test_every_thread_count_has_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    seen: list[int] = []

    def process(suite: str, threads: int) -> list[Row]:
        seen.append(threads)
        return [{"case": suite, "threads": threads, "ms": {"bincompile": 1.0}, "speedup": {}}]

    monkeypatch.setattr(bench, "_in_own_process", process)
    result = bench.run("layers", [1, 2])
    assert seen == [1, 2] and torch.get_num_threads() == before
    assert [row["threads"] for row in result["rows"]] == [1, 2]
    assert result["machine"]["torch"] == torch.__version__


def test_a_table_has_a_line_for_each_case_and_a_dash_for_what_was_not_measured() -> None:
    rows = [{"case": "a", "threads": 1, "ms": {"bincompile": 0.5, "eager": 4.0},
             "speedup": {"eager": 8.0}, "share": {"peak": 0.5}, "values": {"bytes": 12}},
            {"case": "b", "threads": 2, "ms": {"bincompile": 0.25}, "speedup": {}},
            {"case": "c", "threads": 1, "ms": {}, "speedup": {}, "error": "KernelError: why"}]
    result = {"suite": "layers", "load": 0.25, "rows": rows}
    lines = bench.table(result).splitlines()
    assert "layers" in lines[0] and "0.2" in lines[0] and "x eager" in lines[1]
    assert lines[2].split() == ["a", "1", "0.500", "4.000", "8.00", "50.0%", "12"]
    assert lines[3].split() == ["b", "2", "0.250", "-", "-", "-", "-"]
    marked = bench.table(result, markdown=True).splitlines()
    assert marked[1] == "" and marked[4] == "| a | 1 | 0.500 | 4.000 | 8.00 | 50.0% | 12 |"
    assert lines[4] == "c failed: KernelError: why" and bench.failed(result) == ["c"]


def test_a_case_that_fails_hides_no_other(monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    def fails():
        raise KernelError("no kernel", "one", "that")
        yield {}

    cases = [parts.Case("one fails", fails),
             parts.Case("two", lambda: iter([parts.row("two", {"bincompile": 1.0})])),
             parts.Case("three", lambda: iter([parts.row("three", {"bincompile": 1.0})]))]
    monkeypatch.setitem(bench.SUITES, "kernels", lambda: cases)
    first, second = bench._measured("kernels", ["one", "tw"])
    assert "no kernel" in first["error"] and second["case"] == "two" and "error" not in second
    assert "KernelError" in capsys.readouterr().err


class Plain(nn.Module):
    """Attention over the keys, and the same over the heads, which is none."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        over_keys = torch.softmax(q @ k.transpose(-2, -1) / 4.0, dim=-1) @ v
        return over_keys + torch.softmax(q @ k.transpose(-2, -1) / 2.0, dim=1) @ v


def heads(batch: int, length: int) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    return tuple(torch.randn(batch, 4, length, 16) for _ in range(3)), {}


CORPUS = (
    Case("written/plain/one", lambda: Plain().eval(), heads, attention=1),
    Case("tables/plain/one", lambda: nn.Embedding(9, 4).eval(),
         lambda b, n: ((torch.arange(n).repeat(b, 1),), {}), attention=0, look_ups=1),
    Case("tables/missing/one", Plain, heads, attention=1, needs=("no_such_package",)),
)


def test_the_match_suite_counts_ours_and_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile takes the softmax over the heads for attention too, and is wrong."""
    monkeypatch.setattr(bench_match, "cases", lambda: CORPUS)
    rows = list(bench_match.rows("written", "tables"))
    counts = {row["case"]: row["counts"] for row in rows}
    assert list(counts) == ["written", "tables", "all"]
    assert counts["written"] == dict.fromkeys(counts["written"], 0) | {
        "models": 1, "attention": 1, "found": 1, "torch_fused": counts["written"]["torch_fused"],
        "torch_wrong": 1}
    assert counts["written"]["torch_fused"] >= 1
    assert (counts["tables"]["look_ups"], counts["tables"]["look_ups_found"]) == (1, 1)
    assert counts["all"]["models"] == 2 and counts["all"]["skipped"] == 1
    shown = bench.table({"suite": "match", "load": 0.0, "rows": rows}).splitlines()
    assert len(shown) == 5 and "found: 1/1 (100.0 %)" in shown[4]
    with pytest.raises(ConfigError, match="begins with nothing"):
        list(bench_match.rows("nothing"))


def test_an_unknown_suite_or_case_and_a_process_that_fails_are_errors() -> None:
    with pytest.raises(ConfigError, match="kernels, layers"):
        bench.run("everything", [1])
    for suite in ("kernels", "targets"):
        with pytest.raises(ConfigError, match="no case begins"):
            bench.run(suite, [1], ["nothing"])
    with pytest.raises(KernelError, match="measuring 'validate' failed"):
        bench.run("validate", [0])
