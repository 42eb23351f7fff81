"""Attentions for the tests of facets: each is a core `(module, x, *inputs)` and what it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

WIDTH, HEADS, FEATURES = 32, 4, 8
Core = Callable[..., torch.Tensor]
LEAST = torch.finfo(torch.float32).min


class Spelled(nn.Module):
    """Layers that a core may use; `core(self, x, *inputs)` is its forward."""

    def __init__(self, core: Core) -> None:
        super().__init__()
        self.core = core
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.few, self.fused = nn.Linear(WIDTH, 2 * 2 * FEATURES), nn.Linear(WIDTH, 3 * WIDTH)
        self.pair, self.norm = nn.Linear(WIDTH, 2 * WIDTH), nn.LayerNorm(FEATURES)
        self.table, self.mixer = nn.Embedding(9, HEADS), nn.Linear(HEADS, HEADS, bias=False)
        self.matrix = nn.Parameter(torch.randn(WIDTH, HEADS, FEATURES))
        self.gain, self.extra = nn.Parameter(torch.ones(FEATURES)), nn.Parameter(torch.zeros(HEADS))
        self.conv = nn.Conv1d(WIDTH, 3 * WIDTH, 1)
        self.register_buffer("past", torch.ones(64, 64, dtype=torch.bool).tril())
        broken = torch.ones(64, 64, dtype=torch.bool).tril()
        broken[:, 60] = True
        self.register_buffer("nearly", broken)

    def forward(self, x: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return self.core(self, x, *inputs)


def split(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (-1, FEATURES)).transpose(1, 2)


def heads(m: Spelled, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return split(m.q(x)), split(m.k(x)), split(m.v(x))


def soft(scores: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(scores, -1) @ v


def back(x: torch.Tensor) -> torch.Tensor:
    """How many places the key is behind the query, for each pair."""
    places = torch.arange(x.shape[1])
    return places[:, None] - places


def masked(change: Callable[..., torch.Tensor]) -> Core:
    """A core whose scores are changed by `change(module, scores, x, *inputs)`."""
    def core(m: Spelled, x: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        q, k, v = heads(m, x)
        return soft(change(m, q @ k.mT * 0.25, x, *inputs), v)

    return core


def hidden(kept: Callable[..., torch.Tensor], fill: float = -math.inf) -> Core:
    """A core that keeps the keys where `kept(module, x, *inputs)` is True."""
    return masked(lambda m, s, x, *i: s.masked_fill(~kept(m, x, *i), fill))


def added(kept: Callable[..., torch.Tensor], fill: float = -math.inf) -> Core:
    return masked(lambda m, s, x, *i: s + torch.where(kept(m, x, *i), 0.0, fill))


def turned(turn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Core:
    """A core whose queries and keys are turned by `turn(heads, angles)`."""
    def core(m: Spelled, x: torch.Tensor) -> torch.Tensor:
        q, k, v = heads(m, x)
        steps = 10000.0 ** (-torch.arange(FEATURES // 2) / (FEATURES // 2))
        angles = torch.outer(torch.arange(x.shape[1]).float(), steps)
        return soft(turn(q, angles) @ turn(k, angles).mT * 0.25, v)

    return core


def by_halves(t: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    low, high = t.chunk(2, -1)
    cosine, sine = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    return t * cosine + torch.cat((-high, low), -1) * sine


def by_parts(t: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    low, high = t.chunk(2, -1)
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat((low * cosine - high * sine, high * cosine + low * sine), -1)


def by_pairs(t: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    even, odd = t[..., ::2], t[..., 1::2]
    cosine, sine = angles.cos(), angles.sin()
    return torch.stack((even * cosine - odd * sine, odd * cosine + even * sine), -1).flatten(-2)


def by_unbound_pairs(t: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    even, odd = t.unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = angles.cos(), angles.sin()
    return torch.stack((even * cosine - odd * sine, odd * cosine + even * sine), -1).flatten(-2)


def by_numbers(t: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    turns = torch.polar(torch.ones_like(angles), angles)
    pairs = torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns).flatten(-2)


def half_of_it(t: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    first, rest = t[..., :4], t[..., 4:]
    return torch.cat((by_halves(first, angles[:, :2]), rest), -1)


def scaled_not_turned(t: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    return t * angles.cos().repeat(1, 2) + t * angles.sin().repeat(1, 2)


def normed(norm: Callable[[Spelled, torch.Tensor], torch.Tensor]) -> Core:
    def core(m: Spelled, x: torch.Tensor) -> torch.Tensor:
        q, k, v = heads(m, x)
        return soft(norm(m, q) @ norm(m, k).mT * 0.25, v)

    return core


def grouped(join: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> Core:
    """A core with four heads of queries and two of keys and values."""
    def core(m: Spelled, x: torch.Tensor) -> torch.Tensor:
        k, v = (split(t) for t in m.few(x).chunk(2, -1))
        return join(split(m.q(x)), k, v)

    return core


def expanded(t: torch.Tensor) -> torch.Tensor:
    b, h, n, d = t.shape
    return t[:, :, None].expand(b, h, 2, n, d).reshape(b, 2 * h, n, d)


def two_axes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return soft(q.unflatten(1, (2, 2)) @ k.unsqueeze(2).mT * 0.25, v.unsqueeze(2))


def one_kept(m: Spelled, x: torch.Tensor) -> torch.Tensor:
    k, v = (t[:, None, :, :FEATURES] for t in (m.k(x), m.v(x)))
    return soft(split(m.q(x)) @ k.mT * 0.25, v)


def in_one_batch(m: Spelled, x: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.flatten(0, 1) for t in heads(m, x))
    return torch.bmm(torch.softmax(torch.bmm(q, k.mT) * 0.25, -1), v)


def heads_last(m: Spelled, x: torch.Tensor) -> torch.Tensor:
    q, k, v = (layer(x).unflatten(-1, (HEADS, FEATURES)) for layer in (m.q, m.k, m.v))
    weights = torch.softmax(torch.einsum("bnhd,bmhd->bhnm", q, k) * 0.25, -1)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v)


def fused_view(m: Spelled, x: torch.Tensor) -> torch.Tensor:
    q, k, v = m.fused(x).unflatten(-1, (3, HEADS, FEATURES)).permute(2, 0, 3, 1, 4)
    return soft(q @ k.mT * 0.25, v)


def fused_kept(m: Spelled, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    k, v = (split(t) for t in m.pair(y).chunk(2, -1))
    return soft(split(m.q(x)) @ k.mT * 0.25, v)


def multiplied(m: Spelled, x: torch.Tensor) -> torch.Tensor:
    flat = x.reshape(-1, WIDTH)
    made = torch.addmm(m.fused.bias, flat, m.fused.weight.T).view(*x.shape[:-1], 3 * WIDTH)
    q, k, v = (split(t) for t in made.split(WIDTH, -1))
    return soft(q @ k.mT * 0.25, v)


def convolved(m: Spelled, x: torch.Tensor) -> torch.Tensor:
    q, k, v = (split(t.mT) for t in m.conv(x.mT).chunk(3, 1))
    return soft(q @ k.mT * 0.25, v)


def einsummed(m: Spelled, x: torch.Tensor) -> torch.Tensor:
    q, k, v = (torch.einsum("bnc,chd->bhnd", x, m.matrix) for _ in range(3))
    return soft(q @ k.mT * 0.25, v)


def unprojected(m: Spelled, x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x @ x.mT / 8, -1) @ x


def pooled(m: Spelled, x: torch.Tensor) -> torch.Tensor:
    q, k, v = heads(m, x)
    return soft(q.unflatten(2, (2, -1)).max(2).values @ k.mT * 0.25, v)


def cross(m: Spelled, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    q, k, v = split(m.q(x)), split(m.k(y)), split(m.v(y))
    return soft(q @ k.mT * 0.25, v)


def scaled_all_over(m: Spelled, x: torch.Tensor) -> torch.Tensor:
    q, k, v = heads(m, x)
    return soft((q * 0.5) @ (k / 4).mT * 2.0, v)


def sunk(m: Spelled, x: torch.Tensor) -> torch.Tensor:
    q, k, v = heads(m, x)
    scores = q @ k.mT * 0.25
    column = m.extra[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat((scores, column), -1), -1)[..., :-1] @ v


def mixed(m: Spelled, x: torch.Tensor) -> torch.Tensor:
    q, k, v = heads(m, x)
    scores = m.mixer((q @ k.mT * 0.25).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return soft(scores, v)


def by_operator(**options: Any) -> Core:
    def core(m: Spelled, x: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        q, k, v = heads(m, x)
        return functional.scaled_dot_product_attention(q, k, v, *inputs, **options)

    return core


def cross_by_operator(m: Spelled, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    q, k, v = split(m.q(x)), split(m.k(y)), split(m.v(y))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def last_queries(m: Spelled, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    q, k, v = split(m.q(x)), split(m.k(y)), split(m.v(y))
    kept = torch.ones(x.shape[1], y.shape[1], dtype=torch.bool).tril(y.shape[1] - x.shape[1])
    return soft((q @ k.mT * 0.25).masked_fill(~kept, -math.inf), v)


def biased(m: Spelled, scores: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    bias = m.table(back(x).clamp(-4, 4) + 4).permute(2, 0, 1)
    return scores + (bias + torch.where(back(x) >= 0, 0.0, LEAST))


def sloped(m: Spelled, scores: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (scores - back(x).abs() * 0.5).masked_fill(back(x) < 0, -math.inf)
