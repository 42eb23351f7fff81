"""Vector functions against float64: every exponent, special values, the same bits on every ISA."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bincompile.config import INSTRUCTION_SETS, Target, host_instruction_sets
from bincompile.ops import bits
from bincompile.runtime.schedules import vector_math
from bincompile.runtime.schedules.common import LANE, span
from bincompile.runtime.tvm import llvm_target

INF, NAN = math.inf, math.nan
SPECIAL = [0.0, -0.0, INF, -INF, NAN, 1e-45, -1e-45, 1e-39, -1e-39, 88.72283, 88.72284, -103.9,
           -104.1, -87.0, -87.01, 1.0, -1.0, 1.6e38, -1.6e38, 16777217.0, -5.5425925, -5.542594,
           -5.0613804, -5.0613809, 0.6, 0.92, -0.7071068, 1.4142135, 0.5, 2.0, -9.0, 9.0]


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


REFERENCES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "erf": torch.erf, "exp": torch.exp, "exp_nonpositive": torch.exp,
    "gelu": torch.nn.functional.gelu, "gelu_tanh": gelu_tanh, "log": torch.log,
    "reciprocal": torch.reciprocal, "rsqrt": torch.rsqrt, "sigmoid": torch.sigmoid,
    "silu": torch.nn.functional.silu, "tanh": torch.tanh}
ULPS = {"erf": 2.0, "exp": 1.5, "exp_nonpositive": 1.5, "log": 1.5, "reciprocal": 0.51,
        "rsqrt": 1.51, "sigmoid": 2.5, "silu": 3.0, "tanh": 1.5}
DOMAINS = {"exp_nonpositive": (-87.0, 88.0), "sigmoid": (-87.0, INF), "silu": (-87.0, INF)}
USABLE = host_instruction_sets()[1]


@functools.cache
def compiled(isa: str, lanes: int = LANE) -> Any:
    """A module with a kernel for every function: x to out, both of a multiple of `lanes`."""
    import tvm
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import ir as I
    from tvm.tirx.script import builder as T

    with IRBuilder() as builder, I.ir_module():
        for name in vector_math.FUNCTIONS:
            with T.prim_func():
                T.func_name(name)
                T.func_attr({"global_symbol": name, "tirx.noalias": True})
                count = T.int64()
                x, out = (T.match_buffer(T.arg(label, T.handle()), (count,), "float32", align=4)
                          for label in ("x", "out"))
                with T.attr(0, "pragma_import_llvm", vector_math.helpers(name, lanes=lanes)), \
                        T.serial(0, count // lanes) as step:
                    at = span(T, step * lanes, lanes)
                    T.buffer_store(out, vector_math.apply(T, name, x[at], lanes), [at])
    return tvm.compile(builder.get(), target=llvm_target(Target("cpu", isa)))


def run(name: str, x: torch.Tensor, isa: str | None = None, lanes: int = LANE) -> torch.Tensor:
    out = torch.empty_like(x)
    compiled(isa or USABLE[0], lanes)[name](x, out)
    return out


@functools.cache
def grid() -> torch.Tensor:
    """Numbers of every exponent and sign, and where functions change."""
    dense = torch.cat([torch.linspace(-12, 12, 100_000), torch.linspace(-110, 90, 60_000)])
    every = torch.arange(-2**31, 2**31, 30011, dtype=torch.int64).to(torch.int32)
    found = torch.cat([every.view(torch.float32), dense, torch.tensor(SPECIAL)])
    return found[:found.numel() // LANE * LANE]


def test_every_function_has_a_reference() -> None:
    assert set(REFERENCES) == set(vector_math.FUNCTIONS)
    assert set(ULPS) | {"gelu", "gelu_tanh"} == set(REFERENCES)


@pytest.mark.parametrize("name", ULPS)
@pytest.mark.parametrize("isa", USABLE)
def test_a_function_is_within_its_units_in_the_last_place(name: str, isa: str) -> None:
    x = grid()
    exact, found = REFERENCES[name](x.double()), run(name, x, isa)
    rounded = exact.float()
    low, high = DOMAINS.get(name, (-INF, INF))
    inside = (x >= low) & (x <= high) & rounded.isfinite()
    units = torch.nextafter(rounded.abs(), torch.tensor(INF)) - rounded.abs()
    error = ((found.double() - exact).abs() / units)[inside]
    assert error.max() <= ULPS[name], x[inside][error.argmax()]


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("isa", USABLE)
def test_gelu_is_within_a_millionth_of_its_argument(name: str, isa: str) -> None:
    x = grid()
    x = torch.where(x.isfinite(), x, 0.0)
    found, exact = run(name, x, isa), REFERENCES[name](x.double())
    assert ((found.double() - exact).abs() <= 1e-6 * x.abs().double() + 1e-45).all()


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("isa", USABLE)
def test_nan_infinity_and_zero_are_where_torch_has_them(name: str, isa: str) -> None:
    x = torch.tensor(SPECIAL)
    found, expected = run(name, x, isa), REFERENCES[name](x)
    seen = x <= 88 if name == "exp_nonpositive" else torch.ones_like(x, dtype=torch.bool)
    seen |= x.isnan()
    for value, f, e in zip(x[seen], found[seen], expected[seen], strict=True):
        lost = value < -87 if name == "exp_nonpositive" else abs(value) < 1e-44
        assert f.isnan() == e.isnan() and f.isinf() == e.isinf(), (value, f, e)
        assert not f.isinf() or f == e, (value, f, e)
        assert lost or (f == 0) == (e == 0), (value, f, e)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh"])
def test_the_sign_of_gelu_is_torch_s_but_where_its_own_rounding_decides(name: str) -> None:
    x = torch.cat([torch.linspace(-20, 3, 400_000), torch.logspace(-44, 0, 4096).neg()])
    x = x[:x.numel() // LANE * LANE]
    unsure = (x >= -5.5427) & (x <= -5.4858) if name == "gelu" else torch.zeros_like(x).bool()
    same = bits.sign(run(name, x)) == bits.sign(REFERENCES[name](x))
    assert (same | unsure).all(), x[~same & ~unsure]


@pytest.mark.parametrize("name", REFERENCES)
def test_instruction_sets_with_fused_products_give_the_same_bits(name: str) -> None:
    first, *others = (run(name, grid(), isa) for isa in USABLE if isa != "x86-64")
    for other in others:
        assert torch.equal(first.view(torch.int32)[~first.isnan()],
                           other.view(torch.int32)[~first.isnan()])


@pytest.mark.parametrize("name", REFERENCES)
def test_a_number_goes_where_its_lane_in_a_vector_goes(name: str) -> None:
    x = torch.tensor(SPECIAL)
    torch.testing.assert_close(run(name, x, lanes=1), run(name, x), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("isa", [isa.name for isa in INSTRUCTION_SETS])
def test_nothing_is_called_and_nothing_is_done_lane_by_lane(isa: str) -> None:
    text = compiled(isa).mod.inspect_source("asm")
    called = re.findall(r"^\s*(?:callq?|bl)\s+\*?([\w@.]+)", text, re.MULTILINE)
    own = {*(f"{name}_compute_" for name in REFERENCES), "TVMFFIErrorSetRaisedFromCStrParts@PLT",
           "TVMFFIErrorSetRaisedFromCStrParts"}
    assert not [name for name in called if name not in own and "__tvm_set_raised" not in name]
    assert not re.findall(r"\bv?(?:add|sub|mul|div|sqrt|fn?m(?:add|sub)\d+)ss\b", text)
    assert not re.findall(r"\bf(?:add|sub|mul|div|sqrt|madd|msub)\s+s\d", text)
