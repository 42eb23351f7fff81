"""Attention of every query of a sliding window, brought up to date for one new key.

Each query keeps sums over two runs of keys: the back, which new keys join, and the front, which
old keys leave. Nothing is subtracted: the front holds one sum for each block boundary, over all
keys from there on, and the keys between the oldest and the next boundary are attended anew. When
the front is used up, the back takes its place. A sum is kept as (peak, total, mixed), relative to
its own largest score, so no score overflows or vanishes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from bincompile.nn.ring import StreamState

SHORTEST = 256  # a shorter window is attended anew in less time than its sums take


class Sums(NamedTuple):
    """Softmax attention over some keys, unfinished.

    Args:
        peak: (..., 1) the largest score, -inf over no keys.
        total: (..., 1) the sum of exp(score - peak).
        mixed: (..., D) the sum of exp(score - peak) * value.
    """

    peak: torch.Tensor
    total: torch.Tensor
    mixed: torch.Tensor


def block_size(slots: int) -> int | None:
    """The divisor of `slots` next to its square root, if one is near enough to pay."""
    root = math.sqrt(slots)
    near = [n for n in range(math.ceil(root / 4), math.floor(root * 4) + 1) if slots % n == 0]
    return min(near, key=lambda n: abs(math.log(n / root)), default=None)


def over(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
         bias: torch.Tensor | None) -> Sums:
    """Sums of queries (..., R, D) over keys (..., J, D); `bias` (..., 1, J) is added to scores."""
    scores = query @ key.mT
    if bias is not None:
        scores = scores + bias
    peak = scores.amax(-1, keepdim=True)
    weights = (scores - _finite(peak)).exp_()
    return Sums(peak, weights.sum(-1, keepdim=True), weights @ value)


def over_suffixes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                  bias: torch.Tensor | None, block: int) -> Sums:
    """Sums over the keys from each block on, (..., R, blocks, .)."""
    scores = query @ key.mT
    if bias is not None:
        scores = scores + bias
    scores = scores.unflatten(-1, (-1, block))
    peak = scores.amax(-1)
    weights = (scores - _finite(peak)[..., None]).exp_()
    mixed = (weights.transpose(-3, -2) @ value.unflatten(-2, (-1, block))).transpose(-3, -2)
    top = peak.flip(-1).cummax(-1).values.flip(-1)
    scale = (peak[..., None, :] - _finite(top)[..., None]).exp_().triu_()  # [from, block]
    return Sums(top[..., None], scale @ weights.sum(-1, keepdim=True), scale @ mixed)


def merge(parts: list[Sums]) -> Sums:
    """Sums over the keys of all parts."""
    peak = parts[0].peak
    for part in parts[1:]:
        peak = torch.maximum(peak, part.peak)
    scales = [(part.peak - _finite(peak)).exp_() for part in parts]
    total, mixed = parts[0].total * scales[0], parts[0].mixed * scales[0]
    for part, scale in zip(parts[1:], scales[1:], strict=True):
        total = torch.addcmul(total, part.total, scale)
        mixed = torch.addcmul(mixed, part.mixed, scale)
    return Sums(peak, total, mixed)


def _finite(peak: torch.Tensor) -> torch.Tensor:
    return peak.masked_fill(peak == -math.inf, 0.0)


class TwoStacks:
    """The sums of one batch of streams with equal clocks and full windows.

    They follow from the rings alone, so they are no part of a stream's state: where they do not
    belong to the state at hand, they are made anew.
    """

    def __init__(self) -> None:
        self._clock: torch.Tensor | None = None  # of the state that the sums belong to
        self._newest = 0
        self._front: Sums
        self._back: Sums

    def __reduce__(self) -> tuple[type[TwoStacks], tuple[()]]:
        return TwoStacks, ()  # a copy belongs to other rings

    def fits(self, before: torch.Tensor, state: StreamState) -> bool:
        """Whether the streams of a state can be answered here."""
        slots = state.key.shape[2]
        if slots < SHORTEST or block_size(slots) is None or (
                state.key.dtype not in (torch.float32, torch.float64)):
            return False
        first = state.clock[0]
        return self._clock is before or bool((first >= slots) & (state.clock == first).all())

    def answer(self, before: torch.Tensor, state: StreamState, bias: torch.Tensor | None,
               sinks: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        """(N, H, S, D), by slot, after the step that led from the clock `before` to a state.

        `bias` (N, 1, 1, S) is added to the scores, by slot; a query that sees nothing gives 0.
        """
        slots = state.key.shape[2]
        known, self._clock = self._clock is before, None  # none, should anything below fail
        self._newest = (self._newest + 1 if known else int(state.clock[0]) - 1) % slots
        query = state.query * state.query.shape[-1]**-0.5
        if known and self._newest:
            self._extend(query, state, bias)
        else:
            self._back, self._front = self._renew(query, state, bias)
        parts = [self._back, *self._older(query, state, bias)]
        if sinks is not None:
            parts.append(over(query, *sinks, None))
        sums = merge(parts)
        self._clock = state.clock
        return (sums.mixed / sums.total).masked_fill(sums.total == 0, 0.0)

    def _renew(self, query: torch.Tensor, state: StreamState, bias: torch.Tensor | None,
               ) -> tuple[Sums, Sums]:
        """Back and front of these queries: the back ends with the newest key."""
        block = block_size(state.key.shape[2])
        assert block is not None
        return (self._between(query, state, bias, 0, self._newest + 1),
                over_suffixes(query, state.key, state.value, bias, block))

    def _extend(self, query: torch.Tensor, state: StreamState, bias: torch.Tensor | None) -> None:
        """The newest key joins the back, and the newest query takes the place of the oldest."""
        new = self._newest
        self._back = merge([self._back, self._between(query, state, bias, new, new + 1)])
        back, front = self._renew(query[:, :, new:new + 1], state, bias)
        for whole, row in zip((*self._back, *self._front), (*back, *front), strict=True):
            whole[:, :, new] = row[:, :, 0]

    def _older(self, query: torch.Tensor, state: StreamState, bias: torch.Tensor | None,
               ) -> list[Sums]:
        """Sums over the slots behind the newest, which hold the older keys."""
        slots = state.key.shape[2]
        boundary = -(-(self._newest + 1) // (slots // self._front.peak.shape[3]))
        start = boundary * (slots // self._front.peak.shape[3])
        parts = []
        if self._newest + 1 < start:
            parts.append(self._between(query, state, bias, self._newest + 1, start))
        if start < slots:
            parts.append(Sums(*(x[:, :, :, boundary] for x in self._front)))
        return parts

    @staticmethod
    def _between(query: torch.Tensor, state: StreamState, bias: torch.Tensor | None, start: int,
                 stop: int) -> Sums:
        return over(query, state.key[:, :, start:stop], state.value[:, :, start:stop],
                    None if bias is None else bias[..., start:stop])
