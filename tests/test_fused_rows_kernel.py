"""Compiled row programs against their reference: random bodies, odd sizes, hostile numbers."""

from __future__ import annotations

import math
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from bincompile.body import Body
from bincompile.config import Target
from bincompile.errors import InputError
from bincompile.ops import OPERATORS, bits
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


@pytest.mark.parametrize(("seed", "columns", "rows"), random_cases(6))
def test_a_random_body_gives_what_its_reference_gives(seed: int, columns: int, rows: int) -> None:
    check_random(seed, columns, rows)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6, 400))
def test_many_random_bodies_give_what_their_references_give(seed: int) -> None:
    check_random(seed, 1 + seed * 7 % 257, (1, 5, 33, 70)[seed % 4])


def block_body(width: int, inner: int) -> str:
    """What stands between two attention cores: projection, residual, norm, FFN, norm, q and k."""
    return f"""t0 = binary_linear(x0, x2, x3, x4, {width}, 'binary', None, None)
t1 = add(t0, x1)
t2 = layer_norm(t1, x5, x6, 1e-12)
t3 = binary_linear(t2, x7, x8, x9, {width}, 'binary', None, None)
t4 = gelu(t3, 'none')
t5 = binary_linear(t4, x10, x11, None, {inner}, 'binary', None, x12)
t6 = add(t5, t2)
t7 = layer_norm(t6, x13, x14, 1e-12)
t8 = binary_linear(t7, x2, x3, x4, {width}, 'binary', None, None)
t9 = binary_linear(t7, x15, x16, None, {width}, 'binary', x17, None)
return t7, t8, t9"""


def block_inputs(rows: int, width: int, inner: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(width)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def layer(outputs: int, features: int) -> list[torch.Tensor]:
        return packed_layer(outputs, features, generator)

    return [normal(rows, width), normal(rows, width), *layer(width, width), normal(width),
            normal(width), *layer(inner, width), *layer(width, inner)[:2], normal(inner),
            normal(width), normal(width), *layer(width, width)[:2], torch.tensor([0.7])]


@pytest.mark.parametrize(("width", "inner"), [(64, 192), (50, 77)])
def test_a_block_between_attention_cores(width: int, inner: int) -> None:
    body, inputs = block_body(width, inner), block_inputs(70, width, inner)
    bound = ROWS.bind(call_of(body, inputs, {0, 1}))
    agree(bound(*inputs[:2]), body, inputs, 1e-4)
    for rows in (0, 1, 3, 33):
        some = [inputs[0][:rows], inputs[1][:rows], *inputs[2:]]
        agree(bound(*some[:2]), body, some, 1e-4)


def test_threads_rows_and_repetitions_do_not_change_a_bit() -> None:
    body, inputs = block_body(64, 192), block_inputs(1000, 64, 192)
    bound, threads = ROWS.bind(call_of(body, inputs, {0, 1})), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = bound(*inputs[:2])
        one_row = bound(inputs[0][17:18], inputs[1][17:18])
        torch.set_num_threads(2)
        for _ in range(100):
            for found, wanted in zip(bound(*inputs[:2]), alone, strict=True):
                assert torch.equal(found, wanted)
    finally:
        torch.set_num_threads(threads)
    for found, wanted in zip(one_row, alone, strict=True):
        assert torch.equal(found, wanted[17:18])
    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(lambda _: bound(*inputs[:2]), range(8)):
            assert all(map(torch.equal, results, alone))


def test_a_linear_in_a_row_program_has_the_bits_of_the_linear_alone() -> None:
    for features, outputs in ((64, 192), (50, 77), (1, 1), (33, 16)):
        inputs = [torch.randn(5, features), *packed_layer(outputs, features, torch.Generator())]
        inputs[0][0, 0], inputs[0][1], inputs[0][2] = math.nan, 0.0, -0.0
        inputs[0][3, 0], inputs[0][4, features // 2] = math.inf, -math.inf
        body = f"t0 = binary_linear(x0, x1, x2, x3, {features}, 'binary', None, None)\nreturn t0"
        found, = run(call_of(body, inputs))
        wanted = OPERATORS["binary_linear"].overload(*inputs, features, "binary")
        assert torch.equal(found.isnan(), wanted.isnan())
        assert torch.equal(found.nan_to_num(), wanted.nan_to_num())


SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38, 1.0, -1.0, 100.0,
           -100.0, 5.5, -5.5, 0.5, -0.5]
UNARY_CALLS = [*(f"{name}({{0}})" for name in (*UNARY, "log", "sqrt", "rsqrt", "reciprocal")),
               "gelu({0}, 'tanh')", "clamp({0}, -0.5, 1)", "pow({0}, 3)", "pow({0}, -1)",
               "pow({0}, 0)", "where(lt({0}, 0.5), {0}, 2.0)"]


def test_special_numbers_pass_through_every_operation_as_in_torch() -> None:
    lines = [f"t{place} = {call.format('x0')}" for place, call in enumerate(UNARY_CALLS)
             if not call.startswith("where")]
    for call in (*(f"{name}(x0, x1)" for name in (*BINARY, "div")), "amax(x1)", "amin(x1)",
                 "sum(x1)", "mean(x1)", "softmax(x1)"):
        lines.append(f"t{len(lines)} = {call}")
    for name in ("lt", "le", "gt", "ge", "eq", "ne"):
        lines += [f"t{len(lines)} = {name}(x0, x1)", f"t{len(lines) + 1} = "
                  f"where(t{len(lines)}, x0, 7.5)"]
    both = len(lines)
    lines += [f"t{both} = lt(x0, x1)", f"t{both + 1} = logical_not(t{both})",
              f"t{both + 2} = ge(x0, 0.5)", f"t{both + 3} = logical_or(t{both + 1}, t{both + 2})",
              f"t{both + 4} = where(t{both + 3}, x1, 1.5)"]
    results = [line.split(" = ")[0] for line in lines if not any(
        f" = {name}(" in line for name in ("lt", "le", "gt", "ge", "eq", "ne", "logical_not",
                                           "logical_or"))]
    body = "\n".join([*lines, f"return {', '.join(results)}"])
    values = torch.tensor(SPECIAL)
    inputs = [values.expand(len(SPECIAL), -1).contiguous(),
              values.unsqueeze(-1).expand(-1, len(SPECIAL)).contiguous()]
    agree(run(call_of(body, inputs, {0, 1})), body, inputs)


def test_inputs_may_lie_anywhere() -> None:
    body = "t0 = add(x0, x1)\nt1 = layer_norm(t0, x2, None, 1e-05)\nreturn t1"
    memory = torch.randn(1 + 6 * 7 * 19)
    strided = memory[1:].view(6, 7, 19)
    places = [strided.transpose(0, 1), strided[:, :, :17], strided[::2], strided]
    for x in places:
        inputs = [x, torch.randn(x.shape[1:]).unsqueeze(0), torch.randn(2 * x.shape[-1])[::2]]
        agree(run(call_of(body, inputs, {0, 1, 2})), body, inputs)
        with torch.no_grad():
            agree(run(call_of(body, inputs, {0, 1, 2}),
                      [value.clone().requires_grad_() for value in inputs]), body, inputs)


def test_an_index_that_is_not_in_its_table_is_named() -> None:
    body = ("t0 = embedding(x1, x0)\nt1 = binary_embedding(x0, x2, x3, 20)\n"
            "t2 = add(t0, t1)\nreturn t2")
    inputs = [torch.tensor([[1, 4], [0, 2]]), torch.randn(5, 20),
              bits.pack(torch.randn(5, 20)), torch.rand(5)]
    bound = ROWS.bind(call_of(body, inputs))
    agree(bound(inputs[0]), body, inputs)
    for wrong in (5, -1, 2**40):
        with pytest.raises(InputError, match=f"index {wrong}"):
            bound(torch.tensor([[1, 4], [0, wrong]]))


def test_rows_that_do_not_fit_are_an_error_and_never_read_or_written() -> None:
    body = "t0 = add(x0, x1)\nt1 = exp(t0)\nreturn t1"
    inputs = [torch.randn(2, 3, 16), torch.randn(1, 3, 16)]
    bound = ROWS.bind(call_of(body, inputs, {0, 1}))
    with pytest.raises(RuntimeError, match="different numbers of rows"):
        bound(torch.randn(2, 3, 16), torch.randn(1, 4, 16))


@pytest.mark.parametrize(("body", "inputs", "reason"), [
    ("t0 = exp(x0)\nreturn t0", [torch.randn(2, 3).double()], "float64"),
    ("t0 = lt(x0, 0.5)\nreturn t0", [torch.randn(2, 3)], "true or false"),
    ("t0 = lt(x0, 0.5)\nt1 = add(t0, 1.0)\nreturn t1", [torch.randn(2, 3)], "truths"),
    ("t0 = exp(x0)\nreturn t0", [torch.randn(3)], "no input has rows"),
    ("t0 = exp(x1)\nt1 = add(x0, t0)\nreturn t0, t1",
     [torch.randn(2, 3), torch.randn(3)], "fewer rows"),
    ("t0 = add(x0, x1)\nreturn t0", [torch.randn(2, 4, 5, 3), torch.randn(2, 1, 5, 3)],
     "repeats inside"),
    ("t0 = pow(x0, 1.7)\nreturn t0", [torch.randn(2, 3)], "exponent"),
    ("t0 = exp(x0)\nreturn t0", [torch.randn(2, 0)], "no columns"),
])
def test_what_is_not_for_compiled_programs_is_refused_with_a_reason(
        body: str, inputs: list[torch.Tensor], reason: str) -> None:
    places = set(range(len(inputs)))
    assert reason in str(ROWS.supports(call_of(body, inputs, places)))
