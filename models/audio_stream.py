"""A causal transformer that listens: one decision for each frame of 10 ms, made for streaming.

A frame is 40 log-mel bands of the last 25 ms of sound at 16 kHz. Two causal convolutions and two
transformer blocks with rotary positions follow; an attention sees 64 frames. For each frame the
model says whether a tone sounds, and whether it rises or falls from the tone before: that one is
over by then, so that the answer is in what the model remembers.
Trained on synthesised sound by `python -m bincompile.models.train_audio`. Listen to a file with

    python -m bincompile.models.audio_stream sound.wav

Rotary positions: arXiv:2104.09864.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from bincompile.errors import ConfigError, InputError

WEIGHTS = Path(__file__).parent / "data" / "audio_stream.safetensors"
RATE, HOP, SPAN, BANDS = 16000, 160, 400, 40  # samples: in a second, in a frame, that it hears
POINTS, LOWEST, HIGHEST = 512, 60.0, 7600.0  # of the spectrum; the bands' range in Hz
LEVEL, SPREAD, FLOOR = -5.5, 1.5, 1e-6  # of log energies, roughly: frames are about normal
CLASSES = ("background", "tone", "rising", "falling")
MEMORY = 0.3  # s: a tone that begins later than this after another has none to rise from
WINDOW = 64


class Attention(nn.Module):
    """Causal self-attention with rotary positions, within a window: (B, T, width) to the same."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        half = width // heads // 2
        self.frequencies: torch.Tensor
        self.register_buffer("frequencies", 1e4 ** -(torch.arange(half) / half), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        angles = places[:, None] * self.frequencies
        query, key, value = self.project(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        query, key = (_turned(part.transpose(1, 2), angles) for part in (query, key))
        distance = places[:, None] - places
        seen = (distance >= 0) & (distance < self.window)
        mixed = F.scaled_dot_product_attention(query, key, value.transpose(1, 2), attn_mask=seen)
        return self.out(mixed.transpose(1, 2).flatten(2))


def _turned(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """(B, heads, T, D), each pair of features (i, i + D / 2) turned by its angle, (T, D / 2)."""
    left, right = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


class Block(nn.Module):
    """Attention and a feed-forward net, each with a norm before and a sum after."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.attention_norm, self.forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, window)
        self.forward_net = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(),
                                         nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.forward_net(self.forward_norm(x))


class AudioStream(nn.Module):
    """Logits (B, ceil(T / stride), 4) from frames (B, T, 40).

    Args:
        width: features of a token.
        heads: a divisor of width.
        layers: how many blocks.
        window: tokens that an attention sees.
        stride: frames for each token; the model has a decision for each token.

    Example:
        >>> AudioStream(stride=2)(torch.randn(1, 9, 40)).shape
        torch.Size([1, 5, 4])
    """

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 2, window: int = WINDOW,
                 stride: int = 1) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(BANDS, width, 3), nn.Conv1d(width, width, 3, stride)
        self.blocks = nn.ModuleList(Block(width, heads, window) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(CLASSES))

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        x = frames.transpose(1, 2)
        for layer in (self.first, self.second):
            x = F.gelu(layer(F.pad(x, (2, 0))))  # no frame is heard before its time
        x = x.transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def frames(sound: torch.Tensor) -> torch.Tensor:
    """Frames (..., T, 40) of sound (..., 160 T) at 16 kHz; a frame needs no later sample.

    The logarithms of the energies in 40 bands, evenly spaced on the mel scale, of the last 400
    samples; before the first sample is silence.

    Raises:
        InputError: less than one frame.

    Example:
        >>> frames(torch.zeros(2, 1600)).shape
        torch.Size([2, 10, 40])
    """
    count = sound.shape[-1] // HOP
    if not count:
        raise InputError(f"{sound.shape[-1]} samples", f"a frame, of {HOP}, or more", "the sound")
    padded = F.pad(sound[..., :count * HOP], (SPAN - HOP, 0))
    spans = padded.unfold(-1, SPAN, HOP) * torch.hann_window(SPAN)
    energies = torch.fft.rfft(spans, POINTS).abs().square() @ _bands()
    return ((energies + FLOOR).log() - LEVEL) / SPREAD


@functools.cache
def _bands() -> torch.Tensor:
    """(257, 40): triangles between points that are evenly spaced on the mel scale."""
    low, high = (1127 * math.log1p(hertz / 700) for hertz in (LOWEST, HIGHEST))
    centres = 700 * torch.expm1(torch.linspace(low, high, BANDS + 2) / 1127)
    hertz = torch.linspace(0, RATE / 2, POINTS // 2 + 1)[:, None]
    rise = (hertz - centres[:-2]) / (centres[1:-1] - centres[:-2])
    fall = (centres[2:] - hertz) / (centres[2:] - centres[1:-1])
    return torch.minimum(rise, fall).clamp(min=0) * (2 / SPAN)


def synthesise(seconds: float = 2.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tones in noise: sound (16000 * seconds,) and the class (T,) int64 of each of its frames.

    Tones of 60 to 150 ms between 300 and 3000 Hz, three semitones or more apart, silences of 40 to
    450 ms between them, noise 5 to 25 dB below. A tone that begins within 0.3 s of the end of
    another is rising or falling.
    """
    draw = np.random.default_rng(seed)
    count = int(seconds * RATE) // HOP
    sound, labels = np.zeros(count * HOP), np.zeros(count, np.int64)
    start, last, ended = int(draw.uniform(0.02, 0.4) * RATE), 0.0, -math.inf
    while start < len(sound):
        pitch = _other(draw, last)
        samples = np.arange(min(int(draw.uniform(0.06, 0.15) * RATE), len(sound) - start))
        loud = draw.uniform(0.1, 0.5) * np.minimum(1, np.minimum(samples, samples[::-1]) / 80)
        sound[start + samples] += loud * np.sin(2 * math.pi * pitch / RATE * samples
                                                + draw.uniform(0, 2 * math.pi))
        known = start - ended < MEMORY * RATE
        kind = 1 if not known else 2 if pitch > last else 3
        labels[(start + HOP // 2) // HOP:(start + len(samples) + HOP // 2) // HOP] = kind
        last, ended = pitch, start + len(samples)
        start = ended + int(draw.uniform(0.04, 0.45) * RATE)
    noise = 0.3 / math.sqrt(2) * 10 ** (-draw.uniform(5, 25) / 20)
    sound += noise * draw.standard_normal(len(sound))
    return torch.from_numpy(sound).float(), torch.from_numpy(labels)


def _other(draw: np.random.Generator, last: float) -> float:
    """A pitch in Hz, three semitones or more from the last."""
    while True:
        pitch = 300 * 10 ** draw.uniform(0, 1)
        if not last or abs(math.log2(pitch / last)) >= 0.25:
            return pitch


def read(path: str | Path) -> torch.Tensor:
    """The sound (samples,) of a WAV file, the mean of its channels, from -1 to 1.

    Raises:
        ConfigError: no such file, or no WAV file.
        InputError: another rate than 16 kHz, or another width than 16 bits.
    """
    try:
        with wave.open(str(path), "rb") as file:
            found = file.getframerate(), 8 * file.getsampwidth()
            channels, data = file.getnchannels(), file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise ConfigError(f"{path}: {error}", "a WAV file", "the name of the file") from error
    if found != (RATE, 16):
        raise InputError(f"{path} has {found[0]} samples a second of {found[1]} bits",
                         f"{RATE} of 16 bits", "convert the file")
    samples = np.frombuffer(data, "<i2").reshape(-1, channels).astype(np.float32)
    return torch.from_numpy(samples.mean(1) / 32768)


def build() -> nn.Module:
    """The trained model, in eval mode.

    Example:
        >>> build()(example_inputs()[0][0]).shape
        torch.Size([2, 100, 4])
    """
    with torch.random.fork_rng(devices=[]):
        model = AudioStream()
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(WEIGHTS).items()})
    return model.eval()


def example_inputs() -> tuple[tuple[torch.Tensor], dict[str, Any]]:
    """The frames of two sounds of a second: (2, 100, 40)."""
    return (frames(torch.stack([synthesise(1.0, seed)[0] for seed in range(2)])),), {}


def held_out(sounds: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames (sounds, 300, 40) and classes (sounds, 300) that are not trained on."""
    made = [synthesise(3.0, 10**6 + seed) for seed in range(sounds)]
    return frames(torch.stack([s for s, _ in made])), torch.stack([labels for _, labels in made])


@torch.no_grad()
def evaluate(model_like: Callable[..., torch.Tensor]) -> dict[str, float]:
    """The share of frames that the model names right, and of those that rise or fall.

    Example:
        >>> evaluate(build())["accuracy"] >= 0.9
        True
    """
    heard, labels = held_out()
    right = (model_like(heard).argmax(-1) == labels).double()
    return {"accuracy": right.mean().item(), "moving_accuracy": right[labels >= 2].mean().item()}


def spoken(classes: list[int]) -> list[str]:
    """What was heard, one line for each run of frames of a class other than background.

    Example:
        >>> spoken([0, 0, 2, 2, 2, 0])
        ['0.02 s to 0.05 s: rising']
    """
    ends = [t for t in range(1, len(classes)) if classes[t] != classes[t - 1]]
    bounds = [0, *ends, len(classes)]
    second = HOP / RATE
    return [f"{a * second:.2f} s to {b * second:.2f} s: {CLASSES[classes[a]]}"
            for a, b in itertools.pairwise(bounds) if b > a and classes[a]]


def main() -> None:
    """Listen to a file, or to a synthesised sound, frame by frame, and say what was heard."""
    from bincompile import Continual, optimize  # a model does not need its compiler

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("file", nargs="?", type=Path, help="a WAV file of 16 kHz and 16 bits")
    options = parser.parse_args()
    sound = synthesise(3.0)[0] if options.file is None else read(options.file)
    args, _ = example_inputs()
    stream = optimize(build(), args, continual=Continual()).stream(1)
    print("\n".join(spoken([int(stream.step(f[None]).argmax()) for f in frames(sound)])))


if __name__ == "__main__":
    main()
