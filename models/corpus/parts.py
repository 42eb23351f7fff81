"""What the corpus' own models share: a self-attention around any core, and inputs of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bincompile.models.corpus import Call, Case

WIDTH = 32
HEADS = 4
Core = Callable[[Tensor, Tensor, Tensor], Tensor]


class Heads(nn.Module):
    """The projections of a self-attention, to heads and back."""

    def __init__(self, heads: int = HEADS, width: int = WIDTH) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def split(self, x: Tensor) -> list[Tensor]:
        """Query, key and value, (batch, heads, tokens, features) each."""
        return [layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for layer in (self.query, self.key, self.value)]

    def merge(self, x: Tensor) -> Tensor:
        """(batch, heads, tokens, features) through the output projection."""
        merged: Tensor = self.out(x.transpose(1, 2).flatten(-2))
        return merged


class SelfAttention(Heads):
    """Self-attention around a core `(q, k, v) -> out` over (batch, heads, tokens, features)."""

    def __init__(self, core: Core) -> None:
        super().__init__()
        self.core = core

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(self.core(*self.split(x)))


def tokens(batch: int, length: int) -> Call:
    """One tensor of random features, (batch, length, WIDTH)."""
    return (torch.randn(batch, length, WIDTH),), {}


def tokens_and_keep(batch: int, length: int) -> Call:
    """Features, and True for each token that is not padding; the first row has none."""
    return (torch.randn(batch, length, WIDTH), kept(batch, length)), {}


def kept(batch: int, length: int) -> Tensor:
    """True where a token is not padding: all of the first row, fewer in each further one."""
    lengths = (length - torch.arange(batch)).clamp(min=1)
    return torch.arange(length) < lengths[:, None]


def two_lengths(batch: int, length: int) -> Call:
    """Features of one length, and others that are three tokens longer, to attend to."""
    return (torch.randn(batch, length, WIDTH), torch.randn(batch, length + 3, WIDTH)), {}


def ids(rows: int, *shape: int) -> Tensor:
    """Random row numbers of a table."""
    return torch.randint(rows, shape)


def cases_of(group: str, table: Sequence[tuple[str, Callable[[], nn.Module]]],
             inputs: Callable[[int, int], Call] = tokens, attention: int = 0,
             **facts: Any) -> tuple[Case, ...]:
    """One case for each "family/variant" and its module, alike in all else; eval mode."""
    return tuple(Case(f"{group}/{name}", _evaluated(make), inputs, attention, **facts)
                 for name, make in table)


def _evaluated(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: make().eval()
