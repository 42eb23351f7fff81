"""Attention as people write it: cores `(q, k, v) -> out` over (batch, heads, tokens, features).

The patterns take their examples and near misses from here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from bincompile.passes.patterns import Example

Core = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class HandWritten(nn.Module):
    """Self-attention around a core `(q, k, v) -> out` over (batch, heads, tokens, features)."""

    def __init__(self, core: Core, heads: int = 4, features: int = 32) -> None:
        super().__init__()
        self.core, self.heads = core, heads
        self.q, self.k, self.v, self.out = (nn.Linear(features, features) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for layer in (self.q, self.k, self.v))
        return self.out(self.core(q, k, v).transpose(1, 2).flatten(-2))


class Mixed(nn.Module):
    """Self-attention whose heads are mixed before and after the softmax."""

    def __init__(self, how: str, features: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.how, self.heads = how, heads
        self.qkv = nn.Linear(features, 3 * features)
        self.before, self.after = (nn.Linear(heads, heads) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        slopes = torch.linspace(-1, 1, self.heads)[:, None, None] * torch.arange(x.shape[1])
        scores = self._mixed(q @ k.mT * 0.3 + slopes, self.before)
        weights = self._mixed(torch.softmax(scores, -1), self.after)
        return (weights @ v).transpose(1, 2).flatten(-2)

    def _mixed(self, scores: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        if self.how == "linear":
            return layer(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.how == "conv":
            return nn.functional.conv2d(scores, layer.weight[:, :, None, None], layer.bias)
        return torch.einsum("bhij,hg->bgij", scores, layer.weight)


class Channels(nn.Module):
    """Attention between channels of an image, as in image restoration: the sums are over places."""

    def __init__(self, features: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.qkv, self.heads = nn.Conv2d(features, 3 * features, 1), heads
        self.near = nn.Conv2d(3 * features, 3 * features, 3, padding=1, groups=3 * features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(1, (self.heads, -1)).flatten(-2)
                   for t in self.near(self.qkv(x)).chunk(3, 1))
        q, k = (nn.functional.normalize(t, dim=-1) for t in (q, k))
        return (torch.softmax(q @ k.mT * 0.5, -1) @ v).flatten(1, 2).reshape(x.shape)


class Sinks(nn.Module):
    """Self-attention with a learned score for each head that no value belongs to."""

    def __init__(self, features: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.qkv, self.heads = nn.Linear(features, 3 * features), heads
        self.sinks = nn.Parameter(torch.linspace(-1, 1, heads))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * 0.3 + torch.full((x.shape[1],) * 2, -math.inf).triu(1)
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(x.shape[0], -1, x.shape[1], -1)
        joined = torch.cat([scores, sinks], -1)
        joined = joined - joined.max(-1, keepdim=True).values
        weights = torch.softmax(joined, -1)[..., :-1]
        return (weights @ v).transpose(1, 2).flatten(-2)


class Grouped(nn.Module):
    """Self-attention whose heads share keys and values, repeated in one of several ways."""

    def __init__(self, how: str, features: int = 32, heads: int = 4, kept: int = 2) -> None:
        super().__init__()
        self.how, self.heads, self.kept, self.width = how, heads, kept, features // heads
        self.q = nn.Linear(features, features)
        self.kv = nn.Linear(features, 2 * kept * self.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, self.width).transpose(1, 2)
        k, v = self.kv(x).view(b, n, 2, self.kept, self.width).permute(2, 0, 3, 1, 4)
        if self.how == "einsum":
            q = q.unflatten(1, (self.kept, -1))
            weights = torch.softmax(torch.einsum("bkgid,bkjd->bkgij", q, k) * 0.3, -1)
            out = torch.einsum("bkgij,bkjd->bkgid", weights, v).flatten(1, 2)
        elif self.how == "axes":
            q = q.unflatten(1, (self.kept, -1))
            weights = torch.softmax(q @ k.unsqueeze(2).mT * 0.3, -1)
            out = (weights @ v.unsqueeze(2)).flatten(1, 2)
        else:
            k, v = self._repeated(k), self._repeated(v)
            out = torch.softmax(q @ k.mT * 0.3, -1) @ v
        return out.transpose(1, 2).flatten(-2)

    def _repeated(self, x: torch.Tensor) -> torch.Tensor:
        groups = self.heads // self.kept
        if self.how == "repeat":
            return x.repeat_interleave(groups, 1)
        if self.how == "index":
            return x[:, torch.arange(self.heads) // groups]
        b, kept, n, d = x.shape
        return x[:, :, None].expand(b, kept, groups, n, d).reshape(b, self.heads, n, d)


def grouped(how: str) -> Example:
    """An example of heads that share keys and values."""
    return Example(lambda: Grouped(how), lambda: (torch.randn(2, 6, 32),))


def mixed(how: str) -> Example:
    """An example of heads that are mixed."""
    return Example(lambda: Mixed(how), lambda: (torch.randn(2, 6, 32),))


def example(core: Core) -> Example:
    """An example around a core."""
    return Example(lambda: HandWritten(core), lambda: (torch.randn(2, 6, 32),))


def examples(*cores: Core) -> tuple[Example, ...]:
    """Examples around cores."""
    return tuple(map(example, cores))


def kept(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """A causal mask, True where a key is kept."""
    return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()


def softcap(q, k, v):
    """Scores capped by tanh, then masked."""
    scores = torch.tanh(q @ k.mT * 0.3 / 5.0) * 5.0
    return torch.softmax(scores.masked_fill(~kept(q, k), -1e9), -1) @ v


def clamped(q, k, v):
    """Scores clamped, then a causal mask added."""
    scores = (q @ k.mT * 0.3).clamp(-0.5, 0.5)
    return torch.softmax(scores + torch.full((q.shape[2],) * 2, -math.inf).triu(1), -1) @ v


def clamped_after_bias(q, k, v):
    """A mask added, then everything clamped from below."""
    scores = q @ k.mT * 0.3 + torch.full((q.shape[2],) * 2, -math.inf).triu(1)
    return torch.softmax(scores.clamp_min(torch.finfo(torch.float32).min), -1) @ v


def constant_added(q, k, v):
    """Numbers added to the scores."""
    return torch.softmax((q @ k.mT + 2.0) * 0.3 - 1.5, -1) @ v


def subtracted_from(q, k, v):
    """Scores that are subtracted from the mask."""
    mask = torch.full((q.shape[2],) * 2, -math.inf).triu(1)
    return torch.softmax(mask - q @ k.mT * 0.3, -1) @ v


def stabilised(q, k, v):
    """The maximum taken off before the softmax."""
    scores = q @ k.mT * 0.3
    return torch.softmax(scores - scores.amax(-1, keepdim=True), -1) @ v


def two_masks(q, k, v):
    """Two masks, the later one of -inf."""
    scores = (q @ k.mT * 0.3).masked_fill(~kept(q, k), -1e9)
    return torch.softmax(scores.masked_fill(kept(q, k).tril(-3), -math.inf), -1) @ v


def masks_of_two_fills(q, k, v):
    """Two masks, the later one of a finite value."""
    scores = (q @ k.mT * 0.3).masked_fill(~kept(q, k), -math.inf)
    return torch.softmax(scores.masked_fill(kept(q, k).tril(-3), -1e4), -1) @ v


def bias_after_filled_mask(q, k, v):
    """Slopes added behind a mask of a finite value."""
    scores = (q @ k.mT * 0.3).masked_fill(~kept(q, k), -1e9)
    slopes = torch.linspace(0.1, 1, q.shape[1])[:, None, None]
    return torch.softmax(scores - slopes * torch.arange(k.shape[2]), -1) @ v


def mask_from_ones(q, k, v):
    """A mask made of ones and zeros."""
    mask = (1.0 - kept(q, k).float()) * -1e4
    return torch.softmax(q @ k.mT * 0.3 + mask, -1) @ v


def multiplied_mask(q, k, v):
    """A mask that multiplies the scores and is added."""
    ones = kept(q, k).float()
    return torch.softmax(q @ k.mT * 0.3 * ones - 1e4 * (1 - ones), -1) @ v


def nested_where(q, k, v):
    """A mask within a mask."""
    near = kept(q, k).triu(-2)
    scores = torch.where(kept(q, k), q @ k.mT * 0.3, -math.inf)
    return torch.softmax(torch.where(near, scores, -math.inf), -1) @ v


def dots(q, k, v):
    """Einsums with an ellipsis."""
    weights = torch.softmax(torch.einsum("...id,...jd->...ij", q, k) * 0.3, -1)
    return torch.einsum("...ij,...jd->...id", weights, v)


def three_operands(q, k, v):
    """An einsum of three tensors."""
    scale = torch.linspace(0.1, 1.0, q.shape[1])
    weights = torch.softmax(torch.einsum("bhid,bhjd,h->bhij", q, k, scale), -1)
    return torch.einsum("bhij,bhjd->bihd", weights, v).transpose(1, 2)


def broadcast_product(q, k, v):
    """Products written as sums of what broadcasts."""
    scores = (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1) * 0.3
    return (torch.softmax(scores, -1).unsqueeze(-1) * v.unsqueeze(-3)).sum(-2)


def tokens_first(q, k, v):
    """Tokens in front, then batch and heads."""
    q, k, v = (t.permute(2, 0, 1, 3) for t in (q, k, v))
    weights = torch.softmax(torch.einsum("ibhd,jbhd->ijbh", q, k) * 0.3, 1)
    return torch.einsum("ijbh,jbhd->ibhd", weights, v).permute(1, 2, 0, 3)


def regrouped_twice(q, k, v):
    """Heads merged with the batch, apart for the softmax, merged again."""
    _, h, n, d = q.shape
    q, k, v = (t.reshape(-1, n, d) for t in (q, k, v))
    scores = torch.bmm(q, k.mT) * 0.3
    bias = torch.linspace(-1, 1, n * n).view(n, n)
    scores = scores.view(-1, h, n, n) + bias.expand(1, 1, n, n)
    weights = torch.softmax(scores, -1)
    return torch.bmm(weights.view(-1, n, n), v).view(-1, h, n, d)


def queries_of_all_heads(q, k, v):
    """The queries of all heads in one axis, for keys that they share."""
    b, h, n, d = q.shape
    k, v = k[:, 0], v[:, 0]
    scores = (q.reshape(b, h * n, d) @ k.mT * 0.3).view(b, h, n, n)
    weights = torch.softmax(scores.masked_fill(~kept(q, k[:, None]), -1e9), -1)
    return (weights.view(b, h * n, n) @ v).view(b, h, n, d)


def without_maximum(q, k, v):
    """A softmax of powers, no maximum taken off."""
    powers = torch.exp(q @ k.mT * 0.3)
    return (powers / powers.sum(-1, keepdim=True)) @ v


def normalised_late(q, k, v):
    """Powers times values, normalised last."""
    powers = torch.exp(q @ k.mT * 0.3)
    return (powers @ v) / powers.sum(-1, keepdim=True)


def normalised_late_with_maximum(q, k, v):
    """The same, with the maximum taken off."""
    scores = q @ k.mT * 0.3
    powers = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (powers @ v) / powers.sum(-1, keepdim=True)


def by_logarithm(q, k, v):
    """The power of a log_softmax."""
    return torch.log_softmax(q @ k.mT * 0.3, -1).exp() @ v


def by_logsumexp(q, k, v):
    """The power of scores less their logsumexp."""
    scores = q @ k.mT * 0.3
    return torch.exp(scores - torch.logsumexp(scores, -1, keepdim=True)) @ v


def in_full_precision(q, k, v):
    """Scores and softmax in float32, cast back."""
    weights = torch.softmax((q.float() @ k.float().mT) * 0.3, -1, dtype=torch.float32)
    return weights.to(v.dtype) @ v


def cleaned(q, k, v):
    """Rows that are masked everywhere give zeros."""
    scores = (q @ k.mT * 0.3).masked_fill(~kept(q, k).triu(-1).roll(1, 0), -math.inf)
    return torch.softmax(scores, -1).nan_to_num() @ v


def hidden_twice(q, k, v):
    """A mask before the softmax, and zeros behind it."""
    hidden = ~kept(q, k).triu(-1).roll(1, 0)
    scores = (q @ k.mT * 0.3).masked_fill(hidden, torch.finfo(q.dtype).min)
    return torch.softmax(scores, -1).masked_fill(hidden, 0.0) @ v


def windows(q, k, v):
    """Attention within windows, a bias for each."""
    b, h, n, d = q.shape
    q, k, v = (t.reshape(b, h, n // 2, 2, d).transpose(1, 2).reshape(-1, h, 2, d)
               for t in (q, k, v))
    scores = q @ k.mT * 0.3
    mask = torch.linspace(-1, 0, n // 2 * 4).view(n // 2, 1, 2, 2)
    scores = (scores.view(b, n // 2, h, 2, 2) + mask).view(-1, h, 2, 2)
    out = torch.softmax(scores, -1) @ v
    return out.view(b, n // 2, h, 2, d).transpose(1, 2).reshape(b, h, n, d)


# What only looks like it.


def hidden_only_behind(q, k, v):
    """Probabilities hidden behind the softmax alone."""
    return torch.softmax(q @ k.mT * 0.3, -1).masked_fill(~kept(q, k), 0.0) @ v


def renormalised(q, k, v):
    """Probabilities masked and normalised again."""
    weights = torch.softmax(q @ k.mT * 0.3, -1) * kept(q, k)
    return weights / weights.sum(-1, keepdim=True) @ v


def softened(q, k, v):
    """A sum of powers with a number added."""
    powers = torch.exp(q @ k.mT * 0.3)
    return (powers / (powers.sum(-1, keepdim=True) + 1e-3)) @ v


def sums_of_queries(q, k, v):
    """Powers normalised over the queries."""
    powers = torch.exp(q @ k.mT * 0.3)
    return (powers / powers.sum(-2, keepdim=True)) @ v


def capped_mask(q, k, v):
    """tanh of scores with the mask in them."""
    return torch.softmax(torch.tanh(q @ k.mT + kept(q, k).float()), -1) @ v


def linear_attention(q, k, v):
    """Softmaxes of queries and keys, each on its own."""
    q, k = torch.softmax(q, -1), torch.softmax(k, -2)
    return q @ (k.mT @ v)


def sigmoid_attention(q, k, v):
    """Sigmoids in place of the softmax."""
    return torch.sigmoid(q @ k.mT * 0.3) @ v


def logarithm_kept(q, k, v):
    """A log_softmax times the values."""
    return torch.log_softmax(q @ k.mT * 0.3, -1) @ v
