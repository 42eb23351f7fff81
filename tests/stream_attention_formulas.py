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


def stream_binary_attention(query, key, value, key_bits, key_scales, held, rows, clock, threshold,
                            scale, window, rate, delay, probabilities, values):
    """Its keys are taken from their words bit by bit, and each score is a sum of signs."""
    (m, heads, _), slots = query.shape, held.shape[2]
    out = torch.zeros(m, heads, value.shape[2], dtype=torch.float64)
    for place, row, n in ticks(rows, clock, rate, delay):
        tile, lane = divmod(n % slots, 16)
        first = max(0, n + 1 - (slots if window is None else window))
        for head in range(heads):
            negative = [not x >= 0 for x in key[place, head].tolist()]
            for word in range(key_bits.shape[3]):
                bits = negative[word * 32:word * 32 + 32]
                whole = sum(bit << i for i, bit in enumerate(bits))
                key_bits[row, head, tile, word, lane] = whole - (whole >> 31 << 32)
            key_scales[row, head, tile, lane] = key[place, head].abs().mean()
            shown = value[place, head]
            held[row, head, n % slots] = shown if values == "float" else torch.where(
                shown >= 0, 1.0, -1.0) * shown.abs().mean()
            scores = []
            for j in range(first, n + 1):
                tile_j, lane_j = divmod(j % slots, 16)
                dot = sum((1 if x >= 0 else -1) * (
                    -1 if int(key_bits[row, head, tile_j, k // 32, lane_j]) >> k % 32 & 1 else 1)
                    for k, x in enumerate(query[place, head].tolist()))
                scores.append(dot * query[place, head].abs().mean() * scale
                              * key_scales[row, head, tile_j, lane_j])
            if n < 0:
                continue
            powers = torch.stack(scores)
            powers = (powers - powers.max()).exp()
            counts = {"float": lambda p=powers: p, "int8": lambda p=powers: (127 * p).round(),
                      "binary": lambda p=powers, h=head: (p >= min(threshold[h], 1)).double()}
            counted = counts[probabilities]()
            old = torch.stack([held[row, head, j % slots] for j in range(first, n + 1)])
            out[place, head] = counted / counted.sum() @ old
    return out


ATTENTIONS: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (stream_attention, stream_binary_attention)}
