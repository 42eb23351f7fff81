"""compat="bitorch": the engine's values, from its formulas written out, and its state dicts."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from formulas import array, signs
from torch import nn

import bincompile as bc
from bincompile.nn import BMHA, BinaryLinear
from bincompile.optim import BinaryOptimizer


def engine_layer(features: int = 24, outputs: int = 10, dtype: torch.dtype = torch.float32,
                 **options: Any) -> BinaryLinear:
    """A prepared layer whose shift is not 0, and whose scale is not set."""
    layer = BinaryLinear(features, outputs, compat="bitorch", dtype=dtype, **options)
    layer.prepare_params()
    nn.init.normal_(layer.bias_a, std=0.3)
    return layer


def engine_sum(layer: BinaryLinear, x: torch.Tensor) -> np.ndarray:
    """K - 2 popcount(xor), with integers."""
    left = np.packbits(array(x + layer.bias_a) >= 0, axis=-1)
    right = np.packbits(array(layer.weight) >= 0, axis=-1)
    differ = np.unpackbits(left[..., None, :] ^ right, axis=-1).sum(-1, dtype=np.int64)
    return layer.in_features - 2 * differ


def engine_formula(layer: BinaryLinear, x: torch.Tensor) -> np.ndarray:
    """In float32, as the engine's kernel: one scale, one product."""
    scale = np.float32(layer.scale_a.item() * layer.scale_w.item())
    return engine_sum(layer, x).astype(np.float32) * scale


def quantised(weight: np.ndarray, absolute: bool = False) -> np.ndarray:
    centred = weight - weight.mean(dtype=np.float32)
    largest = np.abs(centred).max() if absolute else centred.max()
    eighth = np.clip(np.rint(centred * (np.float32(127) / largest)), -127, 127)
    return np.where(eighth == 0, np.sign(centred), eighth)



@pytest.mark.parametrize("features", [1, 8, 24, 100, 257])
@pytest.mark.parametrize("symmetric", [True, False])
def test_B7_the_first_batch_sets_the_scale_and_values_are_the_engines_bit_for_bit(
        features: int, symmetric: bool) -> None:
    layer = engine_layer(features, symmetric=symmetric).eval()
    first, x = torch.randn(5, features), torch.randn(2, 3, features)
    out = layer(first)
    wanted = (2 if symmetric else 4) * np.abs(array(first)).mean()
    assert layer.scale_a.item() == pytest.approx(wanted, rel=1e-6)
    kept = layer.scale_a.clone()
    for mode in (True, False):
        assert (layer.train(mode)(x).detach().numpy() == engine_formula(layer, x)).all()
    assert torch.equal(layer.scale_a, kept)
    assert (out.detach().numpy() == engine_formula(layer, first)).all()


def test_B7_zeros_leave_the_scale_unset_without_a_nan() -> None:
    layer, x = engine_layer(), torch.zeros(4, 24, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    assert out.eq(0).all() and layer.scale_a.item() == 0
    assert all(t.grad.isfinite().all() for t in (x, layer.weight, layer.bias_a, layer.scale_a))
    layer(torch.ones(4, 24))
    assert layer.scale_a.item() == 2
    for bad in (math.nan, math.inf):
        with pytest.raises(bc.InputError, match="NaN or infinity"):
            engine_layer()(torch.full((1, 24), bad))


def test_B7_a_scale_has_to_be_there_before_a_graph_is_made() -> None:
    layer, x = engine_layer().eval(), torch.randn(4, 24)
    before = copy.deepcopy(layer.state_dict())
    for call in (lambda: bc.optimize(layer, (x,)), lambda: bc.inspect(layer, (x,)),
                 lambda: bc.optimize(layer), lambda: torch.export.export(layer, (x,)),
                 lambda: bc.optimize(nn.Sequential(nn.Linear(24, 24), layer).eval(), (x,))):
        with pytest.raises(bc.ConfigError, match="scale_a"):
            call()
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    copies = [copy.deepcopy(layer) for _ in range(3)]
    copies[0](x)
    copies[1].calibrate([x[:1], x[1:]])
    copies[2].load_state_dict(copies[0].state_dict())
    for ready in copies:
        assert ready.scale_a.item() == pytest.approx(2 * np.abs(array(x)).mean(), rel=1e-6)
        compiled = bc.optimize(ready, (x,))
        assert (compiled(x).numpy() == engine_formula(ready, x)).all()
        assert [r.operator for r in compiled.report.rewrites] == ["binary_linear"]


def test_B8_a_layer_with_a_scale_reads_no_number_back() -> None:
    layer = engine_layer()
    layer(torch.ones(1, 24))
    exported = torch.export.export(layer, (torch.randn(3, 24),))
    assert [str(n.target) for n in exported.graph.nodes if n.op == "call_function"] == [
        "bincompile.fake_bitorch_linear.default"]


def test_prepared_weights_are_the_engines() -> None:
    weight = torch.randn(10, 24) + 0.1
    layer = BinaryLinear(24, 10, compat="bitorch")
    assert layer.scale_w.item() == 1  # as in the engine, before the preparation
    with torch.no_grad():
        layer.weight.copy_(weight)
    layer.prepare_params()
    assert (layer.weight.detach().numpy() == quantised(weight.numpy())).all()
    assert layer.scale_w.item() == pytest.approx(np.abs(array(weight)).mean(), rel=1e-6)
    linear = nn.Linear(24, 10, bias=False)
    again = BinaryLinear.from_float(linear, compat="bitorch")
    assert (again.weight.detach().numpy() == quantised(linear.weight.detach().numpy())).all()
    with pytest.raises(bc.ConfigError, match="bias"):
        BinaryLinear.from_float(nn.Linear(4, 4), compat="bitorch")
    with pytest.raises(bc.ConfigError, match="compat='bitorch'"):
        BinaryLinear(4, 4).prepare_params()


def test_B11_the_largest_value_is_signed_as_stored_models_have_it() -> None:
    layer = BinaryLinear(4, 1, compat="bitorch")
    weight = torch.tensor([[-10.0, -1.0, 1.0, 2.0]])
    with torch.no_grad():
        layer.weight.copy_(weight)
    layer.prepare_params()
    assert (layer.weight.detach().numpy() == quantised(weight.numpy())).all()
    assert layer.weight[0, 0] == -127 != quantised(weight.numpy(), absolute=True)[0, 1]


@pytest.mark.parametrize("value", [0.0, 0.1, -0.7, 1e-30])
def test_B11_equal_weights_neither_raise_nor_give_nan(value: float) -> None:
    layer = BinaryLinear(3, 7, compat="bitorch")
    nn.init.constant_(layer.weight, value)
    layer.prepare_params()
    assert layer.weight.isfinite().all() and layer.weight.abs().le(127).all()
    assert layer.scale_w.item() == pytest.approx(abs(value), rel=1e-5)
    assert layer(torch.ones(2, 3)).isfinite().all()


def test_B12_sums_are_exact_in_bfloat16() -> None:
    layer = engine_layer(1001, 8, torch.bfloat16)
    x = torch.randn(3, 1001).bfloat16()
    out = layer(x)
    scale = np.float32(layer.scale_a.item() * layer.scale_w.item())
    wanted = engine_sum(layer, x).astype(np.float32) * scale
    assert torch.equal(out, torch.from_numpy(wanted).bfloat16())


def test_B13_B14_any_float_dtype_and_size_or_an_error() -> None:
    for features, dtype in ((65, torch.float16), (64, torch.float64), (3, torch.bfloat16)):
        layer = engine_layer(features, 4, dtype)
        x = torch.randn(2, features, dtype=dtype)
        assert layer(x).dtype == dtype and layer(x).ne(0).any()
    for bad, error in ((torch.ones(2, 3).int(), bc.InputTypeError),
                       (torch.ones(2, 4).bfloat16(), bc.InputError)):
        with pytest.raises(error):
            layer(bad)


def test_B16_B17_gradients_are_the_written_formula() -> None:
    layer = engine_layer(12, 5, torch.float64)
    with torch.no_grad():
        layer.scale_a.fill_(0.8)
        layer.weight[0, :2] = 0.0
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    x[0, 0, 0] = -layer.bias_a[0].detach()  # z = 0, whose sign is +1
    x.requires_grad_()
    upstream = torch.randn(2, 3, 5, dtype=torch.float64)
    layer(x).backward(upstream)
    g, z = array(upstream).reshape(6, 5), array(x + layer.bias_a).reshape(6, 12)
    through = (g * layer.scale_w.item()) @ signs(array(layer.weight))
    dx = through * (np.abs(z / 0.8) <= 1)
    assert 0 < (dx == 0).sum() < dx.size and z[0, 0] == 0
    for found, wanted in (
            (x.grad.reshape(6, 12), dx), (layer.bias_a.grad, dx.sum(0)),
            (layer.weight.grad, g.T @ (0.8 * signs(z))),
            (layer.scale_a.grad, (through * signs(z)).sum() / math.sqrt(72))):
        np.testing.assert_allclose(array(found), wanted, rtol=1e-10, atol=1e-12)
    assert layer.scale_w.grad is None and not layer.scale_w.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_layers_of_every_float_dtype_compile_to_the_same_values(dtype: torch.dtype) -> None:
    layer, x = engine_layer(33, 6, dtype).eval(), torch.randn(4, 33, dtype=dtype)
    wanted = layer(x)
    compiled = bc.optimize(layer, (x,))
    assert torch.equal(compiled(x), wanted) and wanted.dtype == dtype
    assert [r.operator for r in compiled.report.rewrites] == ["binary_linear"]


@pytest.mark.parametrize("kind", ["float", "int8 weight", "uint8", "int8", "both"])
def test_state_dicts_of_the_engine_load_and_go_round_bit_for_bit(kind: str) -> None:
    layer, x = engine_layer(), torch.randn(4, 24)
    wanted, own = layer(x), layer.state_dict()
    assert set(own) == {"weight", "bias_a", "scale_a", "scale_w"}
    packed = torch.from_numpy(np.packbits(array(layer.weight) >= 0, axis=-1, bitorder="little"))
    weight = own["weight"]
    stored = {"bias_a": own["bias_a"], "scale_a": own["scale_a"], "scale_w": own["scale_w"], **{
        "float": {"weight": weight}, "int8 weight": {"weight": weight.to(torch.int8)},
        "uint8": {"qweight": packed}, "int8": {"qweight": torch.sign(weight).to(torch.int8)},
        "both": {"weight": weight.to(torch.int8), "qweight": packed}}[kind]}
    fresh = BinaryLinear(24, 10, compat="bitorch")
    keys = set(stored)
    fresh.load_state_dict(stored)
    assert set(stored) == keys and torch.equal(fresh(x), wanted)
    again = BinaryLinear(24, 10, compat="bitorch")
    again.load_state_dict(fresh.state_dict())
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in fresh.state_dict().items())
    if kind not in ("uint8", "int8"):
        assert torch.equal(fresh.weight, layer.weight)


def test_B9_packed_bits_that_are_not_those_of_the_weight_are_refused() -> None:
    layer = engine_layer()
    packed = np.packbits(array(layer.weight) < 0, axis=-1, bitorder="little")
    stale = {**layer.state_dict(), "qweight": torch.from_numpy(packed)}
    with pytest.raises(RuntimeError, match="other signs"):
        BinaryLinear(24, 10, compat="bitorch").load_state_dict(stale)


def test_B20_what_does_not_fit_is_said() -> None:
    stored = engine_layer().state_dict()
    with pytest.raises(RuntimeError, match="compat='bitorch' reads them"):
        BinaryLinear(24, 10).load_state_dict(stored)
    stored["qweight"] = torch.zeros(10, 4, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"allowed is uint8 \(10, 3\)"):
        BinaryLinear(24, 10, compat="bitorch").load_state_dict(stored)


def test_B22_the_rule_of_the_engines_optimizer_starts_from_nothing_random() -> None:
    ends = []
    for seed in (1, 2):
        weight = nn.Parameter(torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, 1.0]]))
        optimizer = BinaryOptimizer([weight], rule="sign_momentum", lr=0.5)
        torch.manual_seed(seed)
        for step in range(20):
            optimizer.zero_grad()
            (weight * (step - torch.arange(6.0).reshape(2, 3) * 3)).sum().backward()
            optimizer.step()
        ends.append(weight.detach().clone())
    assert torch.equal(*ends)
    with pytest.raises(bc.ConfigError, match="weight_decay"):
        BinaryOptimizer([weight], rule="sign_momentum", weight_decay=0.1)


def attention(layer: BMHA, x: torch.Tensor, kept: np.ndarray | None) -> tuple[np.ndarray, ...]:
    """The engine's attention in float64, from its projections; kept is (B, 1 or L, S)."""
    q, k, v = (engine_formula(p, x).astype(np.float64).reshape(
        *x.shape[:2], layer.num_heads, -1).transpose(0, 2, 1, 3)
        for p in (layer.q_linear, layer.k_linear, layer.v_linear))
    scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(layer.head_dim)
    if kept is not None:
        scores = np.where(kept[:, None], scores, -1e9)
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    weights = powers / powers.sum(-1, keepdims=True)
    return weights, (weights @ v).transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1)


def engine_attention() -> BMHA:
    layer = BMHA(10, 12, 3, compat="bitorch").eval()
    for projection in (layer.q_linear, layer.k_linear, layer.v_linear, layer.out):
        projection.prepare_params()
        nn.init.normal_(projection.bias_a, std=0.2)
    return layer


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("shape", [None, (3, 5), (3, 1, 5), (3, 5, 5)], ids=str)
def test_B1_B2_masks_drop_where_they_are_0_whatever_their_dtype(
        shape: tuple[int, ...] | None, dtype: torch.dtype) -> None:
    layer, x = engine_attention(), torch.randn(3, 5, 10)  # three samples and three heads
    kept = None if shape is None else torch.rand(shape) > 0.4
    if kept is not None:
        kept.view(-1, 5)[0] = False  # a row without keys is uniform
    output, weights = layer(x, None if kept is None else kept.to(dtype))
    shown = None if kept is None else array(kept).reshape(3, -1, 5) > 0
    wanted, mixed = attention(layer, x, shown)
    np.testing.assert_allclose(array(weights), wanted, atol=1e-6)
    if kept is not None:
        np.testing.assert_allclose(array(weights)[0, :, 0], 0.2, atol=1e-7)
    far = np.abs(mixed + array(layer.out.bias_a)).min() > 1e-6  # no sign hangs on rounding
    assert far and (output.detach().numpy() == engine_formula(
        layer.out, torch.from_numpy(mixed).float())).all()


def test_B2_half_precision_masks_do_not_overflow() -> None:
    layer = BMHA(8, 8, 2, torch.float16, compat="bitorch").eval()
    weights = layer(torch.randn(2, 4, 8).half(), torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]]))[1]
    assert weights.dtype == torch.float16 and weights[0, :, :, 2:].eq(0).all()
    assert weights[1].eq(0.25).all()


def test_B4_the_weights_are_those_after_dropout_as_the_engine_returns_them() -> None:
    layer, x = engine_attention(), torch.randn(4, 9, 10)
    kept = layer(x)[1]
    layer.dropout.p = 0.25
    dropped = layer.train()(x)[1]
    gone = dropped.eq(0)
    assert 0.1 < gone.float().mean() < 0.4 and kept.gt(0).all()
    torch.testing.assert_close(dropped, torch.where(gone, 0.0, kept / 0.75))
    assert torch.equal(layer.eval()(x)[1], kept)
    assert layer(x, need_weights=False)[1] is None


def test_compat_attention_compiles_and_its_state_goes_round() -> None:
    layer, x, kept = engine_attention(), torch.randn(3, 5, 10), torch.rand(3, 5) > 0.3
    kept[1] = False  # uniform, also when it is compiled
    with pytest.raises(bc.ConfigError, match="scale_a"):
        bc.optimize(layer, (x, kept))
    wanted = layer(x, kept)
    assert set(layer.state_dict()) == {
        f"{part}.{name}" for part in ("q_linear", "k_linear", "v_linear", "out")
        for name in ("weight", "bias_a", "scale_a", "scale_w")}
    fresh = BMHA(10, 12, 3, compat="bitorch").eval()
    fresh.load_state_dict(layer.state_dict())
    compiled = bc.optimize(fresh, (x, kept))
    assert [r.operator for r in compiled.report.rewrites].count("binary_linear") == 4
    assert [m.validated for m in compiled.report.matches] == [True] * 5
    for found, other, want in zip(compiled(x, kept), fresh(x, kept), wanted, strict=True):
        assert torch.equal(other, want)
        torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
