"""Kernels beside references: a sign of nearly 0 may fall otherwise, in few rows, no other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import bincompile as bc
from bincompile.config import Target
from bincompile.errors import ProofError
from bincompile.ops.fused_rows import DOUBTFUL, doubtful_rows, fused_rows, packed_layer
from bincompile.passes.capture import capture
from bincompile.passes.check import ResultError, prove_whole
from bincompile.passes.check_kernels import check_kernels
from bincompile.passes.pipeline import EXACT, LOWER, run
from bincompile.program import Program
from bincompile.runtime.executor import Executable, bind

ROWS = 40


class Block(nn.Module):
    """A norm and a binary layer, whose first sign of row 3 is taken of nearly nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.layer = nn.LayerNorm(16), bc.nn.BinaryLinear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.layer(self.norm(x))) + 1.0


def inputs() -> torch.Tensor:
    x = torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(1))
    x[3] -= x[3].mean()
    x[3, 0] = 0.0
    x[3, 1:] -= x[3, 1:].mean()
    return x


def bound() -> tuple[Program, Executable, torch.Tensor]:
    model, x = Block().eval(), inputs()
    with torch.no_grad():
        program = run((*EXACT, *LOWER), capture(model, (x,)).program)
    return program, bind(program, Target("cpu")), x


def changed(executable: Executable, change: Callable[[torch.Tensor], None]) -> Executable:
    """The executable with a row program whose first result is changed."""
    [name] = executable.bound
    function = executable.bound[name]

    def run_changed(*values: Any) -> list[torch.Tensor]:
        found = [t.clone() for t in function(*values)]
        change(found[0])
        return found

    return dataclasses.replace(executable, bound={name: run_changed})


def off(*rows: int) -> Callable[[torch.Tensor], None]:
    def change(result: torch.Tensor) -> None:
        result[list(rows)] += 0.25

    return change


def test_only_rows_of_doubt_may_differ() -> None:
    program, executable, x = bound()
    for on in ("reference", "kernels"):
        check_kernels(program, executable, [x], on)
        check_kernels(program, changed(executable, off(3)), [x], on)
        for rows in ((4,), (3, 4), tuple(range(ROWS))):
            with pytest.raises(ProofError, match="differs from its reference by"):
                check_kernels(program, changed(executable, off(*rows)), [x], on)


def test_not_many_rows_may_differ() -> None:
    program, executable, x = bound()
    doubtful = x[3].repeat(ROWS, 1)
    check_kernels(program, changed(executable, off(0)), [doubtful])
    with pytest.raises(ProofError):
        check_kernels(program, changed(executable, off(*range(ROWS // 2))), [doubtful])


def test_a_model_whose_signs_round_otherwise_is_proven_by_its_kernels() -> None:
    program, executable, x = bound()
    model = Block().eval()

    def flat(values: list[Any]) -> list[Any]:
        return [model(*values)]

    whole = prove_whole(flat, program, executable, [x])
    assert "largest relative difference" in whole.note

    def other(row: int) -> Executable:
        made = changed(executable, off(row))

        def function(*values: Any) -> tuple[Any, ...]:
            results = [t.clone() for t in executable.function(*values)]
            results[0][row] += 0.25
            return tuple(results)

        return dataclasses.replace(made, function=function)

    prove_whole(flat, program, other(3), [x])
    with pytest.raises(ProofError):
        prove_whole(flat, program, other(4), [x])
    with pytest.raises(ResultError):
        prove_whole(flat, program, dataclasses.replace(
            other(4), bound=executable.bound), [x])


def test_doubt_follows_from_rounding_where_a_row_is_small() -> None:
    """gelu is nearly 0 far below: as float32 computes it the sign is another than the exact one."""
    x = torch.full((2, 8), -12.0)
    x[:, 0], x[1, 1] = 0.01, -5.6
    layer = packed_layer(4, 8, torch.Generator().manual_seed(0))
    body = ("t0 = gelu(x0, 'none')\n"
            "t1 = binary_linear(t0, x1, x2, x3, 8, 'binary', None, None)\nreturn t1")
    given = fused_rows.bind(([x, *layer], body), {})
    assert doubtful_rows(given).tolist() == [True, True]
    given["inputs"][0] = x.abs()
    assert doubtful_rows(given).tolist() == [False, False]
    assert DOUBTFUL == 1e-6
