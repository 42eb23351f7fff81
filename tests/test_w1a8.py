"""Linear layers with int8 activations: exact integers on every instruction set and thread."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import bincompile as bc
from bincompile.config import INSTRUCTION_SETS, Target
from bincompile.ops import OPERATORS, bases, bits, int8
from bincompile.runtime import Call, Dynamic, choose, chosen_sums
from bincompile.runtime.library import tvm_w1a8_linear
from bincompile.runtime.schedules import quantised, w1a8_dot, w1a8_linear

HOST = Target.host()
USABLE = [Target("cpu", found.name, HOST.features) for found in INSTRUCTION_SETS
          if set(found.needs) <= set(HOST.features) and found.name in tvm_w1a8_linear.FORMS]
SIZES = ((1, 129), (15, 1), (33, 31), (75, 65), (257, 70), (1100, 40))


def call_of(features: int, outputs: int, target: Target, **options: Any) -> Call:
    """A layer with random bits; its input is known at run time."""
    given = OPERATORS["binary_linear"].bind(
        (Dynamic(torch.empty(1, features)), bits.pack(torch.randn(outputs, features)),
         torch.rand(outputs), torch.randn(outputs), features, "int8"), options)
    return Call(OPERATORS["binary_linear"], given, target)


def reference(call: Call, x: torch.Tensor) -> torch.Tensor:
    return call.operator.overload(**{**call.arguments, "x": x})


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return (found.dtype == wanted.dtype and torch.equal(found.isnan(), wanted.isnan())
            and torch.equal(found.nan_to_num(), wanted.nan_to_num()))


def bound(call: Call) -> Any:
    kernel = choose(call)
    assert kernel.name == "tvm-w1a8"
    return kernel.bind(call)


@pytest.mark.parametrize(("features", "outputs", "target"), [
    pytest.param(*size, target, id=f"{size}-{target}") for target in USABLE
    for size in (SIZES if target is USABLE[0] else SIZES[1::3])])
def test_every_size_is_bit_equal(features: int, outputs: int, target: Target) -> None:
    call = call_of(features, outputs, target)
    run = bound(call)
    for rows in (0, 1, 3, 4, 9):
        x = torch.randn(rows, features) * 10.0 ** torch.randint(-20, 20, (rows, 1))
        assert same(run(x), reference(call, x)), rows


@pytest.mark.slow
@pytest.mark.parametrize("features", range(1, 258))
def test_every_width_up_to_257_is_bit_equal(features: int) -> None:
    call = call_of(features, 1 + features * 7 % 131, HOST)
    x = torch.randn(11, features)
    assert same(bound(call)(x), reference(call, x))


@pytest.mark.parametrize("features", [510, 1024])
@pytest.mark.parametrize("target", USABLE, ids=str)
def test_the_largest_sums_do_not_overflow(features: int, target: Target) -> None:
    given = call_of(features, 40, target).arguments
    weight = torch.zeros(40, bits.packed_width(features), dtype=torch.uint8)
    weight[::2] = bits.pack(torch.ones(1, features))
    call = Call(OPERATORS["binary_linear"], {**given, "weight": weight}, target)
    x = torch.stack([torch.ones(features), -torch.ones(features), torch.full((features,), 3e38)])
    found = bound(call)(x)
    assert same(found, reference(call, x))
    assert found[0, 0] == given["weight_scale"][0] * features + given["bias"][0]


@pytest.mark.parametrize("target", USABLE, ids=str)
def test_nan_infinities_zeros_and_tiny_rows_are_as_defined(target: Target) -> None:
    call = call_of(50, 20, target)
    call = Call(call.operator, {**call.arguments, "bias": None}, target)
    x = torch.randn(9, 50)
    x[0], x[1], x[2, 3], x[3, 49], x[4, 0] = 0.0, -0.0, math.nan, math.inf, -math.inf
    x[5], x[6], x[7] = x[5] * 1e-39, 2.0**-101, 2.0**-100
    found = bound(call)(x)
    assert same(found, reference(call, x))
    assert not found[[0, 1, 5, 6]].any()
    assert found[2:5].isnan().all() and found[7].any()


def test_halves_round_to_even() -> None:
    numbers, scale = int8.quantised(torch.tensor([[127.0, 0.5, 1.5, -2.5, -126.5]]))
    assert numbers.tolist() == [[127.0, 0.0, 2.0, -2.0, -126.0]] and scale.item() == 1.0
    call = Call(OPERATORS["binary_linear"], OPERATORS["binary_linear"].bind(
        (Dynamic(torch.empty(1, 5)), bits.pack(torch.eye(5) - 0.5), torch.ones(5), None, 5,
         "int8"), {}), HOST)
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, -126.5]])
    assert same(bound(call)(x), reference(call, x))


@pytest.mark.parametrize("target", USABLE, ids=str)
def test_numbers_between_two_levels_round_alike(target: Target) -> None:
    call = call_of(128, 40, target)
    largest = torch.rand(300, 1) + 0.5
    halves = (torch.arange(127) + 0.5) * (largest / 127)
    x = torch.cat([largest, halves.nextafter(halves * 2)], 1)
    run = bound(call)
    for rows in (torch.cat([largest, halves], 1), x, -x):
        assert same(run(rows), reference(call, rows))


OPTIONS = ({"bias": None}, {"weight_scale": torch.tensor([0.7])}, {"shift": torch.randn(70)},
           {"bias": None, "shift": torch.randn(70) * 1e-30})


@pytest.mark.parametrize(("options", "target"), [
    (options, target) for target in USABLE
    for options in (OPTIONS if target is USABLE[0] else OPTIONS[2:3])])
def test_options_are_bit_equal(options: dict[str, Any], target: Target) -> None:
    plain = call_of(70, 90, target)
    call = Call(plain.operator, {**plain.arguments, **options}, target)
    x = torch.randn(6, 70)
    assert same(bound(call)(x), reference(call, x))


def test_inputs_may_have_any_layout_rank_and_float_dtype() -> None:
    call = call_of(64, 70, HOST)
    run, flat = bound(call), torch.randn(1 + 64 * 6)
    for x in (flat[1:].view(6, 64), torch.randn(64, 5).T, torch.randn(2, 64)[::2], flat[:64],
              torch.randn(1, 64).expand(5, 64), torch.randn(2, 3, 64), torch.randn(2, 0, 64),
              torch.randn(3, 64).half(), torch.randn(3, 64).bfloat16()):
        assert same(run(x), reference(call, x))
        out = torch.full((*x.shape[:-1], 70), 7.0, dtype=x.dtype)
        run.into(x, out)
        assert same(out, reference(call, x))


def test_threads_and_batches_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tvm_w1a8_linear, "WORTH_THREADS", 0)
    for target in USABLE[:2]:
        run = bound(call_of(96, 300, target))
        for rows in (1, 5, 130):
            x, results = torch.randn(rows, 96), []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(run(x))
            torch.set_num_threads(1)
            assert same(results[0], results[1]) and same(results[0], results[2])
            assert same(results[0][-1:], run(x[-1:]))


def test_what_the_kernels_do_not_run_is_said() -> None:
    call = call_of(8, 8, Target("cpu"))
    assert choose(call).name == "torch-byte-table"
    assert "it needs one of" in (tvm_w1a8_linear.KERNELS[0].supports(call) or "")
    double = Call(call.operator, {**call.arguments, "x": Dynamic(torch.ones(1, 8).double())}, HOST)
    assert "float64" in (tvm_w1a8_linear.KERNELS[0].supports(double) or "")
    moving = Call(call.operator, {**call.arguments, "bias": Dynamic(torch.ones(8))}, HOST)
    assert "the bias is known only" in (tvm_w1a8_linear.KERNELS[0].supports(moving) or "")


def test_schedules_share_the_definition_of_a_row() -> None:
    assert quantised.LEVELS == int8.LEVELS
    bits_of = torch.tensor(int8.SMALLEST).view(torch.int32).item()
    assert bits_of == quantised.SMALLEST
    fives = w1a8_linear.FLUSH * w1a8_linear.GROUPS * w1a8_linear.GROUP * int8.LEVELS
    assert fives < 1 << 16 and (w1a8_dot.FLUSH * w1a8_dot.STEPS * 2 * int8.LEVELS) < 1 << 15


@pytest.mark.parametrize("features", [1, 15, 40])
def test_packing_in_parts_is_packing_at_once(features: int,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    weight = bases.join(torch.randn(21, 2, features))
    whole = [pack(weight, 2, features) for pack in (chosen_sums.pack_fives, chosen_sums.pack_bytes)]
    monkeypatch.setattr(chosen_sums, "CHUNK", 64)
    assert torch.equal(chosen_sums.pack_fives(weight, 2, features), whole[0])
    assert torch.equal(chosen_sums.pack_bytes(weight, 2, features), whole[1])


def test_a_model_is_made_w1a8_and_stays_near_w1a32() -> None:
    model = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    x = torch.randn(30, 48)
    eight, float_ = (bc.optimize(model, (x,), binary=name, guard=None) for name in
                     ("w1a8", "w1a32"))
    assert "int8" in str(eight.program)
    torch.testing.assert_close(eight(x), float_(x), rtol=0.05, atol=0.05)
    assert not torch.equal(eight(x), float_(x))
    with torch.no_grad():
        expected = eight.program.graph_module(x)[0]
    torch.testing.assert_close(eight(x), expected, rtol=1e-6, atol=1e-6)


def test_a_layer_trains_and_packs_with_int8_activations() -> None:
    layer = bc.nn.BinaryLinear(20, 6, activation="int8")
    x = torch.randn(5, 20, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad.abs().sum() > 0
    layer.eval()
    compiled = bc.optimize(layer, (x.detach(),))
    assert "tvm-w1a8" in str(compiled.report) or USABLE == []
    torch.testing.assert_close(compiled(x.detach()), layer(x).detach(), rtol=1e-6, atol=1e-6)
    with pytest.raises(bc.ConfigError, match="activation_scale"):
        bc.nn.BinaryLinear(20, 6, activation="int8", activation_scale="tensor")
