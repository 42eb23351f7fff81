"""Trains models/digits.py: the float twin first, then the binary model, which starts from the twin.

    python -m bincompile.models.train_digits [--epochs 120] [--seed 0] [--to FOLDER]

One thread and one seed, so a machine gives the same weights each time. Epochs, rates and noise
were chosen on a part of the training images; the test images are read once, at the end.
Straight-through estimator: arXiv:1308.3432.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from bincompile.models import digits
from bincompile.ops import bits

BATCH, TEST_IMAGES, SMOOTHING = 64, 500, 0.05
MOVED, NOISE = 0.15, 3  # share of images moved by up to a pixel; pixels change by up to this much
SOURCE = """\
digits_images.npz: the 1797 images of sklearn.datasets.load_digits (8x8 pixels, 0 to 16).
Array `test` marks the 500 images that are kept for testing.

Source: Alpaydin, E. and Kaynak, C. (1998). Optical Recognition of Handwritten Digits [Dataset].
UCI Machine Learning Repository. https://doi.org/10.24432/C50P49
Licence: Creative Commons Attribution 4.0 International (CC BY 4.0),
https://creativecommons.org/licenses/by/4.0/legalcode
Changes: stored as unsigned bytes in one compressed file, with the mark of the test images.
"""


class SignTable(nn.Module):
    """A table whose rows are +-alpha, alpha the mean |w| of the row; straight-through gradient."""

    def forward(self, table: torch.Tensor) -> torch.Tensor:
        alpha = table.abs().mean(1, keepdim=True)
        # the bracket is 0 and passes the gradient, so every row stays exactly +-alpha
        return alpha.detach() * bits.sign(table.detach()) + (table - table.detach())


def write_images(folder: Path) -> None:
    """Write the images, their labels and the test mark, and say where they are from."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    test = np.zeros(len(labels), dtype=bool)
    test[np.random.RandomState(0).permutation(len(labels))[:TEST_IMAGES]] = True
    np.savez_compressed(folder / digits.IMAGES.name, test=test, labels=labels.astype(np.uint8),
                        images=images.reshape(-1, 8, 8).astype(np.uint8))
    (folder / digits.IMAGES.with_suffix(".txt").name).write_text(SOURCE)


def batches(images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator,
            ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One epoch of (tokens, labels): shuffled, pixels disturbed, some images moved by a pixel."""
    padded = F.pad(images, (1, 1, 1, 1)).long()
    for chosen in torch.randperm(len(images), generator=generator).split(BATCH):
        moved = torch.rand(len(chosen), generator=generator) < MOVED
        start = torch.where(moved, torch.randint(3, (2, len(chosen)), generator=generator), 1)
        rows, columns = start[:, :, None] + torch.arange(8)
        seen = padded[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
        seen = seen + torch.randint(-NOISE, NOISE + 1, seen.shape, generator=generator)
        yield digits.tokenize(seen.clamp(0, digits.WHITE)), labels[chosen]


def fit(model: digits.Digits, data: tuple[torch.Tensor, torch.Tensor], epochs: int, rate: float,
        seed: int) -> list[float]:
    """Train in place with AdamW and a cosine schedule; the mean loss of each epoch."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    steps = epochs * -(-len(data[0]) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    history: list[float] = []
    model.train()
    for _ in range(epochs):
        values = []
        for tokens, labels in batches(*data, generator):
            optimizer.zero_grad()
            value = F.cross_entropy(model(tokens), labels, label_smoothing=SMOOTHING)
            value.backward()
            optimizer.step()
            schedule.step()
            values.append(value.item())
        history.append(sum(values) / len(values))
    model.eval()
    return history


def binary_start(twin: digits.Digits) -> digits.Digits:
    """The binary model with the twin's weights as masters, its table kept at +-alpha."""
    model = digits.Digits()
    model.load_state_dict(twin.state_dict())
    parametrize.register_parametrization(model.table, "weight", SignTable())
    return model


def train(data: tuple[torch.Tensor, torch.Tensor], epochs: int, seed: int,
          ) -> tuple[digits.Digits, digits.Digits]:
    """The trained binary model and its float twin, both in eval mode."""
    torch.manual_seed(seed)
    twin = digits.float_twin()
    fit(twin, data, epochs, rate=2e-3, seed=seed)
    model = binary_start(twin)
    fit(model, data, epochs, rate=3e-3, seed=seed + 1)
    parametrize.remove_parametrizations(model.table, "weight")
    return model, twin


def main() -> None:
    """Train both models and write their weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=120, help="for each of the two models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--to", type=Path, default=digits.DATA, help="folder for the files")
    options = parser.parse_args()
    torch.set_num_threads(1)
    write_images(options.to)
    start = time.perf_counter()
    images = digits.split("train", options.to / digits.IMAGES.name)
    model, twin = train(images, options.epochs, options.seed)
    save_file(model.state_dict(), options.to / digits.WEIGHTS.name)
    save_file(twin.state_dict(), options.to / digits.FLOAT_WEIGHTS.name)
    print(f"binary {digits.evaluate(model)}  float {digits.evaluate(twin)}  "
          f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
