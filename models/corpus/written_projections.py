"""Hand-written attention: how query, key and value are projected, split and grouped."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from bincompile.models.corpus.parts import HEADS, WIDTH, cases_of, tokens, two_lengths

HEAD = WIDTH // HEADS


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(features)) v over (..., tokens, features)."""
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v


def _chunked(x: Tensor) -> list[Tensor]:
    b, n, _ = x.shape
    return [t.view(b, n, HEADS, HEAD).transpose(1, 2) for t in x.chunk(3, dim=-1)]


def _split(x: Tensor) -> list[Tensor]:
    return [t.unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for t in x.split(WIDTH, dim=2)]


def _unbound(x: Tensor) -> list[Tensor]:
    b, n, _ = x.shape
    return list(x.reshape(b, n, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4).unbind(0))


def _selected(x: Tensor) -> list[Tensor]:
    b, n, _ = x.shape
    parts = x.reshape(b, n, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4)
    return [parts[0], parts[1], parts[2]]


def _interleaved(x: Tensor) -> list[Tensor]:
    b, n, _ = x.shape
    return list(x.view(b, n, HEADS, 3 * HEAD).transpose(1, 2).chunk(3, -1))


def _last_axis(x: Tensor) -> list[Tensor]:
    b, n, _ = x.shape
    parts = x.view(b, n, HEADS, HEAD, 3).transpose(1, 2)
    return [parts[..., 0], parts[..., 1], parts[..., 2]]


def _sliced(x: Tensor) -> list[Tensor]:
    parts = (x[..., :WIDTH], x[..., WIDTH:2 * WIDTH], x[:, :, -WIDTH:])
    return [t.unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for t in parts]


class Fused(nn.Module):
    """One projection for all three; `split(projected)` takes it apart."""

    def __init__(self, split: Callable[[Tensor], list[Tensor]], bias: bool = True) -> None:
        super().__init__()
        self.split = split
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        out = attend(*self.split(self.qkv(x)))
        return self.out(out.transpose(1, 2).reshape(b, n, WIDTH))


class ByMatrices(nn.Module):
    """Projections are bare parameters, applied by `addmm`, as GPT-2's Conv1D is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, 3 * WIDTH) * 0.2)
        self.bias = nn.Parameter(torch.zeros(3 * WIDTH))
        self.out = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        projected = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        q, k, v = _split(projected.view(*x.shape[:-1], 3 * WIDTH))
        merged = attend(q, k, v).transpose(1, 2).contiguous().view(*x.shape[:-1], WIDTH)
        return torch.matmul(merged, self.out)


class ByEinsum(nn.Module):
    """Projections with an axis for the heads, as JAX code writes them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, WIDTH, HEADS, HEAD) * 0.2)
        self.out = nn.Parameter(torch.randn(HEADS, HEAD, WIDTH) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bnc,chd->bnhd", x, w) for w in self.weight)
        scores = torch.einsum("bqhd,bkhd->bhqk", q * HEAD ** -0.5, k)
        out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
        return torch.einsum("bqhd,hdc->bqc", out, self.out)


class ByConvolution(nn.Module):
    """Attention over the pixels of an image, projected by 1 x 1 convolutions, unscaled."""

    def __init__(self, channels: int = 16, inner: int = 8) -> None:
        super().__init__()
        self.query, self.key = nn.Conv2d(channels, inner, 1), nn.Conv2d(channels, inner, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        query = self.query(x).view(b, -1, h * w).permute(0, 2, 1)
        key = self.key(x).view(b, -1, h * w)
        weights = torch.softmax(torch.bmm(query, key), dim=-1)
        out = torch.bmm(self.value(x).view(b, -1, h * w), weights.permute(0, 2, 1))
        return self.gamma * out.view(b, c, h, w) + x


class HeadModules(nn.Module):
    """A module for every head; their results are concatenated."""

    class Head(nn.Module):
        """One head with projections of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(WIDTH, HEAD) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return attend(self.query(x), self.key(x), self.value(x))

    def __init__(self, heads: int = 3) -> None:
        super().__init__()
        self.heads = nn.ModuleList(HeadModules.Head() for _ in range(heads))
        self.out = nn.Linear(heads * HEAD, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([head(x) for head in self.heads], dim=-1))


class Grouped(nn.Module):
    """More query heads than key and value heads: `core(q, k, v)` brings them together."""

    def __init__(self, core: Callable[[Tensor, Tensor, Tensor], Tensor], kept: int = 2) -> None:
        super().__init__()
        self.core, self.kept = core, kept
        self.query, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.key, self.value = (nn.Linear(WIDTH, kept * HEAD) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.query(x).view(b, n, HEADS, HEAD).transpose(1, 2)
        k, v = (layer(x).view(b, n, self.kept, HEAD).transpose(1, 2)
                for layer in (self.key, self.value))
        return self.out(self.core(q, k, v).transpose(1, 2).reshape(b, n, WIDTH))


def _interleaved_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    return attend(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, dim=1))


def _expanded_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, kept, n, d = k.shape
    k, v = (t[:, :, None].expand(b, kept, q.shape[1] // kept, n, d).reshape(b, -1, n, d)
            for t in (k, v))
    return attend(q, k, v)


def _group_axis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, heads, n, d = q.shape
    q = q.view(b, k.shape[1], heads // k.shape[1], n, d)
    return attend(q, k.unsqueeze(2), v.unsqueeze(2)).reshape(b, heads, n, d)


def _group_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, heads, n, d = q.shape
    q = q.view(b, k.shape[1], -1, n, d) * d ** -0.5
    weights = torch.einsum("bgrqd,bgkd->bgrqk", q, k).softmax(-1)
    return torch.einsum("bgrqk,bgkd->bgrqd", weights, v).reshape(b, heads, n, d)


def _repeated_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    return attend(q, k.repeat(1, groups, 1, 1), v.repeat(1, groups, 1, 1))


def _indexed_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    chosen = torch.arange(q.shape[1]) // (q.shape[1] // k.shape[1])
    return attend(q, k[:, chosen], v[:, chosen])


def _broadcast_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v)


def _one_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhqd,bkd->bhqk", q, k[:, 0]).mul(HEAD ** -0.5).softmax(-1)
    return torch.einsum("bhqk,bkd->bhqd", weights, v[:, 0])


def _torch_groups(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class Cross(nn.Module):
    """Cross-attention with one projection for key and value of the memory."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.memory = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q = self.query(x).unflatten(-1, (HEADS, HEAD)).transpose(1, 2)
        kv = self.memory(memory).unflatten(-1, (2, HEADS, HEAD)).permute(2, 0, 3, 1, 4)
        return attend(q, kv[0], kv[1]).transpose(1, 2).flatten(2)


class SeparateValues(nn.Module):
    """Values are wider than keys, and there is one head."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)
        self.value = nn.Linear(WIDTH, 24)

    def forward(self, x: Tensor) -> Tensor:
        return attend(self.query(x), self.key(x), self.value(x))


def _image(batch: int, length: int) -> tuple[tuple[Tensor], dict[str, Tensor]]:
    return (torch.randn(batch, 16, 4, 5),), {}


CASES = (
    *cases_of("written", (
        ("projected/chunk", partial(Fused, _chunked)),
        ("projected/split", partial(Fused, _split)),
        ("projected/unbind", partial(Fused, _unbound, bias=False)),
        ("projected/select", partial(Fused, _selected)),
        ("projected/slices", partial(Fused, _sliced)),
        ("projected/interleaved", partial(Fused, _interleaved)),
        ("projected/last-axis", partial(Fused, _last_axis)),
        ("projected/addmm", ByMatrices),
        ("projected/einsum", ByEinsum),
        ("projected/values-wider", SeparateValues),
        ("grouped/expanded", partial(Grouped, _expanded_heads)),
        ("grouped/interleaved", partial(Grouped, _interleaved_heads)),
        ("grouped/group-axis", partial(Grouped, _group_axis)),
        ("grouped/einsum", partial(Grouped, _group_einsum)),
        ("grouped/repeated", partial(Grouped, _repeated_heads)),
        ("grouped/indexed", partial(Grouped, _indexed_heads)),
        ("grouped/torch", partial(Grouped, _torch_groups)),
        ("one-kept/broadcast", partial(Grouped, _broadcast_head, kept=1)),
        ("one-kept/einsum", partial(Grouped, _one_head, kept=1)),
    ), tokens, attention=1),
    *cases_of("written", (("cross/fused-memory", Cross),), two_lengths, attention=1),
    *cases_of("written", (("image/convolution", ByConvolution),), _image, attention=1),
    *cases_of("written", (("heads/modules", HeadModules),), attention=3),
)
