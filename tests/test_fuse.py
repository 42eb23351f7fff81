"""Fusion of rows: which nodes become one operator, which must not, and that values stay."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import bincompile as bc
from bincompile.body import Body
from bincompile.ops.fused_rows import fused_rows
from bincompile.passes.capture import capture
from bincompile.passes.check import flipped_bits
from bincompile.passes.fuse import before_fusion, fuse, signs_within
from bincompile.passes.pipeline import EXACT, LOWER, run
from bincompile.program import Program


def program_of(model: nn.Module, *args: torch.Tensor) -> Program:
    """The program with its row programs in place, not bound to kernels."""
    with torch.no_grad():
        return run((*EXACT, *LOWER), capture(model.eval(), args).program)


def bodies(program: Program) -> list[list[str]]:
    """The operations of every row program, in order."""
    return [[s.op for s in Body.parse(node.args[1]).statements] for node in program.graph.nodes
            if node.target is fused_rows.overload]


def same(model: nn.Module, program: Program, args: Sequence[torch.Tensor]) -> None:
    with torch.no_grad():
        expected, found = model(*args), program(*args)
    several = isinstance(expected, tuple)
    for e, f in zip(*((expected, found) if several else ((expected,), (found,))), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-6)


def left(program: Program) -> set[str]:
    """What the graph still calls of torch's own operators."""
    return {str(n.target).removeprefix("aten.") for n in program.graph.nodes
            if str(n.target).startswith("aten.")}


class Of(nn.Module):
    """A function as a model, with some parameters of 24 features."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.gain = nn.Parameter(torch.randn(24, generator=generator))
        self.bias = nn.Parameter(torch.randn(24, generator=generator))
        self.place = nn.Parameter(torch.randn(5, 24, generator=generator))
        self.function = function

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(self, *args)


def rms(self: Of, x: torch.Tensor) -> torch.Tensor:
    return self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def written_norm(self: Of, x: torch.Tensor) -> torch.Tensor:
    middle = x - x.mean(-1, keepdim=True)
    return middle / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt() * self.gain + self.bias


def written_gelu(self: Of, x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.erf(x / 2 ** 0.5))


def tanh_gelu(self: Of, x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x.pow(3))))


def merged(self: Of, x: torch.Tensor) -> torch.Tensor:
    rows = (x + self.bias).reshape(-1, 24)
    return (nn.functional.silu(rows) * rows).reshape(x.shape)


def placed(self: Of, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.layer_norm(x + self.place, (24,), self.gain, self.bias)


def both(self: Of, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    inner = torch.relu(x * self.gain)
    return inner, inner + self.bias


def chosen(self: Of, x: torch.Tensor) -> torch.Tensor:
    return torch.where((x > 0) & ~(x > 2.0), x * 3, -x).clamp(-1, 2)


WHOLE: dict[str, Callable[..., Any]] = {f.__name__: f for f in (
    rms, written_norm, written_gelu, tanh_gelu, merged, placed, both, chosen)}


@pytest.mark.parametrize("name", WHOLE)
def test_a_stretch_of_row_operations_is_one_region(name: str) -> None:
    model, x = Of(WHOLE[name]), torch.randn(3, 5, 24)
    program = program_of(model, x)
    assert len(bodies(program)) == 1 and not program.refusals
    same(model, program, (x,))
    same(model, program, (torch.randn(2, 5, 24) * 30,))
    made = [r for r in program.rewrites if r.operator == "fused_rows"]
    assert [r.kind for r in made] == ["exact"] and made[0].max_error <= 1e-9
    assert made[0].node in {n.name for n in program.graph.nodes}


def along(self: Of, x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x, 1).softmax(0)


def column_mean(self: Of, x: torch.Tensor) -> torch.Tensor:
    return x.mean(1, keepdim=True).sum(0, keepdim=True)


def alone(self: Of, x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x).transpose(1, 2)


def halves(self: Of, x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x).reshape(-1, 12) + 2


def integers(self: Of, x: torch.Tensor) -> torch.Tensor:
    return (x.long() + 1) * 2


def doubles(self: Of, x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x.double() + 1).float()


def flags(self: Of, x: torch.Tensor) -> torch.Tensor:
    return x * 2 > 1


NONE = {f.__name__: f for f in (along, column_mean, alone, halves, integers, doubles, flags)}


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_row_program_stays_as_it_is(name: str) -> None:
    model, x = Of(NONE[name]), torch.randn(3, 5, 24)
    program = program_of(model, x)
    assert bodies(program) == [] and program.stages[-2].level == "packed"
    same(model, program, (x,))


def around(self: Of, x: torch.Tensor) -> torch.Tensor:
    a = torch.relu(x) + self.bias
    return torch.exp(a - a.amax(1, keepdim=True)) * a


def crossed(self: Of, x: torch.Tensor) -> torch.Tensor:
    a, b = torch.relu(x) + self.bias, torch.sigmoid(x) * self.gain
    c, d = a.flip(1), b.flip(1)
    return (b + c).exp() * (a + d).tanh()


def turned(self: Of, x: torch.Tensor) -> torch.Tensor:
    y = (torch.relu(x) * self.gain).transpose(1, 2)
    return torch.tanh(y + self.bias) * 2


@pytest.mark.parametrize(("function", "ops"), [
    (around, [["relu", "add"], ["sub", "exp", "mul"]]),
    (crossed, [["relu", "add", "sigmoid", "mul"], ["add", "exp", "add", "tanh", "mul"]]),
    (turned, [["relu", "mul"], ["add", "tanh", "mul"]])])
def test_no_path_leaves_a_region_and_comes_back(function: Callable[..., Any],
                                                ops: list[list[str]]) -> None:
    model, x = Of(function), torch.randn(3, 24, 24)
    program = program_of(model, x)
    assert bodies(program) == ops
    same(model, program, (x,))


class Feed(nn.Module):
    """A residual block of binary layers, or of float ones, with several activations."""

    def __init__(self, act: Callable[[torch.Tensor], torch.Tensor], linear: Any) -> None:
        super().__init__()
        self.up, self.gate, self.down = linear(24, 40), linear(24, 40), linear(40, 24)
        self.norm, self.act = nn.LayerNorm(24), act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        return x + self.down(self.act(self.gate(normed)) * self.up(normed))


BINARY = functools.partial(bc.nn.BinaryLinear, bias=True)


def test_binary_layers_and_what_stands_between_are_one_region() -> None:
    torch.manual_seed(2)
    model, x = Feed(nn.functional.silu, BINARY), torch.randn(2, 7, 24)
    program = program_of(model, x)
    [ops] = bodies(program)
    assert sorted(ops) == sorted(["layer_norm", "binary_linear", "silu", "binary_linear", "mul",
                                  "binary_linear", "add"])
    same(model, program, (x,))
    [node] = [n for n in program.graph.nodes if n.target is fused_rows.overload]
    known = {n.name for n in before_fusion(program).graph.nodes}
    assert len(signs_within(node)) == 3 and set(signs_within(node)) <= known
    assert flipped_bits(program.at("normal"), program, [x])[0] == 0.0
    assert flipped_bits(program.at("normal"), program, [x * 1.5])[0] == 0.0


def test_the_records_of_layers_follow_them_into_their_region() -> None:
    program = program_of(Feed(torch.tanh, BINARY), torch.randn(2, 7, 24))
    [node] = [n.name for n in program.graph.nodes if n.target is fused_rows.overload]
    layers = [r for r in program.rewrites if r.operator == "binary_linear"]
    assert {r.node for r in layers} == {node} and len({r.path for r in layers}) == 3
    assert all(0 < r.bytes_after < r.bytes_before for r in layers)


def test_a_lossy_program_stays_lossy_when_its_layers_are_fused() -> None:
    model, x = Feed(torch.relu, nn.Linear), torch.randn(2, 7, 24)
    compiled = bc.optimize(model.eval(), (x,), binary="w1a1", guard=None)
    assert compiled.report.lossy and len(bodies(compiled.program)) == 1
    assert [r.kind for r in compiled.report.rewrites].count("lossy") == 3


def test_a_bias_is_added_by_the_row_program_that_follows_and_else_by_the_product() -> None:
    model, x = Feed(nn.functional.gelu, nn.Linear), torch.randn(2, 7, 24)
    program = program_of(model, x)
    linears = [n for n in program.graph.nodes if str(n.target) == "aten.linear.default"]
    assert [len(n.args) for n in linears] == [2, 2, 2]
    same(model, program, (x,))
    plain = nn.Sequential(nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 4))
    program = program_of(plain, x)
    linears = [n for n in program.graph.nodes if str(n.target) == "aten.linear.default"]
    assert [len(n.args) for n in linears] == [2, 3]
    same(plain, program, (x,))


def test_a_factor_behind_views_joins_the_rows_before_them() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = BINARY(24, 24), nn.LayerNorm(24)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            rows = self.layer(self.norm(x))
            heads = torch.tanh(rows).unflatten(-1, (4, 6)).transpose(1, 2) * 0.125
            return heads.flip(1), (rows.transpose(0, 1) * 2).flip(1)

    torch.manual_seed(4)
    model, x = Heads(), torch.randn(2, 7, 24)
    program = program_of(model, x)
    assert bodies(program) == [["layer_norm", "binary_linear", "tanh", "mul"]]
    assert left(program) >= {"mul.Tensor"}  # rows are read elsewhere too: scaled where they are
    with torch.no_grad():
        for found, expected in zip(program(x), model(x), strict=True):
            assert torch.equal(found, expected)


def test_look_ups_join_what_follows_and_bad_indices_still_raise() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.kinds = nn.Embedding(50, 24), nn.Embedding(3, 24)
            self.places, self.norm = nn.Embedding(9, 24), nn.LayerNorm(24)

        def forward(self, ids: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
            places = self.places(torch.arange(ids.shape[1])[None])
            return self.norm(self.words(ids) + self.kinds(kinds) + places)

    model = Words()
    ids, kinds = torch.randint(50, (2, 7)), torch.randint(3, (2, 7))
    program = program_of(model, ids, kinds)
    assert bodies(program) == [["embedding", "embedding", "add", "add", "layer_norm"]]
    same(model, program, (ids, kinds))
    with pytest.raises(bc.errors.InputError, match="index 50"):
        program(ids + 50 - ids, kinds)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "post_norm": lambda: nn.TransformerEncoderLayer(24, 4, 48, batch_first=True),
    "pre_norm": lambda: nn.TransformerEncoderLayer(24, 4, 48, batch_first=True, norm_first=True,
                                                   activation="gelu"),
    "decoder": lambda: nn.TransformerEncoderLayer(24, 4, 48),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_transformer_layers_keep_their_values(name: str) -> None:
    torch.manual_seed(1)
    model, x = BLOCKS[name]().eval(), torch.randn(2, 7, 24)
    program = program_of(model, x)
    assert len(bodies(program)) in (2, 3) and not {"add.Tensor", "relu", "gelu"} & left(program)
    same(model, program, (x,))


def test_other_dtypes_are_left_to_torch() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        model, x = Of(placed).to(dtype), torch.randn(2, 5, 24, dtype=dtype)
        assert bodies(program_of(model, x)) == []


@pytest.mark.parametrize("name", WHOLE)
def test_kernels_give_the_values_of_the_model(name: str) -> None:
    model, x = Of(WHOLE[name]).eval(), torch.randn(3, 5, 24)
    compiled = bc.optimize(model, (x,))
    for given in (x, torch.randn(2, 5, 24), torch.randn(5, 4, 24).transpose(0, 1)):
        same(model, compiled, (given,))


def test_the_text_of_a_program_shows_each_body() -> None:
    program = program_of(Of(both), torch.randn(3, 5, 24))
    lines = [line.strip() for line in str(program).splitlines()]
    place = next(i for i, line in enumerate(lines) if "bincompile.fused_rows([" in line)
    assert lines[place + 1:place + 5] == [
        "t0 = mul(x0, x1)", "t1 = relu(t0)", "t2 = add(t1, x2)", "return t1, t2"]


def test_a_region_that_is_not_proven_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from bincompile.passes import fuse_ops

    model, x = Of(written_gelu), torch.randn(3, 5, 24)
    aten = torch.ops.aten
    wrong = {aten.erf.default: fuse_ops.RULES[aten.tanh.default]}
    monkeypatch.setattr(fuse_ops, "RULES", {**fuse_ops.RULES, **wrong})
    program = program_of(model, x)
    assert bodies(program) == []
    [refusal] = program.refusals
    assert refusal.operator == "fused_rows" and "not proven: error" in refusal.reason
    same(model, program, (x,))


def test_regions_that_are_alike_share_their_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    from bincompile.passes import fuse as stage

    proofs: list[Any] = []
    real = stage.prove_region
    monkeypatch.setattr(stage, "prove_region", lambda w: proofs.append(w) or real(w))
    layer = functools.partial(Feed, torch.tanh, nn.Linear)
    program = program_of(nn.Sequential(layer(), layer(), layer(), layer()), torch.randn(2, 7, 24))
    found = bodies(program)
    assert len(found) > 4 and len(proofs) == len({str(b) for b in found})


def test_fusing_twice_changes_nothing() -> None:
    program = program_of(Of(both), torch.randn(3, 5, 24))
    assert bodies(fuse(program)) == bodies(program)
