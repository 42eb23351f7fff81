"""Attention by torch's fused kernel, with the operator's edge cases kept.

The fused kernel gives zeros for a row that is masked everywhere, where the operator may ask for
nan, and it knows no fill but -inf. Both are settled by a test on the mask, not on the scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from bincompile.runtime.kernels import Call, Kernel, host_reason

# exp(score - maximum) is exactly 0 in float32 and float64 below this distance.
_UNDERFLOW = {torch.float32: 104.0, torch.float64: 746.0}
_PLAIN = ("scale", "fill", "causal", "masked_row", "need_weights", "groups")
# Facets that change single scores or probabilities, which the fused kernel does not show.
_FACETS = {"softcap": "capped scores", "gain": "scores multiplied by a tensor",
           "low": "clamped scores", "high": "clamped scores", "late_bias": "a bias after the mask",
           "sink": "a sink", "mix_before": "mixed heads", "mix_after": "mixed heads"}


def _supports(call: Call) -> str | None:
    if unknown := next((name for name in _PLAIN if not call.is_stored(name)), None):
        return f"{unknown} is known only at run time"
    if call.value("need_weights"):
        return "the weights are asked for, and the fused kernel does not give them"
    if given := next((name for name in _FACETS if call.value(name) is not None), None):
        return f"{_FACETS[given]}: the fused kernel has no such thing"
    query, bias = call.value("query"), call.value("bias")
    tensors = [call.value(name) for name in ("query", "key", "value", "bias", "mask")]
    if any(t is not None and t.ndim > 4 for t in tensors):
        return "a tensor of more than four dimensions"
    if any(t is not None and t.dtype != query.dtype for t in tensors[:4]):
        return "query, key, value and bias of different dtypes"
    if bias is not None and bias.ndim == 0:
        return "a bias of no dimensions"
    if call.value("masked_row") == "hidden" and call.value("fill") is None:
        return "probabilities hidden after the softmax, with masked scores of -inf"
    if call.value("fill") not in (None, -math.inf) and query.dtype not in _UNDERFLOW:
        return f"a finite fill with scores in {query.dtype}"
    return host_reason(call)


def _bind(call: Call) -> Callable[..., Any]:
    scale, fill, causal, masked_row, _, groups = (call.value(name) for name in _PLAIN)
    empty = torch.empty(0, dtype=call.value("query").dtype)
    repair = masked_row == "nan"
    fused = scale > 0  # torch masks before it scales, and -inf turns round or becomes nan
    finite_fill = call.value("mask") is not None and fill not in (None, -math.inf)

    def attend(query, key, value, bias, mask, *_: Any):
        if key.shape[-2] != value.shape[-2]:  # torch would read behind the values
            call.operator.check(query, key, value, bias, mask, scale)
        kept = _kept(query, key, mask, causal and not (fused and bias is None and mask is None))
        if finite_fill and not _fill_vanishes(query, key, bias, kept, scale, fill):
            return call.operator.reference(query, key, value, bias, mask, scale, fill, causal,
                                           masked_row, groups=groups)
        extra = _combined(bias, kept)
        out = _fused(query, key, value, extra, scale, causal and extra is None, groups)
        if repair and extra is not None and not finite_fill:
            some = _open(extra).any(-1, keepdim=True)
            if key.shape[-2] and not some.all():
                out = torch.where(some, out, math.nan)
        return out, empty

    return call.partial(attend)


def _open(extra: torch.Tensor) -> torch.Tensor:
    return extra if extra.dtype == torch.bool else extra != -math.inf


def _kept(query, key, mask, causal: bool) -> torch.Tensor | None:
    """The mask with the causal one in it; None where neither says anything."""
    if not causal:
        return mask
    past = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
    return past if mask is None else mask & past


def _combined(bias, kept) -> torch.Tensor | None:
    """One mask (bool) or one bias that holds everything that changes the scores."""
    if bias is None or kept is None:
        return kept if bias is None else bias
    return torch.where(kept, bias, -math.inf)


def _fused(query, key, value, extra, scale: float, causal: bool, groups: int) -> torch.Tensor:
    """The fused kernel, given what it is fast for: four dimensions with equal leading ones."""
    rank = max(t.ndim for t in (query, key, value, extra) if t is not None)
    query, key, value, extra = (_lift(t) for t in (query, key, value, extra))
    if query.shape[1] != groups * key.shape[1] or key.shape[:2] != value.shape[:2]:
        key, value = (t if groups == 1 else t.repeat_interleave(groups, -3) for t in (key, value))
        groups = 1
    lead = torch.broadcast_shapes(query.shape[:2], *(
        (t.shape[0], t.shape[1] * groups) for t in (key, value)),
        *([] if extra is None else [extra.shape[:2]]))
    query = query if query.shape[:2] == lead else query.expand(*lead, -1, -1)
    kept = (lead[0], lead[1] // groups)
    key, value = (t if t.shape[:2] == kept else t.expand(*kept, -1, -1) for t in (key, value))
    out = scaled_dot_product_attention(query, key, value, extra, is_causal=causal, scale=scale,
                                       enable_gqa=groups > 1)
    return out if rank == 4 else out.reshape(out.shape[4 - rank:])


def _lift(tensor: torch.Tensor | None) -> torch.Tensor | None:
    while tensor is not None and tensor.ndim < 4:
        tensor = tensor.unsqueeze(0)
    return tensor


def _fill_vanishes(query, key, bias, kept, scale: float, fill: float) -> bool:
    """Whether every filled score has weight 0: each row keeps a key, far above the fill.

    A score is at most features * scale * max|query| * max|key| + max|bias| in size; with an
    infinity or a nan in them the comparison is False.
    """
    if not query.numel() or not key.numel() or not kept.any(-1).all():
        return False
    sizes = [abs(t).amax().item() for t in (query, key)]
    bound = query.shape[-1] * abs(scale) * sizes[0] * sizes[1]
    if bias is not None:
        bound += bias.abs().amax().item()
    return -bound - fill > _UNDERFLOW[query.dtype]


attention = Kernel("torch-sdpa", "attention", _supports, _bind, priority=10)
