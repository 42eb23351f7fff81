"""BMHA against its float64 formula, and the known defects of such layers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from formulas import array, attention_formula

import bincompile as bc
from bincompile.nn import BMHA

B, L, S, H, DIM, HIDDEN = 3, 5, 7, 3, 10, 12
# B == H is the case in which a mask of samples could be taken for a mask of heads.
BAD = [
    {"hidden_dim": 10}, {"num_heads": 0}, {"input_dim": 2.5}, {"dropout": 1.0}, {"dropout": -0.1},
    {"dropout": False}, {"attention": "none"}, {"compat": "engine"}, {"probabilities": "int8"},
    {"values": "binary"}, {"attention": "binary", "probabilities": "int4"},
    {"attention": "binary", "values": "int8"}, {"compat": "bitorch", "attention": "binary"},
    {"compat": "bitorch", "bias": True},
    {"bias": None}, {"dtype": torch.int64}, {"dtype": None, "hidden_dim": 13},
]
KEEP_SHAPES = [(B, S), (1, S), (B, 1, S), (1, 1, S), (B, L, S), (1, L, S), (B, H, L, S),
               (B, 1, L, S), (1, H, L, S), (1, 1, 1, S)]


def attention_layer(**options: Any) -> BMHA:
    return BMHA(DIM, HIDDEN, H, torch.float64, **options).eval()


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(B, n, DIM, dtype=dtype) for n in (L, S, S))  # type: ignore[return-value]


def as_bias(kept: np.ndarray) -> np.ndarray:
    """A keep mask of any of these shapes as what is added to the scores (B, H, L, S)."""
    wide = {2: kept[:, None, None] if kept.ndim == 2 else None,
            3: kept[:, None] if kept.ndim == 3 else None, 4: kept}[kept.ndim]
    return np.broadcast_to(np.where(wide, 0.0, -np.inf), (B, H, L, S))


def check(layer: BMHA, tensors: tuple, mask: torch.Tensor | None, bias: np.ndarray,
          causal: bool = False) -> None:
    query, key, value = tensors
    wanted = attention_formula(layer, query, key, value, bias)
    found = layer(query, mask, key=key, value=value, causal=causal)
    for f, w in zip(found, wanted, strict=True):
        np.testing.assert_allclose(array(f), w, rtol=1e-10, atol=1e-12)
    output, none = layer(query, mask, key=key, value=value, causal=causal, need_weights=False)
    assert none is None
    np.testing.assert_allclose(array(output), wanted[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", KEEP_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8])
def test_keep_masks_of_every_shape(shape: tuple[int, ...], dtype: torch.dtype, causal: bool,
                                   ) -> None:
    kept = torch.rand(shape) > 0.4
    bias = as_bias(kept.numpy()) + (np.triu(np.full((L, S), -np.inf), 1) if causal else 0.0)
    mask = kept if dtype == torch.bool else kept.to(dtype) * 2  # what is not 0 keeps
    check(attention_layer(bias=True), inputs(), mask, bias, causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", KEEP_SHAPES, ids=str)
def test_float_masks_are_added(shape: tuple[int, ...], causal: bool) -> None:
    kept = torch.rand(shape) > 0.3
    mask = torch.where(kept, torch.randn(shape, dtype=torch.float64), -math.inf)
    wide = mask[:, None, None] if mask.ndim == 2 else mask[:, None] if mask.ndim == 3 else mask
    bias = np.broadcast_to(wide.numpy(), (B, H, L, S))
    bias = bias + (np.triu(np.full((L, S), -np.inf), 1) if causal else 0.0)
    check(attention_layer(), inputs(), mask, bias, causal)


def test_a_float_mask_of_zeros_and_ones_is_added_too() -> None:
    mask = (torch.rand(B, S, dtype=torch.float64) > 0.5).double()
    check(attention_layer(), inputs(), mask, np.broadcast_to(mask.numpy()[:, None, None],
                                                             (B, H, L, S)))


@pytest.mark.parametrize("causal", [False, True])
def test_attention_without_mask(causal: bool) -> None:
    bias = np.triu(np.full((B, H, L, S), -np.inf), 1) if causal else np.zeros((B, H, L, S))
    check(attention_layer(), inputs(), None, bias, causal)


def test_key_and_value_default_to_the_input() -> None:
    layer, (x, key, _) = attention_layer(), inputs()
    for given_, whole in (({}, {"key": x, "value": x}), ({"key": key}, {"key": key, "value": key})):
        assert torch.equal(layer(x, **given_)[0], layer(x, **whole)[0])


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_B2_a_query_that_sees_nothing_gives_zeros_and_finite_gradients(
        additive: bool, need_weights: bool) -> None:
    layer, x = attention_layer(), torch.randn(B, L, DIM, dtype=torch.float64, requires_grad=True)
    kept = torch.ones(B, L, L, dtype=torch.bool)
    kept[1] = False
    kept[2, 3] = False
    mask = torch.where(kept, 0.0, -math.inf).double() if additive else kept
    output, weights = layer(x, mask, need_weights=need_weights)
    assert output[1].eq(0).all() and output[2, 3].eq(0).all()
    assert output[0].ne(0).any() and output[2, 2].ne(0).any()
    if weights is not None:
        assert weights[1].eq(0).all() and weights[2, :, 3].eq(0).all()
    output.square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.ne(0).any()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize(("mask", "error"), [
    (torch.ones(B, L + 1).bool(), bc.InputError), (torch.ones(B + 1, L).bool(), bc.InputError),
    (torch.ones(L).bool(), bc.InputError), (torch.ones(B, 2, L).bool(), bc.InputError),
    (torch.ones(B, H + 1, L, L).bool(), bc.InputError),
    (torch.ones(1, B, H, L, L).bool(), bc.InputError), (torch.ones(B, 1).bool(), bc.InputError),
    (torch.ones(B, L, dtype=torch.complex64), bc.InputTypeError)], ids=lambda p: str(
        tuple(p.shape)) if isinstance(p, torch.Tensor) else p.__name__)
def test_a_wrong_mask_is_refused(mask: torch.Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match="mask"):
        attention_layer()(torch.randn(B, L, DIM, dtype=torch.float64), mask)


@pytest.mark.parametrize(("name", "shapes"), [
    ("hidden_states", ((L, DIM), None, None)), ("hidden_states", ((B, L, DIM + 1), None, None)),
    ("key", ((B, L, DIM), (B + 1, S, DIM), None)), ("key", ((B, L, DIM), (B, S, 1), None)),
    ("value", ((B, L, DIM), (B, S, DIM), (B, S + 1, DIM)))])
def test_wrong_inputs_are_refused_by_name(name: str, shapes: tuple) -> None:
    x, key, value = (None if shape is None else torch.zeros(shape, dtype=torch.float64)
                     for shape in shapes)
    with pytest.raises(bc.InputError, match=f"^{name} of shape"):
        attention_layer()(x, key=key, value=value)


@pytest.mark.parametrize("shape", [(0, L), (B, 0)])
def test_empty_batches_and_sequences(shape: tuple[int, int]) -> None:
    x = torch.randn(*shape, DIM, dtype=torch.float64)
    output, weights = attention_layer()(x, torch.ones(shape).bool())
    assert output.shape == x.shape and weights.shape == (shape[0], H, shape[1], shape[1])


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_attention_exports_with_any_batch_and_length(
        need_weights: bool, dtype: torch.dtype) -> None:
    layer = BMHA(DIM, HIDDEN, H).eval()
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    fixed = {"causal": True, "need_weights": need_weights}
    exported = torch.export.export(
        layer, (torch.randn(B, L, DIM), torch.ones(B, L).to(dtype)), fixed,
        dynamic_shapes={"hidden_states": dims, "mask": dims, "causal": None, "need_weights": None})
    x, mask = torch.randn(4, 9, DIM), torch.rand(4, 9).gt(0.3).to(dtype)
    for found, wanted in zip(exported.module()(x, mask, **fixed), layer(x, mask, **fixed),
                             strict=True):
        assert found is wanted is None or torch.equal(found, wanted)


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_a_wrong_argument_is_named(bad: dict[str, Any]) -> None:
    with pytest.raises(bc.ConfigError) as caught:
        BMHA(**({"input_dim": 4, "hidden_dim": 12, "num_heads": 3} | bad))
    error = caught.value
    assert isinstance(error, ValueError)
    assert error.found.startswith("BMHA(") and error.allowed
    assert "argument" in error.change or "leave" in error.change


def test_B1_a_mask_of_keys_is_read_by_sample_even_when_batch_equals_heads() -> None:
    layer, x = attention_layer(), torch.randn(B, L, DIM, dtype=torch.float64)
    kept = torch.ones(B, L, dtype=torch.bool)
    kept[1, 2:] = False
    weights = layer(x, kept)[1]
    assert weights[1, :, :, 2:].eq(0).all() and weights[[0, 2]].gt(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("additive", [False, True])
def test_B2_masks_work_in_half_precision(dtype: torch.dtype, additive: bool) -> None:
    layer = BMHA(DIM, HIDDEN, H, dtype).eval()
    x, kept = torch.randn(B, L, DIM).to(dtype), torch.rand(B, L) > 0.3
    mask = torch.where(kept, 0.0, -math.inf) if additive else kept
    output, weights = layer(x, mask, causal=True)
    assert output.dtype == weights.dtype == dtype
    bias = np.where(kept.numpy(), 0.0, -np.inf)[:, None, None] + np.triu(
        np.full((B, H, L, L), -np.inf), 1)
    wanted = attention_formula(layer, x, x, x, bias)[1]
    np.testing.assert_allclose(array(weights), wanted, atol=8 * torch.finfo(dtype).eps)
    assert output.isfinite().all()


def test_B3_dropout_is_an_argument_and_no_other_is_swallowed() -> None:
    assert BMHA(8, 8, 2, dropout=0.4).dropout.p == 0.4
    for extra in ({"drop": 0.1}, {"causal": True}):
        with pytest.raises(TypeError, match=next(iter(extra))):
            BMHA(8, 8, 2, **extra)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_B4_dropout_acts_in_training_and_weights_are_those_before_it(
        masked: bool, need_weights: bool) -> None:
    layer, x = BMHA(8, 8, 2, dropout=0.5).train(), torch.randn(2, 6, 8)
    mask = torch.ones(2, 6).bool() if masked else None
    (first, weights), (second, _) = (layer(x, mask, need_weights=need_weights) for _ in range(2))
    assert not torch.equal(first, second)
    if need_weights:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 6))
    layer.eval()
    assert torch.equal(*(layer(x, mask, need_weights=need_weights)[0] for _ in range(2)))


def test_B5_other_keys_a_bias_and_an_output_without_weights() -> None:
    layer, (query, key, value) = attention_layer(bias=True), inputs()
    assert {name for name, _ in layer.named_parameters() if name.endswith("bias")} == {
        f"{part}.bias" for part in ("q_linear", "k_linear", "v_linear", "out")}
    output, weights = layer(query, key=key, value=value)
    assert output.shape == (B, L, DIM) and weights.shape == (B, H, L, S)


def test_B10_parameters_are_floats_that_can_be_trained() -> None:
    layer = BMHA(8, 8, 2, bias=True).eval()
    assert all(p.is_floating_point() and p.requires_grad for p in layer.parameters())
    assert not list(layer.buffers())
    layer(torch.randn(2, 3, 8))[0].sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_B15_inputs_need_not_be_contiguous() -> None:
    layer, x = attention_layer(), torch.randn(L, DIM, B, dtype=torch.float64).permute(2, 0, 1)
    assert not x.is_contiguous()
    assert torch.equal(layer(x)[0], layer(x.contiguous())[0])
    assert torch.equal(layer.q_linear(x[:, ::2]), layer.q_linear(x[:, ::2].contiguous()))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, torch.ones(B, L).bool(), torch.zeros(B, L, L)],
                         ids=["none", "keep", "added"])
def test_attention_is_recognised_and_compiled(mask: torch.Tensor | None, causal: bool,
                                              need_weights: bool) -> None:
    layer = BMHA(DIM, HIDDEN, H).eval()
    fixed = {"causal": causal, "need_weights": need_weights}
    compiled = bc.optimize(layer, (torch.randn(B, L, DIM), mask), fixed)
    found = [m for m in compiled.report.matches if m.operator == "attention"]
    assert len(found) == 1 and found[0].validated
    if mask is not None:
        mask = torch.rand(4, 9) > 0.4 if mask.ndim == 2 else torch.randn(4, 9, 9)
    x = torch.randn(4, 9, DIM)
    for f, w in zip(compiled(x, mask, **fixed), layer(x, mask, **fixed), strict=True):
        assert f is w is None or torch.allclose(f, w, atol=1e-5)
