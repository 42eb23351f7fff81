"""Rows as 8-bit integers and a scale: the conventions that every int8 operator and kernel shares.

The scale of a row is its largest |x| over 127, and a number becomes x * (127 / largest), rounded
half to even. A row whose largest |x| is below `SMALLEST` counts as zero: scale 0 and zeros. A row
that holds nan or an infinity has scale nan and zeros, so that all of its results are nan.
"""

from __future__ import annotations

import torch

LEVELS = 127
SMALLEST = 2.0**-100  # above it, 127 / largest is a finite float32


def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers from -127 to 127 in the dtype of x (..., K), and the rows' scales (..., 1).

    Example:
        >>> numbers, scale = quantised(torch.tensor([[1.0, -0.5, 0.25]]))
        >>> numbers.tolist(), round(scale.item(), 6)
        ([[127.0, -64.0, 32.0]], 0.007874)
    """
    if not x.shape[-1]:
        return x, x.new_zeros(*x.shape[:-1], 1)
    largest = x.abs().amax(-1, keepdim=True)
    levels = torch.full_like(largest, LEVELS)  # torch divides a plain number by its reciprocal
    counts = (largest >= SMALLEST) & largest.isfinite()
    factor = torch.where(counts, levels / largest, 0.0).to(x.dtype)
    scale = torch.where(counts, largest / levels, 0.0).to(x.dtype)
    return ((x * factor).round().nan_to_num(0.0),
            torch.where(largest.isfinite(), scale, torch.nan).to(x.dtype))


def exact(features: int) -> torch.dtype:
    """The float dtype in which a sum of this many quantised numbers has no rounding."""
    return torch.float32 if features * LEVELS < 2**24 else torch.float64
