"""Rotary positions with a decay: what a score gains depends on the distance of its tokens only."""

from __future__ import annotations

import math

import torch
from torch import fx, nn

from bincompile.errors import ConfigError, InputError
from bincompile.nn import arguments

_LOWEST = 0.4  # the slowest decay is this share of the way to none


class XPOS(nn.Module):
    """Turns and scales pairs of features by their token's position.

    Position p of n turns pair j by the angle p * 10000^(-j / (head_dim / 2)) and scales it by
    scale[j]^((p - ceil(n / 2)) / scale_base), keys by the inverse; in the product of a query and a
    key the middle of the sequence cancels, and what is left decays with their distance.

    Args:
        head_dim: features of one head, an even number.
        scale_base: tokens over which the scale acts once; more is a slower decay.

    Raises:
        ConfigError (a ValueError): an odd head_dim, or a scale_base that is not positive.

    Source: A Length-Extrapolatable Transformer (arXiv:2212.10554). The buffer `scale`
    (head_dim / 2,) is that of torchscale's XPOS.

    Example:
        >>> positions, tokens = XPOS(head_dim=4), torch.ones(1, 6, 4)
        >>> queries, keys = positions(tokens), positions(tokens, downscale=True)
        >>> scores = queries @ keys.mT  # the same at the same distance
        >>> torch.allclose(scores[0, 3, 1], scores[0, 5, 3])
        True
    """

    def __init__(self, head_dim: int, scale_base: float = 512) -> None:
        super().__init__()
        if arguments.size("XPOS", "head_dim", head_dim) % 2:
            raise ConfigError(f"XPOS(head_dim={head_dim})",
                              "an even head_dim: positions turn pairs of features",
                              "embed_dim or num_heads, or xpos_rel_pos=False")
        if isinstance(scale_base, bool) or not isinstance(scale_base, int | float) \
                or not 0 < scale_base < math.inf:
            raise ConfigError(f"XPOS(scale_base={scale_base!r})", "a number above 0",
                              "the xpos_scale_base argument")
        self.head_dim, self.scale_base = head_dim, scale_base
        decays = torch.arange(0, head_dim, 2) + _LOWEST * head_dim
        self.register_buffer("scale", decays / ((1 + _LOWEST) * head_dim))

    def forward(self, x: torch.Tensor, offset: int = 0, downscale: bool = False) -> torch.Tensor:
        """The tokens x (..., L, head_dim) at positions offset to offset + L - 1 of offset + L.

        Args:
            x: queries or keys; they are computed in float32 or wider and returned in x's dtype.
            offset: tokens before the first of x.
            downscale: scale by the inverse, as keys are.

        Raises:
            InputError: more tokens than x's dtype can scale.
        """
        return _turned(x, self.scale, self.scale_base, offset, downscale)

    def extra_repr(self) -> str:
        """The sizes."""
        return f"head_dim={self.head_dim}, scale_base={self.scale_base}"


def max_tokens(scale_base: float, dtype: torch.dtype) -> int:
    """The longest sequence whose scales, with room for the features, fit the dtype."""
    room = math.log(torch.finfo(dtype).max) - math.log(256)
    return math.floor(2 * scale_base * room / math.log((1 + _LOWEST) / _LOWEST))


@fx.wrap
def _turned(x: torch.Tensor, scale: torch.Tensor, scale_base: float, offset: int,
            downscale: bool) -> torch.Tensor:
    length, limit = x.shape[-2] + offset, max_tokens(scale_base, x.dtype)
    if length > limit:
        raise InputError(f"{length} tokens with xpos_scale_base={scale_base}",
                         f"at most {limit} in {x.dtype}: their scales overflow beyond",
                         "the number of tokens, or xpos_scale_base")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    index = torch.arange(offset, length, device=x.device).to(wide)[:, None]
    pairs = torch.arange(scale.shape[0], device=x.device).to(wide)
    angles = index * 10000.0 ** (-pairs / scale.shape[0])
    exponents = (index - (length + 1) // 2) / scale_base
    factors = scale.to(wide) ** (-exponents if downscale else exponents)
    sine, cosine = angles.sin() * factors, angles.cos() * factors
    even, odd = x[..., ::2].to(wide), x[..., 1::2].to(wide)
    turned = torch.stack((even * cosine - odd * sine, odd * cosine + even * sine), -1)
    return turned.flatten(-2).to(x.dtype)
