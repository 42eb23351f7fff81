"""Attention of a stream's newest token from its definition, one score at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from stream_layer_formulas import ticks


def stream_attention(query, key, value, keys, values, rows, clock, scale, window, rate, delay,
                     softcap, sink, extra_keys, extra_values, distance_bias, slopes):
    (m, heads, _), groups, slots = query.shape, key.shape[1], values.shape[2]
    out = torch.zeros(m, heads, value.shape[2], dtype=torch.float64)
    for place, row, n in ticks(rows, clock, rate, delay):
        keys[row, :, n % slots // 16, :, n % slots % 16] = key[place]
        values[row, :, n % slots] = value[place]
        first = max(0, n + 1 - (slots if window is None else window))
        for head in range(heads if n >= 0 else 0):
            group, scores, shown = head // (heads // groups), [], []
            for j in range(first, n + 1):
                score = query[place, head] @ keys[row, group, j % slots // 16, :, j % 16] * scale
                score = score if softcap is None else softcap * (score / softcap).tanh()
                if distance_bias is not None:
                    table = distance_bias.expand(heads, -1)[head]
                    score = score + table[min(n - j, len(table) - 1)]
                scores.append(score if slopes is None else score - slopes[head] * (n - j))
                shown.append(values[row, group, j % slots])
            for x in range(0 if extra_keys is None else extra_keys.shape[1]):
                score = query[place, head] @ extra_keys[group, x] * scale
                scores.append(score if softcap is None else softcap * (score / softcap).tanh())
                shown.append(extra_values[group, x])
            top = max([*scores, *([] if sink is None else [sink[head]])],
                      key=lambda s: math.inf if s.isnan() else s)
            powers = torch.stack([(score - top).exp() for score in scores])
            total = powers.sum() + (0.0 if sink is None else (sink[head] - top).exp())
            out[place, head] = (powers / total) @ torch.stack(shown)
    return out


ATTENTIONS: dict[str, Callable[..., Any]] = {"stream_attention": stream_attention}
