"""Rows as sums of binary bases: w is about a1 s1 + ... + ak sk, each s a row of signs.

A table of k bases is uint8 (V, k * ceil(D/8)): the packed signs of each base after the other, so
that a row is read in one piece. Its scales are (V,) for one base, else (V, k).
"""

from __future__ import annotations

import torch

from bincompile.errors import InputError
from bincompile.ops import bits

MOST = 4  # bases


def residual(x: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Signs (..., k, D) and scales (..., k): each base is the sign and mean |.| of what is left.

    Every step is in the dtype of x and rounds the same wherever the row stands.

    Example:
        >>> residual(torch.tensor([[3.0, -1.0]]), 2)[1].tolist()
        [[2.0, 1.0]]
    """
    signs, scales, rest = [], [], x
    for _ in range(count):
        scale, sign = bits.row_scale(rest).to(x.dtype), bits.sign(rest)
        rest = rest - scale * sign
        signs.append(sign)
        scales.append(scale)
    return torch.stack(signs, -2), torch.cat(scales, -1)


def combine(signs: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The sum of scale * signs, base by base in order: (..., k, D) and (..., k) to (..., D)."""
    out = signs[..., 0, :] * scales[..., :1]
    for base in range(1, scales.shape[-1]):
        out = out + signs[..., base, :] * scales[..., base:base + 1]
    return out


def fitted(x: torch.Tensor, count: int, rounds: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Like `residual`, refined: scales by least squares, then each number to its nearest level.

    With one base the residual form is the best one already.

    Source: alternating multi-bit quantisation, arXiv:1802.00150.
    """
    signs, scales = residual(x, count)
    codes = bits.unpack(torch.arange(2**count, dtype=torch.uint8, device=x.device).unsqueeze(-1),
                        count, x.dtype)
    unit = 1e-9 * torch.eye(count, dtype=torch.float64, device=x.device)  # rows of equal bases
    for _ in range(rounds if count > 1 else 0):
        gram = (signs @ signs.mT).double() + unit
        scales = torch.linalg.solve(gram, (signs @ x.unsqueeze(-1)).squeeze(-1).double())
        scales = scales.to(x.dtype)
        signs = codes[_nearest(x, scales @ codes.mT)].mT
    return signs, scales


def _nearest(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Which of its row's levels (..., n) each number of x (..., D) is closest to."""
    best = torch.zeros(x.shape, dtype=torch.int64, device=x.device)
    least = (x - levels[..., :1]).abs()
    for level in range(1, levels.shape[-1]):
        distance = (x - levels[..., level:level + 1]).abs()
        best = torch.where(distance < least, level, best)
        least = torch.minimum(distance, least)
    return best


def join(signs: torch.Tensor) -> torch.Tensor:
    """Signs (..., k, D) packed, one base after the other: uint8 (..., k * ceil(D/8))."""
    return bits.pack(signs).flatten(-2)


def split(packed: torch.Tensor, count: int, features: int, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `join`: (..., k, D) of -1 and +1."""
    return bits.unpack(packed.unflatten(-1, (count, -1)), features, dtype)


def count_of(row_scale: torch.Tensor) -> int:
    """How many bases scales (V,) or (V, k) belong to."""
    return 1 if row_scale.ndim == 1 else row_scale.shape[1]


def check_table(table: torch.Tensor, row_scale: torch.Tensor, features: int) -> None:
    """Raise unless the table is packed for this many columns, with a scale for each row."""
    count = count_of(row_scale) if row_scale.ndim in (1, 2) else 0
    rows = table.shape[:1]
    sizes = [(*rows,), *((*rows, k) for k in range(2, MOST + 1))]
    if tuple(row_scale.shape) not in sizes or not row_scale.dtype.is_floating_point:
        raise InputError(f"row_scale {row_scale.dtype} of shape {tuple(row_scale.shape)}",
                         f"a float dtype and one of {sizes}", "the row_scale")
    width = count * bits.packed_width(features)
    if table.dtype != torch.uint8 or table.ndim != 2 or table.shape[1] != width:
        raise InputError(f"packed table {table.dtype} of shape {tuple(table.shape)}",
                         f"uint8 (num_embeddings, {width}) for {features} columns",
                         "pack the table with bincompile.ops.bits.pack")
