"""BinaryLinear against its float64 formula, and the defects it must not have."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from formulas import array, linear_formula, signs
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import bincompile as bc
from bincompile.nn import BinaryLinear

BAD = [
    {"in_features": 0}, {"in_features": True}, {"in_features": 4.0}, {"out_features": -1},
    {"bias": 1}, {"shift": "yes"}, {"activation": "ternary"}, {"activation": None},
    {"activation_scale": "column"}, {"weight_scale": 3}, {"dtype": torch.int8},
    {"dtype": "float32"}, {"compat": "engine"}, {"compat": True}, {"symmetric": False},
    {"compat": "bitorch", "bias": True}, {"compat": "bitorch", "activation": "float"},
    {"compat": "bitorch", "symmetric": 2},
    {"activation": "float", "activation_scale": "tensor"},
]


@pytest.mark.parametrize("activation", ["binary", "float"])
@pytest.mark.parametrize("weight_scale", ["row", "tensor"])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_its_formula(activation: str, weight_scale: str, shift: bool, bias: bool) -> None:
    layer = BinaryLinear(37, 11, bias, activation=activation, weight_scale=weight_scale,
                         shift=shift, dtype=torch.float64)
    if shift:
        nn.init.normal_(layer.shift)
    x = torch.randn(2, 3, 37, dtype=torch.float64)
    x[0, 0, :3] = torch.tensor([0.0, -0.0, 1e6])
    np.testing.assert_allclose(array(layer(x)), linear_formula(layer, x), rtol=1e-12, atol=1e-9)


@given(features=st.integers(1, 300), outputs=st.integers(1, 40), seed=st.integers(0, 2**31),
       lead=st.lists(st.integers(0, 3), max_size=3),
       activation=st.sampled_from(["binary", "float"]),
       dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
def test_B14_linear_takes_any_size_and_float_dtype(
        features: int, outputs: int, seed: int, lead: list[int], activation: str,
        dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    layer = BinaryLinear(features, outputs, activation=activation, dtype=dtype)
    x = torch.randn(*lead, features, dtype=dtype)
    found, wanted = layer(x), linear_formula(layer, x)
    assert found.dtype == dtype and found.shape == (*lead, outputs)
    limit = max(0.51 * torch.finfo(dtype).eps, 1e-6)  # one rounding, at the end
    np.testing.assert_allclose(array(found), wanted, rtol=limit, atol=1e-6)


@pytest.mark.parametrize("activation", ["binary", "float"])
def test_linear_gradients_are_straight_through(activation: str) -> None:
    layer = BinaryLinear(9, 4, True, activation=activation, shift=True, dtype=torch.float64)
    nn.init.normal_(layer.shift)
    x = torch.randn(6, 9, dtype=torch.float64) * 2
    x.requires_grad_()
    upstream = torch.randn(6, 4, dtype=torch.float64)
    layer(x).backward(upstream)
    g, w, z = array(upstream), array(layer.weight), array(x) + array(layer.shift)
    scale = np.abs(w).mean(1)
    row = np.abs(z).mean(1, keepdims=True)
    used, passes = (row * signs(z), np.abs(z) <= 2 * row) if activation == "binary" else (z, 1.0)
    dx = (g * scale) @ signs(w) * passes
    dscale = (g * (used @ signs(w).T)).sum(0)
    # the weight is read twice: by its signs, and by the mean |w| of its row
    dw = (g * scale).T @ used + dscale[:, None] * np.sign(w) / w.shape[1]
    for found, wanted in ((x.grad, dx), (layer.weight.grad, dw), (layer.bias.grad, g.sum(0)),
                          (layer.shift.grad, dx.sum(0))):
        np.testing.assert_allclose(array(found), wanted, rtol=1e-10, atol=1e-12)
    if activation == "binary":
        assert 0 < passes.sum() < passes.size


def test_linear_learns() -> None:
    teacher, student = BinaryLinear(16, 4), BinaryLinear(16, 4)
    x = torch.randn(256, 16)
    wanted = teacher(x).detach()
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (student(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_B8_linear_is_one_operator_in_an_exported_graph() -> None:
    layer = BinaryLinear(6, 4, True, shift=True)
    exported = torch.export.export(layer, (torch.randn(3, 5, 6),),
                                   dynamic_shapes=({0: torch.export.Dim("b"),
                                                    1: torch.export.Dim("t")},))
    names = [str(n.target) for n in exported.graph.nodes if n.op == "call_function"]
    assert names == ["aten.abs.default", "aten.mean.dim", "bincompile.fake_binary_linear.default"]
    x = torch.randn(2, 9, 6)
    assert torch.equal(exported.module()(x), layer(x))


def test_fresh_parameters_have_the_range_of_nn_linear_and_no_shift() -> None:
    layer = BinaryLinear(25, 40, True, shift=True)
    for parameter in (layer.weight, layer.bias):
        assert 0.15 < parameter.abs().max() <= 0.2 and parameter.mean().abs() < 0.05
    assert layer.shift.eq(0).all()


def test_from_float_copies_and_leaves_the_original() -> None:
    linear = nn.Linear(8, 3, dtype=torch.float64).eval()
    before = copy.deepcopy(linear.state_dict())
    layer = BinaryLinear.from_float(linear, activation="float")
    assert not layer.training and layer.weight.dtype == torch.float64
    assert torch.equal(layer.weight, linear.weight) and torch.equal(layer.bias, linear.bias)
    with torch.no_grad():
        layer.weight.zero_()
    assert all(torch.equal(before[name], linear.state_dict()[name]) for name in before)
    with pytest.raises(bc.InputTypeError, match=r"nn\.Linear"):
        BinaryLinear.from_float(nn.Conv1d(1, 1, 1))  # type: ignore[arg-type]


def test_extra_repr_says_what_differs_from_the_default() -> None:
    assert repr(BinaryLinear(4, 2)) == (
        "BinaryLinear(in_features=4, out_features=2, bias=False, activation='binary')")
    assert "weight_scale='tensor', shift=True" in repr(
        BinaryLinear(4, 2, weight_scale="tensor", shift=True))


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_a_wrong_argument_is_named(bad: dict[str, Any]) -> None:
    with pytest.raises(bc.ConfigError) as caught:
        BinaryLinear(**({"in_features": 4, "out_features": 2} | bad))
    error = caught.value
    assert isinstance(error, ValueError)
    assert error.found.startswith("BinaryLinear(") and error.allowed
    assert "argument" in error.change or "leave" in error.change


@pytest.mark.parametrize(("x", "error"), [
    (torch.ones(2, 5), bc.InputError), (torch.ones(2, 4).long(), bc.InputTypeError),
    (torch.ones(()), bc.InputError)])
def test_B13_linear_refuses_a_wrong_input(x: torch.Tensor, error: type[Exception]) -> None:
    with pytest.raises(error):
        BinaryLinear(4, 2)(x)


def test_calibrate_is_the_mean_of_all_numbers() -> None:
    layer = BinaryLinear(4, 2, activation_scale="tensor", shift=True, dtype=torch.float64)
    nn.init.normal_(layer.shift)
    batches = [torch.randn(n, 4, dtype=torch.float64) for n in (1, 7, 3)]
    assert layer.calibrate((x,) for x in batches) is layer
    wanted = np.abs(array(torch.cat(batches)) + array(layer.shift)).mean()
    assert layer.calibrated_scale.item() == pytest.approx(wanted, rel=1e-14)
    x = batches[1] * 3
    np.testing.assert_allclose(array(layer(x)), linear_formula(layer, x), rtol=1e-12)
    layer(x).sum().backward()
    assert layer.calibrated_scale.grad is not None


def test_a_forward_before_calibrate_is_an_error_also_in_export() -> None:
    layer = BinaryLinear(4, 2, activation_scale="tensor")
    for call in (layer, lambda x: torch.export.export(layer, (x,))):
        with pytest.raises(bc.ConfigError, match="calibrate"):
            call(torch.ones(3, 4))
    layer.calibrate([torch.ones(3, 4)])
    exported = torch.export.export(layer, (torch.ones(3, 4),))
    assert torch.equal(exported.module()(torch.ones(3, 4)), layer(torch.ones(3, 4)))


@pytest.mark.parametrize(("data", "error", "word"), [
    ([], bc.InputError, "no data"), ([torch.zeros(2, 4)], bc.InputError, "only zeros"),
    ([torch.tensor([[1.0, math.nan, 1.0, 1.0]])], bc.InputError, "NaN"),
    ([torch.tensor([[1.0, math.inf, 1.0, 1.0]])], bc.InputError, "infinity"),
    ([torch.ones(2, 5)], bc.InputError, r"\(2, 5\)"), ([3.0], bc.InputTypeError, "float"),
    ([torch.ones(2, 4).long()], bc.InputTypeError, "int64"), ([[]], bc.InputTypeError, "list")])
def test_calibrate_refuses(data: list, error: type[Exception], word: str) -> None:
    layer = BinaryLinear(4, 2, activation_scale="tensor")
    with pytest.raises(error, match=word):
        layer.calibrate(data)
    assert layer.calibrated_scale is None


def test_calibrate_needs_a_stored_scale() -> None:
    with pytest.raises(bc.ConfigError, match="activation_scale='tensor'"):
        BinaryLinear(4, 2).calibrate([torch.ones(1, 4)])


def test_the_scale_travels_in_the_state_dict() -> None:
    model = nn.Sequential(BinaryLinear(4, 4, activation_scale="tensor"))
    assert set(model.state_dict()) == {"0.weight"}
    model[0].calibrate([torch.full((2, 4), -1.5)])
    fresh = nn.Sequential(BinaryLinear(4, 4, activation_scale="tensor"))
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(5, 4)
    assert torch.equal(fresh(x), model(x)) and torch.equal(copy.deepcopy(model)(x), model(x))
    with pytest.raises(RuntimeError, match="calibrated_scale"):
        nn.Sequential(BinaryLinear(4, 4)).load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="calibrated_scale"):
        model.load_state_dict({"0.weight": torch.ones(4, 4)})


@pytest.mark.parametrize("first", [torch.zeros(4, 8), torch.full((4, 8), 1e4)])
def test_B7_no_forward_changes_the_layer(first: torch.Tensor) -> None:
    layer, x = BinaryLinear(8, 3), torch.randn(4, 8)
    wanted, before = layer(x), copy.deepcopy(layer.state_dict())
    for mode in (True, False):
        layer.train(mode)(first)
        assert torch.equal(layer(x), wanted)
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_B7_zero_rows_have_a_zero_output_and_a_finite_gradient() -> None:
    layer, x = BinaryLinear(8, 3), torch.zeros(2, 8, requires_grad=True)
    output = layer(x)
    output.sum().backward()
    assert output.eq(0).all() and x.grad.isfinite().all()
    assert layer.weight.grad.isfinite().all()


def test_B9_inference_follows_the_weights() -> None:
    layer, x = BinaryLinear(8, 3).eval(), torch.randn(4, 8)
    first = layer(x)
    with torch.no_grad():
        layer.train().weight.neg_()
    assert torch.equal(layer.eval()(x), -first)


def test_B12_bfloat16_sums_are_whole_numbers_until_the_one_rounding_at_the_end() -> None:
    layer = BinaryLinear(1001, 8, weight_scale="tensor", dtype=torch.bfloat16)
    nn.init.constant_(layer.weight, 1.0)
    x = torch.ones(1, 1001, dtype=torch.bfloat16)
    x[0, :233] = -1.0  # the sum is 535, which is not a bfloat16; a rounded popcount gives others
    assert layer(x).eq(torch.tensor(535.0).bfloat16()).all()


def test_B16_zero_is_plus_one_in_the_gradient_too_and_a_zero_weight_can_flip() -> None:
    layer = BinaryLinear(2, 1, weight_scale="tensor", dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 1.0]]))
    x = torch.tensor([[0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    # a = 1/2, s = 1/2: a sign of 0 gives the same gradients as a sign of 1
    assert x.grad.tolist() == [[0.5, 0.5]]
    assert layer.weight.grad[0, 0].item() == 0.25  # |w| has no slope at 0, the sign passes
    with torch.no_grad():
        layer.weight -= 0.1 * layer.weight.grad
    assert layer(x).item() == pytest.approx(0.0) and layer.weight[0, 0].item() < 0


def test_B17_clipped_inputs_give_the_scale_a_gradient() -> None:
    layer = BinaryLinear(3, 2, activation_scale="tensor", dtype=torch.float64)
    layer.calibrate([torch.full((1, 3), 0.1)])
    x = torch.full((1, 3), 5.0, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    wanted = (np.abs(array(layer.weight)).mean(1) * signs(array(layer.weight)).sum(1)).sum()
    assert x.grad.eq(0).all()
    assert layer.calibrated_scale.grad.item() == pytest.approx(wanted) and wanted != 0


@pytest.mark.parametrize("weight_scale", ["row", "tensor"])
def test_B18_the_scale_is_the_least_squares_one_of_the_signs_it_goes_with(
        weight_scale: str) -> None:
    layer = BinaryLinear(9, 4, activation="float", weight_scale=weight_scale, dtype=torch.float64)
    with torch.no_grad():
        layer.weight += 0.2  # its mean is far from 0
    w = array(layer.weight)
    shown = array(layer(torch.eye(9, dtype=torch.float64))).T
    assert (signs(w) == signs(shown)).all()
    error = np.square(w - shown).sum()
    for factor in (0.99, 1.01):
        assert np.square(w - factor * shown).sum() > error


def test_B20_a_layer_that_is_the_whole_model_needs_no_preparation() -> None:
    layer, x = BinaryLinear(12, 5).eval(), torch.randn(4, 12)
    compiled = bc.optimize(layer, (x,))
    assert torch.equal(compiled(x), layer(x))
    assert [r.operator for r in compiled.report.rewrites] == ["binary_linear"]
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({})


def test_B21_layers_run_and_train_on_a_cpu_without_an_extension() -> None:
    code = ("import warnings; warnings.simplefilter('error'); import torch, sys\n"
            "from bincompile.nn import BMHA, BinaryLinear\n"
            "x = torch.ones(2, 3, 8, requires_grad=True)\n"
            "BMHA(8, 8, 2)(BinaryLinear(8, 8)(x))[0].sum().backward()\n"
            "assert x.grad is not None and 'tvm' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=Path(bc.__file__).parents[1])
    assert done.returncode == 0 and not done.stderr, done.stderr
