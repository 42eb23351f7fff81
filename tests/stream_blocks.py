"""Models of every kind that a stream may be asked of: small, in the spellings people use."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

E, H = 16, 2
Call = Callable[[torch.Tensor], torch.Tensor]


class Fn(nn.Module):
    """Layers by name, and a function of them and of the inputs."""

    def __init__(self, call: Callable[..., object], **layers: nn.Module) -> None:
        super().__init__()
        self.call = call
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs: torch.Tensor) -> object:
        return self.call(self, *inputs)


def causal(length: int) -> torch.Tensor:
    return nn.Transformer.generate_square_subsequent_mask(length)


def in_band(length: int, band: int | None) -> torch.Tensor:
    """Which keys each query sees: itself and those before, so many in all."""
    kept = torch.ones(length, length, dtype=torch.bool).tril()
    return kept if band is None else kept.triu(1 - band)


class Encoder(nn.Module):
    """nn.TransformerEncoder, causal by its mask or not."""

    def __init__(self, depth: int = 1, is_causal: bool = True, width: int = E, heads: int = H,
                 **options: object) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, batch_first=True, **options)
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.is_causal, self.band = is_causal, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.is_causal:
            return self.layers(x)
        if self.band is not None:
            return self.layers(x, mask=~in_band(x.shape[1], self.band))
        return self.layers(x, mask=causal(x.shape[1]), is_causal=True)


class Attention(nn.Module):
    """Attention by hand: what is added to its scores, and how query and key are turned."""

    def __init__(self, added: Call | None = None, turn: Call | None = None, groups: int = 1,
                 sdpa: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(E, E + 2 * E // groups)
        self.out = nn.Linear(E, E)
        self.added, self.turn, self.groups, self.sdpa = added, turn, groups, sdpa
        self.band: int | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(x).split([E, E // self.groups, E // self.groups], -1)
        q, k, v = (p.unflatten(-1, (-1, E // H)).transpose(1, 2) for p in parts)
        if self.turn is not None:
            q, k = self.turn(q), self.turn(k)
        if self.groups > 1:
            k, v = (t.repeat_interleave(self.groups, 1) for t in (k, v))
        if self.sdpa and self.band is None:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(-1, -2) / math.sqrt(E // H)
            if self.added is not None:
                scores = scores + self.added(scores)
            scores = scores.masked_fill(~in_band(x.shape[1], self.band), -math.inf)
            mixed = scores.softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


def banded(model: nn.Module, window: int) -> nn.Module:
    """The model with a band put over each of its causal masks by hand."""
    for part in model.modules():
        if hasattr(part, "band"):
            part.band = window
        elif isinstance(part, Sliding):
            part.window = min(part.window, window)
    return model


class Block(nn.Module):
    """A pre-norm block around any mixer of tokens."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.before, self.after, self.mixer = nn.LayerNorm(E), nn.LayerNorm(E), mixer
        self.wide, self.narrow = nn.Linear(E, 2 * E), nn.Linear(2 * E, E)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mixer(self.before(x))
        return x + self.narrow(F.gelu(self.wide(self.after(x))))


def slopes(scores: torch.Tensor) -> torch.Tensor:
    """ALiBi."""
    places = torch.arange(scores.shape[-1])
    gap = places[None, :] - places[:, None]
    return gap * torch.tensor([0.5, 0.25]).view(2, 1, 1)


class Buckets(nn.Module):
    """T5's bias by the distance, in buckets that grow."""

    def __init__(self, buckets: int = 8, most: int = 20) -> None:
        super().__init__()
        self.table, self.buckets, self.most = nn.Embedding(buckets, H), buckets, most

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        places = torch.arange(scores.shape[-1])
        gap = (places[:, None] - places[None, :]).clamp_min(0)
        exact = self.buckets // 2
        far = exact + (torch.log(gap.clamp_min(1).float() / exact)
                       / math.log(self.most / exact) * (self.buckets - exact)).long()
        bucket = torch.where(gap < exact, gap, far.clamp_max(self.buckets - 1))
        return self.table(bucket).permute(2, 0, 1)


def rotary(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions in halves."""
    half = x.shape[-1] // 2
    rates = 1.0 / 100.0 ** (torch.arange(half) / half)
    angles = torch.arange(x.shape[-2])[:, None] * rates
    cos, sin = angles.cos(), angles.sin()
    low, high = x[..., :half], x[..., half:]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def rotary_complex(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions of neighbours, as complex numbers."""
    half = x.shape[-1] // 2
    rates = 1.0 / 100.0 ** (torch.arange(half).float() / half)
    angles = torch.outer(torch.arange(x.shape[-2]).float(), rates)
    turned = torch.view_as_complex(x.float().unflatten(-1, (half, 2)).contiguous())
    return torch.view_as_real(turned * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


class Sliding(nn.Module):
    """nn.MultiheadAttention under a hand-written band."""

    def __init__(self, window: int = 5) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, H, batch_first=True)
        self.window = window

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        i = torch.arange(x.shape[1])
        hidden = (i[None, :] > i[:, None]) | (i[None, :] <= i[:, None] - self.window)
        return self.attention(x, x, x, attn_mask=hidden, need_weights=False)[0]


class Learned(nn.Module):
    """Learned positions before a causal encoder, as in GPT-2."""

    def __init__(self, most: int = 64) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, E), nn.Embedding(most, E)
        self.encoder = Encoder(2, norm_first=True)
        self.head = nn.Linear(E, 50, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(self.encoder(x))


class CausalConv(nn.Module):
    """A convolution over (B, T, E) that sees the past alone."""

    def __init__(self, kernel: int = 3, dilation: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.pad = (kernel - 1) * dilation
        self.conv = nn.Conv1d(E, E, kernel, dilation=dilation, groups=groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x.transpose(1, 2), (self.pad, 0))).transpose(1, 2)


class WaveNet(nn.Module):
    """Gated dilated convolutions with skips, over (B, C, T)."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(E, 2 * E, 2, dilation=2**i) for i in range(layers))
        self.skips = nn.ModuleList(nn.Conv1d(E, E, 1) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(x)
        for i, (conv, skip) in enumerate(zip(self.convs, self.skips, strict=True)):
            gate, value = conv(F.pad(x, (2**i, 0))).chunk(2, 1)
            x = x + torch.tanh(value) * torch.sigmoid(gate)
            total = total + skip(x)
        return F.relu(total)


class Chomp(nn.Module):
    """A temporal convolution network's layer: padding on both sides, the end cut off."""

    def __init__(self, kernel: int = 3, dilation: int = 2) -> None:
        super().__init__()
        self.cut = (kernel - 1) * dilation
        self.conv = nn.Conv1d(E, E, kernel, padding=self.cut, dilation=dilation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.relu(self.conv(x)[:, :, :-self.cut])


class Recurrent(nn.Module):
    """nn.GRU or nn.LSTM and a head."""

    def __init__(self, cls: type = nn.GRU, **options: object) -> None:
        super().__init__()
        self.rnn = cls(E, E, batch_first=True, **options)
        self.head = nn.Linear(E * (2 if options.get("bidirectional") else 1), 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0])


class TokenShift(nn.Module):
    """RWKV's mixing of a token with the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.share, self.key = nn.Parameter(torch.rand(E)), nn.Linear(E, E, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = F.pad(x, (0, 0, 1, -1))
        return torch.relu(self.key(x * self.share + before * (1 - self.share))) ** 2


class Conformer(nn.Module):
    """A causal conformer block: half feed-forwards, attention, gated depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.LayerNorm(E), nn.Linear(E, 2 * E), nn.SiLU(),
                                                 nn.Linear(2 * E, E)) for _ in range(2))
        self.attention, self.norms = Attention(sdpa=True), nn.ModuleList(
            nn.LayerNorm(E) for _ in range(3))
        self.gate, self.depth = nn.Conv1d(E, 2 * E, 1), nn.Conv1d(E, E, 5, groups=E)
        self.batch_norm, self.point = nn.BatchNorm1d(E), nn.Conv1d(E, E, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 0.5 * self.first(x)
        x = x + self.attention(self.norms[0](x))
        y = F.glu(self.gate(self.norms[1](x).transpose(1, 2)), 1)
        y = F.silu(self.batch_norm(self.depth(F.pad(y, (4, 0)))))
        x = x + self.point(y).transpose(1, 2)
        return self.norms[2](x + 0.5 * self.second(x))


class Decoder(nn.Module):
    """A causal decoder layer over a memory that does not change."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(E, H, 2 * E, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2)

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        return self.decoder(x, memory, tgt_mask=causal(x.shape[1]), tgt_is_causal=True)


class Classed(nn.Module):
    """A class token before the window of a bidirectional layer; its output is the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.encoder = nn.Parameter(torch.randn(1, 1, E)), Encoder(1, is_causal=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1))[:, 0]


class Selective(nn.Module):
    """A diagonal linear recurrence as a scan of logarithms: h[t] = a[t] h[t-1] + x[t]."""

    def __init__(self) -> None:
        super().__init__()
        self.decay, self.value = nn.Linear(E, E), nn.Linear(E, E)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = F.logsigmoid(self.decay(x)).cumsum(1)
        return torch.exp(total + torch.logcumsumexp(F.logsigmoid(self.value(x)) - total, 1))


class Swin(nn.Module):
    """Attention within windows that do not overlap."""

    def __init__(self, window: int = 4) -> None:
        super().__init__()
        self.encoder, self.window = Encoder(1, is_causal=False), window

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = x.reshape(-1, self.window, E)
        return self.encoder(parts).reshape(x.shape)
