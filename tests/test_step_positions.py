"""Positions one token at a time: tables, sinusoids and rotary ones, at any index of a stream."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

import bincompile as bc
from bincompile.config import Continual, Target
from bincompile.errors import ContinualError
from bincompile.passes.capture import capture
from bincompile.passes.graph import copy_module, finish
from bincompile.passes.normalise import normalise
from bincompile.passes.streaming.analysis import analyse
from bincompile.passes.streaming.build import to_steps
from bincompile.passes.streaming.free import position_references
from bincompile.program import Program
from bincompile.steps import StepProgram

E, ENTRIES, LONG = 8, 21, 17
FAR = 10**6
Call = Callable[["Model", torch.Tensor, torch.Tensor], torch.Tensor]


class Model(nn.Module):
    """Tokens (batch, T, E), and what each case makes of them and of their positions."""

    def __init__(self, *calls: Call) -> None:
        super().__init__()
        self.table = nn.Embedding(ENTRIES, E)
        self.weight = nn.Parameter(torch.randn(1, ENTRIES, E))
        self.register_buffer("frequencies", 100.0 ** -(torch.arange(4) / 4))
        self.register_buffer("places", torch.arange(ENTRIES)[None])
        angles = torch.outer(torch.arange(ENTRIES), self.frequencies)
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))
        self.calls = calls

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        index = torch.arange(x.shape[1])
        return tuple(call(self, x, index) for call in self.calls)


def turned(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def interleaved(m: Model, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    angles = (index[:, None] * m.frequencies).repeat_interleave(2, -1)
    pairs = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * angles.cos() + pairs * angles.sin()


def as_complex(m: Model, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    angles = index[:, None] * m.frequencies
    whole = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    turns = torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(whole * turns).flatten(-2)


def as_library(m: Model, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """As transformers makes them: a product of matrices, both halves alike."""
    wide = m.frequencies[None, :, None].expand(x.shape[0], -1, 1)
    angles = (wide @ index[None, None].expand(x.shape[0], 1, -1).to(wide.dtype)).transpose(1, 2)
    both = torch.cat([angles, angles], -1)
    left, right = x.chunk(2, -1)
    return x * both.cos() + torch.cat([-right, left], -1) * both.sin()


def sinusoids(m: Model, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    rate = torch.exp(torch.arange(0, E, 2) * (-math.log(10000.0) / E))
    return x + torch.stack([(index[:, None] * rate).sin(), (index[:, None] * rate).cos()],
                           -1).flatten(1)


@dataclasses.dataclass(frozen=True)
class Case:
    """A use of positions, how many a stream has of them, and how near float32 of them is."""

    name: str
    call: Call
    limit: int | None = None
    close: float = 1e-12


CASES = (
    Case("half", lambda m, x, i: turned(x, i[:, None] * m.frequencies)),
    Case("partial", lambda m, x, i: torch.cat([turned(x[..., :4], i[:, None] * m.frequencies[:2]),
                                               x[..., 4:]], -1)),
    Case("interleaved", interleaved),
    Case("complex", as_complex),
    Case("as the library has it", as_library),
    Case("sinusoids", sinusoids, close=1e-6),
    Case("a number", lambda m, x, i: x * (1 + i * 0.25)[:, None]),
    Case("a table", lambda m, x, i: x + m.table(i), ENTRIES),
    Case("two on", lambda m, x, i: x + m.table(i + 2), ENTRIES - 2),
    Case("stored places", lambda m, x, i: x + m.table(m.places[:, :x.shape[1]]), ENTRIES),
    Case("counted ones", lambda m, x, i: x + m.table(
        torch.ones(x.shape[:2], dtype=torch.int64).cumsum(1) - 1), ENTRIES),
    Case("a slice", lambda m, x, i: x + m.weight[:, :x.shape[1]], ENTRIES),
    Case("a slice from the third", lambda m, x, i: x + m.weight[:, 2:x.shape[1] + 2],
         ENTRIES - 2),
    Case("stored turns", lambda m, x, i: torch.view_as_real(torch.view_as_complex(
        x.unflatten(-1, (-1, 2))) * m.turns[:x.shape[1]]).flatten(-2), ENTRIES),
    Case("the last entry for ever", lambda m, x, i: x + m.table(i.clamp(max=9))),
)
REFUSED = (
    Case("from the end", lambda m, x, i: x + m.table(x.shape[1] - 1 - i)),
    Case("a share of the length", lambda m, x, i: x * (i / x.shape[1])[:, None]),
    Case("spread over the length", lambda m, x, i: x * torch.softmax(i * 0.1, 0)[:, None]),
)


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model(*(case.call for case in (*CASES, *REFUSED))).eval().double()


@pytest.fixture(scope="module")
def program(model: Model) -> Program:
    return normalise(capture(model, (torch.randn(2, 6, E).double(),)).program)


def steps_of(program: Program, case: Case, **options: str) -> StepProgram:
    """The step program of one of the outputs."""
    return to_steps(only(program, case), Continual(**options))


def only(program: Program, case: Case) -> Program:
    module, _ = copy_module(program.graph_module)
    output = module.graph.output_node()
    output.args = ((output.args[0][(*CASES, *REFUSED).index(case)],),)
    return program.next(finish(module), program.level)


def at(steps: StepProgram, tokens: torch.Tensor, clocks: list[int]) -> torch.Tensor:
    """The answers (rows, E) of one step of rows with these clocks."""
    with torch.no_grad():
        [found] = steps.program.graph_module(tokens[:, None], torch.arange(len(clocks)),
                                             torch.tensor(clocks), *steps.empty(len(clocks)))
    return found[:, 0]


def exact(call: Call, model: Model, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """What a model in float64 makes of tokens, where whole numbers become float64 too."""
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            return call(model, x, index)
    finally:
        torch.set_default_dtype(torch.float32)


TOKENS = torch.randn(3, LONG, E, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_positions_follow_the_clock_of_each_row(program: Program, model: Model,
                                                case: Case) -> None:
    steps = steps_of(program, case)
    assert steps.limit == case.limit
    wanted = exact(case.call, model, TOKENS, torch.arange(LONG))
    for clocks in ([0, 5, 16], [12, 1, 3]):
        tokens = torch.stack([TOKENS[row, clock] for row, clock in enumerate(clocks)])
        expected = torch.stack([wanted[row, clock] for row, clock in enumerate(clocks)])
        torch.testing.assert_close(at(steps, tokens, clocks), expected, rtol=case.close,
                                   atol=case.close)


@pytest.mark.parametrize("case", REFUSED, ids=lambda c: c.name)
def test_positions_that_know_the_length_are_refused(program: Program, case: Case) -> None:
    with pytest.raises(ContinualError, match="number of tokens"):
        steps_of(program, case)


@pytest.mark.parametrize("case", CASES[7:14], ids=lambda c: c.name)
def test_recycled_tables_begin_anew_and_say_so(program: Program, model: Model,
                                               case: Case) -> None:
    steps, limit = steps_of(program, case, positions="recycle"), case.limit
    assert limit is not None and steps.limit is None
    assert any(f"begin anew after {limit}" in note for note in steps.notes)
    wanted = exact(case.call, model, TOKENS[:, :3], torch.arange(3))
    found = at(steps, TOKENS[:, 2], [2, 2 + limit, 2 + 1000 * limit])
    torch.testing.assert_close(found, wanted[:, 2], rtol=1e-12, atol=1e-12)


def test_the_reference_of_recycled_positions_counts_from_any_start(program: Program) -> None:
    case = next(c for c in CASES if c.name == "a table")
    facts = analyse(only(program, case), Continual(positions="recycle")).facts
    [counted] = position_references(facts, start=ENTRIES - 2).values()
    assert counted(5).tolist() == [ENTRIES - 2, ENTRIES - 1, 0, 1, 2]


def test_a_million_steps_are_exact_to_a_hundred_thousandth() -> None:
    torch.manual_seed(0)
    names = ("half", "complex", "as the library has it", "sinusoids")
    chosen = [case for case in CASES if case.name in names]
    model = Model(*(case.call for case in chosen)).eval()
    program = normalise(capture(model, (torch.randn(2, 6, E),)).program)
    steps, tokens = to_steps(program, Continual()), TOKENS[:, 0].float()
    with torch.no_grad():
        answers = steps.program.graph_module(
            tokens[:, None], torch.arange(3), torch.tensor([FAR, FAR + 7, 10 * FAR]))
    model.double()
    for row, clock in enumerate((FAR, FAR + 7, 10 * FAR)):
        for case, found in zip(chosen, answers, strict=True):
            wanted = exact(case.call, model, tokens[row:row + 1, None].double(),
                           torch.tensor([clock]))
            torch.testing.assert_close(found[row:row + 1].double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_table_of_bits_is_looked_up_where_each_row_stands() -> None:
    class Bits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = bc.nn.BinaryEmbedding(ENTRIES, E)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.table(torch.arange(x.shape[1]))

    model, x = Bits().eval(), torch.randn(2, ENTRIES, E)
    compiled = bc.optimize(model, (x[:, :6],), continual=Continual(), target=Target("cpu"))
    assert "binary_embedding" in {r.operator for r in compiled.report.rewrites}
    stream = compiled.stream(2)
    torch.testing.assert_close(stream.steps(x), model(x))
    with pytest.raises(ContinualError, match="positions"):
        stream.step(x[:, 0])


def test_layers_share_the_angles_that_both_compute() -> None:
    turn = CASES[0].call
    model = Model(lambda m, x, i: turn(m, turn(m, x, i), torch.arange(x.shape[1]))).eval()
    program = normalise(capture(model, (torch.randn(2, 6, E),)).program)
    steps = to_steps(program, Continual())
    called = [str(n.target) for n in steps.program.graph.nodes]
    assert called.count("aten.cos.default") == called.count("aten.sin.default") == 1
