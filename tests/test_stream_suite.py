"""The suite `stream` on sizes that take no time: what it counts, whom it meets, what it prints."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from peers import installed
from test_suites import FIELDS, measured
from torch import nn

import bincompile as bc
from bincompile import bench, timing
from bincompile.suites import (
    operations,
    peers,
    rows,
    stream,
    stream_errors,
    stream_models,
    stream_parts,
    targets,
)
from bincompile.suites.peers import CONTINUAL, NEWEST, WINDOW
from bincompile.suites.rows import OURS, PRODUCTS, READ
from bincompile.suites.stream_parts import SelfAttention

SMALL = {"SHAPES": ((16, 2, 4),), "BATCH": 3, "LONGER": (16, 2, 4, 8), "TINY": (8, 2, 2)}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(rows, "medians", partial(timing.medians, rounds=1, seconds=1e-6))
    monkeypatch.setattr(peers, "compiler", lambda: None)
    for name, value in SMALL.items():
        monkeypatch.setattr(stream, name, value)
    monkeypatch.setattr(stream_models, "BLOCK", (16, 2, 24, 4))
    monkeypatch.setattr(stream_models, "ACTION", {"features": 12, "width": 16, "heads": 2,
                                                  "window": 8})
    monkeypatch.setattr(stream_errors, "SHAPE", (16, 2, 4))
    monkeypatch.setattr(stream_errors, "STEPS", 50)
    monkeypatch.setattr(stream_errors, "SPREADS", (16,))
    monkeypatch.setattr(stream_errors, "CHUNK", 20)
    yield


def cases(*beginnings: str) -> list[rows.Case]:
    return [case for case in stream.cases() if case.name.startswith(beginnings)]


# what is counted


def test_operations_are_two_for_each_product() -> None:
    layer = SelfAttention(16, 2).eval()
    x = torch.randn(3, 5, 16)
    products = 3 * 5 * 16 * 64 + 2 * 3 * 5 * 5 * 16
    assert operations.of_call(lambda: layer(x)) == 2 * products
    with torch.inference_mode():
        assert operations.of_call(lambda: layer(x)) == 2 * products
    conv = nn.Conv1d(4, 6, 3)
    assert operations.of_call(lambda: conv(torch.randn(2, 4, 10))) == 2 * 2 * 8 * 6 * 4 * 3
    assert operations.of_call(lambda: torch.exp(x)) == 0


def test_a_step_counts_one_token_and_a_full_window() -> None:
    model = SelfAttention(16, 2).eval()
    steps = bc.optimize(model, (torch.randn(2, 6, 16),), continual=6).steps
    assert steps is not None
    assert operations.of_step(steps) == 2 * (16 * 64 + 2 * 6 * 16)


# whom it meets


def test_the_window_is_attended_by_all_queries_or_the_newest() -> None:
    layer, x = nn.MultiheadAttention(16, 2, batch_first=True).eval(), torch.randn(2, 5, 16)
    found = peers.window_attention(layer, x)
    with torch.no_grad():
        whole = layer(x, x, x)[0]
        assert torch.equal(found[WINDOW]()[0], whole)
        torch.testing.assert_close(found[NEWEST]()[0], whole[:, -1:])


def test_continual_inference_is_timed_with_a_full_window() -> None:
    """The window's tokens are its state, to which its step adds the last one anew."""
    installed("continual")
    x = torch.randn(2, 5, 16)
    after = torch.cat([x[:, 1:], x[:, -1:]], 1)
    layer = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 1,
        enable_nested_tensor=False).eval()
    with torch.inference_mode():
        (step,) = peers.continual_attention(layer, x).values()
        torch.testing.assert_close(step(), layer(after, after, after)[0][:, -1])
        (step,) = peers.continual_encoder(encoder, x).values()
        torch.testing.assert_close(step(), encoder(after)[:, -1])


def test_without_continual_inference_a_row_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "continual", None)
    layer, x = nn.MultiheadAttention(16, 2, batch_first=True).eval(), torch.randn(1, 4, 16)
    assert peers.continual_attention(layer, x) == {}
    assert peers.continual_encoder(nn.TransformerEncoder(nn.TransformerEncoderLayer(
        16, 2, batch_first=True), 1, enable_nested_tensor=False), x) == {}
    target = next(t for t in targets.TARGETS if t.figure == CONTINUAL)
    found = rows.row(target.row, {OURS: 1.0, WINDOW: 20.0})
    assert targets.judged([found], [target])[0]["verdict"] == targets.NOT_MEASURED
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(bench, "_in_own_process", lambda *_: [found])
    result = bench.run("stream", [1])
    assert "continual-inference is not installed" in bench.table(result).splitlines()[-1]
    assert bench.run("validate", [1])["absent"] == []


# what it prints


def test_attention_steps() -> None:
    found = measured(cases("attention step", "step of a tiny"))
    name = stream.attention_name(*SMALL["SHAPES"][0])
    full, binary = (found[f"{name}, {form}"] for form in stream_parts.FORMS)
    assert {WINDOW, NEWEST} <= set(full["speedup"]) and set(full["share"]) == {PRODUCTS}
    assert set(binary["speedup"]) == set(full["speedup"]) and not binary["share"]
    values = full["values"]
    assert values["operations_window"] == 2 * (4 * 16 * 64 + 2 * 4 * 4 * 16)
    assert values["operations_step"] == 2 * (16 * 64 + 2 * 4 * 16)
    assert values["state_bytes"] >= 2 * 4 * 16 * 4
    assert values["steps_per_s"] == pytest.approx(1e3 / full["ms"][OURS])
    floor = found[stream.FLOOR]
    assert floor["values"][stream.MICROSECONDS] == pytest.approx(1e3 * floor["ms"][OURS])


@pytest.mark.slow
def test_batches_and_longer_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "FORMS", {"fp32": {}})
    found = measured(cases("3 streams", "longer"))
    batch = found[f"{stream.batch_name(*SMALL['SHAPES'][0])}, fp32"]
    assert set(batch["speedup"]) == {stream.SINGLES}
    longer = found[f"{stream.longer_name()}, fp32"]
    times = longer["ms"]
    assert longer["values"][stream.EXCESS] == pytest.approx(
        (times[OURS] - times["4 tokens"]) / times[READ])
    assert longer["values"]["read_gigabytes"] == pytest.approx(2 * 4 * 16 * 4 / times[READ] / 1e6)


@pytest.mark.slow
def test_whole_models() -> None:
    found = measured(stream_models.cases())
    block = found[f"{stream_models.block_name()}, fp32"]
    assert WINDOW in block["speedup"] and set(block["share"]) == {PRODUCTS}
    audio = found["audio_stream, fp32"]["values"]
    assert audio["same_decisions"] == audio["frames"] == 300
    assert audio["largest_error"] < 1e-4 and audio["receptive_field"] == 131
    for blocks in (1, 2):
        for form in stream_parts.FORMS:
            row = found[f"action_stream, {blocks} blocks, {form}"]
            assert WINDOW in row["speedup"]
            assert row["values"]["operations_step"] < row["values"]["operations_window"]


def test_errors_of_a_long_stream() -> None:
    found = measured(cases("errors"))
    for spread in stream_errors.SPREADS:
        values = found[stream_errors.name(spread)]["values"]
        assert values["steps"] == 50 and 0 < values[stream_errors.LARGEST] < 1e-4
        assert values[stream_errors.OVER_SDPA] == pytest.approx(
            values[stream_errors.LARGEST] / values[stream_errors.SDPA])


def test_scores_have_the_deviation_that_they_are_asked_for() -> None:
    for spread in (1, 16):
        layer = stream_errors.attention(spread).attention
        x = torch.randn(400, 16)
        query, key, _ = nn.functional.linear(x, layer.in_proj_weight).unflatten(
            -1, (3, 2, 8)).unbind(1)
        scores = torch.einsum("ihd,jhd->hij", query, key) / 8**0.5
        assert scores.std().item() == pytest.approx(spread, rel=0.2)


def test_the_reference_of_errors_is_the_model_on_each_window() -> None:
    model, x = stream_errors.attention(4), torch.randn(9, 16)
    found = stream_errors.windowed(model, x.double(), 4)
    model.double()
    for i, y in enumerate(found):
        wanted = model(x[None, i:i + 4].double())[0, -1]
        torch.testing.assert_close(y, wanted.detach(), atol=1e-12, rtol=0)


def test_stream_targets_stand_above_their_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, tuple[str, ...]]] = []

    def process(suite: str, threads: int, *only: str) -> list[rows.Row]:
        asked.append((suite, threads, only))
        return [rows.row(stream.FLOOR, {OURS: 0.004}, values={stream.MICROSECONDS: 4.0})]

    monkeypatch.setattr(bench, "_in_own_process", process)
    result = bench.run("stream", [1, 2], [stream.FLOOR])
    assert asked == [("stream", 1, (stream.FLOOR,))]
    (target,) = result["targets"]
    assert target["verdict"] == "reached" and "5" in bench.table(result)
    bench.run("stream", [1], quick=True)
    assert asked[-1] == ("stream", 1, (bench.QUICK,))
    assert set(result["rows"][0]) == FIELDS


def test_a_quick_run_follows_errors_for_fewer_steps(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[int, tuple[str, ...]]] = []

    def found(suite: str, only: tuple[str, ...]) -> Iterator[rows.Row]:
        seen.append((stream_errors.STEPS, only))
        yield from ()

    monkeypatch.setattr(bench, "_measured", found)
    bench._main("stream", "1", "errors", bench.QUICK)
    assert seen == [(stream_errors.QUICK_STEPS, ("errors",))]
    assert capsys.readouterr().out == "[]\n"
