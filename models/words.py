"""The next word of a made-up language, from 1-bit rows that also score it: a tied output head.

Words belong to classes, and a class is followed by one of two others. The model sees the rows of
two words, of which the second counts, and scores all words by the same table: 1 bit a number to
look up, and 1 bit a number in the product with the whole vocabulary, for each of two bases. It
trains on float masters and is packed at the end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from bincompile.nn import BinaryEmbedding
from bincompile.optim import BinaryOptimizer

WORDS, CLASSES, FOLLOWERS = 240, 24, 2
STEPS, BATCH, ASKED = 250, 256, 2000


class NextWord(nn.Module):
    """Scores (B, WORDS) of the word after two words (B, 2)."""

    def __init__(self, dim: int = 96, packed: bool = True) -> None:
        super().__init__()
        self.words = BinaryEmbedding(WORDS, dim, bases=2, packed=packed)
        self.hidden = nn.Sequential(nn.Linear(2 * dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, before: torch.Tensor) -> torch.Tensor:
        return self.words.logits(self.hidden(self.words(before).flatten(-2)))

    def pack(self) -> NextWord:
        """This model with its table packed, and the same values."""
        self.words = self.words.pack()
        return self


@functools.cache
def grammar() -> tuple[torch.Tensor, torch.Tensor]:
    """The class of each word (WORDS,), and the classes that may follow a class (CLASSES, 2)."""
    generator = torch.Generator().manual_seed(1)
    classes = torch.arange(WORDS) % CLASSES
    follow = torch.randint(CLASSES, (CLASSES, FOLLOWERS), generator=generator)
    return classes[torch.randperm(WORDS, generator=generator)], follow


def draw(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two words (count, 2) and one that may follow (count,)."""
    generator = torch.Generator().manual_seed(seed)
    classes, follow = grammar()
    before = torch.randint(WORDS, (count, 2), generator=generator)
    choices = follow[classes[before[:, 1]]]
    choice = torch.randint(FOLLOWERS, (count, 1), generator=generator)
    wanted = classes.unsqueeze(0) == choices.gather(1, choice)
    noise = torch.rand(count, WORDS, generator=generator)
    return before, noise.masked_fill(~wanted, -1.0).argmax(1)


def build() -> nn.Module:
    """The model, trained here in a few seconds and packed, in eval mode.

    Example:
        >>> model = build()
        >>> model.words.packed, model(*example_inputs()[0]).shape
        (True, torch.Size([8, 240]))
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = NextWord(packed=False)
        optimizer = BinaryOptimizer(model.parameters(), "ste", lr=4e-3)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, STEPS)
        for step in range(STEPS):
            before, after = draw(BATCH, 100 + step)
            loss = F.cross_entropy(model(before) / 8, after)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        return model.pack().eval()


def example_inputs() -> tuple[tuple[torch.Tensor], dict[str, Any]]:
    """Two words of 8 sentences: (8, 2) int64."""
    return (draw(8, 2)[0],), {}


@torch.no_grad()
def evaluate(model_like: Callable[..., torch.Tensor]) -> dict[str, float]:
    """The share of guesses that the grammar allows.

    Example:
        >>> evaluate(build())["allowed"] >= 0.9
        True
    """
    before, _ = draw(ASKED, 3)
    classes, follow = grammar()
    guessed = classes[model_like(before).argmax(1)]
    allowed = follow[classes[before[:, 1]]] == guessed.unsqueeze(1)
    return {"allowed": allowed.any(1).double().mean().item()}
