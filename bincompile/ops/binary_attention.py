"""Attention whose queries and keys are 1 bit, and where asked its probabilities and values too."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from bincompile.errors import InputError, InputTypeError
from bincompile.op import Operator, Sample, Tolerance
from bincompile.ops import bits

PROBABILITIES = ("float", "binary", "int8", "uint8")
VALUES = ("float", "binary")
CLIP = 2.0  # the gradient of a sign passes where |x| <= CLIP * its row's scale
LEVELS = {"int8": 127.0, "uint8": 255.0}
DOUBTFUL = 3e-4  # a rounding nearer than this to one half may fall to the other side


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What forward and backward share, in float32 or wider; names as in `_reference`."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    powers: torch.Tensor
    counts: torch.Tensor
    total: torch.Tensor

    @property
    def weights(self) -> torch.Tensor:
        return _shares(self.counts, self.total)


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The signs of x and the scale of each of its rows."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return bits.sign(wide), bits.row_scale(wide)


def _shares(counts: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    return torch.where(total == 0, 0.0, counts / total)


def _levels(powers: torch.Tensor, value_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """With "uint8", what is rounded to whole numbers, and the weight that one of them stands for.

    They are those of the values' signs; a row without a key has neither.
    """
    products = powers * value_scale.mT
    if not products.shape[-1]:
        return products, powers.sum(-1, keepdim=True)
    most = products.amax(-1, keepdim=True)
    return torch.where(most == 0, 0.0, products * (LEVELS["uint8"] / most)), most / LEVELS["uint8"]


def _counted(powers: torch.Tensor, probabilities: str, threshold: torch.Tensor | None,
             value_scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The counts c of keys, and what they are divided by."""
    counts, total = powers, None
    if probabilities == "int8":
        counts = (powers * LEVELS["int8"]).round()
    elif probabilities == "binary":
        kept = (powers >= _limit(powers, threshold)) & (powers > 0)
        counts = torch.where(powers.isnan(), powers, kept.to(powers.dtype))
    elif probabilities == "uint8":
        assert value_scale is not None
        levels, unit = _levels(powers, value_scale)
        size, total = value_scale.mT, powers.sum(-1, keepdim=True)
        counts = torch.where(size > 0, levels.round() * unit / size, powers)
    return counts, counts.sum(-1, keepdim=True) if total is None else total


def _limit(powers: torch.Tensor, threshold: torch.Tensor | None) -> torch.Tensor:
    """Of each head (H, 1, 1), at most 1, so that the largest score is always kept."""
    assert threshold is not None
    return threshold.to(powers.dtype).clamp(max=1.0).reshape(-1, 1, 1)


def _parts(query, key, value, bias, mask, threshold, scale, causal, probabilities,
           values) -> _Parts:
    (q, q_scale), (k, k_scale) = _rows(query), _rows(key)
    scores = (q @ k.mT) * (q_scale * scale) * k_scale.mT
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = torch.where(mask, scores, -math.inf)
    if causal:
        past = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = torch.where(past, scores, -math.inf)
    if scores.shape[-1]:
        top = scores.amax(-1, keepdim=True)
        scores = (scores - torch.where(top == -math.inf, 0.0, top)).exp()
    v, v_scale = value.to(scores.dtype), None
    if values == "binary":
        signs, v_scale = _rows(v)
        v = signs * v_scale
    return _Parts(q * q_scale, k * k_scale, v, scores,
                  *_counted(scores, probabilities, threshold, v_scale))


def _reference(query, key, value, bias, mask, drop, threshold, scale, causal=False,
               probabilities="float", values="float", need_weights=False):
    """(c / sum(c) * drop) @ v, and c / sum(c); rows without any kept key give zeros.

    query (B, H, M, D), key (B, H, N, D), value (B, H, N, E). With s(x) the mean |x| of a row:
    scores = sign(q) @ sign(k)^T * s(q) s(k)^T * scale + bias, dropped where not mask or, if
    causal, where j > i; e = exp(scores - their largest), which is in [0, 1]. Then c is e itself
    ("float"), round(127 e) ("int8"), or 1 where e >= min(threshold, 1) of its head, else 0
    ("binary"). v is value, or sign(value) * s(value). `drop` is a factor of each weight.

    "uint8", for binary values, rounds what each sign is multiplied by: with p = e s(v) and P the
    largest p of the row, the result is (sum of round(255 p / P) sign(v)) * P / 255 / sum(e). Its
    weights are round(255 p / P) * P / 255 / s(v) / sum(e), or e / sum(e) where s(v) is 0.
    """
    parts = _parts(query, key, value, bias, mask, threshold, scale, causal, probabilities, values)
    weights = parts.weights
    out = (weights if drop is None else weights * drop.to(weights.dtype)) @ parts.value
    return (out.to(value.dtype),
            weights.to(value.dtype) if need_weights else query.new_empty(0))


def _shape(query, key, value, bias, mask, drop, threshold, scale, causal=False,
           probabilities="float", values="float", need_weights=False):
    rows = query.shape[:3]
    weights = value.new_empty((*rows, key.shape[2])) if need_weights else query.new_empty(0)
    return value.new_empty((*rows, value.shape[3])), weights


def _check(query, key, value, bias, mask, drop, threshold, scale, causal=False,
           probabilities="float", values="float", need_weights=False):
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4 or x.shape[:2] != query.shape[:2]:
            raise InputError(f"{name} of shape {tuple(x.shape)}",
                             "(batch, heads, tokens, features), of one batch and number of heads",
                             f"the {name}")
        if not x.dtype.is_floating_point:
            raise InputTypeError(f"{name} of dtype {x.dtype}", "a float dtype", f"the {name}")
    if query.shape[3] != key.shape[3]:
        raise InputError(f"query with {query.shape[3]} features, key with {key.shape[3]}",
                         "the same number of features", "the query or the key")
    if key.shape[2] != value.shape[2]:
        raise InputError(f"{key.shape[2]} keys and {value.shape[2]} values", "as many of each",
                         "the key or the value")
    if mask is not None and mask.dtype != torch.bool:
        raise InputTypeError(f"mask of dtype {mask.dtype}", "bool, True where a key is kept",
                             "the mask; a float mask is the bias")
    for name, found, allowed in (("probabilities", probabilities, PROBABILITIES),
                                 ("values", values, VALUES)):
        if found not in allowed:
            raise InputError(f"{name}={found!r}", " or ".join(map(repr, allowed)),
                             f"the {name} argument")
    if probabilities == "uint8" and values != "binary":
        raise InputError(f"probabilities='uint8' with values={values!r}",
                         "values='binary', whose scales it rounds too", "the values argument")
    heads = (query.shape[1],)
    if (probabilities == "binary") != (threshold is not None) or (
            threshold is not None and tuple(threshold.shape) != heads):
        shown = None if threshold is None else tuple(threshold.shape)
        raise InputError(f"threshold of shape {shown} with probabilities={probabilities!r}",
                         f"{heads} with 'binary', and None otherwise", "the threshold")


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.causal, ctx.probabilities, ctx.values, ctx.need_weights = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad, grad_weights):
    """With u = c / sum(c), p = e / sum(e), G = drop * (g @ v^T) + g_weights, and [..] 1 or 0:

    dscores = p (G - sum(p G)): the counts pass as e does; dbias is its sum;
    dq = dscores @ (sign(k) s(k)) * scale * [|q| <= 2 s(q)]; dk likewise;
    dv = (u drop)^T @ g, times [|v| <= 2 s(v)] where the values are binary;
    dthreshold = -sum(w (G - sum(u G)) / sum(c)) with w = [0 < e <= 2 min(threshold, 1)].
    """
    query, key, value, bias, mask, drop, threshold = ctx.saved_tensors
    parts = _parts(query, key, value, bias, mask, threshold, ctx.scale, ctx.causal,
                   ctx.probabilities, ctx.values)
    weights, shares = parts.weights, _shares(parts.powers, parts.powers.sum(-1, keepdim=True))
    g = grad.to(weights.dtype)
    factor = 1.0 if drop is None else drop.to(weights.dtype)
    inner = (g @ parts.value.mT) * factor
    if ctx.need_weights:
        inner = inner + grad_weights
    scores = shares * (inner - (shares * inner).sum(-1, keepdim=True))
    found = {0: _clipped(scores @ parts.key * ctx.scale, query),
             1: _clipped(scores.mT @ parts.query * ctx.scale, key),
             2: (weights * factor).mT @ g}
    if ctx.values == "binary":
        found[2] = _clipped(found[2], value)
    if bias is not None:
        found[3] = scores.sum_to_size(bias.shape)
    if threshold is not None:
        found[6] = _threshold_gradient(parts, inner, weights, threshold)
    return (*(found[i].to(t.dtype) if i in found else None
              for i, t in enumerate(ctx.saved_tensors)), *(None,) * 5)


def _clipped(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return grad * (x.to(grad.dtype).abs() <= CLIP * bits.row_scale(x))


def _threshold_gradient(parts: _Parts, inner: torch.Tensor, weights: torch.Tensor,
                        threshold: torch.Tensor) -> torch.Tensor:
    near = (parts.powers <= 2 * _limit(parts.powers, threshold)) & (parts.powers > 0)
    moved = (near * (inner - (weights * inner).sum(-1, keepdim=True))).sum(-1)
    total = parts.counts.sum(-1)
    return -torch.where(total == 0, 0.0, moved / total).sum((0, 2))


def _doubtful_rows(bound: Mapping[str, Any]) -> torch.Tensor | None:
    """Rows with a probability that other rounding before it may take to the next level."""
    kind = bound["probabilities"]
    if kind == "float":
        return None
    given = {name: bound[name] for name in ("query", "key", "value", "bias", "mask", "threshold",
                                            "scale", "causal", "values")}
    powers = _parts(probabilities="float", **given).powers
    if kind == "binary":
        near = ((powers - _limit(powers, bound["threshold"])).abs() < DOUBTFUL) & (powers < 1)
        return near.any(-1).flatten()
    levels = (_levels(powers, _rows(bound["value"])[1])[0] if kind == "uint8"
              else powers * LEVELS["int8"])
    return ((levels - levels.floor() - 0.5).abs() < DOUBTFUL).any(-1).flatten()


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    def normal(*shape: int, grad: bool = False) -> torch.Tensor:
        return torch.randn(shape, generator=generator).requires_grad_(grad)

    kept = torch.rand(2, 1, 3, 4, generator=generator) > 0.4
    kept[0, 0, 2] = False
    for kind, values in (("float", "float"), ("int8", "float"), ("binary", "binary"),
                         ("uint8", "binary")):
        limit = normal(2).abs().requires_grad_() if kind == "binary" else None
        rest = {"probabilities": kind, "values": values}
        q, k, v = (normal(2, 2, n, e, grad=True) for n, e in ((3, 9), (4, 9), (4, 5)))
        yield Sample((q, k, v, None, None, None, limit, 9**-0.5), rest)
        yield Sample((q, k, v, normal(2, 3, 4, grad=True), kept, 2.0 * (normal(2, 2, 3, 4) > 0),
                      limit, 0.3), {"causal": True, "need_weights": True, **rest})
    q, k = normal(1, 2, 3, 5), normal(1, 2, 0, 5)
    yield Sample((q, k, k, None, None, None, None, 1.0), {"need_weights": True})
    yield Sample((k, q, q, None, None, None, None, 1.0))
    yield Sample((q.bfloat16(), q.bfloat16(), q.bfloat16(), None, None, None, None, 1.0))


def _bad_samples(generator: torch.Generator) -> Iterator[Sample]:
    q, k = (torch.randn(2, 3, n, 8, generator=generator) for n in (5, 7))
    none, binary = (None,) * 4, {"probabilities": "binary"}
    yield Sample((q, k[..., :4], k, *none, 1.0), error="features")
    yield Sample((q, k, k[:, :, :6], *none, 1.0), error="values")
    yield Sample((q[0], k, k, *none, 1.0), error="query")
    yield Sample((q, k[:, :1], k, *none, 1.0), error="key")
    yield Sample((q, k, k.long(), *none, 1.0), error="value")
    yield Sample((q, k, k, None, torch.ones(5, 7), None, None, 1.0), error="mask")
    yield Sample((q, k, k, *none, 1.0), {"values": "ternary"}, error="values='ternary'")
    yield Sample((q, k, k, *none, 1.0), {"probabilities": "no"}, error="probabilities='no'")
    yield Sample((q, k, k, *none, 1.0), {"probabilities": "uint8"}, error="values='float'")
    yield Sample((q, k, k, *none, 1.0), binary, error="threshold")
    yield Sample((q, k, k, None, None, None, torch.ones(2), 1.0), binary, error="threshold")
    yield Sample((q, k, k, None, None, None, torch.ones(3), 1.0), error="threshold")


binary_attention = Operator(
    name="binary_attention",
    schema="(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? mask, Tensor? drop, "
           "Tensor? threshold, float scale, bool causal=False, str probabilities='float', "
           "str values='float', bool need_weights=False) -> (Tensor, Tensor)",
    reference=_reference,
    shape=_shape,
    check=_check,
    samples=_samples,
    bad_samples=_bad_samples,
    signs_of=lambda bound: [bound["query"], bound["key"]],
    doubtful_rows=_doubtful_rows,
    tolerance=Tolerance(rtol=2e-5, atol=2e-5),
    backward=(_setup_context, _backward),
    source="1-bit query and key: BinaryAttention, arXiv:2603.09582; {0, 1} probabilities: BiT, "
           "arXiv:2205.13016; straight-through gradients: arXiv:1308.3432",
)
