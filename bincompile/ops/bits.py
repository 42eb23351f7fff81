"""Signs, packing and scales: the conventions that every binary operator shares.

sign(x) is +1 where x >= 0 (so -0.0 is +1) and -1 elsewhere (so NaN is -1). Bits are packed along
the last axis, least significant bit first, 8 to a uint8; bit 1 means +1; padding bits are 0.
"""

from __future__ import annotations

import torch

LANES = 16  # partial sums of a row scale; kernels keep the same ones, so scales agree bit for bit


def sign(x: torch.Tensor) -> torch.Tensor:
    """+1 where x >= 0, else -1, in the dtype of x."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def packed_width(features: int) -> int:
    """Bytes that hold this many bits."""
    return (features + 7) // 8


def pack(x: torch.Tensor) -> torch.Tensor:
    """The signs of x (..., K) as uint8 (..., ceil(K/8)).

    Example:
        >>> pack(torch.tensor([[1.0, -1.0, 0.0]])).tolist()
        [[5]]
    """
    bits = torch.nn.functional.pad((x >= 0).to(torch.uint8), (0, -x.shape[-1] % 8))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=x.device)
    return (bits.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)


def unpack(packed: torch.Tensor, features: int, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `pack`: uint8 (..., ceil(K/8)) as -1 and +1 (..., K).

    Example:
        >>> unpack(torch.tensor([[5]], dtype=torch.uint8), 3, torch.float32).tolist()
        [[1.0, -1.0, 1.0]]
    """
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    codes = torch.arange(256, dtype=torch.uint8, device=packed.device).unsqueeze(-1)
    signs = ((codes >> shifts) & 1).to(dtype) * 2 - 1  # of every byte: looked up, not computed
    return torch.embedding(signs, packed.int()).flatten(-2)[..., :features]


def row_scale(x: torch.Tensor) -> torch.Tensor:
    """Mean |x| of each row: (..., K) -> (..., 1), in float32 or float64.

    The order of additions is part of the definition: lane l sums the elements k with
    k % 16 == l in increasing k, then the lanes are halved (8, 4, 2, 1) and divided by K.
    """
    features = x.shape[-1]
    wide = x.abs().to(torch.promote_types(x.dtype, torch.float32))
    parts = torch.nn.functional.pad(wide, (0, -features % LANES)).unflatten(-1, (-1, LANES))
    lanes = parts[..., 0, :]
    for part in parts.unbind(-2)[1:]:
        lanes = lanes + part
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes / features
