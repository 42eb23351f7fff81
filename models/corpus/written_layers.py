"""Hand-written layers around attention: caches, memories, continual steps, published blocks."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from bincompile.models.corpus import Call
from bincompile.models.corpus.parts import (
    HEADS,
    WIDTH,
    Heads,
    SelfAttention,
    cases_of,
    ids,
    kept,
    two_lengths,
)
from bincompile.models.corpus.written_projections import attend

HEAD = WIDTH // HEADS
ROWS = 50


class Cached(Heads):
    """New tokens attend to the keys and values of former calls, and return the longer ones."""

    def forward(self, x: Tensor, past: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        q, k, v = self.split(x)
        k, v = torch.cat((past["key"], k), 2), torch.cat((past["value"], v), 2)
        return self.merge(attend(q, k, v)), {"key": k, "value": v}


class CausalCache(Cached):
    """The same; new tokens don't see each other's future."""

    def forward(self, x: Tensor, past: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        q, k, v = self.split(x)
        before = past["key"].shape[2]
        k, v = torch.cat((past["key"], k), 2), torch.cat((past["value"], v), 2)
        new, old = torch.arange(q.shape[2])[:, None] + before, torch.arange(k.shape[2])
        scores = (q @ k.mT / math.sqrt(HEAD)).masked_fill(old > new, -math.inf)
        return self.merge(scores.softmax(-1) @ v), {"key": k, "value": v}


class NewestQuery(Heads):
    """A continual step: the newest token attends to its window."""

    def forward(self, window: Tensor) -> Tensor:
        q, k, v = self.split(window)
        return self.merge(attend(q[:, :, -1:], k, v))[:, 0]


class TimeLast(nn.Module):
    """Continual-inference's layout: (batch, features, time), scaled on the query."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv1d(WIDTH, 3 * WIDTH, 1)
        self.out = nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, n = x.shape
        q, k, v = self.project(x).chunk(3, dim=1)
        q, k, v = (t.reshape(b * HEADS, HEAD, n) for t in (q * HEAD ** -0.5, k, v))
        weights = functional.softmax(torch.bmm(q.transpose(1, 2), k), dim=-1)
        return self.out(torch.bmm(v, weights.transpose(1, 2)).reshape(b, WIDTH, n))


class Zeta(nn.Module):
    """torchscale's layer: heads in the batch, an inner norm, padding and bias on the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, *, keep: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, HEADS, HEAD).transpose(1, 2).reshape(b * HEADS, n, HEAD)
                   for t in (self.query(x) * HEAD ** -0.5, self.key(x), self.value(x)))
        scores = torch.bmm(q, k.transpose(1, 2)).view(b, HEADS, n, n)
        scores = scores.masked_fill(~keep[:, None, None].bool(), float("-inf"))
        scores = scores.view(b * HEADS, n, n) + bias.unsqueeze(0).expand(b, -1, -1, -1).reshape(
            b * HEADS, n, n)
        weights = functional.softmax(scores, dim=-1, dtype=torch.float32).type_as(scores)
        out = torch.bmm(weights, v).transpose(0, 1).reshape(n, b, WIDTH).transpose(0, 1)
        return self.out(self.norm(out)), weights.view(b, HEADS, n, n).transpose(1, 0)


class Encoded(nn.Module):
    """A BERT-like layer with an additive mask of its ids, masks and positions, as users write."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(ROWS, WIDTH), nn.Embedding(64, WIDTH)
        self.attention, self.norm = SelfAttention(attend), nn.LayerNorm(WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        found = batch["ids"]
        x = self.words(found) + self.places(torch.arange(found.shape[1]))
        q, k, v = self.attention.split(x)
        mask = (1.0 - batch["mask"][:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        scores = q @ k.mT / math.sqrt(HEAD) + mask
        x = self.norm(x + self.attention.merge(scores.softmax(-1) @ v))
        return {"hidden": x + self.narrow(functional.gelu(self.wide(x))), "pooled": x[:, 0]}


class Generator(nn.Module):
    """A GPT in the style of nanoGPT: a mask stored at full size and cut, a tied head."""

    def __init__(self, context: int = 16, layers: int = 2) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(ROWS, WIDTH), nn.Embedding(context, WIDTH)
        self.blocks = nn.ModuleList(Generator.Block(context) for _ in range(layers))
        self.head = nn.Linear(WIDTH, ROWS, bias=False)
        self.head.weight = self.words.weight

    class Block(nn.Module):
        """Causal attention with one projection, before the norm."""

        seen: Tensor

        def __init__(self, context: int) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            self.norm = nn.LayerNorm(WIDTH)
            self.register_buffer("seen", torch.ones(context, context).tril()[None, None])

        def forward(self, x: Tensor) -> Tensor:
            b, n, c = x.size()
            q, k, v = self.qkv(self.norm(x)).split(c, dim=2)
            q, k, v = (t.view(b, n, HEADS, c // HEADS).transpose(1, 2) for t in (q, k, v))
            scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            scores = scores.masked_fill(self.seen[:, :, :n, :n] == 0, float("-inf"))
            out = functional.softmax(scores, dim=-1) @ v
            return x + self.out(out.transpose(1, 2).contiguous().view(b, n, c))

    def forward(self, found: Tensor) -> Tensor:
        x = self.words(found) + self.places(torch.arange(found.size(1), device=found.device))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@dataclasses.dataclass
class Pooled:
    """A result as a dataclass."""

    vector: Tensor
    weights: Tensor


torch.export.register_dataclass(Pooled)


class Latents(nn.Module):
    """Perceiver's pooling: learned latents are projected to queries of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(3, WIDTH))
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Pooled:
        q = self.query(self.latents).expand(x.shape[0], -1, -1)
        weights = (q @ self.key(x).mT / math.sqrt(WIDTH)).softmax(-1)
        return Pooled(weights @ self.value(x), weights)


class Decoder(nn.Module):
    """Self-attention, then attention to a memory whose padding is masked."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.query = SelfAttention(attend), nn.Linear(WIDTH, WIDTH)
        self.key, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.own(x)
        q, k, v = (layer(t).unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for layer, t in (
            (self.query, x), (self.key, memory), (self.value, memory)))
        return x + attend(q, k, v).transpose(1, 2).flatten(2)


class Windows(nn.Module):
    """Attention inside windows of the sequence, moved into the batch, as Swin does with images."""

    def __init__(self, window: int = 4) -> None:
        super().__init__()
        self.window, self.inner = window, SelfAttention(attend)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        parts = x.view(b, n // self.window, self.window, c).flatten(0, 1)
        return self.inner(parts).view(b, n, c)


def _past(batch: int, length: int) -> Call:
    past = {name: torch.randn(batch, HEADS, length + 2, HEAD) for name in ("key", "value")}
    return (torch.randn(batch, 2, WIDTH),), {"past": past}


def _zeta(batch: int, length: int) -> Call:
    return (torch.randn(batch, length, WIDTH),), {
        "keep": kept(batch, length), "bias": torch.randn(HEADS, length, length)}


def _time_last(batch: int, length: int) -> Call:
    return (torch.randn(batch, WIDTH, length),), {}


def _words(batch: int, length: int) -> Call:
    return ({"ids": ids(ROWS, batch, length), "mask": kept(batch, length).long()},), {}


def _ids(batch: int, length: int) -> Call:
    return (ids(ROWS, batch, length),), {}


CASES = (
    *cases_of("written", (("cache/bidirectional", Cached), ("cache/causal", CausalCache)),
              _past, attention=1),
    *cases_of("written", (("step/newest-query", NewestQuery), ("pooling/latents", Latents)),
              attention=1),
    *cases_of("written", (("step/time-last", TimeLast),), _time_last, attention=1),
    *cases_of("written", (("published/zeta", Zeta),), _zeta, attention=1),
    *cases_of("written", (("models/bert", Encoded),), _words, attention=1, look_ups=2),
    *cases_of("written", (("models/gpt", Generator),), _ids, attention=2, look_ups=2),
    *cases_of("written", (("models/decoder", Decoder),), two_lengths, attention=2),
    *cases_of("written", (("window/in-batch", Windows),), attention=1,
              sizes=((2, 8), (3, 16), (1, 12))),  # whole windows, and more than one
)
