"""Masks of attention as one float tensor that is added to the scores."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from bincompile.errors import InputError, InputTypeError


def additive(name: str, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bool mask (True: ignore) or a float mask (added), as what is added."""
    if not isinstance(mask, torch.Tensor) or not (
            mask.dtype == torch.bool or mask.dtype.is_floating_point):
        found = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise InputTypeError(f"{name} of {found}", "a bool tensor, True where a key is ignored, or "
                             "a float tensor that is added to the scores", f"the {name}")
    if mask.dtype == torch.bool:
        return torch.where(mask, -math.inf, torch.zeros((), dtype=dtype, device=mask.device))
    return mask.to(dtype)


def of_queries(mask: torch.Tensor, batch: int, heads: int, queries: int, keys: int,
               dtype: torch.dtype) -> torch.Tensor:
    """attn_mask (keys,), (L, keys) or (batch * heads, L, keys), L queries or 1, as 4-D bias."""
    bias = additive("attn_mask", mask, dtype)
    if bias.ndim == 1:
        bias = bias[None]
    fits = bias.ndim in (2, 3) and bias.shape[-1] == keys and (
        bias.shape[-2] == queries or bias.shape[-2] == 1) and (
        bias.ndim == 2 or bias.shape[0] == batch * heads)
    if not fits:
        raise InputError(f"attn_mask of shape {tuple(mask.shape)}",
                         f"({keys},), ({queries}, {keys}) or ({batch * heads}, {queries}, {keys}), "
                         "with 1 for a row that serves every query", "the attn_mask")
    return bias[None, None] if bias.ndim == 2 else bias.unflatten(0, (batch, heads))


def of_keys(mask: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """key_padding_mask of exactly this shape, as what is added."""
    bias = additive("key_padding_mask", mask, dtype)
    if tuple(bias.shape) != shape:
        raise InputError(f"key_padding_mask of shape {tuple(mask.shape)}", f"{shape}",
                         "the key_padding_mask")
    return bias


def of_past(queries: int, keys: int, like: torch.Tensor) -> torch.Tensor:
    """(queries, keys): key j is kept where j <= i."""
    return like.new_full((queries, keys), -math.inf).triu(1)


def add(*parts: torch.Tensor | None) -> torch.Tensor | None:
    """The sum of those that are not None."""
    given = [p for p in parts if p is not None]
    return sum(given[1:], given[0]) if given else None


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
           bias: torch.Tensor | None, dropout: float = 0.0,
           sinks: tuple[torch.Tensor, torch.Tensor] | None = None,
           ) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(query @ key^T / sqrt(D) + bias) @ value, and the weights; unseeing rows are 0.

    `sinks` are further keys and values (1, H, X, D) that every query sees, whatever the bias; they
    are not joined to the others, so a window is not copied.
    """
    query = query * query.shape[-1]**-0.5
    scores, sees = query @ key.mT, None
    if bias is not None:
        if sinks is None:
            bias, sees = _seeing(bias)
        scores = scores + bias
    if sinks is not None:
        scores = torch.cat([scores, query @ sinks[0].mT], -1)
    weights = torch.softmax(scores, -1)
    if dropout:
        weights = F.dropout(weights, dropout)
    if sinks is None:
        mixed = weights @ value
    else:
        ours, theirs = weights.split([key.shape[-2], sinks[0].shape[-2]], -1)
        mixed = ours @ value + theirs @ sinks[1]
    if sees is None:
        return mixed, weights
    return mixed.masked_fill(~sees, 0.0), weights.masked_fill(~sees, 0.0)


def attend_fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                 bias: torch.Tensor | None, dropout: float = 0.0) -> torch.Tensor:
    """What `attend` mixes, by torch's fused operator, which keeps no weights."""
    if bias is None:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    bias, sees = _seeing(bias)
    mixed = F.scaled_dot_product_attention(query, key, value, bias, dropout)
    return mixed.masked_fill(~sees, 0.0)


def _seeing(bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bias with no row of -inf alone, whose softmax were NaN, and where rows see a key."""
    sees = (bias != -math.inf).any(-1, keepdim=True)
    return torch.where(sees, bias, 0.0), sees
