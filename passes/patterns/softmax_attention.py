"""Attention written with a softmax, in any order of scale, mask and layout steps."""

from __future__ import annotations

import math

import torch
from torch import fx

from bincompile.passes import attention_examples as spelled
from bincompile.passes.attention import Softmax, around_softmax
from bincompile.passes.divergence import divergence
from bincompile.passes.graph import aten
from bincompile.passes.patterns import Candidate, Context, Example, Pattern
from bincompile.passes.scores import STEPS

SOFTMAXES = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)


def _match(node: fx.Node, context: Context) -> Candidate:
    row = "zero" if node.target is aten._safe_softmax.default else "nan"
    found = around_softmax(Softmax(node, node.args[0], node.args[1], row), context)
    if found is None:
        raise divergence(node, node.args[0], STEPS, context)
    return found


def _plain(q, k, v):
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v


def _scaled_query(q, k, v):
    return torch.softmax((q * 0.3) @ k.mT, dim=3, dtype=torch.float32).to(v.dtype) @ v


def _added_mask(q, k, v):
    mask = torch.full((q.shape[2], k.shape[2]), -math.inf).triu(1)
    return torch.softmax(q @ k.mT * 0.3 + mask, -1) @ v


def _mask_before_scale(q, k, v):
    mask = torch.linspace(-1, 1, q.shape[1])[:, None, None]
    return torch.softmax((q @ k.mT + mask * torch.ones(1, q.shape[2], k.shape[2])) * 0.3, -1) @ v


def _filled_mask(q, k, v):
    kept = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return torch.softmax((q @ k.mT * 0.3).masked_fill(~kept, -1e9), -1) @ v


def _where_mask(q, k, v):
    kept = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return torch.softmax(torch.where(kept, q @ k.mT, -math.inf), -1) @ v


def _transposed(q, k, v):
    return (v.mT @ torch.softmax(k @ q.mT * 0.3, -2)).mT


def _einsum(q, k, v):
    scores = torch.einsum("bhid,bhjd->bijh", q, k) * 0.3
    return torch.einsum("bijh,bhjd->bhid", torch.softmax(scores, 2), v)


def _merged_heads(q, k, v):
    b, h, n, d = q.shape
    q, k, v = (t.reshape(b * h, n, d) for t in (q, k, v))
    scores = torch.baddbmm(torch.zeros(1, 1, n), q, k.mT, beta=1, alpha=0.3)
    return torch.bmm(torch.softmax(scores, -1), v).view(b, h, n, d)


def _regrouped(q, k, v):
    b, h, n, _ = q.shape
    bias = torch.linspace(-1, 1, h * n * n).view(h, n, n)
    scores = (q * 0.3).flatten(0, 1) @ k.flatten(0, 1).mT
    scores = (scores.view(b, h, n, n) + bias).view(b * h, n, n)
    return (torch.softmax(scores, -1) @ v.flatten(0, 1)).view(b, h, n, -1)


def _learned_scale(q, k, v):
    temperature = torch.linspace(0.1, 1.0, q.shape[1])[:, None, None]
    return torch.softmax(q @ k.mT * temperature, -1) @ v


def _written_out(q, k, v):
    scores = q @ k.mT * 0.3
    powers = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (powers / powers.sum(-1, keepdim=True)) @ v


def _over_queries(q, k, v):
    return torch.softmax(q @ k.mT * 0.3, 2) @ v


def _over_heads(q, k, v):
    return torch.softmax(q @ k.mT * 0.3, 1) @ v


def _over_batch(q, k, v):
    return torch.softmax(q @ k.mT * 0.3, 0) @ v


def _over_channels(q, k, v):
    return (torch.softmax(q.mT @ k * 0.3, -1) @ v.mT).mT


def _relu_scores(q, k, v):
    return torch.softmax(torch.relu(q @ k.mT), -1) @ v


def _router(q, k, v):
    return torch.softmax(q.sum(-1, keepdim=True), -1) * v


def _tokens() -> tuple[torch.Tensor]:
    return (torch.randn(2, 6, 32),)


softmax_attention = Pattern(
    "softmax_attention", "attention", SOFTMAXES, _match,
    examples=(
        *spelled.examples(
            _plain, _scaled_query, _added_mask, _mask_before_scale, _filled_mask, _where_mask,
            _transposed, _einsum, _merged_heads, _regrouped, _learned_scale, _written_out,
            spelled.softcap, spelled.clamped, spelled.clamped_after_bias, spelled.constant_added,
            spelled.subtracted_from, spelled.stabilised, spelled.two_masks,
            spelled.masks_of_two_fills, spelled.bias_after_filled_mask, spelled.mask_from_ones,
            spelled.multiplied_mask, spelled.nested_where, spelled.dots, spelled.three_operands,
            spelled.broadcast_product, spelled.tokens_first, spelled.regrouped_twice,
            spelled.queries_of_all_heads, spelled.in_full_precision, spelled.cleaned,
            spelled.windows, spelled.hidden_twice),
        *map(spelled.mixed, ("linear", "conv", "einsum")),
        Example(spelled.Sinks, _tokens),
        *map(spelled.grouped, ("einsum", "axes", "repeat", "index", "expand"))),
    near_misses=(*spelled.examples(
        _over_queries, _over_heads, _over_batch, _over_channels, _relu_scores, _router,
        spelled.renormalised, spelled.capped_mask, spelled.linear_attention,
        spelled.sigmoid_attention, spelled.hidden_only_behind),
        Example(spelled.Channels, lambda: (torch.randn(2, 32, 4, 6),))),
)
