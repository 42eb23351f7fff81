"""torchscale's attention written out in float64, and layers to compare with it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from formulas import array
from torch import nn

from bincompile.nn import MultiheadAttention

B, T, E, H = 3, 7, 24, 4
OPTIONS = {"multiway": False, "layernorm_eps": 1e-5, "xpos_rel_pos": False, "xpos_scale_base": 512}


def layer(*, self_attention: bool = True, dtype: torch.dtype = torch.float64,
          **options: Any) -> MultiheadAttention:
    made = MultiheadAttention(None, E, H, self_attention=self_attention, dtype=dtype, **options)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made.eval()


def tokens(length: int = T, batch: int = B, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(batch, length, E, dtype=dtype)


def formula(made: MultiheadAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
            bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Loops over samples, heads and queries; bias (B, H, T, S) is -inf where a key is dropped."""
    q, k, v = (array(x) @ array(p.weight).T + array(p.bias) for p, x in (
        (made.q_proj, query), (made.k_proj, key), (made.v_proj, value)))
    weights, mixed, size = np.zeros(bias.shape), np.zeros(q.shape), made.head_dim
    for b, h, i in itertools.product(*map(range, bias.shape[:3])):
        part = slice(h * size, (h + 1) * size)
        scores = np.array([
            score(made, q[b, i, part], k[b, j, part], i - j) for j in range(k.shape[1])])
        scores = scores / math.sqrt(size) + bias[b, h, i]
        if np.isfinite(scores).any():
            grown = np.exp(scores - scores.max())
            weights[b, h, i] = grown / grown.sum()
        mixed[b, i, part] = weights[b, h, i] @ v[b, :, part]
    if made.inner_attn_ln is not None:
        norm = made.inner_attn_ln
        centred = mixed - mixed.mean(-1, keepdims=True)
        mixed = centred / np.sqrt(mixed.var(-1, keepdims=True) + norm.eps)
        mixed = mixed * array(norm.weight) + array(norm.bias)
    attn = mixed @ array(made.out_proj.weight).T + array(made.out_proj.bias)
    return attn, weights.transpose(1, 0, 2, 3)


def score(made: MultiheadAttention, query: np.ndarray, key: np.ndarray, distance: int) -> float:
    """Pairs are complex numbers: xpos multiplies their product by a rotation and a decay."""
    if made.xpos is None:
        return float(query @ key)
    half = made.head_dim // 2
    pair = np.arange(half)
    angles = distance * 10000.0 ** (-pair / half)
    decay = array(made.xpos.scale) ** (distance / made.xpos.scale_base)
    left, right = query[::2] + 1j * query[1::2], key[::2] + 1j * key[1::2]
    return float((left * right.conj() * np.exp(1j * angles) * decay).real.sum())


def check(made: MultiheadAttention, inputs: tuple[torch.Tensor, ...], bias: np.ndarray,
          **call: Any) -> None:
    wanted = formula(made, *inputs, bias)
    attn, weights = made(*inputs, **call)
    np.testing.assert_allclose(array(attn), wanted[0], rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(array(weights), wanted[1], rtol=1e-9, atol=1e-11)
    attn, none = made(*inputs, **call, need_weights=False)
    assert none is None
    np.testing.assert_allclose(array(attn), wanted[0], rtol=1e-9, atol=1e-10)


def dropped(mask: np.ndarray) -> np.ndarray:
    return np.where(mask, -np.inf, 0.0)


def whole(bias: np.ndarray, keys: int = T) -> np.ndarray:
    return np.broadcast_to(bias, (B, H, T, keys))


def assert_same(found: tuple, wanted: tuple, tolerance: float = 2e-6) -> None:
    for f, w in zip(found, wanted, strict=True):
        assert f.shape == w.shape
        torch.testing.assert_close(f, w, rtol=tolerance, atol=tolerance)
