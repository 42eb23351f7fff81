"""Attention one token at a time: every class and facet against plain torch, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from bincompile.config import Continual
from bincompile.errors import ContinualError
from bincompile.ops.attention import attention as whole_attention
from bincompile.passes import pipeline
from bincompile.passes.capture import capture
from bincompile.passes.graph import copy_module, finish
from bincompile.passes.normalise import normalise
from bincompile.passes.streaming.banded import banded
from bincompile.passes.streaming.build import to_steps
from bincompile.passes.streaming.distances import Sight
from bincompile.program import Program
from bincompile.steps import StepProgram

E, H, D, W, LONG = 8, 2, 4, 5, 23
SCALE = 0.6
WINDOW = Continual(W)
attention = torch.ops.bincompile.attention
Given = dict[str, Any]


class Model(nn.Module):
    """Query, key and value of one layer, and what the cases add to their attention."""

    def __init__(self, *cases: Case) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(E, E) for _ in range(3))
        self.slopes = nn.Parameter(torch.tensor([0.3, 0.7]))
        self.table, self.pair = nn.Parameter(torch.randn(H, 8)), nn.Parameter(torch.randn(H, H))
        self.one = nn.Parameter(torch.randn(1, H, 1, D))
        self.cases, self.known = cases, []  # heads are made once for all cases

    def heads(self, x: torch.Tensor) -> list[torch.Tensor]:
        known = next((heads for tokens, heads in self.known if tokens is x), None)
        if known is None:
            known = [layer(x).unflatten(-1, (H, D)).transpose(1, 2)
                     for layer in (self.q, self.k, self.v)]
            self.known.append((x, known))
        return known

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.known.clear()
        found = tuple(case.call(self, x) for case in self.cases)
        self.known.clear()
        return found


def distance(length: int) -> torch.Tensor:
    places = torch.arange(length)
    return places[:, None] - places


def attend(model: Model, x: torch.Tensor, given: Given) -> torch.Tensor:
    """The operator as a graph has it."""
    query, key, value = model.heads(x)
    if given.get("groups"):
        key, value = key[:, :1], value[:, :1]
    given = dict(given)
    bias, mask = given.pop("bias", None), given.pop("mask", None)
    return attention(query, key, value, bias, mask, SCALE, **given)[0].transpose(1, 2)


def plain(model: Model, x: torch.Tensor, given: Given, seen: torch.Tensor) -> torch.Tensor:
    """The same in plain torch, of the keys that are seen."""
    query, key, value = model.heads(x)
    if given.get("groups"):
        key, value = (t[:, :1].expand_as(t) for t in (key, value))
    scores = query @ key.mT * SCALE * given.get("gain", 1.0)
    if given.get("mix_before") is not None:
        scores = torch.einsum("gh,bhmn->bgmn", given["mix_before"], scores)
    if given.get("softcap"):
        scores = given["softcap"] * torch.tanh(scores / given["softcap"])
    scores = scores + given.get("bias", 0.0)
    scores = scores.clamp(given.get("low", -math.inf), given.get("high", math.inf))
    scores = scores + given.get("late_bias", 0.0)
    for hidden in (~seen, ~given.get("mask", seen)):
        scores = scores.masked_fill(hidden, -math.inf)
    if given.get("sink") is not None:
        scores = torch.cat([scores, given["sink"].expand(*scores.shape[:-1], 1)], -1)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)[..., :x.shape[1]]
    if given.get("mix_after") is not None:
        weights = torch.einsum("gh,bhmn->bgmn", given["mix_after"], weights)
    return (weights @ value).transpose(1, 2)


@dataclasses.dataclass(frozen=True)
class Case:
    """An attention, the window asked for, and what a query of the reference sees."""

    name: str
    given: Callable[[Model, int], Given]
    continual: Continual = WINDOW
    form: str = "stream_attention"
    before: int | None = W - 1
    ahead: int = 0

    def call(self, model: Model, x: torch.Tensor) -> torch.Tensor:
        return attend(model, x, self.given(model, x.shape[1]))

    def wanted(self, model: Model, x: torch.Tensor) -> torch.Tensor:
        back = distance(x.shape[1])
        seen = back >= -self.ahead
        seen = seen if self.before is None else seen & (back <= self.before)
        given = self.given(model, x.shape[1])
        return plain(model, x, {k: v for k, v in given.items() if k != "causal"}, seen)


def causal(**more: Any) -> Given:
    return {"causal": True, **more}


def added(function: Callable[[Model, torch.Tensor], torch.Tensor], name: str = "bias",
          ) -> Callable[[Model, int], Given]:
    return lambda model, length: causal(**{name: function(model, distance(length))})


def t5(model: Model, back: torch.Tensor) -> torch.Tensor:
    far = back.clamp(min=0)
    wide = 4 + (torch.log(far.clamp(min=1).double() / 4) / math.log(8) * 4).long()
    return model.table[:, torch.where(far < 4, far, wide.clamp(max=7))]


def alibi(model: Model, back: torch.Tensor) -> torch.Tensor:
    return -back * model.slopes[:, None, None]


ALL = Continual()
SLOW = {"form": "stream_window"}
CASES = (
    Case("causal", lambda m, n: causal()),
    Case("unbounded", lambda m, n: causal(), ALL, before=None),
    Case("one token", lambda m, n: causal(), Continual(1), before=0),
    Case("a band of its own", lambda m, n: {"mask": (distance(n) >= 0) & (distance(n) < 4)}, ALL,
         before=3),
    Case("a narrower window", lambda m, n: {"mask": (distance(n) >= 0) & (distance(n) < 9)}),
    Case("two tokens ahead", lambda m, n: {"mask": (distance(n) >= -2) & (distance(n) < 3)}, ALL,
         before=2, ahead=2),
    Case("itself not", lambda m, n: {"mask": distance(n) > 0, "masked_row": "zero"}, **SLOW),
    Case("every other", lambda m, n: {"mask": (distance(n) >= 0) & (distance(n) % 2 == 0)}),
    Case("slopes", added(alibi)),
    Case("by place", lambda m, n: causal(bias=m.slopes[:, None, None] * torch.arange(n))),
    Case("one bias with its mask", lambda m, n: {"bias": torch.where(
        distance(n) >= 0, alibi(m, distance(n)), -math.inf)}),
    Case("buckets", added(t5)),
    Case("buckets, unbounded", added(t5), ALL, before=None),
    Case("softcap", lambda m, n: causal(softcap=0.7)),
    Case("sink", lambda m, n: causal(sink=m.slopes[:, None, None])),
    Case("groups", lambda m, n: causal(groups=2)),
    Case("clamped", lambda m, n: causal(low=-0.2, high=0.3, bias=alibi(m, distance(n)),
                                        late_bias=t5(m, distance(n))), **SLOW),
    Case("gain by distance", added(lambda m, back: 1 / (1.0 + back.abs()), "gain"), **SLOW),
    Case("mixed before", lambda m, n: causal(mix_before=m.pair), **SLOW),
)


def deep(layers: int) -> Callable[[Model, torch.Tensor], torch.Tensor]:
    def call(model: Model, x: torch.Tensor) -> torch.Tensor:
        for _ in range(layers):
            x = x + attend(model, x, {}).flatten(2)
        return x

    return call


@dataclasses.dataclass(frozen=True)
class Bidirectional:
    """Layers that see the whole window; the formula is the model itself on the last tokens."""

    name: str
    call: Callable[[Model, torch.Tensor], torch.Tensor]
    continual: Continual = WINDOW


@dataclasses.dataclass(frozen=True)
class Refused:
    """What can't be had one token at a time, and words of the reason."""

    name: str
    call: Callable[[Model, torch.Tensor], torch.Tensor]
    reason: str
    continual: Continual = WINDOW


def pooled(model: Model, x: torch.Tensor) -> torch.Tensor:
    _, key, value = model.heads(x)
    found = attention(model.one.expand(x.shape[0], H, 1, D), key, value, None, None, SCALE)[0]
    return found.flatten(1)


def padded(model: Model, x: torch.Tensor) -> torch.Tensor:
    return attend(model, functional.pad(x, (0, 0, 1, 0))[:, :-1] + x, {})


def masked(function: Callable[[torch.Tensor], torch.Tensor], **more: Any,
           ) -> Callable[[Model, torch.Tensor], torch.Tensor]:
    return lambda model, x: attend(model, x, {"mask": function(distance(x.shape[1])), **more})


WINDOWS = (
    Bidirectional("one layer", deep(1)),
    Bidirectional("two layers", deep(2)),
    Bidirectional("the whole window", deep(1), Continual(W, outputs="all")),
    Bidirectional("causal, two layers, of the last tokens", lambda m, x: attend(
        m, attend(m, x, causal()).flatten(2), causal()), Continual(W, semantics="window")),
    Bidirectional("a query that stays", pooled, Continual(W, semantics="window")),
    Bidirectional("tokens that see others", padded, Continual(W, semantics="window")),
)
BANDED = Continual(W, semantics="banded")
REFUSALS = (
    Refused("three layers", deep(3), "mixed already"),
    Refused("all of two layers", deep(2), "mixed already", Continual(W, outputs="all")),
    Refused("not causal", deep(1), "no causal mask was found", BANDED),
    Refused("a prefix", masked(lambda back: (back >= 0) | (torch.arange(back.shape[0]) < 3)),
            "is no band", BANDED),
    Refused("hidden keys with a score", masked(lambda back: back >= 0, fill=0.0),
            "the score 0.0", BANDED),
    Refused("far ahead", masked(lambda back: back >= -7), "sees 7 tokens ahead", BANDED),
    Refused("roots of the distance", lambda m, x: attend(m, x, causal(
        bias=-distance(x.shape[1]).abs().double().sqrt())), "does not settle", ALL),
    Refused("by the number of tokens", lambda m, x: attend(m, x, causal(
        bias=distance(x.shape[1]).double() / x.shape[1])), "number of tokens"),
    Refused("mixed, unbounded", lambda m, x: attend(m, x, causal(mix_after=m.pair)),
            "needs a window", ALL),
)
EVERY = (*CASES, *WINDOWS, *REFUSALS)


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    model = Model(*EVERY).eval().double()
    return normalise(capture(model, (torch.randn(2, 6, E).double(),)).program)


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model(*EVERY).eval().double()


def steps_of(program: Program, case: Any) -> StepProgram:
    """The step program of one of the outputs."""
    module, _ = copy_module(program.graph_module)
    output = module.graph.output_node()
    output.args = ((output.args[0][EVERY.index(case)],),)
    return to_steps(program.next(finish(module), program.level), case.continual)


def stepped(steps: StepProgram, x: torch.Tensor) -> torch.Tensor:
    """The answers (rows, LONG, ...) of two rows in a stream of three, one of which joins late."""
    states = [torch.full_like(s, 77) for s in steps.empty(3)]
    clock, homes, found = torch.zeros(3, dtype=torch.int64), torch.tensor([2, 0]), []
    for step in range(LONG + 3):
        moving = [row for row, join in ((0, 0), (1, 3)) if 0 <= step - join < LONG]
        moving = moving[::-1] if step % 2 else moving
        rows = homes[moving]
        token = torch.stack([x[row, int(clock[homes[row]])] for row in moving])[:, None]
        with torch.no_grad():
            [answer] = steps.program.graph_module(token, rows, clock, *states)
        found += [(row, int(clock[homes[row]]), part)
                  for row, part in zip(moving, answer, strict=True)]
        clock[rows] += 1
    made = torch.full((2, LONG, *found[0][2].shape), math.nan, dtype=torch.float64)
    for row, at, part in found:
        made[row, at] = part
    return made


def operators(steps: StepProgram) -> set[str]:
    return {str(n.target).split(".")[1] for n in steps.program.graph.nodes
            if str(n.target).startswith("bincompile.")}


TOKENS = torch.randn(2, LONG, E, generator=torch.Generator().manual_seed(1)).double() * 2


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_facet_equals_plain_torch_within_its_band(program: Program, model: Model,
                                                        case: Case) -> None:
    steps = steps_of(program, case)
    assert case.form in operators(steps)
    found = stepped(steps, TOKENS)[:, :, 0]
    with torch.no_grad():
        wanted = case.wanted(model, TOKENS)
    late = steps.delay
    assert late == case.ahead
    torch.testing.assert_close(found[:, late:], wanted[:, :LONG - late], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", WINDOWS, ids=lambda c: c.name)
def test_bidirectional_layers_equal_the_model_on_the_last_tokens(program: Program, model: Model,
                                                                 case: Bidirectional) -> None:
    steps = steps_of(program, case)
    assert steps.semantics == f"window({W})" and steps.first == W - 1
    found = stepped(steps, TOKENS)
    for at in range(W - 1, LONG):
        with torch.no_grad():
            wanted = case.call(model, TOKENS[:, at + 1 - W:at + 1])
        wanted = wanted if steps.answers[0] is None or case.continual.outputs == "all" \
            else wanted[:, -1:]
        torch.testing.assert_close(found[:, at], wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", REFUSALS, ids=lambda c: c.name)
def test_what_does_not_fit_is_refused_with_its_node_and_reason(program: Program,
                                                               case: Refused) -> None:
    with pytest.raises(ContinualError, match=case.reason) as raised:
        steps_of(program, case)
    assert "(bincompile.attention)" in str(raised.value) and "test_step_attention.py:" in str(
        raised.value)


def test_windows_say_whether_they_truncate(program: Program) -> None:
    said = {case.name: (steps.semantics, steps.windows[0][1], steps.receptive_field)
            for case in CASES[:5] for steps in [steps_of(program, case)]}
    assert said["causal"] == ("banded(5), truncates", 5, 5)
    assert said["unbounded"][1:] == (None, None)
    assert said["one token"][1:] == (1, 1)
    assert said["a band of its own"] == ("banded(4)", 4, 4)
    assert said["a narrower window"] == ("banded(5), truncates", 5, 5)


@pytest.mark.slow
def test_two_layers_of_an_encoder_equal_the_encoder_on_the_window() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 12, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval().double()
    captured = capture(encoder, (torch.randn(2, 6, E).double(),)).program
    program = pipeline.run(pipeline.EXACT, captured)
    steps = to_steps(program, Continual(W))
    found = stepped(steps, TOKENS)[:, :, 0]
    for at in range(W - 1, LONG):
        with torch.no_grad():
            wanted = encoder(TOKENS[:, at + 1 - W:at + 1])[:, -1]
        torch.testing.assert_close(found[:, at], wanted, rtol=1e-9, atol=1e-9)


class Memory(nn.Module):
    """Queries of a stream, keys and values of what does not change, some of them hidden."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(E, E) for _ in range(3))

    def forward(self, x: torch.Tensor, memory: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        query, key, value = (layer(t).unflatten(-1, (H, D)).transpose(1, 2) for layer, t in (
            (self.q, x), (self.k, memory), (self.v, memory)))
        found = attention(query, key, value, None, kept[:, None, None, :], SCALE)[0]
        return found.transpose(1, 2).flatten(2)


def test_keys_that_do_not_change_are_computed_once_for_each_row() -> None:
    torch.manual_seed(0)
    model = Memory().eval().double()
    memory, kept = torch.randn(3, 7, E).double(), torch.rand(3, 7) > 0.4
    kept[:, 0] = True
    program = normalise(capture(model, (torch.randn(3, 6, E).double(), memory, kept)).program)
    steps = to_steps(program, Continual(W, time_dim={"x": 1}))
    assert steps.prepare is not None and steps.windows == ()
    states = steps.empty(3, steps.prepare.graph_module(memory, kept))
    rows, tokens = torch.tensor([2, 0]), TOKENS[:, :1]
    with torch.no_grad():
        [found] = steps.program.graph_module(tokens, rows, torch.tensor([4, 0, 9]), *states)
        wanted = model(tokens, memory[rows], kept[rows])
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_the_reference_in_blocks_is_the_attention_with_its_band() -> None:
    query, key, value = (torch.randn(1, H, 600, D).double() for _ in range(3))
    bias, back = torch.randn(H, 600, 600).double(), distance(600)
    given = whole_attention.bind((query, key, value, bias, None, SCALE), {"softcap": 2.0})
    seen = (back >= -3) & (back <= 40)
    wanted = whole_attention.reference(**{**given, "mask": seen})[0]
    torch.testing.assert_close(banded(given, Sight(40, 3))[0], wanted, rtol=1e-12, atol=1e-12)
