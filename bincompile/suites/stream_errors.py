"""The errors of a long stream, step by step, against float64 on the same float32 inputs."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from bincompile.api import optimize
from bincompile.config import Continual
from bincompile.suites.rows import OURS, Case, Row, row
from bincompile.suites.stream_parts import SelfAttention

SHAPE = (512, 8, 64)  # features, heads, tokens of the window
STEPS, QUICK_STEPS, CHUNK = 100_000, 5_000, 500
SPREADS = (1, 4, 16, 100)  # standard deviations of the scores
LARGEST, SDPA, OVER_SDPA = "largest_error", "sdpa_error", "over_sdpa"


def cases() -> list[Case]:
    """One for each spread of the scores."""
    return [Case(name(spread), partial(_errors, spread)) for spread in SPREADS]


def name(spread: int) -> str:
    """The case of scores of this standard deviation."""
    return f"errors at a score deviation of {spread}"


def attention(spread: float) -> SelfAttention:
    """A layer whose scores have this standard deviation for tokens of normal numbers."""
    width, heads, _ = SHAPE
    model = SelfAttention(width, heads).eval()
    weight = model.attention.in_proj_weight
    x = torch.randn(256, width)
    with torch.no_grad():
        query, key = (F.linear(x, w).view(-1, heads, width // heads).transpose(0, 1)
                      for w in weight[:2 * width].split(width))
        now = (query @ key.mT / math.sqrt(width // heads)).std()
        weight[:2 * width] *= (spread / now).sqrt()
    return model


def windowed(model: SelfAttention, tokens: torch.Tensor, window: int) -> torch.Tensor:
    """(T - window + 1, width): scaled_dot_product_attention of each newest token in its window.

    In the dtype of the tokens (T, width), to which the weights are cast.
    """
    layer, dtype = model.attention, tokens.dtype
    weights = (layer.in_proj_weight, layer.in_proj_bias, layer.out_proj.weight,
               layer.out_proj.bias)
    inner, inner_bias, outer, outer_bias = (w.to(dtype) for w in weights)
    query, key, value = F.linear(tokens, inner, inner_bias).unflatten(
        -1, (3, layer.num_heads, -1)).unbind(1)
    windows = (x.unfold(0, window, 1).transpose(2, 3) for x in (key, value))
    mixed = F.scaled_dot_product_attention(query[window - 1:, :, None], *windows)
    return F.linear(mixed[:, :, 0].flatten(1), outer, outer_bias)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The norm of each row's error over the norm of the row that is right.

    Example:
        >>> relative(torch.tensor([[3.0, 3.0]]), torch.tensor([[3.0, 4.0]])).tolist()
        [0.2]
    """
    return (found.double() - wanted.double()).norm(dim=-1) / wanted.double().norm(dim=-1)


@torch.no_grad()
def _errors(spread: int) -> Iterator[Row]:
    model, window = attention(spread), SHAPE[2]
    before = torch.randn(window - 1, SHAPE[0])
    stream: Any = optimize(model, (torch.randn(1, window, SHAPE[0]),),
                           continual=Continual(window)).stream(1)
    for token in before.split(1):
        stream.step(token)
    worst, seconds, steps = {OURS: 0.0, SDPA: 0.0}, 0.0, 0
    while steps < STEPS:
        tokens = torch.randn(min(CHUNK, STEPS - steps), SHAPE[0])
        seen = torch.cat([before, tokens])
        start = time.perf_counter()
        found = torch.cat([stream.step(token) for token in tokens.split(1)])
        seconds += time.perf_counter() - start
        wanted = windowed(model, seen.double(), window)
        for which, y in ((OURS, found), (SDPA, windowed(model, seen, window))):
            worst[which] = max(worst[which], relative(y, wanted).max().item())
        before, steps = seen[-window + 1:], steps + len(tokens)
    yield row(name(spread), {OURS: 1e3 * seconds / steps}, values={
        "steps": steps, LARGEST: worst[OURS], SDPA: worst[SDPA],
        OVER_SDPA: worst[OURS] / worst[SDPA]})
