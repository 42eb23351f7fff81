"""Scaled dot-product attention with its edge cases as attributes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch

from bincompile.errors import InputError
from bincompile.op import Operator, Sample, Tolerance

MASKED_ROWS = ("nan", "zero")


def _reference(query, key, value, bias, mask, scale, fill=None, causal=False,
               masked_row="nan", need_weights=False):
    """softmax(query @ key^T * scale + bias, `fill` where not mask) @ value, and the weights.

    query (..., M, D), key (..., N, D), value (..., N, E); bias is added, mask is True where a key
    is kept (`fill` None: -inf); causal keeps key j of query i where j <= i. A row that is -inf
    everywhere gives nan, or zeros with masked_row="zero". Without need_weights the second result
    is empty.
    """
    scores = query @ key.mT * scale
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = torch.where(mask, scores, -math.inf if fill is None else fill)
    if causal:
        kept = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = torch.where(kept, scores, -math.inf)
    weights = torch.softmax(scores, -1)
    if masked_row == "zero":
        empty = (scores == -math.inf).all(-1, keepdim=True)
        weights = torch.where(empty, 0.0, weights)
    weights = weights.to(value.dtype)
    return weights @ value, (weights if need_weights else query.new_empty(0))


def _shape(query, key, value, bias, mask, scale, fill=None, causal=False, masked_row="nan",
           need_weights=False):
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    rows = (query.shape[-2], key.shape[-2])
    for extra in (bias, mask):
        if extra is not None:
            lead = torch.broadcast_shapes((*lead, *rows), extra.shape)[:-2]
    weights = value.new_empty((*lead, *rows)) if need_weights else query.new_empty(0)
    lead = torch.broadcast_shapes(tuple(lead), value.shape[:-2])
    return value.new_empty((*lead, query.shape[-2], value.shape[-1])), weights


def _check(query, key, value, bias, mask, scale, fill=None, causal=False, masked_row="nan",
           need_weights=False):
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim < 2:
            raise InputError(f"{name} of shape {tuple(tensor.shape)}", "(..., tokens, features)",
                             f"the {name}")
    if query.shape[-1] != key.shape[-1]:
        raise InputError(f"query with {query.shape[-1]} features, key with {key.shape[-1]}",
                         "the same number of features", "the query or the key")
    if key.shape[-2] != value.shape[-2]:
        raise InputError(f"{key.shape[-2]} keys and {value.shape[-2]} values", "as many of each",
                         "the key or the value")
    if mask is not None and mask.dtype != torch.bool:
        raise InputError(f"mask of dtype {mask.dtype}", "bool, True where a key is kept",
                         "the mask; a float mask is the bias")
    if masked_row not in MASKED_ROWS:
        raise InputError(f"masked_row={masked_row!r}", " or ".join(map(repr, MASKED_ROWS)),
                         "the masked_row argument")


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    for need, row in itertools.product((False, True), MASKED_ROWS):
        q, k, v = normal(2, 3, 5, 8), normal(2, 3, 7, 8), normal(2, 3, 7, 4)
        kept = torch.rand(2, 1, 5, 7, generator=generator) > 0.4
        kept[0, 0, 2] = False
        rest = {"masked_row": row, "need_weights": need}
        yield Sample((q, k, v, None, None, 8**-0.5), rest)
        yield Sample((q, k, v, normal(3, 5, 7), None, 0.3), rest)
        yield Sample((q, k, v, None, kept, 0.3), rest)
        yield Sample((q, k, v, normal(1, 1, 1, 7), kept, 0.3, -1e9), rest)
        yield Sample((q, k, v, torch.where(kept, 0.0, -math.inf), None, 0.3), rest)
        yield Sample((q, q, v[:, :, :5], None, None, 1.0), {"causal": True, **rest})
        yield Sample((normal(1, 3), normal(1, 3), normal(1, 2), None, None, 50.0), rest)
        yield Sample((normal(4, 0, 3), normal(4, 6, 3), normal(4, 6, 2), None, None, 1.0), rest)
        yield Sample((normal(2, 5, 3).double(), normal(2, 6, 3).double(),
                      normal(2, 6, 2).double(), None, None, 1.0), rest)


def _bad_samples(generator: torch.Generator) -> Iterator[Sample]:
    q, k = torch.randn(2, 5, 8, generator=generator), torch.randn(2, 7, 8, generator=generator)
    yield Sample((q, k[..., :4], k, None, None, 1.0), error="features")
    yield Sample((q, k, k[:, :6], None, None, 1.0), error="values")
    yield Sample((q[0, 0], k, k, None, None, 1.0), error="query")
    yield Sample((q, k, k, None, torch.ones(5, 7), 1.0), error="mask")
    yield Sample((q, k, k, None, None, 1.0), {"masked_row": "one"}, error="masked_row")


attention = Operator(
    name="attention",
    schema="(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? mask, float scale, "
           "float? fill=None, bool causal=False, str masked_row='nan', bool need_weights=False) "
           "-> (Tensor, Tensor)",
    reference=_reference,
    shape=_shape,
    check=_check,
    samples=_samples,
    bad_samples=_bad_samples,
    tolerance=Tolerance(rtol=2e-5, atol=2e-5),
    source="arXiv:1706.03762; masked rows as in torch.nn.functional.scaled_dot_product_attention",
)
