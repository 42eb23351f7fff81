"""Weights as sums of binary bases: kernels, fits, and models that are made of them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

import bincompile as bc
from bincompile.config import INSTRUCTION_SETS, Target
from bincompile.ops import OPERATORS, bases
from bincompile.runtime import Call, Dynamic, choose
from bincompile.runtime.library import tvm_w1a32_linear

HOST = Target.host()
USABLE = [Target("cpu", found.name, HOST.features) for found in INSTRUCTION_SETS
          if set(found.needs) <= set(HOST.features) and found.name in tvm_w1a32_linear.TABLES]
OPERATOR = OPERATORS["binary_bases_linear"]


def call_of(features: int, outputs: int, count: int, activation: str, target: Target = HOST,
            **options: Any) -> Call:
    """A layer with random bases; its input is known at run time."""
    given = OPERATOR.bind(
        (Dynamic(torch.empty(1, features)), bases.join(torch.randn(outputs, count, features)),
         torch.rand(outputs, count), torch.randn(outputs), features, activation), options)
    return Call(OPERATOR, given, target)


def reference(call: Call, x: torch.Tensor) -> torch.Tensor:
    return OPERATOR.overload(**{**call.arguments, "x": x})


@pytest.mark.parametrize(("features", "outputs", "count"), [(33, 65, 4), (257, 70, 3)])
@pytest.mark.parametrize("target", USABLE, ids=str)
def test_float_activations_agree(features: int, outputs: int, count: int, target: Target) -> None:
    call = call_of(features, outputs, count, "float", target)
    run = choose(call, "tvm-w1a32").bind(call)
    for rows in (0, 1, 4, 6):
        x = torch.randn(rows, features)
        wanted = reference(call, x.double()).float()
        torch.testing.assert_close(run(x), wanted, rtol=1e-5, atol=1e-5 * features**0.5)


@pytest.mark.parametrize(("features", "outputs", "count"), [(15, 3, 2), (257, 70, 4)])
@pytest.mark.parametrize("target", USABLE, ids=str)
def test_int8_activations_are_bit_equal(features: int, outputs: int, count: int,
                                        target: Target) -> None:
    call = call_of(features, outputs, count, "int8", target, shift=torch.randn(features))
    kernel = choose(call)
    assert kernel.name == "tvm-w1a8"
    for rows in (1, 6):
        x = torch.randn(rows, features)
        assert torch.equal(kernel.bind(call)(x), reference(call, x))


@pytest.mark.parametrize("activation", ["float", "int8"])
def test_threads_give_the_same_bits(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tvm_w1a32_linear", "tvm_w1a8_linear"):
        monkeypatch.setattr(f"bincompile.runtime.library.{name}.WORTH_THREADS", 0)
    call = call_of(96, 300, 2, activation)
    run = choose(call).bind(call)
    for rows in (1, 5, 70):
        x, results = torch.randn(rows, 96), []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(x))
        torch.set_num_threads(1)
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
        assert torch.equal(results[0][-1:], run(x[-1:]))


@pytest.mark.parametrize("activation", ["float", "int8", "binary"])
def test_one_base_is_the_plain_operator(activation: str) -> None:
    call, x = call_of(40, 9, 1, activation), torch.randn(5, 40)
    plain = OPERATORS["binary_linear"].overload(
        x, call.arguments["weight"], call.arguments["weight_scale"][:, 0], call.arguments["bias"],
        40, activation)
    assert torch.equal(reference(call, x), plain)


@pytest.mark.parametrize("activation", ["float", "int8", "binary"])
def test_many_bases_without_a_compiler(activation: str) -> None:
    call, x = call_of(70, 20, 3, activation, Target("cpu")), torch.randn(5, 70)
    kernel = choose(call)
    assert kernel.name == "torch-byte-table"
    torch.testing.assert_close(kernel.bind(call)(x), reference(call, x), rtol=1e-5, atol=1e-5)


def test_more_bases_are_nearer_and_the_fit_is_better_than_the_residual() -> None:
    weight, errors = torch.randn(30, 200), []
    for count in (1, 2, 3, 4):
        packed, scales = OPERATORS["fit_bases"].overload(weight, count)
        found = bases.combine(bases.split(packed, count, 200, torch.float32), scales)
        errors.append(float((found - weight).square().mean()))
        assert errors[-1] <= float((bases.combine(*bases.residual(weight, count))
                                    - weight).square().mean()) + 1e-6
    assert all(after < before / 2 for before, after in itertools.pairwise(errors))


def test_a_weight_is_fitted_anew_after_it_changed() -> None:
    weight = torch.randn(4, 30)
    before = OPERATORS["fit_bases"].overload(weight, 2)
    again = OPERATORS["fit_bases"].overload(weight, 2)
    assert torch.equal(before[0], again[0]) and before[0] is not again[0]
    weight.neg_()
    assert not torch.equal(before[0], OPERATORS["fit_bases"].overload(weight, 2)[0])


@pytest.mark.parametrize("precision", ["w1a1", "w1a8", "w1a32"])
def test_a_model_of_many_bases_is_near_the_float_model(precision: str) -> None:
    model = nn.Sequential(nn.Embedding(50, 40), nn.Linear(40, 64), nn.Tanh(),
                          nn.Linear(64, 10)).eval()
    ids, errors = torch.randint(50, (4, 12)), []
    with torch.no_grad():
        wanted = model(ids)
    for count in (1, 4):
        binary = bc.Binary(precision, bases=count)
        compiled = bc.optimize(model, (ids,), binary=binary, guard=None)
        errors.append(float((compiled(ids) - wanted).square().mean()))
        assert ("binary_bases_linear" in str(compiled.program)) == (count > 1)
        with torch.no_grad():
            plain = compiled.program.graph_module(ids)[0]
        torch.testing.assert_close(compiled(ids), plain, rtol=1e-4, atol=1e-4)
    assert precision == "w1a1" or errors[1] < errors[0] / 10


@pytest.mark.parametrize("count", [0, 5, True, 1.0, "2"])
def test_a_number_of_bases_that_is_none_is_refused(count: object) -> None:
    with pytest.raises(bc.ConfigError, match="bases"):
        bc.Binary("w1a32", bases=count)
