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


def stream_window(token, ring, rows, clock, window, rate, delay, fill, apart=1, back=0,
                  last=False):
    out = []
    for place, row, n in ticks(rows, clock, rate, delay):
        ring[row, n % ring.shape[1]] = token[place]
        wanted = [n - back - apart * age for age in reversed(range(window))]
        entries = [ring[row, i % ring.shape[1]] if i >= 0 else torch.full_like(token[place], fill)
                   for i in wanted]
        out.append(torch.stack(entries, -1 if last else 0))
    shape = (*token.shape[1:], window) if last else (window, *token.shape[1:])
    return stacked(out, token.new_empty(0, *shape))


def stream_shift(token, ring, rows, clock, by, rate, delay, fill):
    return stream_window(token, ring, rows, clock, 1, rate, delay, fill, back=by)[:, 0]


def stream_depthwise(token, ring, rows, clock, weight, bias, rate, delay, fill, apart, back):
    read = stream_window(token, ring, rows, clock, len(weight), rate, delay, fill, apart, back)
    out = torch.einsum("mkf,kf->mf", read, weight)
    return out if bias is None else out + bias


JOIN: dict[str, Callable[[Any, Any], torch.Tensor]] = {
    "sum": lambda a, b: a + b, "mean": lambda a, b: a + b, "prod": lambda a, b: a * b,
    "max": lambda a, b: torch.where(a.isnan() | (a > b), a, b),
    "min": lambda a, b: torch.where(a.isnan() | (a < b), a, b),
    "logsumexp": lambda a, b: torch.stack([a, b]).logsumexp(0)}


def stream_scan(token, total, rows, clock, kind, rate, delay):
    out = []
    for place, row, n in ticks(rows, clock, rate, delay):
        value = JOIN[kind](total[row, (n - 1) % 2], token[place]) if n > 0 else token[place]
        total[row, n % 2] = value
        out.append(value / max(n + 1, 1) if kind == "mean" else value)
    return stacked(out, token)


def stream_pool(token, ring, ends, begin, rows, clock, window, kind, rate, delay):
    out = []
    for place, row, n in ticks(rows, clock, rate, delay):
        if n % window == 0 and n > 0:
            for at in reversed(range(1, window)):
                ends[row, at] = ring[row, at] if at + 1 == window else (
                    JOIN[kind](ends[row, at + 1], ring[row, at]))
        ring[row, n % window] = token[place]
        first = token[place] if n % window == 0 or n <= 0 else (
            JOIN[kind](begin[row, (n - 1) % 2], token[place]))
        begin[row, n % 2] = first
        whole = n >= window and (n + 1) % window
        total = JOIN[kind](ends[row, (n + 1) % window], first) if whole else first
        out.append(total / min(max(n + 1, 1), window) if kind == "mean" else total)
    return stacked(out, token)


def memory(state, row, n, initial, place):
    """What a recurrent layer remembers of the step before."""
    if n > 0:
        return state[row, (n - 1) % 2]
    return torch.zeros_like(state[row, 0]) if initial is None else initial[place]


def affine(weight, x, bias):
    return weight @ x + (0 if bias is None else bias)


def stream_gru(token, hidden, rows, clock, w_ih, w_hh, b_ih, b_hh, initial, rate, delay):
    out = []
    for place, row, n in ticks(rows, clock, rate, delay):
        h = memory(hidden, row, n, initial, place)
        a, b = affine(w_ih, token[place], b_ih).view(3, -1), affine(w_hh, h, b_hh).view(3, -1)
        r, z = (a[:2] + b[:2]).sigmoid()
        hidden[row, n % 2] = (1 - z) * (a[2] + r * b[2]).tanh() + z * h
        out.append(hidden[row, n % 2].clone())
    return stacked(out, token.new_empty(0, hidden.shape[-1]))


def stream_rnn(token, hidden, rows, clock, w_ih, w_hh, b_ih, b_hh, initial, kind, rate, delay):
    out = []
    for place, row, n in ticks(rows, clock, rate, delay):
        x = affine(w_ih, token[place], b_ih) + affine(
            w_hh, memory(hidden, row, n, initial, place), b_hh)
        hidden[row, n % 2] = x.tanh() if kind == "tanh" else x.clamp(min=0)
        out.append(hidden[row, n % 2].clone())
    return stacked(out, token.new_empty(0, hidden.shape[-1]))


def stream_lstm(token, hidden, cell, rows, clock, w_ih, w_hh, b_ih, b_hh, w_hr, first_hidden,
                first_cell, rate, delay):
    out = []
    for place, row, n in ticks(rows, clock, rate, delay):
        h, c = memory(hidden, row, n, first_hidden, place), memory(cell, row, n, first_cell, place)
        i, f, g, o = (affine(w_ih, token[place], b_ih) + affine(w_hh, h, b_hh)).view(4, -1)
        cell[row, n % 2] = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * cell[row, n % 2].tanh()
        hidden[row, n % 2] = h if w_hr is None else w_hr @ h
        out.append((hidden[row, n % 2].clone(), cell[row, n % 2].clone()))
    return (stacked([h for h, _ in out], token.new_empty(0, hidden.shape[-1])),
            stacked([c for _, c in out], token.new_empty(0, cell.shape[-1])))


LAYERS: dict[str, Callable[..., Any]] = {f.__name__: f for f in (
    stream_index, stream_filled, stream_window, stream_shift, stream_depthwise, stream_scan,
    stream_pool, stream_gru, stream_rnn, stream_lstm)}
