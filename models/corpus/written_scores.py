"""Hand-written attention: scale, mask and softmax in every order and spelling."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from bincompile.models.corpus.parts import (
    HEADS,
    WIDTH,
    Core,
    Heads,
    SelfAttention,
    cases_of,
    tokens_and_keep,
)

WINDOW = 3


def _root(q: Tensor) -> float:
    return 1 / math.sqrt(q.shape[-1])


def _lower(q: Tensor, k: Tensor) -> Tensor:
    return torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()


def _divided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1) @ v


def _scaled_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.softmax(torch.matmul(q * _root(q), k.mT), dim=-1).matmul(v)


def _scaled_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ (k * _root(k)).mT).softmax(-1) @ v


def _split_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    half = q.shape[-1] ** -0.25
    return ((q * half) @ (k * half).mT).softmax(-1) @ v


def _unscaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def _scale_of_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / torch.tensor(q.shape[-1], dtype=q.dtype).sqrt()).softmax(-1) @ v


def _with_max(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * _root(q)
    powers = (scores - scores.max(-1, keepdim=True).values).exp()
    return powers / powers.sum(-1, keepdim=True) @ v


def _without_max(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    powers = torch.exp(q @ k.mT * _root(q))
    return (powers / powers.sum(dim=-1, keepdim=True)) @ v


def _late(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    powers = torch.exp(q @ k.mT * _root(q))
    return (powers @ v) / powers.sum(-1, keepdim=True)


def _late_with_max(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * _root(q)
    powers = torch.exp(scores - scores.amax(-1, keepdim=True))
    total = powers.sum(-1)
    return torch.einsum("bhqk,bhkd->bhqd", powers, v) / total.unsqueeze(-1)


def _in_float(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT) * _root(q)
    return functional.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype) @ v


def _cast_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * _root(q)).float().softmax(-1).type_as(v) @ v


def _named_axes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * _root(q)
    return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)


def _unnamed_axes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("...qd,...kd->...qk", q, k) * _root(q)
    return torch.einsum("...qk,...kd->...qd", scores.softmax(-1), v)


def _heads_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    weights = torch.softmax(torch.einsum("bihd,bjhd->bijh", q, k) * _root(q), dim=2)
    return torch.einsum("bijh,bjhd->bihd", weights, v).transpose(1, 2)


def _keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(k @ q.mT * _root(q), dim=-2)
    return (v.mT @ weights).mT


def _merged_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, n, d = q.shape
    q, k, v = (t.reshape(b * h, n, d) for t in (q, k, v))
    weights = torch.bmm(q, k.transpose(1, 2)).mul(_root(q)).softmax(-1)
    return torch.bmm(weights, v).view(b, h, n, d)


def _added_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, n, d = q.shape
    q, k, v = (t.reshape(b * h, n, d) for t in (q, k, v))
    empty = torch.empty(b * h, n, n)
    weights = torch.baddbmm(empty, q, k.mT, beta=0, alpha=_root(q)).softmax(-1)
    return torch.bmm(weights, v).view(b, h, n, d)


def _added_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, n, d = q.shape
    bias = torch.arange(n, dtype=q.dtype).expand(b * h, n, n) / -n
    scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).mT, beta=0.5, alpha=_root(q))
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view(b, h, n, d)


def _filled(value: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * _root(q)).masked_fill(~_lower(q, k), value).softmax(-1) @ v


def _where(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    least = torch.tensor(torch.finfo(q.dtype).min)
    return torch.where(_lower(q, k), q @ k.mT * _root(q), least).softmax(-1) @ v


def _added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.full((q.shape[-2], k.shape[-2]), -math.inf).triu(1)
    return (q @ k.mT * _root(q) + mask).softmax(-1) @ v


def _window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    back = torch.arange(q.shape[-2])[:, None] - torch.arange(k.shape[-2])
    seen = (back >= 0) & (back < WINDOW)
    return (q @ k.mT * _root(q)).masked_fill(seen.logical_not(), -math.inf).softmax(-1) @ v


def _band(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = torch.ones(q.shape[-2], k.shape[-2]).tril(WINDOW).triu(-WINDOW)
    return ((q @ k.mT * _root(q)) + (1 - seen) * -10000.0).softmax(-1) @ v


def _nested(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    back = torch.arange(q.shape[-2])[:, None] - torch.arange(k.shape[-2])
    scores = (q @ k.mT * _root(q)).masked_fill(back < 0, -math.inf)
    return scores.masked_fill(back >= WINDOW, -math.inf).softmax(-1) @ v


def _capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.tanh(q @ k.mT * _root(q) / 20.0) * 20.0
    return scores.masked_fill(~_lower(q, k), -1e9).softmax(-1) @ v


def _clamped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * _root(q)).clamp(-5.0, 5.0).softmax(-1) @ v


def _cosine(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
    return (q @ k.mT * 10.0).softmax(-1) @ v


def _no_numbers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT * _root(q)).masked_fill(~_lower(q, k).triu(-1), -math.inf).softmax(-1)
    return torch.nan_to_num(weights, 0.0) @ v


def _fused(causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=causal)


class Padded(Heads):
    """Self-attention over what is not padding: `masked(scores, keep)` spells the mask."""

    def __init__(self, masked: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.masked = masked

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = self.split(x)
        scores = self.masked(q @ k.mT * _root(q), keep[:, None, None, :])
        return self.merge(scores.softmax(-1) @ v)


class Temperature(Heads):
    """One learned factor a head, kept positive by its exponent and limited as SwinV2 does."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.zeros(HEADS, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
        factor = self.temperature.clamp(max=4.6).exp()
        return self.merge(((q @ k.mT) * factor).softmax(-1) @ v)


class Normed(SelfAttention):
    """LayerNorm over the features of each head of query and key."""

    def __init__(self) -> None:
        super().__init__(_divided)
        self.of_query, self.of_key = (nn.LayerNorm(WIDTH // HEADS) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        return self.merge(self.core(self.of_query(q), self.of_key(k), v))


class Sink(Heads):
    """One more score a head, learned, that takes weight from the keys and has no value."""

    def __init__(self) -> None:
        super().__init__()
        self.sink = nn.Parameter(torch.randn(HEADS))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        scores = (q @ k.mT * _root(q)).masked_fill(~_lower(q, k), -math.inf)
        sink = self.sink.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        return self.merge(torch.cat((scores, sink), -1).softmax(-1)[..., :-1] @ v)


class TalkingHeads(Heads):
    """Heads are mixed by learned matrices before and after the softmax."""

    def __init__(self, before: bool = True, after: bool = True) -> None:
        super().__init__()
        self.before = nn.Linear(HEADS, HEADS, bias=False) if before else nn.Identity()
        self.after = nn.Linear(HEADS, HEADS, bias=False) if after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        scores = self.before((q @ k.mT * _root(q)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        weights = self.after(scores.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.merge(weights @ v)


class WithWeights(Heads):
    """Returns the probabilities and their entropy beside the result."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        q, k, v = self.split(x)
        weights = (q @ k.mT * _root(q)).softmax(-1)
        entropy = -(weights * (weights + 1e-9).log()).sum(-1).mean(1)
        return {"out": self.merge(weights @ v), "weights": weights, "entropy": entropy}


class InPrecision(nn.Module):
    """A self-attention in half precision between float32 inputs and results."""

    def __init__(self, core: Core, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self.dtype = SelfAttention(core).to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.to(self.dtype)).float()


def _core(core: Core) -> Callable[[], nn.Module]:
    return partial(SelfAttention, core)


CASES = (
    *cases_of("written", (
        ("scale/divided", _core(_divided)),
        ("scale/on-query", _core(_scaled_query)),
        ("scale/on-key", _core(_scaled_key)),
        ("scale/split", _core(_split_scale)),
        ("scale/none", _core(_unscaled)),
        ("scale/tensor", _core(_scale_of_tensor)),
        ("scale/learned", Temperature),
        ("softmax/late-with-max", _core(_late_with_max)),
        ("softmax/with-max", _core(_with_max)),
        ("softmax/without-max", _core(_without_max)),
        ("softmax/late", _core(_late)),
        ("softmax/float32", _core(_in_float)),
        ("product/einsum-ellipsis", _core(_unnamed_axes)),
        ("product/einsum", _core(_named_axes)),
        ("product/heads-last", _core(_heads_last)),
        ("product/keys-first", _core(_keys_first)),
        ("product/bmm", _core(_merged_batch)),
        ("product/baddbmm-empty", _core(_added_product)),
        ("product/baddbmm-bias", _core(_added_bias)),
        ("mask/filled", _core(partial(_filled, -math.inf))),
        ("mask/filled-finite", _core(partial(_filled, -1e9))),
        ("mask/where", _core(_where)),
        ("mask/added", _core(_added)),
        ("window/causal", _core(_window)),
        ("window/band", _core(_band)),
        ("window/nested", _core(_nested)),
        ("limits/softcap", _core(_capped)),
        ("limits/clamp", _core(_clamped)),
        ("limits/cosine", _core(_cosine)),
        ("limits/norm", Normed),
        ("limits/sink", Sink),
        ("limits/nan-to-num", _core(_no_numbers)),
        ("weights/returned", WithWeights),
        ("fused/plain", _core(partial(_fused, False))),
        ("fused/causal", _core(partial(_fused, True))),
        ("precision/half", partial(InPrecision, _in_float, torch.float16)),
        ("precision/bfloat16", partial(InPrecision, _cast_before, torch.bfloat16)),
        ("precision/bfloat16-whole", partial(InPrecision, _divided, torch.bfloat16)),
    ), attention=1),
    *cases_of("written", (
        ("mixed/after", partial(TalkingHeads, before=False)),
        ("mixed/before", partial(TalkingHeads, after=False)),
        ("mixed/both", TalkingHeads),
    ), attention=1, unseen={"attention": "a linear layer mixes the heads"}),
    *cases_of("written", (
        ("padding/filled", partial(Padded, lambda s, keep: s.masked_fill(~keep, -math.inf))),
        ("padding/added", partial(Padded, lambda s, keep: s + (1.0 - keep.float()) * -1e4)),
        ("padding/where", partial(Padded, lambda s, keep: torch.where(keep, s, -1e9))),
        ("padding/compared", partial(
            Padded, lambda s, keep: s.masked_fill(keep.int() == 0, torch.finfo(s.dtype).min))),
    ), tokens_and_keep, attention=1),
)
