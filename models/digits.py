"""A small transformer that reads handwritten digits, with 1-bit attention and a 1-bit table.

An image of 8x8 pixels is 16 patches of 2x2. Each pixel has one of three levels, so a patch is a
token of a vocabulary of 81. Query, key, value and output projections are `BMHA` (1-bit weights
and activations), the rows of the token table are exactly +-alpha; the rest is float32.
Trained by `python -m bincompile.models.train_digits`; data and licence: data/digits_images.txt.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from bincompile.nn import BMHA

DATA = Path(__file__).parent / "data"
IMAGES, WEIGHTS, FLOAT_WEIGHTS = (
    DATA / name for name in ("digits_images.npz", "digits.safetensors", "digits_float.safetensors"))
CLASSES, PATCHES, LEVELS, WHITE = 10, 16, 3, 16  # a pixel is 0 (black) to 16 (white)
VOCABULARY = LEVELS**4
PROJECTIONS = ("q_linear", "k_linear", "v_linear", "out")


class Block(nn.Module):
    """Attention and a feed-forward net, each with a norm before and a sum after: (B, L, dim)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.forward_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = BMHA(dim, dim, heads, dropout=0.0)
        self.forward_net = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(),
                                         nn.Linear(2 * dim, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))[0]
        return x + self.forward_net(self.forward_norm(x))


class Digits(nn.Module):
    """Logits (B, 10) from tokens (B, 16) of dtype int64."""

    def __init__(self, dim: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, dim)
        self.positions = nn.Parameter(torch.randn(PATCHES, dim) * 0.5)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, CLASSES)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def float_twin() -> Digits:
    """The same network with `nn.Linear` for the binary projections; untrained."""
    model = Digits()
    for block in model.blocks:
        for name in PROJECTIONS:
            binary = getattr(block.attention, name)
            setattr(block.attention, name,
                    nn.Linear(binary.in_features, binary.out_features, bias=False))
    return model


def tokenize(images: torch.Tensor) -> torch.Tensor:
    """Tokens (B, 16) from images (B, 8, 8) with pixels from 0 to 16, row by row of patches."""
    levels = (images.long() * LEVELS).div(WHITE + 1, rounding_mode="floor")
    patches = levels.unfold(1, 2, 2).unfold(2, 2, 2).reshape(len(images), PATCHES, 4)
    return (patches * torch.tensor([LEVELS**i for i in range(4)])).sum(-1)


def split(part: str, path: Path = IMAGES) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 8, 8) uint8 and labels (N,) int64 of "train" (1297) or "test" (500)."""
    with np.load(path, allow_pickle=False) as data:
        chosen = data["test"] == (part == "test")
        return (torch.from_numpy(data["images"][chosen]),
                torch.from_numpy(data["labels"][chosen].astype(np.int64)))


def test_split() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (500, 16) and labels (500,), both int64; never seen in training."""
    images, labels = split("test")
    return tokenize(images), labels


test_split.__test__ = False  # type: ignore[attr-defined]  # not a test, whatever its name says


def build() -> nn.Module:
    """The trained binary model, in eval mode.

    Example:
        >>> build()(example_inputs()[0][0]).shape
        torch.Size([8, 10])
    """
    return _load(Digits, WEIGHTS)


def build_float() -> nn.Module:
    """Its float twin, trained on the same images, in eval mode."""
    return _load(float_twin, FLOAT_WEIGHTS)


def example_inputs() -> tuple[tuple[torch.Tensor], dict[str, Any]]:
    """The tokens of 8 test images: (8, 16) int64."""
    return (test_split()[0][:8],), {}


@torch.no_grad()
def evaluate(model_like: Callable[..., torch.Tensor]) -> dict[str, float]:
    """The share of the test split that the model reads right.

    Example:
        >>> evaluate(build())["accuracy"] >= 0.88
        True
    """
    tokens, labels = test_split()
    return {"accuracy": (model_like(tokens).argmax(-1) == labels).double().mean().item()}


def _load(make: Callable[[], Digits], path: Path) -> Digits:
    with torch.device("meta"):  # draws no random weights, which would move the caller's generator
        model = make()
    model.load_state_dict(load_file(path), assign=True)
    return model.eval()
