"""The proof refuses every wrong reading of a facet: caps, sinks, mixtures, groups, windows."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from wrong_rules import Arguments, Spelled, candidates, put, tensors, verdict

from bincompile.ops import OPERATORS
from bincompile.passes.patterns import Candidate
from bincompile.passes.validate import DISTINCT, validate
from bincompile.record import Evidence


def capped(q, k, v, bias):
    return torch.softmax(30.0 * torch.tanh(q @ k.mT * 0.3 / 30.0) + bias, -1) @ v


def clamped(q, k, v, bias):
    return torch.softmax((q @ k.mT * 0.3 + bias).clamp(-3.0, 4.0), -1) @ v


def gained(q, k, v, gain, bias):
    return torch.softmax(q @ k.mT * 0.3 * gain + bias, -1) @ v


def late(q, k, v, bias, kept):
    return torch.softmax((q @ k.mT * 0.3).masked_fill(~kept, -1e4) + bias, -1) @ v


def sunk(q, k, v, sink):
    scores = torch.cat([q @ k.mT * 0.3, sink.expand(q.shape[0], -1, q.shape[2], 1)], -1)
    return torch.softmax(scores, -1)[..., :-1] @ v


class Mixed(nn.Module):
    """Heads whose scores and probabilities are mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = torch.einsum("bhij,hg->bgij", q @ k.mT * 0.3, self.before)
        return torch.einsum("bhij,hg->bgij", torch.softmax(scores, -1), self.after) @ v


def grouped(q, k, v):
    return functional.scaled_dot_product_attention(
        q, k[:, :2], v[:, :2], scale=0.3, enable_gqa=True)


def normalised_late(q, k, v):
    scores = q @ k.mT * 0.3
    powers = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (powers @ v) / powers.sum(-1, keepdim=True)


def windowed(q, k, v):
    far = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])[None, :]
    return torch.softmax((q @ k.mT * 0.3).masked_fill((far < 0) | (far > 2), -math.inf), -1) @ v


class Table(nn.Module):
    """A table with a look-up of some spelling."""

    def __init__(self, look_up: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 4))
        self.look_up = look_up

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.look_up(self.table, ids)


def times_one_hot(table, ids):
    return functional.one_hot(ids, 9).to(table.dtype) @ table


def indexed(table, ids):
    return table[ids]


def four_heads() -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(2, 4, 8, 8) for _ in range(3))


def bias() -> torch.Tensor:
    return torch.randn(2, 1, 8, 8)


def ids() -> tuple[torch.Tensor]:
    return (torch.tensor([[1, 2, 8], [0, 3, 3]]),)


FORMS: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]] = {
    "capped": lambda: (Spelled(capped), tensors(bias)),
    "clamped": lambda: (Spelled(clamped), tensors(bias)),
    "gained": lambda: (Spelled(gained), tensors(lambda: torch.rand(3, 8, 8) + 0.5, bias)),
    "late": lambda: (Spelled(late), tensors(bias, lambda: torch.rand(2, 1, 8, 8) > 0.4)),
    "sunk": lambda: (Spelled(sunk), tensors(lambda: torch.randn(3, 1, 1))),
    "mixed": lambda: (Mixed(), four_heads()),
    "grouped": lambda: (Spelled(grouped), four_heads()),
    "normalised late": lambda: (Spelled(normalised_late), tensors()),
    "windowed": lambda: (Spelled(windowed), tensors()),
    "one-hot": lambda: (Table(times_one_hot), ids()),
    "indexed": lambda: (Table(indexed), ids()),
}


@functools.cache
def form(name: str) -> tuple[Candidate, Any]:
    return candidates(*FORMS[name]())


def reference(a: Arguments) -> Any:
    return OPERATORS["attention"].reference(**a)


def sink_with_a_value(a: Arguments) -> Any:
    scores = torch.cat([a["query"] @ a["key"].mT * a["scale"],
                        a["sink"].expand(*a["query"].shape[:-1], 1)], -1)
    value = torch.cat([a["value"], a["value"][..., -1:, :]], -2)
    return torch.softmax(scores, -1) @ value, None


def cap_after_the_bias(a: Arguments) -> Any:
    scores = a["query"] @ a["key"].mT * a["scale"] + a["bias"]
    scores = a["softcap"] * torch.tanh(scores / a["softcap"])
    return torch.softmax(scores, -1) @ a["value"], None


def gain_after_the_bias(a: Arguments) -> Any:
    scores = (a["query"] @ a["key"].mT * a["scale"] + a["bias"]) * a["gain"]
    return torch.softmax(scores, -1) @ a["value"], None


def summed_over_queries(a: Arguments) -> Any:
    powers = torch.exp(a["query"] @ a["key"].mT * a["scale"])
    return (powers @ a["value"]) / powers.sum(-2)[..., None], None


def keys_tiled(a: Arguments) -> Any:
    """Heads of keys in the order of `repeat`, not of `repeat_interleave`."""
    key, value = (a[n].repeat_interleave(a["groups"], 1)[:, [0, 2, 1, 3]]
                  for n in ("key", "value"))
    return reference({**a, "groups": 1, "key": key, "value": value})


def band(width: int) -> Callable[[Arguments], Arguments]:
    def change(a: Arguments) -> Arguments:
        rows, columns = a["query"].shape[-2], a["key"].shape[-2]
        ones = torch.ones(rows, columns, dtype=torch.bool)
        near = ones.tril() & ones.triu(1 - width)
        return {**a, "mask": near, "bias": None, "causal": False}

    return change


MISTAKES: dict[str, tuple[str, Callable[[Arguments], Any]]] = {
    "cap dropped": ("capped", put(softcap=lambda a: None)),
    "cap of another height": ("capped", put(softcap=lambda a: a["softcap"] * 1.001)),
    "cap after the bias": ("capped", cap_after_the_bias),
    "cap without its factor": ("capped", put(softcap=lambda a: 1.0)),
    "clamp dropped": ("clamped", put(low=lambda a: None, high=lambda a: None)),
    "clamp from below alone": ("clamped", put(high=lambda a: None)),
    "clamp from above alone": ("clamped", put(low=lambda a: None)),
    "clamp turned round": ("clamped", put(low=lambda a: -a["high"], high=lambda a: -a["low"])),
    "clamp before the bias": ("clamped", put(late_bias=lambda a: a["bias"],
                                             bias=lambda a: None)),
    "gain dropped": ("gained", put(gain=lambda a: None)),
    "gain inverted": ("gained", put(gain=lambda a: 1 / a["gain"])),
    "gain of another head": ("gained", put(gain=lambda a: a["gain"].flip(-3))),
    "gain after the bias": ("gained", gain_after_the_bias),
    "late bias dropped": ("late", put(late_bias=lambda a: None)),
    "late bias before the mask": ("late", put(bias=lambda a: a["late_bias"],
                                              late_bias=lambda a: None)),
    "sink dropped": ("sunk", put(sink=lambda a: None)),
    "sink with a value": ("sunk", sink_with_a_value),
    "sink of another head": ("sunk", put(sink=lambda a: a["sink"].flip(-3))),
    "sink scaled": ("sunk", put(sink=lambda a: a["sink"] * a["scale"])),
    "mixture dropped": ("mixed", put(mix_before=lambda a: None)),
    "mixture transposed": ("mixed", put(mix_before=lambda a: a["mix_before"].mT)),
    "later mixture transposed": ("mixed", put(mix_after=lambda a: a["mix_after"].mT)),
    "mixtures swapped": ("mixed", put(mix_before=lambda a: a["mix_after"],
                                      mix_after=lambda a: a["mix_before"])),
    "both mixtures before": ("mixed", put(mix_before=lambda a: a["mix_after"] @ a["mix_before"],
                                          mix_after=lambda a: None)),
    "heads of keys tiled": ("grouped", keys_tiled),
    "heads of keys in another order": ("grouped", put(key=lambda a: a["key"].flip(-3))),
    "sum over the queries": ("normalised late", summed_over_queries),
    "scale dropped of a written softmax": ("normalised late", put(scale=lambda a: 1.0)),
    "window one too wide": ("windowed", band(4)),
    "window one too narrow": ("windowed", band(2)),
    "window without an end": ("windowed", put(mask=lambda a: None, bias=lambda a: None,
                                              causal=lambda a: True)),
}
LOOK_UP_MISTAKES: dict[str, tuple[str, Callable[[Arguments], Any]]] = {
    "one-hot off by one": ("one-hot", put(
        indices=lambda a: (a["indices"] + 1) % a["table"].shape[0])),
    "one-hot of the last row dropped": ("one-hot", put(
        indices=lambda a: a["indices"].clamp_max(a["table"].shape[0] - 2))),
    "negative index not wrapped": ("indexed", put(
        indices=lambda a: a["indices"].clamp_min(0), wrap=lambda a: False)),
    "negative index wrapped by one too few": ("indexed", put(indices=lambda a: torch.where(
        a["indices"] < 0, a["indices"] + a["table"].shape[0] - 1, a["indices"]))),
}
ALL = [(name, "attention", *rest) for name, rest in MISTAKES.items()]
ALL += [(name, "embedding", *rest) for name, rest in LOOK_UP_MISTAKES.items()]


@pytest.mark.parametrize("name", FORMS)
def test_the_right_reading_is_proven(name: str) -> None:
    evidence = validate(*form(name))
    assert isinstance(evidence, Evidence) and evidence.passed and evidence.trials >= 7


@pytest.mark.parametrize(("name", "operator", "where", "change"), ALL,
                         ids=[name for name, *_ in ALL])
def test_a_wrong_reading_is_refused(name: str, operator: str, where: str,
                                    change: Callable[[Arguments], Any]) -> None:
    found = verdict(*form(where), operator, change)
    assert isinstance(found, str) and ("error" in found or "shape" in found)


def test_sizes_that_are_equal_by_chance_are_told_apart() -> None:
    """Batch and tokens are as many in the example; a rule that mixes them up is refused."""
    candidate, graph_module = candidates(Spelled(windowed), tuple(
        torch.randn(8, 3, 8, 4) for _ in range(3)))

    def swapped(a: Arguments) -> Any:
        out, weights = reference(a)
        square = out.shape[0] == out.shape[-2]
        return (out if square else out.flip(-2)), weights

    assert isinstance(validate(candidate, graph_module), Evidence)
    assert "error" in str(verdict(candidate, graph_module, "attention", swapped))
    assert len(set(DISTINCT)) == len(DISTINCT)


class Strided(nn.Module):
    """Attention over frames that a convolution made: small inputs have none."""

    def __init__(self) -> None:
        super().__init__()
        self.frames = nn.Conv1d(1, 8, 20, stride=10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.frames(x[:, None]).mT
        return torch.softmax(q @ q.mT * 0.3, -1) @ q


def test_a_model_that_needs_large_sizes_is_proven_at_several() -> None:
    evidence = validate(*candidates(Strided(), (torch.randn(2, 90),)))
    assert isinstance(evidence, Evidence) and evidence.trials > 7


def test_a_rewrite_that_can_not_be_compared_is_refused() -> None:
    assert "comparison fails" in str(verdict(*form("windowed"), "attention",
                                             lambda a: ("no tensor", None)))
    assert "fails where the model runs" in str(verdict(*form("windowed"), "attention",
                                                       lambda a: 1 / 0))
