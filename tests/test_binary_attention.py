"""Attention of 1-bit queries and keys: values against whole-number sums, gradients against what
the operator's description says, and the layer that holds it."""

from __future__ import annotations

import itertools
import math
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
from bincompile.nn import BMHA
from bincompile.ops.binary_attention import PROBABILITIES, VALUES, binary_attention

OPTIONS = [pair for pair in itertools.product(PROBABILITIES, VALUES) if pair != ("uint8", "float")]
B, H, M, N, D, E = 2, 3, 4, 6, 5, 7


def popcount_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, bias: np.ndarray, scale: float,
                       threshold: np.ndarray | None, probabilities: str, values: str,
                       ) -> tuple[np.ndarray, np.ndarray]:
    """Query by query; bias is -inf where a key is dropped."""
    out, weights = np.zeros((*q.shape[:3], v.shape[3])), np.zeros((*q.shape[:3], k.shape[2]))
    shown = signs(v) * np.abs(v).mean(-1, keepdims=True) if values == "binary" else v
    for b, h, i in np.ndindex(*q.shape[:3]):
        differ = ((q[b, h, i] >= 0) ^ (k[b, h] >= 0)).sum(-1)
        sizes = np.abs(q[b, h, i]).mean() * np.abs(k[b, h]).mean(-1)
        scores = sizes * (q.shape[3] - 2 * differ) * scale + bias[b, h, i]
        if not np.isfinite(scores).any():
            continue
        powers = np.exp(scores - scores.max())
        counts = {"float": powers, "int8": np.rint(127 * powers)}.get(probabilities)
        if probabilities == "binary":
            counts = ((powers >= min(threshold[h], 1.0)) & (powers > 0)).astype(float)
        if probabilities == "uint8":
            scales = np.abs(v[b, h]).mean(-1)
            step = (powers * scales).max() / 255
            counts = np.rint(powers * scales / step) * step / scales
        weights[b, h, i] = counts / (powers if probabilities == "uint8" else counts).sum()
        out[b, h, i] = weights[b, h, i] @ shown[b, h]
    return out, weights


def tensors(*sizes: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(B, H, n, d, dtype=torch.float64).mul_(2).requires_grad_()
                 for n, d in sizes)


def limits(probabilities: str) -> torch.Tensor | None:
    if probabilities != "binary":
        return None
    return torch.tensor([0.2, 0.6, 1.5], dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(("probabilities", "values"), OPTIONS)
@given(features=st.sampled_from([1, 5, 8, 64, 65]), rows=st.integers(1, 5), keys=st.integers(1, 9),
       causal=st.booleans(), seed=st.integers(0, 2**31))
def test_B6_B19_scores_are_popcounts_of_any_width(
        probabilities: str, values: str, features: int, rows: int, keys: int, causal: bool,
        seed: int) -> None:
    torch.manual_seed(seed)
    q, k, v = tensors((rows, features), (keys, features), (keys, 3))
    threshold, kept = limits(probabilities), torch.rand(B, 1, rows, keys) > 0.3
    found = binary_attention.overload(q, k, v, None, kept, None, threshold, features**-0.5, causal,
                                      probabilities, values, True)
    bias = np.where(kept.numpy(), 0.0, -np.inf) + (
        np.triu(np.full((rows, keys), -np.inf), 1) if causal else 0.0)
    wanted = popcount_attention(array(q), array(k), array(v), np.broadcast_to(
        bias, (B, H, rows, keys)), features**-0.5,
        None if threshold is None else array(threshold), probabilities, values)
    for f, w in zip(found, wanted, strict=True):
        np.testing.assert_allclose(array(f), w, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("probabilities", "values"), OPTIONS)
@pytest.mark.parametrize("weighed", [False, True])
def test_gradients_are_straight_through(probabilities: str, values: str, weighed: bool) -> None:
    q, k, v = tensors((M, D), (N, D), (N, E))
    bias = torch.randn(H, M, N, dtype=torch.float64, requires_grad=True)
    threshold, kept = limits(probabilities), torch.rand(B, 1, M, N) > 0.3
    kept[0, 0, 0] = False
    drop = (torch.rand(B, H, M, N, dtype=torch.float64) > 0.2) / 0.8
    leaves = [t for t in (q, k, v, bias, threshold) if t is not None]

    def passed(x: torch.Tensor) -> torch.Tensor:
        """sign(x) s(x), whose gradient is that of x where |x| <= 2 s(x)."""
        scale = x.detach().abs().mean(-1, keepdim=True)
        through = torch.where(x.detach().abs() <= 2 * scale, x, x.detach())
        return through + (torch.where(x >= 0, 1.0, -1.0) * scale - through).detach()

    out, weights = binary_attention.overload(q, k, v, bias, kept, drop, threshold, 0.4, False,
                                             probabilities, values, weighed)
    g, g_weights = torch.randn_like(out), torch.randn_like(weights)
    found = torch.autograd.grad((out * g).sum() + (weights * g_weights).sum(), leaves)
    scores = passed(q) @ passed(k).mT * 0.4 + bias
    scores = torch.where(kept, scores, -1e300)
    soft = torch.where(kept, torch.softmax(scores, -1), 0.0)
    hard = binary_attention.overload(q, k, v, bias, kept, None, threshold, 0.4, False,
                                     probabilities, values, True)[1].detach()
    used = soft + (hard - soft).detach()
    mixed = (used * drop) @ (passed(v) if values == "binary" else v)
    total = (mixed * g).sum() + ((used * g_weights).sum() if weighed else 0.0)
    wanted = torch.autograd.grad(total, leaves[:4])
    for f, w in zip(found[:4], wanted, strict=True):
        np.testing.assert_allclose(array(f), array(w), rtol=1e-9, atol=1e-11)
    if threshold is not None:
        shown = array(passed(v) if values == "binary" else v)
        inner = array(g) @ shown.swapaxes(-1, -2) * array(drop) + (array(g_weights) if weighed
                                                                   else 0.0)
        expected = _threshold_slope(array(soft), array(hard), inner, array(threshold))
        np.testing.assert_allclose(array(found[4]), expected, rtol=1e-9, atol=1e-11)
        assert (expected != 0).all()


def _threshold_slope(soft: np.ndarray, hard: np.ndarray, inner: np.ndarray,
                     threshold: np.ndarray) -> np.ndarray:
    """-sum(w (G - sum(u G)) / sum(c)), w = [0 < e <= 2 min(threshold, 1)], row by row."""
    slope = np.zeros(len(threshold))
    for b, h, i in np.ndindex(*soft.shape[:3]):
        if soft[b, h, i].any():
            powers = soft[b, h, i] / soft[b, h, i].max()
            near = (powers > 0) & (powers <= 2 * min(threshold[h], 1.0))
            centred = inner[b, h, i] - hard[b, h, i] @ inner[b, h, i]
            slope[h] -= (near * centred).sum() / np.count_nonzero(hard[b, h, i])
    return slope


def test_every_clip_stops_and_lets_pass_some_gradient() -> None:
    q, k, v = tensors((M, D), (N, D), (N, E))
    binary_attention.overload(q, k, v, None, None, None, None, 0.4, False, "float",
                              "binary")[0].square().sum().backward()
    for x in (q, k, v):
        passes = x.abs() <= 2 * x.abs().mean(-1, keepdim=True)
        assert 0 < passes.sum() < x.numel()
        assert x.grad[~passes].eq(0).all() and x.grad[passes].ne(0).all()


def layer_of(probabilities: str = "float", values: str = "float", **options: Any) -> BMHA:
    return BMHA(10, 12, 3, torch.float64, attention="binary", probabilities=probabilities,
                values=values, **options).eval()


@pytest.mark.parametrize(("probabilities", "values"), OPTIONS)
@pytest.mark.parametrize("additive", [False, True])
def test_the_layer_is_its_formula_and_rows_without_keys_are_zero(
        probabilities: str, values: str, additive: bool) -> None:
    layer = layer_of(probabilities, values, bias=True)
    query, key, value = (torch.randn(2, n, 10, dtype=torch.float64) for n in (4, 6, 6))
    kept = torch.rand(2, 4, 6) > 0.4
    kept[1, 2] = False
    extra = torch.randn(2, 4, 6, dtype=torch.float64) if additive else 0.0
    mask = torch.where(kept, extra, -math.inf) if additive else kept
    bias = np.where(kept.numpy(), array(torch.as_tensor(extra)), -np.inf)
    heads = [linear_formula(p, x).reshape(2, -1, 3, 4).transpose(0, 2, 1, 3) for p, x in (
        (layer.q_linear, query), (layer.k_linear, key), (layer.v_linear, value))]
    mixed, weights = popcount_attention(
        *heads, np.broadcast_to(bias[:, None], (2, 3, 4, 6)), 0.5,
        None if layer.threshold is None else array(layer.threshold), probabilities, values)
    wanted = linear_formula(layer.out, torch.from_numpy(
        mixed.transpose(0, 2, 1, 3).reshape(2, 4, 12)))
    found = layer(query, mask, key=key, value=value)
    np.testing.assert_allclose(array(found[0]), wanted, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(array(found[1]), weights, rtol=1e-9, atol=1e-11)
    assert found[1][1, :, 2].eq(0).all()
    output, none = layer(query, mask, key=key, value=value, need_weights=False)
    assert none is None and torch.equal(output, found[0])
    output.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize(("probabilities", "values"), OPTIONS)
def test_a_row_depends_on_no_later_token(probabilities: str, values: str) -> None:
    layer, x = layer_of(probabilities, values), torch.randn(2, 6, 10, dtype=torch.float64)
    whole, part = (layer(t, causal=True)[0] for t in (x, x[:, :4]))
    torch.testing.assert_close(whole[:, :4], part, rtol=1e-12, atol=1e-12)


def test_dropout_drops_weights_in_training_and_returns_them_whole() -> None:
    layer, x = layer_of(dropout=0.5), torch.randn(2, 6, 10, dtype=torch.float64)
    kept = layer(x)[1]
    first, second = (layer.train()(x) for _ in range(2))
    assert not torch.equal(first[0], second[0]) and torch.equal(first[1], kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    layer = BMHA(8, 8, 2, dtype, attention="binary", probabilities="binary").eval()
    output, weights = layer(torch.randn(2, 5, 8).to(dtype), torch.rand(2, 5) > 0.3)
    assert output.dtype == weights.dtype == dtype and output.isfinite().all()


@pytest.mark.parametrize(("probabilities", "values"), [("float", "float"), ("binary", "binary"),
                                                       ("int8", "float")])
def test_the_layer_learns(probabilities: str, values: str) -> None:
    """Which token holds the largest first number: a task for attention."""
    layer = BMHA(8, 32, 4, dropout=0.0, attention="binary", probabilities=probabilities,
                 values=values)
    head = nn.Linear(8, 4)
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=0.01)
    x = torch.randn(256, 6, 8)
    labels = x[torch.arange(256), x[:, :, 0].argmax(1), 1:5].argmax(1)
    losses, before = [], None if layer.threshold is None else layer.threshold.detach().clone()
    for _ in range(150):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(head(layer(x, need_weights=False)[0].mean(1)), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.2 and np.mean(losses[-10:]) < losses[0] - 0.15
    if before is not None:
        assert (layer.threshold - before).abs().max() > 0.01


@pytest.mark.parametrize(("probabilities", "values"), [("float", "float"), ("binary", "binary")])
def test_attention_is_recognised_compiled_saved_and_loaded(
        tmp_path: Path, probabilities: str, values: str) -> None:
    layer = layer_of(probabilities, values).float()
    x, kept = torch.randn(2, 5, 10), torch.rand(2, 5) > 0.3
    compiled = bc.optimize(layer, (x, kept))
    found = [m for m in compiled.report.matches if m.operator == "attention"]
    assert len(found) == 1 and found[0].validated and found[0].attrs["values"] == values
    assert not compiled.report.refusals and not compiled.report.lossy
    compiled.save(tmp_path / "model.bc")
    loaded = bc.load(tmp_path / "model.bc")
    for batch, tokens in ((2, 5), (3, 8)):
        x, kept = torch.randn(batch, tokens, 10), torch.rand(batch, tokens) > 0.3
        for f, again, w in zip(compiled(x, kept), loaded(x, kept), layer(x, kept), strict=True):
            assert torch.equal(f, again)
            torch.testing.assert_close(f, w, rtol=1e-5, atol=1e-5)


def test_the_threshold_travels_in_the_state_dict() -> None:
    layer, x = layer_of("binary", "binary"), torch.randn(2, 5, 10, dtype=torch.float64)
    with torch.no_grad():
        layer.threshold.copy_(torch.tensor([0.1, 0.9, 0.4]))
    fresh = layer_of("binary", "binary")
    fresh.load_state_dict(layer.state_dict())
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in layer.state_dict().items())
    assert torch.equal(fresh(x)[0], layer(x)[0])
    assert "threshold" in layer.state_dict() and "threshold" not in layer_of().state_dict()
