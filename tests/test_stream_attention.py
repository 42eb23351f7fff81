"""Attention of a stream's newest token: exact after any number of steps, and what it writes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import bincompile as bc
from bincompile.config import Target
from bincompile.errors import InputError
from bincompile.op import Sample
from bincompile.ops import OPERATORS
from bincompile.ops.stream_attention import slots_for
from bincompile.runtime import choose
from bincompile.runtime.kernels import Call, sample_call
from bincompile.runtime.library import tvm_stream_attention

OPERATOR, HOST = OPERATORS["stream_attention"], Target.host()
HEADS, FEATURES, WINDOW = 4, 64, 64


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def arguments(generator: torch.Generator, rows: int, clock: int, window: int = WINDOW,
              heads: int = HEADS, groups: int = HEADS, **rest: Any) -> dict[str, Any]:
    """Tokens for rows of one clock, whose rings hold tokens already."""
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    slots = slots_for(window)
    state = (normal(rows, groups, slots // 16, FEATURES, 16), normal(rows, groups, slots, FEATURES))
    tokens = [normal(rows, count, FEATURES) for count in (heads, groups, groups)]
    return OPERATOR.bind((*tokens, *state, torch.arange(rows), torch.full((rows,), clock),
                          FEATURES ** -0.5, window), rest)


def call_of(given: dict[str, Any]) -> Call:
    return sample_call(OPERATOR, Sample((), given), HOST, ())


def run(given: dict[str, Any]) -> torch.Tensor:
    """The compiled kernel; it writes to the state that is given."""
    call = call_of(given)
    kernel = choose(call)
    assert kernel.name == "tvm-stream-attention"
    return kernel.bind(call)(*call.run_time(given))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error of a row, relative to the norm of what is right."""
    error = (found.double() - expected).flatten(1).norm(dim=1)
    return float((error / expected.flatten(1).norm(dim=1)).max())


def errors(given: dict[str, Any]) -> tuple[float, float]:
    """Of the kernel and of torch's own attention, both in float32, against float64."""
    given = OPERATOR.isolated(given)
    wide = {name: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for name, v in OPERATOR.isolated(given).items()}
    expected, found = OPERATOR.overload(**wide), run(given)
    rows, groups, slots = given["values"].shape[:3]
    keys = given["keys"].transpose(3, 4).reshape(rows, groups, slots, FEATURES)
    torchs = torch.nn.functional.scaled_dot_product_attention(
        given["query"][:, :, None], keys, given["values"], scale=given["scale"])[:, :, 0]
    return relative(found, expected), relative(torchs, expected)


def check_errors(given: dict[str, Any], deviation: float) -> None:
    given["scale"] *= deviation
    found, torchs = errors(given)
    assert found <= (1e-5 if deviation <= 16 else 2 * torchs), (found, torchs)


@pytest.mark.parametrize("deviation", [1, 4, 16, 100])
@pytest.mark.parametrize("clock", [63, 99_999, 10 ** 12])
def test_a_step_is_exact_for_scores_of_any_size(
        generator: torch.Generator, deviation: float, clock: int) -> None:
    check_errors(arguments(generator, 40, clock), deviation)


@pytest.mark.slow
@pytest.mark.parametrize("deviation", [1, 4, 16, 100])
def test_every_one_of_100_000_steps_is_exact(
        generator: torch.Generator, deviation: float) -> None:
    given = arguments(generator, 1, 0, heads=2, groups=2)
    given["scale"] *= deviation
    call, clock = call_of(given), given["clock"]
    bound = choose(call).bind(call)
    past: list[torch.Tensor] = []
    for step in range(100_000):
        clock[0] = step
        for name in ("query", "key", "value"):
            given[name] = torch.randn(1, 2, FEATURES, generator=generator)
        found = bound(*call.run_time(given))
        past = [*past[1 - WINDOW:], torch.stack([given["key"][0], given["value"][0]])]
        keys, values = torch.stack(past, 2)
        query = given["query"][0, :, None]
        expected, torchs = (torch.nn.functional.scaled_dot_product_attention(
            query.to(dtype), keys.to(dtype), values.to(dtype), scale=given["scale"])[:, 0]
            for dtype in (torch.float64, torch.float32))
        error = relative(found.flatten(1), expected.flatten()[None])
        rival = relative(torchs.flatten()[None], expected.flatten()[None])
        assert error <= max(1e-5, 2 * rival if deviation > 16 else 0.0), step


@pytest.mark.parametrize("groups", [1, 2, 12])
@pytest.mark.parametrize("threads", [1, 3])
def test_heads_that_share_a_key_and_threads_change_nothing(
        generator: torch.Generator, groups: int, threads: int,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tvm_stream_attention, "WORTH_THREADS", 0)
    given = arguments(generator, 5, 40, heads=12, groups=groups)
    expected = OPERATOR.overload(**OPERATOR.isolated(given))
    torch.set_num_threads(threads)
    found = run(given)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    torch.set_num_threads(1)
    assert torch.equal(run(given), found)


@pytest.mark.parametrize("clock", [0, 5, 63, 64, 1000])
@pytest.mark.parametrize("kernel", ["reference", "tvm-stream-attention"])
def test_a_step_writes_its_slot_and_can_be_taken_again(
        generator: torch.Generator, clock: int, kernel: str) -> None:
    given = arguments(generator, 3, clock, window=60)
    before, call = OPERATOR.isolated(given), call_of(given)
    bound = choose(call, kernel).bind(call)
    first, second = (bound(*call.run_time(given)) for _ in range(2))
    assert torch.equal(first, second)
    slot = clock % 64
    assert torch.equal(given["keys"][:, :, slot // 16, :, slot % 16], given["key"])
    assert torch.equal(given["values"][:, :, slot], given["value"])
    for name, index in (("keys", (..., slot // 16, slice(None), slot % 16)),
                        ("values", (..., slot, slice(None)))):
        before[name][index] = given[name][index]
        assert torch.equal(before[name], given[name])


@pytest.mark.parametrize("kernel", ["reference", "tvm-stream-attention"])
@pytest.mark.parametrize(("change", "word"), [
    ({"rows": torch.tensor([0, 3])}, "row 3"), ({"rows": torch.tensor([-1, 0])}, "row -1"),
    ({"window": None, "clock": torch.tensor([4, 64, 0])}, "64 slots")])
def test_a_row_or_a_slot_that_is_not_there_is_an_error(
        generator: torch.Generator, kernel: str, change: dict[str, Any], word: str) -> None:
    given = arguments(generator, 3, 4)
    for name in ("query", "key", "value", "rows"):
        given[name] = given[name][:2]
    good = {**given, **({"window": None} if "window" in change else {})}
    call = call_of(good)
    bound = choose(call, kernel).bind(call)
    with pytest.raises(InputError, match=word):
        bound(*call.run_time({**good, **change}))


def test_a_number_that_is_not_finite_leaves_with_its_token(generator: torch.Generator) -> None:
    given = arguments(generator, 1, 0, window=20)
    call = call_of(given)
    bound = choose(call).bind(call)
    clock, bad = given["clock"], {3: ("value", math.inf), 30: ("key", math.nan)}
    for step in range(70):
        clock[0] = step
        for name in ("query", "key", "value"):
            given[name] = torch.randn(1, HEADS, FEATURES, generator=generator)
        if step in bad:
            given[bad[step][0]][0, 0, 0] = bad[step][1]
        found = bound(*call.run_time(given))
        held = any(begin <= step < begin + 20 for begin in bad)
        assert bool(found.isfinite().all()) != held, step


def test_a_ring_that_grows_gives_the_same(generator: torch.Generator) -> None:
    small = arguments(generator, 2, 30, window=64) | {"window": None}
    large = {**small, "keys": torch.cat([small["keys"], torch.full_like(small["keys"], math.nan)],
                                        2),
             "values": torch.cat([small["values"], torch.full_like(small["values"], math.inf)], 2)}
    assert torch.equal(run(small), run(large))


class Causal(torch.nn.Module):
    """One causal attention and a layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(32, 2, batch_first=True)
        self.after = torch.nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.after(self.attention(x, x, x, attn_mask=mask, need_weights=False)[0])


@pytest.mark.parametrize(("values", "operator"), [
    ("float", "stream_binary_attention"), ("binary", "binary_attention")])
def test_a_model_with_keys_of_one_bit_steps(values: str, operator: str) -> None:
    torch.manual_seed(3)
    x = torch.randn(2, 20, 32)
    compiled = bc.optimize(Causal().eval(), (x,), continual=8, guard=None,
                           binary=bc.Binary("w1a32", attention="binary", values=values))
    names = [str(node.target) for node in compiled.steps.program.graph.nodes]
    assert f"bincompile.{operator}.default" in names
    stream = compiled.stream(2)
    found = torch.stack([stream.step(x[:, t]) for t in range(8)], 1)
    torch.testing.assert_close(found, compiled(x[:, :8]), rtol=1e-5, atol=1e-5)
