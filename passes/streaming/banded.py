"""Attention over a whole sequence within a band: the reference of a stream's attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bincompile.passes.streaming.attention_forms import computed, hidden_too
from bincompile.passes.streaming.distances import Sight

BLOCK = 256  # queries at once: no matrix of all tokens by all tokens is made
ROWS = ("sink",)  # arguments with an axis of queries
PAIRS = ("bias", "mask", "late_bias", "gain")  # and such with one of keys too


def banded(bound: Mapping[str, Any], sight: Sight) -> tuple[torch.Tensor, torch.Tensor]:
    """An attention whose queries see the tokens in a band alone.

    Args:
        bound: its arguments, by name, over a whole sequence.
        sight: the band.

    Example:
        >>> from bincompile.ops.attention import attention
        >>> q = torch.randn(1, 5, 4)
        >>> given = attention.bind((q, q, q, None, None, 0.5), {"causal": True})
        >>> torch.equal(banded(given, Sight(0))[0], q)
        True
    """
    query, tokens = bound["query"], bound["key"].shape[-2]
    parts = []
    for start in range(0, max(tokens, 1), BLOCK):
        stop = min(start + BLOCK, tokens)
        first = 0 if sight.before is None else max(0, start - sight.before)
        last = min(tokens, stop + sight.ahead)
        distance = torch.arange(start, stop)[:, None] - torch.arange(first, last)
        seen = distance >= -sight.ahead
        if sight.before is not None:
            seen = seen & (distance <= sight.before)
        given = {name: _cut(name, value, (start, stop), (first, last), tokens)
                 for name, value in bound.items()}
        parts.append(computed(hidden_too(given, seen))[0])
    return torch.cat(parts, -2), query.new_empty(0)


def _cut(name: str, value: Any, rows: tuple[int, int], keys: tuple[int, int],
         tokens: int) -> Any:
    """An argument for some queries and some keys."""
    if not isinstance(value, torch.Tensor):
        return value
    if name in ("key", "value"):
        return value[..., keys[0]:keys[1], :]
    if name in ("query", *ROWS, *PAIRS) and value.ndim > 1 and value.shape[-2] == tokens:
        value = value[..., rows[0]:rows[1], :]
    if name in PAIRS and value.ndim > 0 and value.shape[-1] == tokens:
        value = value[..., keys[0]:keys[1]]
    return value
