"""Models with a softmax or a product of activations that hold no dot-product attention."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from bincompile.models.corpus import Call
from bincompile.models.corpus.parts import (
    HEADS,
    WIDTH,
    SelfAttention,
    cases_of,
    ids,
    two_lengths,
)

HEAD = WIDTH // HEADS
ROWS = 40


class LinearAttention(nn.Module):
    """Softmax over the features of the query and the tokens of the key, product regrouped."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.query(x).softmax(-1), self.key(x).softmax(1)
        return q @ (k.mT @ self.value(x))


class Router(nn.Module):
    """A mixture of experts: a softmax weighs what three networks say of a token."""

    def __init__(self, experts: int = 3, top: int = 2) -> None:
        super().__init__()
        self.gate, self.top = nn.Linear(WIDTH, experts), top
        self.experts = nn.Parameter(torch.randn(experts, WIDTH, WIDTH) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        least = weights.topk(self.top, -1).values[..., -1:]
        weights = weights * (weights >= least)
        return torch.einsum("bne,bned->bnd", weights, torch.einsum("bnc,ecd->bned", x,
                                                                   self.experts))


class Bahdanau(nn.Module):
    """Additive attention: a learned vector reads the tanh of a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16)
        self.energy = nn.Linear(16, 1, bias=False)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        mixed = torch.tanh(self.query(x)[:, :, None] + self.key(memory)[:, None])
        return self.energy(mixed).squeeze(-1).softmax(-1) @ memory


class Pooling(nn.Module):
    """A weight for each token from a linear layer, then their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.score(torch.tanh(x)).softmax(1) * x).sum(1)


class Pointer(nn.Module):
    """The softmax of a product is the answer: nothing is weighed by it."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, choices: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.query(x) @ self.key(choices).mT / math.sqrt(WIDTH)
        return scores.log_softmax(-1).argmax(-1), scores.softmax(-1)


class Similarity(nn.Module):
    """CLIP's logits: every image against every text."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16)
        self.scale = nn.Parameter(torch.tensor(2.6))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        left = functional.normalize(self.image(image.mean(1)), dim=-1)
        right = functional.normalize(self.text(text.mean(1)), dim=-1)
        return (self.scale.exp() * left @ right.T).softmax(-1)


class Interactions(nn.Module):
    """DLRM: products of all pairs of embeddings go into a network."""

    def __init__(self, tables: int = 3) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(ROWS, 8) for _ in range(tables))
        self.top = nn.Linear(tables * tables, 1)

    def forward(self, found: Tensor) -> Tensor:
        rows = torch.stack([table(found[:, i]) for i, table in enumerate(self.tables)], 1)
        return torch.sigmoid(self.top(torch.bmm(rows, rows.mT).flatten(1)))


class SoftLookUp(nn.Module):
    """Every row of a table takes part, as in a memory network or a codebook."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Parameter(torch.randn(ROWS, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.memory.T / math.sqrt(WIDTH)).softmax(-1) @ self.memory


class Channels(nn.Module):
    """XCiT: the softmax runs over channels, each pair weighed by its products over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.temperature = nn.Parameter(torch.ones(HEADS, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, HEADS, HEAD).permute(2, 0, 3, 4, 1).unbind(0)
        q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
        weights = ((q @ k.mT) * self.temperature).softmax(-1)
        return self.out((weights @ v).permute(0, 3, 1, 2).reshape(b, n, c))


class Sinkhorn(nn.Module):
    """Rows and columns of a product's exponents are normalised in turn."""

    def __init__(self, rounds: int = 3) -> None:
        super().__init__()
        self.query, self.key, self.rounds = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8), rounds

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        powers = torch.exp(torch.tanh(self.query(x) @ self.key(y).mT))
        for _ in range(self.rounds):
            powers = powers / powers.sum(-2, keepdim=True)
            powers = powers / powers.sum(-1, keepdim=True)
        return powers @ y


class BilinearPooling(nn.Module):
    """Products of features over the tokens, signed roots of them, a classifier and a softmax."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.reduce, self.classify = nn.Linear(WIDTH, 8), nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        small = self.reduce(x)
        pooled = (small.mT @ small / x.shape[1]).flatten(1)
        return self.classify(pooled.sign() * pooled.abs().sqrt()).softmax(-1)


class Classifier(nn.Module):
    """A softmax at the end."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.mean(1)).softmax(-1)


class MixtureOfSoftmaxes(nn.Module):
    """Several softmaxes over words, weighed by another one (Yang et al.)."""

    def __init__(self, mixtures: int = 3) -> None:
        super().__init__()
        self.prior, self.latent = nn.Linear(WIDTH, mixtures), nn.Linear(WIDTH, mixtures * WIDTH)
        self.words = nn.Linear(WIDTH, ROWS)

    def forward(self, x: Tensor) -> Tensor:
        prior = self.prior(x).softmax(-1)
        latent = torch.tanh(self.latent(x)).unflatten(-1, (-1, WIDTH))
        return (prior.unsqueeze(-2) @ self.words(latent).softmax(-1)).squeeze(-2)


class Clusters(nn.Module):
    """NetVLAD: tokens are softly assigned to stored centres, and their residuals summed."""

    def __init__(self, centres: int = 4) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(centres, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        far = (x[:, :, None] - self.centres).square().sum(-1)
        assigned = (-far).softmax(-1)
        return assigned.mT @ x - assigned.sum(1)[:, :, None] * self.centres


class Temperature(nn.Module):
    """A relaxed choice of a codebook's rows, as a Gumbel softmax is when nothing is drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.logits, self.codes = nn.Linear(WIDTH, ROWS), nn.Parameter(torch.randn(ROWS, 8))

    def forward(self, x: Tensor) -> Tensor:
        return (self.logits(x) / 0.5).softmax(-1) @ self.codes


class DynamicConvolution(nn.Module):
    """A softmax over kernel taps that each token chooses, applied to its neighbours."""

    def __init__(self, taps: int = 3) -> None:
        super().__init__()
        self.taps, self.weights = taps, nn.Linear(WIDTH, taps)

    def forward(self, x: Tensor) -> Tensor:
        around = functional.pad(x, (0, 0, 1, 1)).unfold(1, self.taps, 1)
        return (around @ self.weights(x).softmax(-1).unsqueeze(-1)).squeeze(-1)


class Capsules(nn.Module):
    """Routing by agreement: products are added to logits, whose softmax is over the parents."""

    def __init__(self, parents: int = 3, features: int = 8) -> None:
        super().__init__()
        self.votes = nn.Linear(WIDTH, parents * features)
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        votes = self.votes(x).unflatten(-1, (-1, self.features))
        logits = torch.zeros_like(votes[..., 0])
        for _ in range(2):
            found = (logits.softmax(-1).unsqueeze(-1) * votes).sum(1)
            found = found / (1 + found.square().sum(-1, keepdim=True))
            logits = logits + (votes * found[:, None]).sum(-1)
        return found


def _softmax_over(axis: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / math.sqrt(HEAD), axis) @ v


def _relu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.relu(q @ k.mT) / k.shape[-2] @ v


def _sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(q @ k.mT / math.sqrt(HEAD) - 2.0) @ v


def _squared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    powers = (q @ k.mT).square()
    return powers / powers.sum(-1, keepdim=True) @ v


def _distances(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(-torch.cdist(q, k), -1) @ v


def _top(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT / math.sqrt(HEAD)
    return torch.softmax(scores.argsort(-1).to(q.dtype), -1) @ v


def _retention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    place = torch.arange(q.shape[-2])
    far = place[:, None] - place
    return (q @ k.mT * (0.9 ** far.clamp(min=0)) * (far >= 0)) @ v


def _found(batch: int, length: int) -> Call:
    return (ids(ROWS, batch, 3),), {}


_CORES = (
    ("wrong-axis/heads", partial(_softmax_over, 1)),
    ("wrong-axis/queries", partial(_softmax_over, 2)),
    ("wrong-axis/batch", partial(_softmax_over, 0)),
    ("no-softmax/relu", _relu),
    ("no-softmax/sigmoid", _sigmoid),
    ("no-softmax/squared", _squared),
    ("no-softmax/retention", _retention),
    ("no-product/distances", _distances),
    ("no-product/ranks", _top),
)
CASES = (
    *cases_of("negative", tuple((name, partial(SelfAttention, core)) for name, core in _CORES)),
    *cases_of("negative", (
        ("linear/regrouped", LinearAttention),
        ("router/experts", Router),
        ("pooling/linear", Pooling),
        ("pooling/bilinear", BilinearPooling),
        ("classifier/softmax", Classifier),
        ("classifier/mixture", MixtureOfSoftmaxes),
        ("stored/soft-look-up", SoftLookUp),
        ("stored/clusters", Clusters),
        ("stored/relaxed-choice", Temperature),
        ("dynamic/convolution", DynamicConvolution),
        ("dynamic/capsules", Capsules),
    )),
    *cases_of("negative", (("channels/xcit", Channels),), unseen={
        "attention": "products over tokens, a softmax over channels: axes, not calls"}),
    *cases_of("negative", (
        ("additive/bahdanau", Bahdanau),
        ("product/pointer", Pointer),
        ("product/clip", Similarity),
        ("product/sinkhorn", Sinkhorn),
    ), two_lengths),
    *cases_of("negative", (("product/dlrm", Interactions),), _found, look_ups=3),
)
