"""Suite `layers`: a compiled BMHA against nn.MultiheadAttention, eager and under torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from bincompile.api import optimize
from bincompile.nn import BMHA
from bincompile.suites.peers import peers
from bincompile.suites.rows import EAGER, INDUCTOR, OURS, Case, Row, row, times_of

WIDTH, HEADS = 768, 12
BEST = "best peer"
# What attention is made of, and the numbers of tokens.
FORMS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "float attention": ({"attention": "float"}, (128,)),
    "binary attention": ({"attention": "binary", "probabilities": "uint8", "values": "binary"},
                         (128, 512))}


def cases() -> list[Case]:
    """One case for each number of tokens."""
    lengths = sorted({length for _, found in FORMS.values() for length in found})
    return [Case(f"BMHA, {length} tokens", partial(_bmha, length)) for length in lengths]


class Binary(nn.Module):
    """A BMHA over its own input, without the weights."""

    def __init__(self, **form: Any) -> None:
        super().__init__()
        self.attention = BMHA(WIDTH, WIDTH, HEADS, dropout=0.0, **form)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, WIDTH) to the same shape."""
        return self.attention(x, need_weights=False)[0]


class Float(nn.Module):
    """nn.MultiheadAttention in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, WIDTH) to the same shape."""
        return self.attention(x, x, x, need_weights=False)[0]


def _bmha(length: int) -> Iterator[Row]:
    x = torch.randn(1, length, WIDTH)
    ours = {name: partial(optimize(Binary(**form).eval(), (x,)), x)
            for name, (form, lengths) in FORMS.items() if length in lengths}
    times = times_of(ours | peers(Float().eval(), x, half=False, int8=False))
    for name in ours:
        found = row(f"BMHA {WIDTH}, {HEADS} heads, {length} tokens, {name}", times, ours=name,
                    others=set(ours) - {name})
        best = min(found["ms"].get(peer, float("inf")) for peer in (EAGER, INDUCTOR))
        found["speedup"][BEST] = best / found["ms"][OURS]
        yield found
