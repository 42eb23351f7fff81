"""Hand-written attention that knows positions: rotary, relative and disentangled terms."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from bincompile.models.corpus.parts import HEADS, WIDTH, Heads, cases_of
from bincompile.models.corpus.written_projections import attend

HEAD = WIDTH // HEADS
FARTHEST = 4
ROOT = 1 / math.sqrt(HEAD)


def _angles(n: int) -> Tensor:
    rates = 10000.0 ** (-torch.arange(0, HEAD, 2) / HEAD)
    return torch.outer(torch.arange(n).float(), rates)


def _half_rotated(x: Tensor) -> Tensor:
    """Llama's rotation: the second half of the features turns with the first."""
    angles = torch.cat([_angles(x.shape[-2])] * 2, -1)
    first, second = x.chunk(2, -1)
    return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()


def _interleaved(x: Tensor) -> Tensor:
    """GPT-J's rotation: neighbours turn together."""
    angles = _angles(x.shape[-2])
    even, odd = x[..., ::2], x[..., 1::2]
    turned = (even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos())
    return torch.stack(turned, -1).flatten(-2)


def _complex(x: Tensor) -> Tensor:
    """Rotation as a product of complex numbers, as Meta's Llama writes it."""
    turns = torch.polar(torch.ones(()), _angles(x.shape[-2]))
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(-2).type_as(x)


def _partial(x: Tensor) -> Tensor:
    """GPT-NeoX rotates a part of the features."""
    turned, rest = x.split((4, HEAD - 4), -1)
    angles = torch.cat([_angles(x.shape[-2])[:, :2]] * 2, -1)
    first, second = turned.chunk(2, -1)
    turned = turned * angles.cos() + torch.cat((-second, first), -1) * angles.sin()
    return torch.cat((turned, rest), -1)


class Rotary(Heads):
    """Query and key are rotated by their positions."""

    def __init__(self, rotate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.rotate = rotate

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        return self.merge(attend(self.rotate(q), self.rotate(k), v))


class Slopes(Heads):
    """ALiBi: a penalty that grows with the distance, at another rate in each head."""

    slopes: Tensor

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, HEADS + 1).float(), False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        place = torch.arange(x.shape[1])
        far = place[:, None] - place[None, :]
        scores = q @ k.mT * ROOT - self.slopes[:, None, None] * far.abs()
        if self.causal:
            scores = scores.masked_fill(far < 0, -math.inf)
        return self.merge(scores.softmax(-1) @ v)


class RelativeBias(Heads):
    """T5's bias: a learned number for each head and distance, from a table."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Embedding(2 * FARTHEST + 1, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        bias = self.bias(_distances(x.shape[1])).permute(2, 0, 1).unsqueeze(0)
        return self.merge((q @ k.mT * ROOT + bias).softmax(-1) @ v)


class Shaw(Heads):
    """Relative positions as vectors: on the keys, and if asked on the values (Shaw et al.)."""

    def __init__(self, values: bool) -> None:
        super().__init__()
        self.of_keys = nn.Embedding(2 * FARTHEST + 1, HEAD)
        self.of_values = nn.Embedding(2 * FARTHEST + 1, HEAD) if values else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        far = _distances(x.shape[1])
        terms = torch.einsum("bhqd,qkd->bhqk", q, self.of_keys(far))
        weights = ((q @ k.mT + terms) * ROOT).softmax(-1)
        out = weights @ v
        if self.of_values is not None:
            out = out + torch.einsum("bhqk,qkd->bhqd", weights, self.of_values(far))
        return self.merge(out)


class Disentangled(Heads):
    """DeBERTa's three terms: content to content, content to position, position to content."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(2 * FARTHEST + 1, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        n, root = x.shape[1], 1 / math.sqrt(3 * HEAD)
        table = self.places(torch.arange(2 * FARTHEST + 1))
        place_q, place_k = (layer(table).unflatten(-1, (HEADS, HEAD)).transpose(0, 1)
                            for layer in (self.query, self.key))
        index = _distances(n).expand(x.shape[0], HEADS, n, n)
        to_place = torch.gather(q @ place_k.mT, -1, index)
        from_place = torch.gather(k @ place_q.mT, -1, index).mT
        scores = q @ k.mT * root + to_place * root + from_place * root
        return self.merge(scores.softmax(-1) @ v)


class TransformerXL(Heads):
    """Two biases of the query, and a term by distance that is shifted into place."""

    def __init__(self) -> None:
        super().__init__()
        self.of_content = nn.Parameter(torch.randn(HEADS, 1, HEAD))
        self.of_place = nn.Parameter(torch.randn(HEADS, 1, HEAD))
        self.place = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        b, n, _ = x.shape
        steps = torch.arange(n - 1, -1, -1.0)[:, None] * torch.arange(1, WIDTH + 1) / WIDTH
        places = self.place(steps.sin()).unflatten(-1, (HEADS, HEAD)).transpose(0, 1)
        by_place = (q + self.of_place) @ places.mT
        padded = torch.cat((by_place.new_zeros(b, HEADS, n, 1), by_place), -1)
        shifted = padded.view(b, HEADS, n + 1, n)[:, :, 1:].view(b, HEADS, n, n)
        scores = ((q + self.of_content) @ k.mT + shifted) * ROOT
        return self.merge(scores.softmax(-1) @ v)


def _distances(n: int) -> Tensor:
    place = torch.arange(n)
    return (place[None, :] - place[:, None]).clamp(-FARTHEST, FARTHEST) + FARTHEST


CASES = (
    *cases_of("written", (
        ("rotary/half", partial(Rotary, _half_rotated)),
        ("rotary/interleaved", partial(Rotary, _interleaved)),
        ("rotary/complex", partial(Rotary, _complex)),
        ("rotary/partial", partial(Rotary, _partial)),
        ("alibi/causal", partial(Slopes, True)),
        ("alibi/both-ways", partial(Slopes, False)),
    ), attention=1),
    *cases_of("written", (
        ("relative/bias", RelativeBias),
        ("relative/keys", partial(Shaw, False)),
        ("relative/disentangled", Disentangled),
    ), attention=1, look_ups=1),
    *cases_of("written", (
        ("relative/keys-and-values", partial(Shaw, True)),
    ), attention=1, look_ups=2),
    *cases_of("written", (("relative/transformer-xl", TransformerXL),), attention=1,
              sizes=((2, 7), (3, 7), (1, 7))),  # the capture fixes a length that is shifted by it
)
