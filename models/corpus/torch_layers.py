"""torch's own attention layers, in every form of their options and masks."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bincompile.models.corpus import Call, Case
from bincompile.models.corpus.parts import HEADS, WIDTH, kept, two_lengths

BATCHED = {"batch_first": True}
Inputs = Callable[[int, int], Call]
LAYER: dict[str, Any] = {"d_model": WIDTH, "nhead": HEADS, "dim_feedforward": 40}


def _attention(**options: Any) -> nn.Module:
    return nn.MultiheadAttention(WIDTH, HEADS, **{**BATCHED, **options}).eval()


def _itself(batch: int, length: int, **options: Any) -> Call:
    x = torch.randn(batch, length, WIDTH)
    return (x, x, x), options


def _time_first(batch: int, length: int) -> Call:
    return _itself(length, batch)


def _unbatched(batch: int, length: int) -> Call:
    x = torch.randn(length, WIDTH)
    return (x, x, x), {}


def _bool_mask(batch: int, length: int) -> Call:
    return _itself(batch, length, attn_mask=~_lower(length))


def _float_mask(batch: int, length: int) -> Call:
    mask = torch.zeros(length, length).masked_fill(~_lower(length), -math.inf)
    return _itself(batch, length, attn_mask=mask, need_weights=False)


def _mask_of_each_head(batch: int, length: int) -> Call:
    return _itself(batch, length, attn_mask=torch.randn(batch * HEADS, length, length))


def _padding(batch: int, length: int, **options: Any) -> Call:
    return _itself(batch, length, key_padding_mask=~kept(batch, length), **options)


def _padding_and_mask(batch: int, length: int) -> Call:
    return _padding(batch, length, attn_mask=~_lower(length), need_weights=False)


def _causal_hint(batch: int, length: int) -> Call:
    return _itself(batch, length, attn_mask=~_lower(length), is_causal=True, need_weights=False)


def _other_widths(batch: int, length: int) -> Call:
    return (torch.randn(batch, length, WIDTH), torch.randn(batch, length + 2, 12),
            torch.randn(batch, length + 2, 20)), {"need_weights": False}


def _memory(batch: int, length: int) -> Call:
    (x, other), _ = two_lengths(batch, length)
    return (x, other, other), {}


def _lower(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def _source(batch: int, length: int, **options: Any) -> Call:
    return (torch.randn(batch, length, WIDTH),), options


def _source_mask(batch: int, length: int) -> Call:
    return _source(batch, length, mask=~_lower(length))


def _source_padding(batch: int, length: int) -> Call:
    return _source(batch, length, src_key_padding_mask=~kept(batch, length))


def _target_mask(batch: int, length: int) -> Call:
    return two_lengths(batch, length)[0], {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(length)}


def _all_masks(batch: int, length: int) -> Call:
    return two_lengths(batch, length)[0], {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(length),
        "tgt_is_causal": True, "memory_key_padding_mask": ~kept(batch, length + 3)}


def _source_first(inputs: Inputs) -> Inputs:
    """nn.Transformer takes the memory's source first, a decoder the target."""
    def swapped(batch: int, length: int) -> Call:
        (target, source), options = inputs(batch, length)
        return (source, target), options

    return swapped


def _encoder(layers: int = 2, **options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(**LAYER, **{**BATCHED, **options})
    return nn.TransformerEncoder(layer, layers, nn.LayerNorm(WIDTH),
                                 enable_nested_tensor=False).eval()


def _decoder(**options: Any) -> nn.Module:
    layer = nn.TransformerDecoderLayer(**LAYER, **{**BATCHED, **options})
    return nn.TransformerDecoder(layer, 2).eval()


def _both(**options: Any) -> nn.Module:
    encoder = _encoder(1, **options)  # its own one warns that it can't use nested tensors
    return nn.Transformer(**LAYER, num_decoder_layers=1, custom_encoder=encoder,
                          **{**BATCHED, **options}).eval()


def _no_weights(batch: int, length: int) -> Call:
    return _itself(batch, length, need_weights=False)


def _weights_of_heads(batch: int, length: int) -> Call:
    return _itself(batch, length, average_attn_weights=False)


_ATTENTION: tuple[tuple[str, dict[str, Any], Inputs], ...] = (
    ("self/weights", {}, _itself),
    ("self/fused", {}, _no_weights),
    ("self/weights-of-heads", {}, _weights_of_heads),
    ("self/time-first", {"batch_first": False}, _time_first),
    ("self/unbatched", {}, _unbatched),
    ("self/no-bias", {"bias": False}, _no_weights),
    ("self/bias-kv", {"add_bias_kv": True}, _itself),
    ("self/zero-attention", {"add_zero_attn": True}, _no_weights),
    ("self/bias-kv-padding", {"add_bias_kv": True, "add_zero_attn": True}, _padding),
    ("cross/memory", {}, _memory),
    ("cross/other-widths", {"kdim": 12, "vdim": 20}, _other_widths),
    ("masked/float", {}, _float_mask),
    ("masked/bool", {}, _bool_mask),
    ("masked/of-each-head", {}, _mask_of_each_head),
    ("masked/causal-hint", {}, _causal_hint),
    ("padded/padding", {}, _padding),
    ("padded/padding-and-mask", {}, _padding_and_mask),
)
_STACKS = (
    ("encoder/post-norm", _encoder, _source, 2),
    ("encoder/pre-norm-gelu", partial(_encoder, norm_first=True, activation="gelu"), _source, 2),
    ("encoder/padding", _encoder, _source_padding, 2),
    ("encoder/mask", partial(_encoder, norm_first=True), _source_mask, 2),
    ("encoder/time-first", partial(_encoder, batch_first=False), _source, 2),
    ("decoder/target-mask", _decoder, _target_mask, 4),
    ("decoder/pre-norm", partial(_decoder, norm_first=True), two_lengths, 4),
    ("decoder/all-masks", _decoder, _all_masks, 4),
    ("transformer/target-mask", _both, _source_first(_target_mask), 3),
    ("transformer/all-masks", _both, _source_first(_all_masks), 3),
    ("transformer/pre-norm", partial(_both, norm_first=True, bias=False),
     _source_first(two_lengths), 3),
)
CASES = (
    *(Case(f"torch/{name}", partial(_attention, **options), inputs, 1)
      for name, options, inputs in _ATTENTION),
    *(Case(f"torch/{name}", make, inputs, count) for name, make, inputs, count in _STACKS),
)
