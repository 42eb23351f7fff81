"""Attention whose scores are masked and biased in every way that torchscale's layer knows."""

from __future__ import annotations

import math

import torch
from torch import fx
from torch.nn import functional as F

from bincompile.errors import InputError, InputTypeError

_Terms = tuple[torch.Tensor | None, torch.Tensor | None]  # what is added, and what is kept


@fx.wrap
def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
           key_padding_mask: torch.Tensor | None, attn_mask: torch.Tensor | None,
           rel_pos: torch.Tensor | None, scale: float, is_causal: bool, need_weights: bool,
           dropout: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    """softmax(query @ key^T * scale + terms) @ value, and the weights.

    Terms are added in float32 or wider. A query that sees no key has weights and a result of zero.

    Args:
        query: (B, H, T, D); it stands at the end of the S keys.
        key: (B, H, S, D).
        value: (B, H, S, D).
        key_padding_mask, attn_mask, rel_pos, is_causal: as `MultiheadAttention` takes them.
        scale: of the products.
        need_weights: return the weights, before dropout, as well.
        dropout: probability of dropping a weight.

    Returns:
        (B, H, T, D), and (B, H, T, S) or None.

    Raises:
        InputError: a mask of a wrong shape.
        InputTypeError: a mask of a wrong dtype.

    Source: torchscale's MultiheadAttention, whose bool attn_mask and unseeing rows are mended.

    Example:
        >>> query = torch.zeros(1, 1, 1, 2)
        >>> key, padding = torch.zeros(1, 1, 4, 2), torch.tensor([[0, 0, 0, 1]])
        >>> attend(query, key, key, padding, None, None, 1.0, False, True, 0.0)[1]
        tensor([[[[0.3333, 0.3333, 0.3333, 0.0000]]]])
    """
    bias, keep = _read_terms(query, key, key_padding_mask, attn_mask, rel_pos)
    past = _past(query, key) if is_causal else None
    if need_weights:
        return _attend_in_steps(query * scale, key, value, bias, keep, past, dropout)
    return _attend_fused(query, key, value, bias, keep, past, scale, dropout), None


def _attend_in_steps(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                     bias: torch.Tensor | None, keep: torch.Tensor | None,
                     past: torch.Tensor | None, dropout: float,
                     ) -> tuple[torch.Tensor, torch.Tensor]:
    scores = query @ key.mT
    if bias is not None:
        scores = scores + bias
    if past is not None:
        scores = scores.masked_fill(~past, -math.inf)
    if keep is None:
        weights = torch.softmax(scores, -1).to(value.dtype)
        return F.dropout(weights, dropout) @ value, weights
    sees = (keep if past is None else keep & past).any(-1, keepdim=True)
    # a query that sees nothing is left unmasked here, or its softmax and gradient were NaN
    weights = torch.softmax(scores.masked_fill(~keep & sees, -math.inf), -1).to(value.dtype)
    mixed = F.dropout(weights, dropout) @ value
    return mixed.masked_fill(~sees, 0.0), weights.masked_fill(~sees, 0.0)


def _attend_fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                  bias: torch.Tensor | None, keep: torch.Tensor | None,
                  past: torch.Tensor | None, scale: float, dropout: float) -> torch.Tensor:
    if keep is None and past is not None and query.shape[2] == key.shape[2]:
        return F.scaled_dot_product_attention(query, key, value, None, dropout, True, scale=scale)
    mask = past if keep is None else keep if past is None else keep & past
    if bias is not None and mask is not None:  # float32 with any query: -1e9 is no -inf
        mask = torch.where(mask, bias, -math.inf)
    return F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scale)


def _read_terms(query: torch.Tensor, key: torch.Tensor, key_padding_mask: torch.Tensor | None,
                attn_mask: torch.Tensor | None, rel_pos: torch.Tensor | None) -> _Terms:
    """All terms as (what is added, what is kept), each to be broadcast to (B, H, T, S), or None."""
    sizes = (*query.shape[:3], key.shape[2])
    found = [_read_padding(key_padding_mask, sizes),
             _read("attn_mask", attn_mask, sizes, per_sample=True),
             _read("rel_pos", rel_pos, sizes, per_sample=False)]
    bias: torch.Tensor | None = None
    keep: torch.Tensor | None = None
    for tensor in (t for t in found if t is not None):
        kept = tensor
        if tensor.dtype != torch.bool:
            wide = tensor.to(_wide(query))
            kept = wide != -math.inf
            added = torch.where(kept, wide, 0.0)
            bias = added if bias is None else bias + added
        keep = kept if keep is None else keep & kept
    return bias, keep


def _read_padding(mask: torch.Tensor | None, sizes: tuple[int, ...]) -> torch.Tensor | None:
    """A key_padding_mask, which is not 0 at padding, as bool (B or 1, 1, 1, S), True to keep."""
    if mask is None:
        return None
    name, (batch, _, _, keys) = "key_padding_mask", sizes
    if not isinstance(mask, torch.Tensor) or mask.dtype.is_complex:
        raise _wrong_type(name, mask, "bool, integer or float tensor, not 0 at padding")
    if mask.ndim != 2 or mask.shape[1] != keys or not _fits(mask.shape[0], batch):
        raise InputError(f"{name} of shape {tuple(mask.shape)}",
                         f"(B, S) or (1, S), S with the keys of the state; here "
                         f"(B, S) = ({batch}, {keys})", f"the {name}")
    return (mask == 0)[:, None, None]


def _read(name: str, mask: torch.Tensor | None, sizes: tuple[int, ...],
          per_sample: bool) -> torch.Tensor | None:
    """A mask or bias as 4-D: bool, True to keep, or float to add."""
    if mask is None:
        return None
    allowed = (torch.bool,) if per_sample else ()
    if not isinstance(mask, torch.Tensor) or not (
            mask.dtype.is_floating_point or mask.dtype in allowed):
        what = "bool tensor, True where a key is dropped, or a " if per_sample else ""
        raise _wrong_type(name, mask, what + "float tensor that is added to the scores")
    wide = _to_four_axes(mask, sizes, per_sample)
    if wide is None or wide.shape[3] != sizes[3] or not all(
            _fits(n, size) for n, size in zip(wide.shape[:3], sizes[:3], strict=True)):
        lead = "B" if per_sample else "H"
        raise InputError(f"{name} of shape {tuple(mask.shape)}",
                         f"(T, S), ({lead}, T, S), (B * H, T, S) or (B, H, T, S), with 1 for any "
                         "of B, H and T, and S with the keys of the state; here (B, H, T, S) = "
                         f"{tuple(map(str, sizes))}", f"the {name}")
    return ~wide if wide.dtype == torch.bool else wide


def _to_four_axes(mask: torch.Tensor, sizes: tuple[int, ...],
                  per_sample: bool) -> torch.Tensor | None:
    batch, heads = sizes[:2]
    if mask.ndim == 2:
        return mask[None, None]
    if mask.ndim == 4:
        return mask
    if mask.ndim != 3:
        return None
    if mask.shape[0] == batch * heads:  # asked first, so that a graph captured so takes batch 1 too
        return mask.unflatten(0, (batch, heads))
    return mask[:, None] if per_sample else mask[None]


def _fits(size: int, wanted: int) -> bool:
    return size == 1 or size == wanted


def _wide(scores: torch.Tensor) -> torch.dtype:
    return torch.float64 if scores.dtype == torch.float64 else torch.float32


def _past(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """(T, S) bool: key j is not later than query i, which stands at S - T + i."""
    queries, keys = query.shape[2], key.shape[2]
    index = torch.arange(keys, device=query.device)
    return index <= torch.arange(keys - queries, keys, device=query.device)[:, None]


def _wrong_type(name: str, mask: object, allowed: str) -> InputTypeError:
    found = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
    return InputTypeError(f"{name} of {found}", f"a {allowed}", f"the {name}")
