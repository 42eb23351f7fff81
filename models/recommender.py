"""Which items a user likes, from bags of 1-bit item rows: every table is packed while it trains.

The data is made here: an item has a few tags and a group, a user has seen items mostly of one
group, and is asked about an item. The user is the mean of the rows of what was seen, the item the
majority of the rows of its tags and a row of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from bincompile.nn import BinaryEmbedding, BinaryEmbeddingBag
from bincompile.optim import BinaryOptimizer

ITEMS, TAGS, GROUPS, SEEN, PADDING = 400, 60, 8, 12, 0  # row 0 of a table is padding
STEPS, BATCH, ASKED = 300, 128, 2000


class Recommender(nn.Module):
    """Scores (B,) of items (B,) with tags (B, 3), for users who saw items (B, 12)."""

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.history = BinaryEmbeddingBag(ITEMS, dim, PADDING, mode="mean")
        self.tags = BinaryEmbeddingBag(TAGS, dim, PADDING, ties="zero")
        self.items = BinaryEmbedding(ITEMS, dim, bases=2)
        self.mix = nn.Linear(2 * dim, dim)

    def forward(self, seen: torch.Tensor, item: torch.Tensor, tags: torch.Tensor) -> torch.Tensor:
        asked = self.mix(torch.cat([self.items(item), self.tags(tags)], -1))
        return (self.history(seen) * asked).sum(-1)


@functools.cache
def catalogue() -> tuple[torch.Tensor, torch.Tensor]:
    """The group of each item (ITEMS,), and its three tags (ITEMS, 3)."""
    generator = torch.Generator().manual_seed(1)
    groups = torch.randint(GROUPS, (ITEMS,), generator=generator)
    own = (TAGS - 1) // GROUPS
    tags = 1 + groups.unsqueeze(1) * own + torch.randint(own, (ITEMS, 3), generator=generator)
    return groups, tags


def draw(count: int, seed: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Inputs of `Recommender` for `count` questions, and whether the answer is yes."""
    generator = torch.Generator().manual_seed(seed)
    groups, tags = catalogue()
    liked = torch.randint(GROUPS, (count, 1), generator=generator)
    seen = torch.randint(1, ITEMS, (count, 40), generator=generator)
    order = (groups[seen] != liked).int().sort(dim=1, stable=True)[1][:, :SEEN]
    seen = seen.gather(1, order)  # what is liked comes first, and fills a part of the history
    length = torch.randint(4, SEEN + 1, (count, 1), generator=generator)
    seen = seen.masked_fill(torch.arange(SEEN) >= length, PADDING)
    answers = torch.rand(count, generator=generator) < 0.5
    candidates = torch.randint(1, ITEMS, (count, 60), generator=generator)
    wanted = (groups[candidates] == liked) == answers.unsqueeze(1)
    item = candidates.gather(1, wanted.int().argmax(1, keepdim=True)).squeeze(1)
    return (seen, item, tags[item]), answers


def build() -> nn.Module:
    """The model, trained here in a few seconds, in eval mode; the same each time on one machine.

    Example:
        >>> model = build()
        >>> model(*example_inputs()[0]).shape
        torch.Size([8])
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Recommender()
        optimizer = BinaryOptimizer.for_model(model, lr=0.1, threshold=0.2, float_lr=3e-3)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, STEPS)
        for step in range(STEPS):
            inputs, answers = draw(BATCH, 100 + step)
            loss = F.binary_cross_entropy_with_logits(model(*inputs) / 8, answers.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    return model.eval()


def example_inputs() -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """What 8 users saw (8, 12), and items (8,) with their tags (8, 3), int64."""
    return draw(8, 2)[0], {}


@torch.no_grad()
def evaluate(model_like: Callable[..., torch.Tensor]) -> dict[str, float]:
    """The share of right answers to questions that training did not ask.

    Example:
        >>> evaluate(build())["accuracy"] >= 0.9
        True
    """
    inputs, answers = draw(ASKED, 3)
    return {"accuracy": ((model_like(*inputs) > 0) == answers).double().mean().item()}
