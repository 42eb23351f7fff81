"""Scaled dot-product attention with its edge cases as attributes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch

from bincompile.errors import InputError
from bincompile.op import Operator, Sample, Tolerance

MASKED_ROWS = ("nan", "zero", "hidden")


def _reference(query, key, value, bias, mask, scale, fill=None, causal=False,
               masked_row="nan", need_weights=False, softcap=None, gain=None, low=None, high=None,
               late_bias=None, sink=None, mix_before=None, mix_after=None, mix_shift=None,
               groups=1):
    """softmax(query @ key^T * scale + bias, `fill` where not mask) @ value, and the weights.

    query (..., M, D), key (..., N, D), value (..., N, E); bias is added, mask is True where a key
    is kept (`fill` None: -inf); causal keeps key j of query i where j <= i. A row that is -inf
    everywhere gives nan, or zeros with masked_row="zero"; with "hidden" the probabilities of keys
    that the mask hides are set to 0 after the softmax. Without need_weights the second result is
    empty. The rest, in the order in which it takes effect:

    groups: each head of key and value (axis -3) serves so many heads of the query in turn.
    gain: the scaled scores are multiplied by it. mix_before (H', H): scores of head h' are its
    row's mixture of the scores of all heads. softcap c: c * tanh(scores / c).
    low, high: the scores are clamped to them after the bias. late_bias: added after the mask.
    sink (..., 1): one more score for each row, that takes probability but has no value.
    mix_after (H', H) and mix_shift (H'): the probabilities are mixed, and shifted.
    """
    key, value = (t if groups == 1 else t.repeat_interleave(groups, -3) for t in (key, value))
    scores = query @ key.mT * scale
    if gain is not None:
        scores = scores * gain
    scores = scores if mix_before is None else _mixed(scores, mix_before)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = _hidden(scores, bias, mask, fill, causal, low, high, late_bias)
    keys = scores.shape[-1]
    if sink is not None:
        sink = sink.to(scores.dtype).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], -1)
    weights = torch.softmax(scores, -1)
    if masked_row == "zero":
        empty = (scores == -math.inf).all(-1, keepdim=True)
        weights = torch.where(empty, 0.0, weights)
    weights = weights[..., :keys].to(value.dtype)
    if masked_row == "hidden":
        weights = torch.where(mask, weights, 0.0)
    weights = weights if mix_after is None else _mixed(weights, mix_after)
    if mix_shift is not None:
        weights = weights + mix_shift[:, None, None]
    return weights @ value, (weights.contiguous() if need_weights else query.new_empty(0))


def _mixed(scores, mixture):
    return torch.einsum("gh,...hmn->...gmn", mixture.to(scores.dtype), scores)


def _hidden(scores, bias, mask, fill, causal, low, high, late_bias):
    """The scores with what is added to them and what is hidden."""
    if bias is not None:
        scores = scores + bias
    if low is not None or high is not None:
        scores = scores.clamp(low, high)
    if mask is not None:
        scores = torch.where(mask, scores, -math.inf if fill is None else fill)
    if late_bias is not None:
        scores = scores + late_bias
    if causal:
        kept = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = torch.where(kept, scores, -math.inf)
    return scores


def _shape(query, key, value, bias, mask, scale, fill=None, causal=False, masked_row="nan",
           need_weights=False, softcap=None, gain=None, low=None, high=None, late_bias=None,
           sink=None, mix_before=None, mix_after=None, mix_shift=None, groups=1):
    lead = torch.broadcast_shapes(query.shape[:-2], _repeated(key, groups))
    rows = (query.shape[-2], key.shape[-2])
    if gain is not None:
        lead = torch.broadcast_shapes((*lead, *rows), gain.shape)[:-2]
    if mix_before is not None:
        lead = (*lead[:-1], mix_before.shape[0])
    for extra in (bias, mask, late_bias):
        if extra is not None:
            lead = torch.broadcast_shapes((*lead, *rows), extra.shape)[:-2]
    if mix_after is not None:
        lead = (*lead[:-1], mix_after.shape[0])
    weights = value.new_empty((*lead, *rows)) if need_weights else query.new_empty(0)
    lead = torch.broadcast_shapes(tuple(lead), _repeated(value, groups))
    return value.new_empty((*lead, query.shape[-2], value.shape[-1])), weights


def _repeated(tensor, groups):
    """The leading sizes of keys or values with each head repeated."""
    lead = tensor.shape[:-2]
    return lead if groups == 1 else (*lead[:-1], lead[-1] * groups)


def _check(query, key, value, bias, mask, scale, fill=None, causal=False, masked_row="nan",
           need_weights=False, softcap=None, gain=None, low=None, high=None, late_bias=None,
           sink=None, mix_before=None, mix_after=None, mix_shift=None, groups=1):
    _check_tensors(query, key, value, mask)
    if masked_row not in MASKED_ROWS:
        raise InputError(f"masked_row={masked_row!r}", " or ".join(map(repr, MASKED_ROWS)),
                         "the masked_row argument")
    if masked_row == "hidden" and mask is None:
        raise InputError("masked_row='hidden' without a mask", "a mask that says what is hidden",
                         "the mask")
    if softcap is not None and not (softcap != 0 and math.isfinite(softcap)):
        raise InputError(f"softcap={softcap}", "a finite number that is not 0, or None",
                         "the softcap argument")
    if groups < 1 or (groups > 1 and min(key.ndim, value.ndim) < 3):
        raise InputError(f"groups={groups} with a key of shape {tuple(key.shape)}",
                         "at least 1, and more only with an axis of heads", "the groups argument")
    if sink is not None and (sink.ndim < 1 or sink.shape[-1] != 1):
        raise InputError(f"sink of shape {tuple(sink.shape)}", "(..., 1): one score for each row",
                         "the sink")
    for name, tensor in (("mix_before", mix_before), ("mix_after", mix_after)):
        if tensor is not None and (tensor.ndim != 2 or query.ndim < 3):
            raise InputError(f"{name} of shape {tuple(tensor.shape)}",
                             "(heads after, heads before), and an axis of heads", f"the {name}")


def _check_tensors(query, key, value, mask):
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


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    for need, row in itertools.product((False, True), MASKED_ROWS[:2]):
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
        if need == (row == "zero"):
            yield from _facet_samples(normal, kept, rest)


def _facet_samples(normal, kept, rest) -> Iterator[Sample]:
    """A call for each facet, and one with all of them."""
    q, k, v = normal(2, 3, 5, 8), normal(2, 3, 7, 8), normal(2, 3, 7, 4)
    late = torch.where(kept, 0.0, -math.inf)
    facets = ({"softcap": 2.0}, {"gain": normal(3, 1, 1)}, {"gain": normal(5, 7)},
              {"low": -0.5, "high": 0.5}, {"low": -1.0}, {"late_bias": late},
              {"sink": normal(3, 1, 1)}, {"sink": normal(2, 3, 5, 1)},
              {"mix_before": normal(3, 3)}, {"mix_after": normal(3, 3)},
              {"mix_after": normal(3, 3), "mix_shift": normal(3)})
    for facet in facets:
        yield Sample((q, k, v, None, kept, 0.3), {**facet, **rest})
        yield Sample((q, k, v, normal(5, 7), kept, 0.3, -1e4), {**facet, **rest})
    yield Sample((q, k, v, normal(5, 7), kept, 0.3, 0.0), {
        **{name: value for facet in facets for name, value in facet.items()}, **rest})
    yield Sample((q, k[:, :1], v[:, :1], None, None, 0.3), {"groups": 3, **rest})
    for fill in (None, -1e4):
        yield Sample((q, k, v, None, kept, 0.3, fill), {**rest, "masked_row": "hidden"})
    yield Sample((normal(2, 4, 3, 8), normal(2, 2, 3, 8), normal(2, 2, 3, 4), None, None, 0.3),
                 {"groups": 2, "causal": True, **rest})


def _bad_samples(generator: torch.Generator) -> Iterator[Sample]:
    q, k = torch.randn(2, 5, 8, generator=generator), torch.randn(2, 7, 8, generator=generator)
    yield Sample((q, k[..., :4], k, None, None, 1.0), error="features")
    yield Sample((q, k, k[:, :6], None, None, 1.0), error="values")
    yield Sample((q[0, 0], k, k, None, None, 1.0), error="query")
    yield Sample((q, k, k, None, torch.ones(5, 7), 1.0), error="mask")
    yield Sample((q, k, k, None, None, 1.0), {"masked_row": "one"}, error="masked_row")
    yield Sample((q, k, k, None, None, 1.0), {"masked_row": "hidden"}, error="mask")
    yield Sample((q, k, k, None, None, 1.0), {"softcap": 0.0}, error="softcap")
    yield Sample((q, k, k, None, None, 1.0), {"groups": 0}, error="groups")
    yield Sample((q[0], k[0], k[0], None, None, 1.0), {"groups": 2}, error="groups")
    yield Sample((q, k, k, None, None, 1.0), {"sink": torch.ones(5, 2)}, error="sink")
    yield Sample((q, k, k, None, None, 1.0), {"mix_before": torch.ones(2)}, error="mix_before")
    yield Sample((q, k, k, None, None, 1.0), {"mix_after": torch.ones(2)}, error="mix_after")


attention = Operator(
    name="attention",
    schema="(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? mask, float scale, "
           "float? fill=None, bool causal=False, str masked_row='nan', bool need_weights=False, "
           "float? softcap=None, Tensor? gain=None, float? low=None, float? high=None, "
           "Tensor? late_bias=None, Tensor? sink=None, Tensor? mix_before=None, "
           "Tensor? mix_after=None, Tensor? mix_shift=None, int groups=1) -> (Tensor, Tensor)",
    reference=_reference,
    shape=_shape,
    check=_check,
    samples=_samples,
    bad_samples=_bad_samples,
    tolerance=Tolerance(rtol=2e-5, atol=2e-5),
    source="arXiv:1706.03762; masked rows as in torch.nn.functional.scaled_dot_product_attention; "
           "mixed heads arXiv:2003.02436; groups arXiv:2305.13245; sink arXiv:2309.17453",
)
