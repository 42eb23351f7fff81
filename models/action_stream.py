"""The shape of online action detection: what is happening now, from features of video frames.

A frame is 3072 features, as two TSN networks give them for colour and motion. A linear takes them
to the width of the encoder, learned positions are added, one or two blocks of nn.TransformerEncoder
see a window of 64 frames in both directions, and the newest frame's output is classified: 20
actions, background and the ambiguous. The weights are random, for measuring time and bytes.

Streamed with `Continual(window=64, positions="recycle")`: the table has 127 positions, one less
than two windows, and begins anew after the last, so that no two frames of a window share one.
Source: Continual Transformers, arXiv:2201.06268, after OadTR, arXiv:2106.11149.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bincompile.models.similarity import cosines

FEATURES, CLASSES, WINDOW, SEED = 3072, 22, 64, 0


class ActionStream(nn.Module):
    """Logits (B, 22) of the newest frame from features (B, T, features), T up to 2 window - 1.

    Args:
        features: of a frame.
        width: features of a token, and of the feed-forward nets.
        heads: a divisor of width.
        blocks: 1, which streams as a single output, or 2, the first of them retroactive.
        window: frames that are seen.

    Example:
        >>> ActionStream(features=12, width=8, heads=2, window=4)(torch.randn(3, 4, 12)).shape
        torch.Size([3, 22])
    """

    def __init__(self, features: int = FEATURES, width: int = 1024, heads: int = 8,
                 blocks: int = 1, window: int = WINDOW) -> None:
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.positions = nn.Embedding(2 * window - 1, width)
        layer = nn.TransformerEncoderLayer(width, heads, width, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, blocks, enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        places = torch.arange(frames.shape[1], device=frames.device)
        x = self.encoder(self.embed(frames) + self.positions(places))
        return self.head(x[:, -1])


def build(blocks: int = 1, width: int = 1024, features: int = FEATURES) -> nn.Module:
    """The model, in eval mode; the same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return ActionStream(features, width, blocks=blocks).eval()


def example_inputs(count: int = 2, features: int = FEATURES,
                   ) -> tuple[tuple[torch.Tensor], dict[str, Any]]:
    """Random features of a window: (count, 64, features)."""
    generator = torch.Generator().manual_seed(SEED)
    return (torch.randn(count, WINDOW, features, generator=generator),), {}


@torch.no_grad()
def evaluate(model_like: Callable[..., torch.Tensor]) -> dict[str, float]:
    """Mean and least cosine of the logits to those of the model, and the share of equal classes."""
    args, _ = example_inputs()
    found, wanted = model_like(*args), _reference()
    same = (found.argmax(-1) == wanted.argmax(-1)).double().mean().item()
    return {**cosines(found, wanted), "same_class": same}


@functools.cache
def _reference() -> torch.Tensor:
    return build()(*example_inputs()[0])
