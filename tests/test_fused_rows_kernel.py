"""Compiled row programs against their reference: random bodies, odd sizes, hostile numbers."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from bincompile.body import Body
from bincompile.config import Target
from bincompile.ops import OPERATORS
from bincompile.ops.fused_rows import doubtful_rows, packed_layer
from bincompile.runtime.bound import Bound
from bincompile.runtime.kernels import Call, Dynamic, kernels_of

FUSED = OPERATORS["fused_rows"]
ROWS = next(kernel for kernel in kernels_of("fused_rows") if kernel.name == "tvm-rows")
HOST = Target.host()
pytestmark = pytest.mark.skipif(not HOST.isa, reason="no instruction set to compile for")


def call_of(body: str, inputs: list[torch.Tensor], run_time: set[int] | None = None,
            target: Target = HOST) -> Call:
    """A call with the inputs at these places known at run time: by default the first."""
    places = {0} if run_time is None else run_time
    known = [Dynamic(value) if place in places else value for place, value in enumerate(inputs)]
    return Call(FUSED, {"inputs": known, "body": body}, target)


def run(call: Call, inputs: list[torch.Tensor] | None = None) -> tuple[torch.Tensor, ...]:
    assert ROWS.supports(call) is None
    bound = ROWS.bind(call)
    assert isinstance(bound, Bound)
    parts = call.arguments["inputs"]
    values = inputs or call.value("inputs")
    return bound(*(v for v, part in zip(values, parts, strict=True) if isinstance(part, Dynamic)))


def agree(found: tuple[torch.Tensor, ...], body: str, inputs: list[torch.Tensor],
          limit: float = 1e-5) -> None:
    """Found is what the reference gives, but for rows in which a sign is in doubt."""
    wanted = FUSED.overload(inputs, body)
    doubt = doubtful_rows({"inputs": inputs, "body": body})
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        if doubt is not None:
            clear = ~doubt.expand(other.shape[:-1].numel())
            assert bool(clear.any()) or not clear.numel()
            one, other = (t.reshape(-1, t.shape[-1])[clear] for t in (one, other))
        torch.testing.assert_close(one, other, rtol=limit, atol=limit, equal_nan=True)


UNARY = ("neg", "abs", "exp", "relu", "sigmoid", "tanh", "erf", "silu")
BINARY = ("add", "sub", "mul", "maximum", "minimum")
OTHERS = ("gelu({0}, 'none')", "gelu({0}, 'tanh')", "clamp({0}, -0.5, 1)", "clamp({0}, None, 0.7)",
          "pow({0}, 2)", "pow({0}, 3)", "softmax({0})", "layer_norm({0}, x2, x3, 1e-05)",
          "layer_norm({0}, None, None, 1e-05)", "rms_norm({0}, x2, 1e-06)", "mul({0}, 0.25)",
          "sub(1.5, {0})", "div({0}, 3)", "mul({0}, x4)", "add({0}, x3)", "add({0}, x5)")


def random_body(draw: random.Random, linears: bool) -> str:
    """A body of 3 to 8 statements over x0, x1 (rows), x2, x3 (columns), x4 (a number a row), x5
    (rows that repeat) and, with `linears`, the layers x6.. and x9.. of the same width."""
    lines: list[str] = []
    wide = ["x0", "x1"]

    def give(text: str) -> str:
        lines.append(f"t{len(lines)} = {text}")
        return f"t{len(lines) - 1}"

    for _ in range(draw.randint(3, 8)):
        a, b = draw.choice(wide), draw.choice(wide)
        kind = draw.randrange(8 if linears else 6)
        if kind < 2:
            wide.append(give(f"{draw.choice(UNARY)}({a})"))
        elif kind == 2:
            wide.append(give(f"{draw.choice(BINARY)}({a}, {b})"))
        elif kind == 3:
            wide.append(give(draw.choice(OTHERS).format(a)))
        elif kind == 4:
            whole = give(f"{draw.choice(('sum', 'mean', 'amax', 'amin'))}({a})")
            wide.append(give(f"{draw.choice(('sub', 'maximum'))}({b}, {whole})"))
        elif kind == 5:
            truth = give(f"{draw.choice(('lt', 'le', 'gt', 'ge', 'eq', 'ne'))}({a}, {b})")
            wide.append(give(f"where({truth}, {a}, {draw.choice((b, '0.5'))})"))
        else:
            layer = draw.choice((6, 9))
            wide.append(give(f"binary_linear({a}, x{layer}, x{layer + 1}, x{layer + 2}, "
                             f"{{0}}, 'binary', None, None)"))
        # keeps values of a size at which errors mean something
        wide[-1] = give(f"layer_norm({wide[-1]}, None, None, 0.001)")
    results = sorted(draw.sample(wide[2:], min(len(wide) - 2, draw.randint(1, 3))))
    last = give(f"add({wide[-1]}, {give('mul(x5, x4)')})")
    last = give(f"add({give(f'add({last}, x2)')}, {give('sub(x0, x1)')})")
    last = give(f"sub({last}, x3)")
    for layer in (6, 9) if linears else ():
        last = give(f"binary_linear({last}, x{layer}, x{layer + 1}, x{layer + 2}, "
                    "{0}, 'binary', None, None)")
    return "\n".join([*lines, f"return {', '.join([*dict.fromkeys(results), last])}"])


def random_inputs(rows: int, columns: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return [normal(2, rows, columns), normal(2, rows, columns), normal(columns), normal(columns),
            normal(2, rows, 1), normal(1, rows, columns),
            *packed_layer(columns, columns, generator), *packed_layer(columns, columns, generator)]


def random_cases(count: int) -> list[Any]:
    widths = (1, 3, 16, 17, 31, 48, 63, 64, 65, 100, 130, 257)
    return [pytest.param(seed, widths[seed % len(widths)], (1, 5, 0, 33)[seed % 4],
                         id=f"{seed}-{widths[seed % len(widths)]}") for seed in range(count)]


def check_random(seed: int, columns: int, rows: int) -> None:
    draw = random.Random(seed)
    body = random_body(draw, linears=seed % 2 == 1).format(columns)
    inputs = random_inputs(rows, columns, seed)
    inputs = inputs[:Body.parse(body).inputs]
    call = call_of(body, inputs, {0, 1, 2, 3, 4, 5})
    agree(run(call), body, inputs, 1e-4 if seed % 2 else 2e-5)


@pytest.mark.parametrize(("seed", "columns", "rows"), random_cases(8))
def test_a_random_body_gives_what_its_reference_gives(seed: int, columns: int, rows: int) -> None:
    check_random(seed, columns, rows)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8, 400))
def test_many_random_bodies_give_what_their_references_give(seed: int) -> None:
    check_random(seed, 1 + seed * 7 % 257, (1, 5, 33, 70)[seed % 4])
