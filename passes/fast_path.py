"""What dynamo records as one call, in plain operators: torch.nn's fast path, and autocast.

The formulas are those of nn.TransformerEncoderLayer and nn.MultiheadAttention in eval mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

Tensor = torch.Tensor
PATTERN, PADDING = 0, 1  # kinds of masks: (L, L), (B, L); any other is (B, heads or 1, L, L)


def attention(query: Tensor, key: Tensor, value: Tensor, embed_dim: int, num_head: int,
              qkv_weight: Tensor, qkv_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor,
              mask: Tensor | None = None, need_weights: bool = True,
              average_attn_weights: bool = True,
              mask_type: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Self-attention (B, L, E) and its probabilities, None unless they are asked for."""
    batch, length, _ = query.shape
    mixed = functional.linear(query, qkv_weight, qkv_bias)
    q, k, v = mixed.view(batch, length, 3, num_head, -1).permute(2, 0, 3, 1, 4).unbind(0)
    scores = (q * (embed_dim // num_head) ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(_broadcast(mask.to(torch.bool), mask_type), float("-inf"))
    weights = scores.softmax(-1)
    merged = (weights @ v).transpose(1, 2).reshape(batch, length, embed_dim)
    shown = (weights.mean(1) if average_attn_weights else weights) if need_weights else None
    return functional.linear(merged, proj_weight, proj_bias), shown


def _broadcast(mask: Tensor, kind: int | None) -> Tensor:
    if kind == PADDING:
        return mask[:, None, None, :]
    return mask[None, None] if kind == PATTERN else mask


def encoder_layer(src: Tensor, embed_dim: int, num_heads: int, qkv_weight: Tensor,
                  qkv_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor, use_gelu: bool,
                  norm_first: bool, eps: float, norm_weight_1: Tensor, norm_bias_1: Tensor,
                  norm_weight_2: Tensor, norm_bias_2: Tensor, ffn_weight_1: Tensor,
                  ffn_bias_1: Tensor, ffn_weight_2: Tensor, ffn_bias_2: Tensor,
                  mask: Tensor | None = None, mask_type: int | None = None) -> Tensor:
    """One layer of an encoder on (B, L, E)."""
    shape = (embed_dim,)
    activation = functional.gelu if use_gelu else functional.relu

    def attend(x: Tensor) -> Tensor:
        return attention(x, x, x, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight,
                         proj_bias, mask, False, True, mask_type)[0]

    def feed(x: Tensor) -> Tensor:
        hidden = activation(functional.linear(x, ffn_weight_1, ffn_bias_1))
        return functional.linear(hidden, ffn_weight_2, ffn_bias_2)

    def first(x: Tensor) -> Tensor:
        return functional.layer_norm(x, shape, norm_weight_1, norm_bias_1, eps)

    def second(x: Tensor) -> Tensor:
        return functional.layer_norm(x, shape, norm_weight_2, norm_bias_2, eps)

    if norm_first:
        src = src + attend(first(src))
        return src + feed(second(src))
    src = first(src + attend(src))
    return second(src + feed(src))


def enter_autocast(*args: Any) -> torch.autocast:
    """Begin what dynamo recorded as the start of a `with torch.autocast(...)`."""
    context = torch.autocast(*args)
    context.__enter__()
    return context


def exit_autocast(context: torch.autocast) -> None:
    """End it."""
    context.__exit__(None, None, None)


PLAIN: dict[Any, Callable[..., Any]] = {
    torch.amp.autocast_mode._enter_autocast: enter_autocast,
    torch.amp.autocast_mode._exit_autocast: exit_autocast,
    torch._transformer_encoder_layer_fwd: encoder_layer,
    torch._native_multi_head_attention: attention,
}
