"""Normalising changes the spelling of a graph, never its results."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from bincompile.passes.capture import capture
from bincompile.passes.normalise import normalise
from bincompile.program import Program, target_name

X = (3, 6, 4)


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


def normal(function: Callable[..., Any], dtype: torch.dtype = torch.float32) -> Program:
    return normalise(capture(Function(function).eval(), (torch.randn(X).to(dtype),)).program)


def targets(program: Program) -> list[str]:
    return [target_name(n.target) for n in program.graph.nodes if n.op == "call_function"
            and "sym_size" not in target_name(n.target)]


# A function, and what is left of it.
SPELLINGS: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "dropout": (lambda x: functional.dropout(x, 0.5, False) + 1, ["aten.add.Tensor"]),
    "copies": (lambda x: x.clone().contiguous().detach() + 1, ["aten.add.Tensor"]),
    "a cast to the same": (lambda x: x.to(torch.float32).float() + 1, ["aten.add.Tensor"]),
    "a cast and back": (lambda x: x.double().float() + 1,
                        ["aten._to_copy", "aten._to_copy", "aten.add.Tensor"]),
    "a factor of one": (lambda x: x * 1.0 / 1 + 1, ["aten.add.Tensor"]),
    "a factor of two": (lambda x: x * 2.0 + 1, ["aten.mul.Tensor", "aten.add.Tensor"]),
    "a cast to another's dtype": (lambda x: x.double().type_as(x) + 1,
                                  ["aten._to_copy", "aten._to_copy", "aten.add.Tensor"]),
    "a stabilised softmax": (lambda x: torch.softmax(x - x.amax(1, keepdim=True), 1),
                             ["aten.softmax.int"]),
    "views": (lambda x: x.view(-1, 4) + 1, ["aten.reshape", "aten.add.Tensor"]),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_one_spelling_is_left(name: str) -> None:
    function, left = SPELLINGS[name]
    assert targets(normal(function)) == left


@pytest.mark.parametrize("equation", ["bnd,bmd,bn->bmn", "bnd,bmd,bk->nmk", "bnd,bn,bmd->bdnm"])
def test_an_einsum_of_three_is_a_chain_of_two(equation: str) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        parts = equation.split("->")[0].split(",")
        return torch.einsum(equation, *(x if len(p) == 3 else x[:, :, 0] for p in parts))

    program, x = normal(function), torch.randn(X)
    assert all(len(n.args[1]) == 2 for n in program.graph.nodes
               if n.op == "call_function" and n.target is torch.ops.aten.einsum.default)
    torch.testing.assert_close(program(x), function(x))


def test_a_copy_stays_before_what_reads_memory_as_it_lies() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        turned = x.transpose(0, 2).contiguous().unflatten(-1, (-1, 1)).expand(-1, -1, -1, 2)
        return torch.view_as_real(torch.view_as_complex(turned.contiguous()))

    assert "aten.clone" in targets(normal(function))
    x = torch.randn(X)
    assert torch.equal(normal(function)(x), function(x))


def powers(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    return torch.exp(x - x.amax(dim, keepdim=True))


def written_out(x: torch.Tensor) -> torch.Tensor:
    found = powers(x)
    return found / found.sum(-1, keepdim=True)


def with_max(x: torch.Tensor) -> torch.Tensor:
    found = torch.exp(x - x.max(dim=1, keepdim=True).values)
    return found / found.sum(1, keepdim=True)


@pytest.mark.parametrize("function", [written_out, with_max])
def test_a_softmax_written_out_is_the_operator(function: Callable[..., torch.Tensor]) -> None:
    program = normal(function)
    assert targets(program) == ["aten.softmax.int"]
    for x in (torch.randn(X), torch.randn(X) * 1e4, torch.zeros(X), torch.full(X, -math.inf)):
        torch.testing.assert_close(program(x), function(x), equal_nan=True)


NOT_SOFTMAX: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "another sum": lambda x: powers(x) / powers(x).sum(1, keepdim=True),
    "another maximum": lambda x: (lambda p: p / p.sum(-1, keepdim=True))(powers(x, 1)),
    "a mean": lambda x: (lambda p: p / p.mean(-1, keepdim=True))(powers(x)),
    "a power of two": lambda x: (lambda p: p / p.sum(-1, keepdim=True))(
        torch.exp2(x - x.amax(-1, keepdim=True))),
    "half the maximum": lambda x: (lambda p: p / p.sum(-1, keepdim=True))(
        torch.exp(x - x.amax(-1, keepdim=True) / 2)),
    "one more": lambda x: (lambda p: p / (p.sum(-1, keepdim=True) + 1))(powers(x)),
    "the sum of others": lambda x: powers(x) / powers(x * 2).sum(-1, keepdim=True),
    "over all": lambda x: (lambda p: p / p.sum((-2, -1), keepdim=True))(powers(x)),
}


@pytest.mark.parametrize("name", NOT_SOFTMAX)
def test_what_is_nearly_a_softmax_stays_as_it_is(name: str) -> None:
    program, x = normal(NOT_SOFTMAX[name]), torch.randn(X)
    assert "aten.softmax.int" not in targets(program)
    torch.testing.assert_close(program(x), NOT_SOFTMAX[name](x))


MEANINGS: dict[str, Callable[[torch.Tensor], Any]] = {
    "int times one": lambda x: (x.long() * 1.0).sum(-1),
    "factor of a tensor": lambda x: x * torch.ones(1, 1, 1, 1),
    "there and back": lambda x: x.mT.mT + x.permute(2, 0, 1).permute(1, 2, 0),
    "there and further": lambda x: x.permute(2, 0, 1).permute(2, 0, 1),
    "turned round": lambda x: x.permute(1, 2, 0).permute(1, 2, 0).permute(1, 2, 0),
    "copy of a part": lambda x: x[:, ::2].clone().view(-1),
    "a clone in between": lambda x: x.mT.contiguous().view(-1, 2),
    "a strided copy": lambda x: x.mT.clone(memory_format=torch.contiguous_format).flatten(),
    "casts": lambda x: x.bfloat16().float().half().float(),
    "type_as": lambda x: x.type_as(x) + x.double().type_as(x),
}


@pytest.mark.parametrize("name", MEANINGS)
def test_the_meaning_stays(name: str) -> None:
    function = MEANINGS[name]
    program = normal(function)
    for rows in (3, 5):
        x = torch.randn(rows, 6, 4)
        expected, found = function(x), program(x)
        assert expected.dtype == found.dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_captured_program_is_not_changed() -> None:
    captured = capture(Function(written_out).eval(), (torch.randn(X),)).program
    before = str(captured)
    program = normalise(captured)
    assert str(captured) == before and program.parent is captured and program.level == "normal"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_keep_their_dtype(dtype: torch.dtype) -> None:
    program = normal(lambda x: functional.dropout(x * 1.0, 0.5, False).to(x.dtype) + 1, dtype)
    assert targets(program) == ["aten.add.Tensor"]
    assert program(torch.ones(X, dtype=dtype)).dtype == dtype
