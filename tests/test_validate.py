"""A proof refuses every wrong rule; every spelling of attention gives the model's results."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from wrong_rules import Arguments, Spelled, candidates, put, tensors, verdict

import bincompile as bc
from bincompile.ops import OPERATORS
from bincompile.passes.patterns import Candidate
from bincompile.passes.validate import LIMIT, validate
from bincompile.record import Evidence

# The ten spellings: what a user may write, whether it is attention, and where it is not, why.


def causal(q: torch.Tensor) -> torch.Tensor:
    return torch.full((q.shape[-2], q.shape[-2]), -math.inf).triu(1)


def plain(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(8), dim=3) @ v


def last_dimension(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(8), dim=-1) @ v


def with_mask(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(8) + causal(q), dim=-1) @ v


def tiny_divisor(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1) / 1e-3, dim=-1) @ v


def key_not_transposed(q, k, v):
    return torch.softmax(q @ k / math.sqrt(8), dim=-1) @ v


def key_permuted(q, k, v):
    return torch.softmax(q @ k.permute(0, 2, 3, 1) / math.sqrt(8), dim=-1) @ v


def over_batch(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(8), dim=0) @ v


def over_heads(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(8), dim=1) @ v


def over_queries(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(8), dim=2) @ v


def mask_then_scale(q, k, v):
    return torch.softmax((q @ k.transpose(-2, -1) + causal(q)) * 0.35, dim=-1) @ v


def shapes(key: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    return torch.randn(2, 4, 6, 8), torch.randn(key), torch.randn(2, 4, 6, 8)


STRAIGHT, TRANSPOSED, PERMUTED = (2, 4, 6, 8), (2, 4, 8, 6), (2, 6, 4, 8)
SPELLINGS = [
    (plain, STRAIGHT, ""), (last_dimension, STRAIGHT, ""), (with_mask, STRAIGHT, ""),
    (tiny_divisor, STRAIGHT, ""), (key_not_transposed, TRANSPOSED, ""),
    (key_permuted, PERMUTED, ""), (over_batch, STRAIGHT, "dimension -4"),
    (over_heads, STRAIGHT, "dimension -3"), (over_queries, STRAIGHT, "doesn't sum"),
    (mask_then_scale, STRAIGHT, ""),
]


@pytest.mark.parametrize(("core", "key", "reason"), SPELLINGS,
                         ids=[core.__name__ for core, _, _ in SPELLINGS])
def test_a_spelling_gives_the_results_of_the_model(core, key, reason) -> None:
    args = shapes(key)
    compiled = bc.optimize(Spelled(core).eval(), args)
    matches, refusals = compiled.report.matches, compiled.report.refusals
    if reason:
        assert not matches and [reason in r.reason for r in refusals] == [True]
        assert refusals[0].node and Spelled.forward.__code__.co_filename in refusals[0].source
    else:
        assert [m.operator for m in matches] == ["attention"] and matches[0].validated
        assert not refusals and matches[0].max_error <= LIMIT
    for scale in (1.0, 10.0):
        call = tuple(scale * torch.randn_like(x) for x in args)
        torch.testing.assert_close(compiled(*call), core(*call), rtol=1e-5, atol=1e-5 * scale)


def test_a_match_says_what_the_model_computes() -> None:
    compiled = bc.optimize(Spelled(mask_then_scale).eval(), shapes(STRAIGHT))
    attrs = compiled.report.matches[0].attrs
    assert attrs["scale"] == pytest.approx(0.35) and attrs["causal"] and attrs["heads"] is None
    assert attrs["mask"] == "causal" and attrs["masked_row"] == "nan"


# Wrong rules: a right candidate whose emitted operator is changed on the way.

def masked(q, k, v, bias, kept, window):
    scores = (q @ k.mT * 0.3 + bias).masked_fill(~kept, -math.inf)
    return torch.softmax(torch.where(window, scores, -math.inf), -1) @ v


def filled(q, k, v, kept):
    return torch.softmax((q @ k.mT * 0.3).masked_fill(~kept, -1e4), -1) @ v


def sdpa(q, k, v, bias):
    return functional.scaled_dot_product_attention(q, k, v, bias)


def sdpa_causal(q, k, v):
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def weighted(q, k, v):
    weights = torch.softmax(q @ k.mT * 0.3, -1)
    return weights @ v, weights


def tempered(q, k, v, temperature):
    return torch.softmax(q @ k.mT / temperature, -1) @ v


def kept() -> torch.Tensor:
    return torch.rand(2, 1, 8, 8) > 0.4


FORMS: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]] = {
    "masked": lambda: (Spelled(masked), tensors(lambda: torch.randn(3, 8, 8), kept, kept)),
    "filled": lambda: (Spelled(filled), tensors(kept)),
    "sdpa": lambda: (Spelled(sdpa), tensors(lambda: torch.randn(2, 3, 8, 8))),
    "sdpa_causal": lambda: (Spelled(sdpa_causal), tensors()),
    "weighted": lambda: (Spelled(weighted), tensors()),
    "tempered": lambda: (Spelled(tempered), tensors(lambda: torch.rand(3, 1, 1) + 0.5)),
    "look_up": lambda: (nn.Embedding(9, 8, padding_idx=2), (torch.tensor([[1, 2, 8]]),)),
    "bag": lambda: (nn.EmbeddingBag(9, 8, mode="mean"),
                    (torch.tensor([1, 2, 8, 3]), torch.tensor([0, 1]))),
    "weighted_bag": lambda: (WeightedBag(), (torch.tensor([[1, 2], [3, 8]]), torch.rand(2, 2))),
}


class WeightedBag(nn.EmbeddingBag):
    """A bag whose weights are an input."""

    def __init__(self) -> None:
        super().__init__(9, 8, mode="sum")

    def forward(self, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return super().forward(indices, per_sample_weights=weights)


@functools.cache
def form(name: str) -> tuple[Candidate, Any]:
    return candidates(*FORMS[name]())


def over_another_axis(a: Arguments) -> Any:
    scores = a["query"] @ a["key"].mT * a["scale"] + a["bias"]
    return torch.softmax(scores.masked_fill(~a["mask"], -math.inf), -2) @ a["value"], None


def mask_before_bias_and_scale(a: Arguments) -> Any:
    scores = (a["query"] @ a["key"].mT + a["bias"]) * a["scale"]
    return torch.softmax(scores.masked_fill(~a["mask"], -math.inf), -1) @ a["value"], None


def softened(a: Arguments) -> Any:
    weights = torch.exp(a["query"] @ a["key"].mT * a["scale"])
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
    return weights @ a["value"], weights


def split_heads_otherwise(tensor: torch.Tensor) -> torch.Tensor:
    b, h, n, d = tensor.shape
    return tensor.transpose(1, 2).reshape(b, n, d, h).permute(0, 3, 1, 2)


def strictly_causal(offset: int) -> Callable[[Arguments], Arguments]:
    def change(a: Arguments) -> Arguments:
        rows, columns = a["query"].shape[-2], a["key"].shape[-2]
        near = torch.ones(rows, columns, dtype=torch.bool).tril(offset)
        return {**a, "causal": False, "mask": near}

    return change


def in_float32(a: Arguments) -> Any:
    found = OPERATORS["attention"].reference(
        **{k: t.float() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
           for k, t in a.items()})
    return tuple(t.double() for t in found)


ATTENTION_MISTAKES: dict[str, tuple[str, Callable[[Arguments], Any]]] = {
    "scale off by a millionth": ("masked", put(scale=lambda a: a["scale"] * (1 + 1e-6))),
    "no scale": ("masked", put(scale=lambda a: 1.0)),
    "scale the wrong way up": ("masked", put(scale=lambda a: 1 / a["scale"])),
    "scale of the tokens": ("sdpa", put(scale=lambda a: a["query"].shape[-2] ** -0.5 / 2)),
    "scale squared": ("sdpa_causal", put(scale=lambda a: a["scale"] ** 2)),
    "query and key swapped": ("masked", put(query=lambda a: a["key"], key=lambda a: a["query"])),
    "key and value swapped": ("sdpa", put(key=lambda a: a["value"], value=lambda a: a["key"])),
    "query negated": ("sdpa_causal", put(query=lambda a: -a["query"])),
    "value transposed": ("weighted", put(value=lambda a: a["value"].mT)),
    "key transposed": ("weighted", put(key=lambda a: a["key"].mT)),
    "keys in another order": ("sdpa", put(key=lambda a: a["key"].flip(-2))),
    "heads shifted by one": ("sdpa", put(value=lambda a: a["value"].roll(1, -3))),
    "heads split otherwise": ("weighted", put(query=lambda a: split_heads_otherwise(a["query"]))),
    "last key dropped": ("weighted", put(key=lambda a: a["key"][..., :-1, :],
                                         value=lambda a: a["value"][..., :-1, :])),
    "bias missing": ("masked", put(bias=lambda a: None)),
    "bias negated": ("sdpa", put(bias=lambda a: -a["bias"])),
    "bias scaled with the scores": ("masked", put(bias=lambda a: a["bias"] * a["scale"])),
    "bias transposed": ("sdpa", put(bias=lambda a: a["bias"].mT)),
    "bias of another head": ("masked", put(bias=lambda a: a["bias"].flip(-3))),
    "mask before the scale": ("masked", mask_before_bias_and_scale),
    "mask missing": ("masked", put(mask=lambda a: None)),
    "mask inverted": ("masked", put(mask=lambda a: ~a["mask"])),
    "mask transposed": ("filled", put(mask=lambda a: a["mask"].mT)),
    "fill of -inf for a finite one": ("filled", put(fill=lambda a: None)),
    "finite fill for -inf": ("masked", put(fill=lambda a: -1e4)),
    "fill too small": ("filled", put(fill=lambda a: -1.0)),
    "masked rows give zeros": ("masked", put(masked_row=lambda a: "zero")),
    "masked rows give nan": ("sdpa", put(masked_row=lambda a: "nan")),
    "not causal": ("sdpa_causal", put(causal=lambda a: False)),
    "causal one too far": ("sdpa_causal", strictly_causal(1)),
    "causal one too short": ("sdpa_causal", strictly_causal(-1)),
    "causal as well": ("weighted", put(causal=lambda a: True)),
    "softmax over the queries": ("masked", over_another_axis),
    "a softened softmax": ("weighted", softened),
    "rounded to float32": ("weighted", in_float32),
    "scale doubled beside a temperature": ("tempered", put(scale=lambda a: a["scale"] * 2)),
}
LOOK_UP_MISTAKES: dict[str, tuple[str, str, Callable[[Arguments], Any]]] = {
    "index off by one": ("look_up", "embedding", put(
        indices=lambda a: (a["indices"] + 1) % a["table"].shape[0])),
    "padding row zeroed": ("look_up", "embedding", put(
        table=lambda a: a["table"].index_fill(0, torch.tensor([2]), 0.0))),
    "last row clamped": ("look_up", "embedding", put(
        indices=lambda a: a["indices"].clamp_max(a["table"].shape[0] - 2))),
    "bag summed": ("bag", "embedding_bag", put(mode=lambda a: "sum")),
    "offsets halved": ("bag", "embedding_bag", put(offsets=lambda a: a["offsets"] // 2)),
    "bag pads": ("bag", "embedding_bag", put(padding_idx=lambda a: 0)),
    "weights dropped": ("weighted_bag", "embedding_bag", put(weights=lambda a: None)),
    "weights reversed": ("weighted_bag", "embedding_bag", put(
        weights=lambda a: a["weights"].flip(-1))),
}
MISTAKES = [(name, where, "attention", change)
            for name, (where, change) in ATTENTION_MISTAKES.items()]
MISTAKES += [(name, *rest) for name, rest in LOOK_UP_MISTAKES.items()]


@pytest.mark.parametrize("name", FORMS)
def test_the_right_rule_is_proven(name: str) -> None:
    evidence = validate(*form(name))
    assert isinstance(evidence, Evidence) and evidence.passed
    assert evidence.trials >= 7 and evidence.dtype == "float64" and evidence.limit == LIMIT


@pytest.mark.parametrize(("name", "where", "operator", "change"), MISTAKES,
                         ids=[name for name, *_ in MISTAKES])
def test_a_wrong_rule_is_refused(name: str, where: str, operator: str,
                                 change: Callable[[Arguments], Any]) -> None:
    candidate, graph_module = form(where)
    found = verdict(candidate, graph_module, operator, change)
    assert isinstance(found, str) and found


def test_swapped_masks_and_layouts_are_refused() -> None:
    """Mistakes in the inputs that a rule hands on, not in the operator."""
    candidate, graph_module = form("masked")
    swaps = [("query", "key"), ("key", "value"), ("query", "value"), ("mask_0", "bias_0")]
    roles = candidate.inputs
    for left, right in swaps:
        def emit(build: Any, values: Any, left: str = left, right: str = right) -> Any:
            return candidate.emit(build, {**values, left: values[right], right: values[left]})

        assert left in roles and right in roles
        assert isinstance(validate(dataclasses.replace(candidate, emit=emit), graph_module), str)
    for dropped in ("mask_0", "mask_1"):
        def emit_without(build: Any, values: Any, dropped: str = dropped) -> Any:
            none = torch.full_like(values[dropped], dropped == "mask_1")
            return candidate.emit(build, {**values, dropped: none})

        wrong = dataclasses.replace(candidate, emit=emit_without)
        assert isinstance(validate(wrong, graph_module), str)


# Rows that are masked everywhere.


def one_row_masked(rows: int, columns: int) -> torch.Tensor:
    keep = torch.ones(rows, columns, dtype=torch.bool).tril()
    keep[1] = False
    return keep


def softmax_masked(q, k, v):
    keep = one_row_masked(q.shape[-2], k.shape[-2])
    return torch.softmax((q @ k.mT * 0.3).masked_fill(~keep, -math.inf), -1) @ v


def softmax_cleaned(q, k, v):
    keep = one_row_masked(q.shape[-2], k.shape[-2])
    scores = (q @ k.mT * 0.3).masked_fill(~keep, -math.inf)
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v


def softmax_filled(q, k, v):
    keep = one_row_masked(q.shape[-2], k.shape[-2])
    return torch.softmax((q @ k.mT * 0.3).masked_fill(~keep, -1e9), -1) @ v


def sdpa_masked(q, k, v):
    return functional.scaled_dot_product_attention(
        q, k, v, one_row_masked(q.shape[-2], k.shape[-2]))


ROWS = [(softmax_masked, lambda row: row.isnan().all()),
        (softmax_cleaned, lambda row: (row == 0).all()),
        (softmax_filled, lambda row: row.isfinite().all() and (row != 0).all()),
        (sdpa_masked, lambda row: (row == 0).all())]


@pytest.mark.parametrize(("core", "expected"), ROWS, ids=[core.__name__ for core, _ in ROWS])
def test_a_fully_masked_row_gives_what_the_model_gives(core, expected) -> None:
    args = shapes(STRAIGHT)
    compiled = bc.optimize(Spelled(core).eval(), args)
    assert [m.operator for m in compiled.report.matches] == ["attention"]
    for call in (args, tuple(torch.randn(3, 5, 6, 8) for _ in range(3))):
        result, wanted = compiled(*call), core(*call)
        assert expected(wanted[..., 1, :]) and expected(result[..., 1, :])
        torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_an_input_mask_may_hide_a_row_at_any_call() -> None:
    def core(q, k, v, mask):
        return torch.softmax(q @ k.mT * 0.3 + mask, -1) @ v

    args = (*shapes(STRAIGHT), torch.zeros(2, 1, 6, 6))
    compiled = bc.optimize(Spelled(core).eval(), args)
    mask = args[-1].clone()
    mask[1, 0, 3] = -math.inf
    result = compiled(*args[:3], mask)
    assert result[1, :, 3].isnan().all() and result[0].isfinite().all()
    torch.testing.assert_close(result, core(*args[:3], mask), rtol=1e-5, atol=1e-5, equal_nan=True)


def test_identical_subgraphs_share_one_proof() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2)
    matches = bc.optimize(model.eval(), (torch.randn(2, 5, 16),)).report.matches
    times = [m.evidence.milliseconds for m in matches]
    assert len(matches) == 2 and all(m.validated for m in matches)
    assert times[0] > 0 and times[1] == 0.0
