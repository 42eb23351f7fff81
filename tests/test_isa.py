"""Every compiled kernel on every instruction set that this machine has, and on any layout."""

from __future__ import annotations

import importlib
import itertools
import math
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from stored import STORED

from bincompile.config import INSTRUCTION_SETS, Target, host_instruction_sets
from bincompile.errors import ConfigError
from bincompile.op import Operator, Sample
from bincompile.ops import OPERATORS, bits
from bincompile.runtime import Call, kernels_of, library
from bincompile.runtime.kernels import Kernel, sample_call
from bincompile.runtime.tvm import llvm_target, prepare

FEATURES, ISAS = host_instruction_sets()
TARGETS = [Target("cpu", isa, FEATURES) for isa in ISAS]


def test_a_target_is_named_with_its_instruction_set() -> None:
    for isa in ISAS:
        assert Target.of(f"cpu:{isa}") == Target("cpu", isa, FEATURES)
        assert str(Target.of(f"cpu:{isa}")) == f"cpu:{isa}"
    assert Target.of("cuda") == Target("cuda")


@pytest.mark.parametrize("name", ["cpu:avx3", "cuda:avx2", "cpu:neon", "tpu", "cpu avx2"])
def test_a_target_that_is_not_of_this_machine_is_refused(name: str) -> None:
    if name.partition(":")[2] in ISAS and name.startswith("cpu:"):
        pytest.skip("this machine has it")
    with pytest.raises(ConfigError):
        Target.of(name)


def test_every_instruction_set_is_one_that_llvm_knows(capfd: pytest.CaptureFixture[str]) -> None:
    for isa in INSTRUCTION_SETS:
        found = llvm_target(Target("cpu", isa.name))
        assert found.attrs["mcpu"] == isa.processor and found.attrs["mtriple"] == isa.triple
    assert capfd.readouterr().err == ""  # LLVM says so when it does not


def accepted(operator: Operator, target: Target) -> Iterator[tuple[int, Kernel, Call]]:
    """The calls of an operator's samples that a compiled kernel takes, by the sample's place."""
    for place, sample in enumerate(operator.samples(torch.Generator().manual_seed(11))):
        call = sample_call(operator, sample, target, STORED)
        for kernel in kernels_of(operator.name):
            if kernel.recipe is not None and kernel.supports(call) is None:
                yield place, kernel, call


def compiled_kernels() -> list[Any]:
    """Every kernel that is compiled, with its operator."""
    return [pytest.param(operator, kernel, id=f"{operator.name}-{kernel.name}")
            for operator in OPERATORS.values() for kernel in kernels_of(operator.name)
            if kernel.recipe is not None]


def run(kernel: Kernel, call: Call) -> list[torch.Tensor]:
    """What the kernel gives for the values that the call was made with, and writes to them."""
    values = call.operator.isolated({name: call.value(name) for name in call.operator.arguments})
    result = kernel.bind(call)(*call.run_time(values))
    return [*(result if isinstance(result, tuple | list) else (result,)),
            *(values[name] for name in call.operator.mutated)]


def sure_rows(call: Call) -> torch.Tensor | None:
    """Rows in which rounding can't flip a sign; None where all are sure."""
    arguments = {name: call.value(name) for name in call.operator.arguments}
    doubtful = call.operator.doubtful_rows and call.operator.doubtful_rows(arguments)
    return None if doubtful is None else ~doubtful


def compare(kernel: Kernel, calls: list[Call]) -> None:
    """The call for each target gives the same: integers bit by bit, floats to rounding."""
    first, *others = (run(kernel, call) for call in calls)
    sure, exact = sure_rows(calls[0]), calls[0].operator.tolerance.bits
    for target, found in zip(TARGETS[1:], others, strict=False):
        for one, other in zip(first, found, strict=True):
            if sure is not None and one.shape[:sure.ndim] == sure.shape:
                one, other = one[sure], other[sure]
            rounds = one.is_floating_point() and not exact
            limit = {"rtol": 1e-5, "atol": 1e-5} if rounds else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(other, one, equal_nan=True, **limit, msg=(
                lambda text, target=target: f"{kernel.name} on {target}: {text}"))


def check(operator: Operator, kernel: Kernel, most: int | None) -> None:
    """Compare on the samples that the kernel takes on every target."""
    found = [{place: call for place, k, call in accepted(operator, target) if k is kernel}
             for target in TARGETS]
    able = [calls for calls in found if calls]
    places = sorted(set.intersection(*map(set, able)))[:most]
    assert places, f"{kernel.name} takes no sample of {operator.name}"
    for calls in able:
        recipes = [kernel.recipe(calls[place]) for place in places if kernel.recipe]
        prepare(recipes, calls[places[0]].target)
    for place in places:
        compare(kernel, [calls[place] for calls in able])


@pytest.mark.parametrize(("operator", "kernel"), compiled_kernels())
def test_instruction_sets_give_the_same(operator: Operator, kernel: Kernel) -> None:
    check(operator, kernel, 1)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("operator", "kernel"), compiled_kernels())
def test_instruction_sets_give_the_same_for_every_sample(
        operator: Operator, kernel: Kernel, threads: int,
        monkeypatch: pytest.MonkeyPatch) -> None:
    for entry in pkgutil.iter_modules(library.__path__, f"{library.__name__}."):
        module = importlib.import_module(entry.name)
        if hasattr(module, "WORTH_THREADS"):
            monkeypatch.setattr(module, "WORTH_THREADS", 0)
    torch.set_num_threads(threads)
    check(operator, kernel, None)


def layouts(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """The same values one element off their alignment, between others, and transposed."""
    place = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    yield place.copy_(x)
    wide = torch.empty(*x.shape, 3, dtype=x.dtype)
    yield wide[..., 1].copy_(x)
    if x.ndim > 1:
        yield x.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize(("operator", "kernel"), compiled_kernels())
def test_where_an_input_lies_changes_nothing(operator: Operator, kernel: Kernel) -> None:
    calls = [(k, call) for _, k, call in accepted(operator, TARGETS[0]) if k is kernel][:2]
    for _, call in calls:
        given = call.run_time({name: call.value(name) for name in operator.arguments})
        bound = kernel.bind(call)
        expected = bound(*given)
        for place, value in enumerate(given):
            for other in layouts(value):
                found = bound(*given[:place], other, *given[place + 1:])
                torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=0)


def linear(features: int, outputs: int, rows: int, target: Target, activation: str) -> Call:
    """A binary linear layer, its activations with every value that a sign may stumble over."""
    x = torch.randn(rows, features)
    specials = itertools.cycle((0.0, -0.0, 1e-45, -1e-45, 3.0, -3.0, math.pi))
    x[:, 0] = torch.tensor([next(specials) for _ in range(rows)])
    operator = OPERATORS["binary_linear"]
    sample = Sample((x, bits.pack(torch.randn(outputs, features)), torch.rand(outputs),
                     torch.randn(outputs), features), {"activation": activation})
    return sample_call(operator, sample, target, STORED)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("features", range(1, 258))
def test_a_linear_layer_of_any_width_is_its_reference(features: int, target: Target) -> None:
    outputs, rows = 1 + features * 7 % 131, 1 + features * 5 % 41
    for activation in ("binary", "float"):
        call = linear(features, outputs, rows, target, activation)
        expected = call.operator.overload(*(call.value(name) for name in call.operator.arguments))
        for kernel in kernels_of("binary_linear"):
            if kernel.recipe is not None and kernel.supports(call) is None:
                found = run(kernel, call)[0]
                same = {"rtol": 0, "atol": 0} if activation == "binary" else {"rtol": 1e-5,
                                                                              "atol": 2e-5}
                torch.testing.assert_close(found, expected, **same)
