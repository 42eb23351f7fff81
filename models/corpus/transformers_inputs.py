"""What models of transformers are called with: tokens, pixels, sound, and rows of numbers."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bincompile.models.corpus import Call

Inputs = Callable[[int, int], Call]
VOCABULARY, SPECIAL = 99, 5  # how many tokens; the first ones mean padding, start, end and the like


def seeded(name: str, batch: int, length: int) -> torch.Generator:
    """A generator whose numbers depend on these three alone."""
    return torch.Generator().manual_seed(zlib.crc32(f"{name} {batch} {length}".encode()))


def kept(batch: int, length: int, side: str = "right") -> Tensor:
    """1 for a position that counts, 0 for padding, (B, L) int64: the first row is full."""
    places = torch.arange(length)
    lengths = torch.tensor([max(1, length - 2 * row) for row in range(batch)])
    mask = (places[None] < lengths[:, None]).long()
    return mask if side == "right" else mask.flip(1)


def tokens(prefix: str = "", *, mask: bool = True, side: str = "right", pad: int = 0,
           extra: int = 0, vocabulary: int = VOCABULARY) -> Inputs:
    """input_ids and attention_mask, (B, L + extra) int64, under names that begin with `prefix`."""
    def inputs(batch: int, length: int) -> Call:
        shape = (batch, length + extra)
        drawn = torch.randint(SPECIAL, vocabulary, shape, generator=seeded(prefix, batch, length))
        if not mask:
            return (), {f"{prefix}input_ids": drawn}
        counts = kept(*shape, side)
        return (), {f"{prefix}input_ids": drawn.masked_fill(counts == 0, pad),
                    f"{prefix}attention_mask": counts}
    return inputs


def floats(name: str, *shape: int) -> Inputs:
    """Normal numbers (B, *shape) float32; -1 in the shape stands for the length."""
    def inputs(batch: int, length: int) -> Call:
        sizes = [length if size == -1 else size for size in shape]
        return (), {name: torch.randn(batch, *sizes, generator=seeded(name, batch, length))}
    return inputs


def integers(name: str, low: int, high: int, *shape: int) -> Inputs:
    """Integers of [low, high), (B, *shape) int64; -1 in the shape stands for the length."""
    def inputs(batch: int, length: int) -> Call:
        sizes = (batch, *(length if size == -1 else size for size in shape))
        return (), {name: torch.randint(low, high, sizes, generator=seeded(name, batch, length))}
    return inputs


def padding(name: str, steps: int = 1, size: int = -1) -> Inputs:
    """A mask (B, L * steps) int64, 0 behind the end of each row; or of a fixed size."""
    def inputs(batch: int, length: int) -> Call:
        return (), {name: kept(batch, length * steps if size == -1 else size)}
    return inputs


def pixels(size: int = 16, *, channels: int = 3, name: str = "pixel_values",
           frames: int | None = None) -> Inputs:
    """Images (B, channels, size, size), or films (B, frames, channels, size, size)."""
    shape = (channels, size, size) if frames is None else (frames, channels, size, size)
    return floats(name, *shape)


def sound(*, samples: int, name: str = "input_values", mask: bool = True) -> Inputs:
    """A wave (B, L * samples) float32 and, where asked, its attention_mask."""
    def inputs(batch: int, length: int) -> Call:
        wave = torch.randn(batch, length * samples, generator=seeded(name, batch, length))
        if not mask:
            return (), {name: wave}
        counts = kept(batch, length).repeat_interleave(samples, dim=1)
        return (), {name: wave * counts, "attention_mask": counts}
    return inputs


def together(*parts: Inputs) -> Inputs:
    """The arguments of all parts in one call."""
    def inputs(batch: int, length: int) -> Call:
        calls = [part(batch, length) for part in parts]
        args = tuple(itertools.chain.from_iterable(args for args, _ in calls))
        return args, {name: value for _, named in calls for name, value in named.items()}
    return inputs


def options(**given: Any) -> Inputs:
    """Arguments that are the same at every size."""
    return lambda batch, length: ((), given)


def positional(part: Inputs) -> Inputs:
    """The same arguments without their names, in the same order."""
    def inputs(batch: int, length: int) -> Call:
        args, named = part(batch, length)
        return (*args, *named.values()), {}
    return inputs
