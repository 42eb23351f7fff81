"""Attention as torch's own operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from bincompile.passes.attention import around_operator
from bincompile.passes.graph import arguments, aten
from bincompile.passes.patterns import Candidate, Context, Example, Pattern


def _match(node: fx.Node, context: Context) -> Candidate:
    return around_operator(node, arguments(node), context)


class _Core(nn.Module):
    def __init__(self, heads: int = 4, **options: Any) -> None:
        super().__init__()
        self.heads, self.options = heads, options

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                mask: torch.Tensor | None = None) -> torch.Tensor:
        return functional.scaled_dot_product_attention(q, k, v, mask, **self.options)


class _SigmoidCore(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(q @ k.mT) @ v


def _tensors(*extra: torch.Tensor, kept: int = 4):
    return lambda: (torch.randn(2, 4, 6, 8), torch.randn(2, kept, 6, 8),
                    torch.randn(2, kept, 6, 8), *extra)


torch_attention = Pattern(
    "torch_attention", "attention", (aten.scaled_dot_product_attention.default,), _match,
    examples=(
        Example(_Core, _tensors()),
        Example(lambda: _Core(is_causal=True, scale=0.5), _tensors()),
        Example(lambda: _Core(enable_gqa=True), _tensors(kept=2)),
        Example(_Core, _tensors(torch.rand(6, 6) > 0.3)),
        Example(_Core, _tensors(torch.randn(2, 1, 6, 6))),
        Example(lambda: nn.TransformerEncoderLayer(32, 4, 48, batch_first=True),
                lambda: (torch.randn(2, 6, 32),)),
    ),
    near_misses=(Example(_SigmoidCore, _tensors()),),
)
