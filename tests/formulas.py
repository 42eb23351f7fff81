"""What the layers compute, written out in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch

from bincompile.nn import BMHA, BinaryLinear


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def signs(values: np.ndarray) -> np.ndarray:
    return np.where(values >= 0, 1.0, -1.0)


def linear_formula(layer: BinaryLinear, x: torch.Tensor) -> np.ndarray:
    weight, z = array(layer.weight), array(x)
    if layer.shift is not None:
        z = z + array(layer.shift)
    scale = np.abs(weight).mean(1) if layer.weight_scale == "row" else np.abs(weight).mean()
    out = (z if layer.activation == "float" else signs(z)) @ signs(weight).T * scale
    if layer.activation == "binary":
        stored = layer.calibrated_scale
        out = out * (np.abs(z).mean(-1, keepdims=True) if stored is None else stored.item())
    return out if layer.bias is None else out + array(layer.bias)


def attention_formula(layer: BMHA, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                      bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Loops over samples, heads and queries; bias (B, H, L, S) is -inf where a key is dropped."""
    q, k, v = (linear_formula(p, x) for p, x in (
        (layer.q_linear, query), (layer.k_linear, key), (layer.v_linear, value)))
    mixed, size = np.zeros(q.shape), layer.head_dim
    weights = np.zeros(bias.shape)
    for b, h, i in itertools.product(*map(range, bias.shape[:3])):
        part = slice(h * size, (h + 1) * size)
        scores = k[b, :, part] @ q[b, i, part] / math.sqrt(size) + bias[b, h, i]
        if np.isfinite(scores).any():
            grown = np.exp(scores - scores.max())
            weights[b, h, i] = grown / grown.sum()
        mixed[b, i, part] = weights[b, h, i] @ v[b, :, part]
    return linear_formula(layer.out, torch.from_numpy(mixed)), weights
