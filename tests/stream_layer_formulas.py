"""Windows, running values and recurrent layers of streams, from their definitions, row by row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch


def ticks(rows, clock, rate, delay) -> Iterator[tuple[int, int, int]]:
    """For each token the row that it belongs to and the index that the step computes for it."""
    for place, row in enumerate(rows.tolist()):
        yield place, row, math.ceil((int(clock[row]) - delay) / rate)


def stacked(found: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    return torch.stack(found) if found else like


def stream_index(rows, clock, rate, delay):
    return torch.tensor([n for _, _, n in ticks(rows, clock, rate, delay)], dtype=torch.int64)


def stream_filled(rows, clock, window, rate, delay):
    return torch.tensor([[n - age >= 0 for age in reversed(range(window))]
                         for _, _, n in ticks(rows, clock, rate, delay)],
                        dtype=torch.bool).reshape(-1, window)


def stream_window(token, ring, rows, clock, window, rate, delay, fill):
    out = []
    for place, row, n in ticks(rows, clock, rate, delay):
        ring[row, n % ring.shape[1]] = token[place]
        entries = [ring[row, i % ring.shape[1]] if i >= 0 else torch.full_like(token[place], fill)
                   for i in range(n - window + 1, n + 1)]
        out.append(torch.stack(entries))
    return stacked(out, token.new_empty(0, window, *token.shape[1:]))


def stream_shift(token, ring, rows, clock, by, rate, delay, fill):
    return stream_window(token, ring, rows, clock, by + 1, rate, delay, fill)[:, 0]


LAYERS: dict[str, Callable[..., Any]] = {f.__name__: f for f in (
    stream_index, stream_filled, stream_window, stream_shift)}
