"""Trains models/audio_stream.py on synthesised sound.

    python -m bincompile.models.train_audio [--steps 900] [--seed 0] [--to FOLDER]

One thread and one seed. Weights are stored in float16, which the model holds in float32.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from bincompile.models import audio_stream

BATCH, SECONDS = 16, 2.0


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames (16, 200, 40) and classes (16, 200), the same for the same seed."""
    made = [audio_stream.synthesise(SECONDS, BATCH * seed + i) for i in range(BATCH)]
    sounds, labels = (torch.stack(part) for part in zip(*made, strict=True))
    return audio_stream.frames(sounds), labels


def train(steps: int, seed: int) -> tuple[audio_stream.AudioStream, list[float]]:
    """The model in eval mode, and the loss of each step: AdamW, one cycle of the rate."""
    torch.manual_seed(seed)
    model = audio_stream.AudioStream()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    history: list[float] = []
    model.train()
    for step in range(steps):
        heard, labels = batch(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(heard).flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        history.append(loss.item())
    return model.eval(), history


def main() -> None:
    """Train the model and write its weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--to", type=Path, default=audio_stream.WEIGHTS.parent,
                        help="folder for the file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    model, history = train(options.steps, options.seed)
    save_file({name: tensor.half() for name, tensor in model.state_dict().items()},
              options.to / audio_stream.WEIGHTS.name)
    print(f"loss {history[-1]:.4f}  {audio_stream.evaluate(model)}  "
          f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
