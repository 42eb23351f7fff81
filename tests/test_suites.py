"""Every suite on sizes that take no time: rows that are whole, and targets that read them."""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Sequence
from functools import partial

import pytest
import torch

from bincompile import bench, timing
from bincompile.config import Target
from bincompile.suites import (
    calls,
    embedding,
    kernels,
    layers,
    limits,
    models,
    peers,
    rows,
    stack,
    targets,
)
from bincompile.suites.rows import EAGER, HALF, INT8, KERNEL, OURS, PEAK, Case, Row

FIELDS = {"case", "threads", "ms", "speedup", "share", "values"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One round, and no torch.compile."""
    monkeypatch.setattr(rows, "medians", partial(timing.medians, rounds=1, seconds=1e-6))
    monkeypatch.setattr(peers, "compiler", lambda: None)


def measured(cases: Sequence[Case]) -> dict[str, Row]:
    """The rows of all cases by name; they can be written, and ratios are those of their times."""
    found = [row for case in cases for row in case.measure()]
    assert found and json.loads(json.dumps(found)) == found
    for row in found:
        assert set(row) == FIELDS and row["threads"] == 1
        for kind in ("speedup", "share"):
            for name, ratio in row[kind].items():
                if name in row["ms"]:
                    assert ratio == pytest.approx(row["ms"][name] / row["ms"][OURS])
    return {row["case"]: row for row in found}


def test_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    forms = {name: (kernels.LOSSY[name][0], (80,)) for name in ("w1a32", "w2a8")}
    for name, value in {"SIZES": (80,), "ROWS": (3,), "LENGTHS": (4,), "HEADS": 2,
                        "HEAD_DIM": 8, "LOSSY": forms}.items():
        monkeypatch.setattr(kernels, name, value)
    monkeypatch.setattr(limits, "PRODUCTS", 1 << 20)
    monkeypatch.setattr(limits, "COPIED", {"memory": 1 << 16})
    found = measured(kernels.cases())
    row = found["w1a1 80 -> 80, 3 rows"]
    assert {OURS, KERNEL, EAGER, HALF, INT8} <= set(row["ms"])
    assert set(row["speedup"]) == {EAGER, HALF, INT8}
    for form in forms:
        assert set(found[f"{form} 80 -> 80, 3 rows"]["speedup"]) == {EAGER, HALF, INT8}
    assert {f"attention core, 4 tokens, {v} values" for v in ("float", "binary")} <= set(found)
    assert found["copy in memory"]["values"]["gigabytes"] > 0
    if Target.host().isa in limits.REGISTERS:
        assert set(row["share"]) == {PEAK}
        assert found["1-bit products on registers"]["values"]["gmacs"] > 0


@pytest.mark.parametrize("rounds", [1, 7, 500])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_peak_does_the_products_that_it_is_asked_for(rounds: int, threads: int) -> None:
    torch.set_num_threads(threads)
    if not limits.at_peak(1):
        pytest.skip("no instruction set to compile for")
    lanes, accumulators = limits.REGISTERS[Target.host().isa]
    run = limits.at_peak(rounds * lanes * accumulators * limits.WORD * threads)[PEAK]
    run()
    ends = [functools.reduce(lambda last, _: last + (last ^ rounds).bit_count(), range(rounds),
                             place + 1) for place in range(accumulators)]
    expected = lanes * functools.reduce(operator.xor, ends, rounds)
    assert run.args[-1].tolist() == [expected] * threads


def test_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "WIDTH", 24)
    monkeypatch.setattr(layers, "FORMS", {name: (form, tuple(n // 64 for n in lengths))
                                          for name, (form, lengths) in layers.FORMS.items()})
    found = measured(layers.cases())
    assert list(found) == ["BMHA 24, 12 heads, 2 tokens, float attention",
                           "BMHA 24, 12 heads, 2 tokens, binary attention",
                           "BMHA 24, 12 heads, 8 tokens, binary attention"]
    for row in found.values():
        assert row["speedup"][layers.BEST] == row["speedup"][EAGER]


def test_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "SIZES", (8,))
    found = measured(calls.cases())
    assert len(found) == 2
    for row in found.values():
        assert row["values"]["overhead_us"] == pytest.approx(
            1e3 * (row["ms"][OURS] - row["ms"][KERNEL]))


def test_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WIDTH": 64, "TABLES": (50,), "LOOK_UPS": (7,), "BAGS": 5,
                        "BAG": 3}.items():
        monkeypatch.setattr(embedding, name, value)
    found = measured(embedding.cases())
    assert len(found) == 1 + len(embedding.MODES)
    assert {name for name, row in found.items() if INT8 in row["ms"]} == \
        {"look-up of 7 in 50 x 64", "sum of 3, 5 bags of 50 x 64"}
    assert found["look-up of 7 in 50 x 64"]["values"][embedding.BYTES] <= 1 / 20


def test_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "encoder", lambda *_: stack.encoder(1, 32, 4))
    monkeypatch.setattr(models, "Encoder", lambda: torch.nn.Sequential(
        torch.nn.Embedding(30000, 32), stack.encoder(1, 32, 4)))
    monkeypatch.setattr(models, "WIDTH", 32)
    monkeypatch.setattr(models, "TOKENS", 5)
    monkeypatch.setattr(models, "REPEATS", 2)
    monkeypatch.setattr(models, "_seconds", lambda what, folder: {"capture": 1.0}.get(what, 2.5))
    found = measured([case for case in models.cases() if "exact" not in case.name])
    for form in models.FORMS:
        assert set(found[f"bert binary, {form}"]["speedup"]) == {EAGER, HALF, INT8}
        assert set(found[f"bert threads, {form}"]["speedup"]) == {models.ONE}
    assert found["bert compile"]["values"]["warm_over_capture_s"] == 1.5
    assert 0 < found["bert bytes"]["values"]["held_share"] < 1
    for form in models.FORMS:
        parts = [r["ms"][OURS] for name, r in found.items() if name.startswith(
            f"bert profile, {form}: ")]
        assert len(parts) > 2 and min(parts) > 0


def test_a_process_prints_the_seconds_that_it_took(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(models, "encoder", lambda: stack.encoder(1, 32, 4))
    monkeypatch.setattr(models, "WIDTH", 32)
    models.seconds("capture")
    assert json.loads(capsys.readouterr().out) > 0


def test_every_target_reads_a_row_that_its_case_gives() -> None:
    for suite, names in targets.needed().items():
        cases = {case.name for case in bench.SUITES[suite]()}
        assert set(names) <= cases, suite
    for target in targets.TARGETS:
        assert target.row.startswith(target.case.rsplit(", ", 1)[0][:4])


def test_targets_are_reached_missed_or_not_measured() -> None:
    fast = targets.Target("fast", "kernels", "a", "a", "speedup", EAGER, 2.0)
    small = targets.Target("small", "models", "b", "b", "values", "held_share", 0.05, most=True)
    found = [rows.row("a", {OURS: 1.0, EAGER: 2.0}),
             rows.row("b", {OURS: 1.0}, values={"held_share": 0.06})]
    judged = targets.judged(found, [fast, small])
    assert [(j["measured"], j["verdict"]) for j in judged] == [(2.0, "reached"), (0.06, "missed")]
    assert [j["verdict"] for j in targets.judged([], [fast])] == [targets.NOT_MEASURED]
    text = bench.table({"suite": "targets", "load": 0.0, "rows": found, "targets": judged})
    assert "fast" in text and ">= 2.00 x" in text and "<= 0.05" in text and "missed" in text


def test_the_targets_are_measured_by_their_own_suites(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, tuple[str, ...]] = {}

    def process(suite: str, threads: int, *only: str) -> list[Row]:
        asked[suite] = only
        return []

    monkeypatch.setattr(bench, "_in_own_process", process)
    result = bench.run("targets", [1])
    assert asked == {suite: tuple(names) for suite, names in targets.needed().items()}
    assert len(result["targets"]) == len(targets.TARGETS)
    bench.run("targets", [1], ["calls"])
