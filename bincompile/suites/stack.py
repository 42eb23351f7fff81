"""The encoder stack of BERT in plain torch modules: post-norm, without look-ups and pooler."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Layer(nn.Module):
    """One layer: self-attention and two linears, each with a residual and a layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-12) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, width) to the same shape."""
        heads = (project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                 for project in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        x = self.norms[0](self.out(mixed) + x)
        return self.norms[1](self.narrow(F.gelu(self.wide(x))) + x)


def encoder(layers: int = 12, width: int = 768, heads: int = 12) -> nn.Module:
    """The stack with random weights of torch's usual size, in eval mode; BERT-base by default.

    Source: arXiv:1810.04805.
    """
    return nn.Sequential(*(Layer(width, heads) for _ in range(layers))).eval()


class Encoder(nn.Module):
    """The stack behind its look-ups: words, positions and one layer norm."""

    def __init__(self, words: int = 30522, positions: int = 512, width: int = 768) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(words, width), nn.Embedding(positions, width)
        self.norm, self.stack = nn.LayerNorm(width, eps=1e-12), encoder(width=width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 (B, L) to (B, L, width)."""
        places = torch.arange(tokens.shape[1])
        return self.stack(self.norm(self.words(tokens) + self.positions(places)))
