"""The compiled kernel of attention with 1-bit queries and keys, against the operator."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from bincompile.config import Target
from bincompile.errors import InputError
from bincompile.ops.binary_attention import binary_attention
from bincompile.runtime import Call, Dynamic, choose
from bincompile.runtime.library import tvm_binary_attention
from bincompile.runtime.library.tvm_binary_attention import KERNEL

HOST = Target.host()
ISAS = [Target("cpu", name, HOST.features) for name in ("avx2", "x86-64")]
# features, width, probabilities, values, and whether there are bias, mask and causal masking
KINDS = [(64, 64, "uint8", "binary", False), (65, 33, "uint8", "binary", True),
         (37, 19, "float", "float", True), (130, 70, "float", "binary", False),
         (1, 1, "int8", "float", False), (7, 17, "binary", "binary", True)]
SIZES = [(1, 2, 35, 70), (2, 3, 8, 16), (3, 1, 9, 1), (1, 2, 1, 33), (2, 2, 3, 0), (1, 1, 0, 5),
         (0, 2, 3, 4)]

pytestmark = pytest.mark.skipif(HOST.isa == "", reason="no instruction set to compile for")


def heads(batch: int, count: int, tokens: int, features: int) -> torch.Tensor:
    """(batch, heads, tokens, features), a view of what a projection gives."""
    return torch.randn(batch, tokens, count, features).transpose(1, 2)


def arguments(kind: tuple[Any, ...], sizes: tuple[int, ...]) -> dict[str, Any]:
    features, width, probabilities, values, masked = kind
    batch, count, rows, keys = sizes
    mask = torch.rand(batch, 1, rows, keys) > 0.4
    mask[..., :1, :] &= bool(rows % 2)  # a row without keys in some
    tensors = [heads(batch, count, *size) for size in ((rows, features), (keys, features),
                                                       (keys, width))]
    extras = [torch.randn(count, 1, keys), mask] if masked else [None, None]
    limit = torch.tensor([0.3, 0.7, 1.2])[:count] if probabilities == "binary" else None
    return binary_attention.bind((*tensors, *extras, None, limit, features**-0.5, masked,
                                  probabilities, values), {})


def call_of(given: dict[str, Any], target: Target = HOST) -> Call:
    return Call(binary_attention, {name: Dynamic(value) if isinstance(value, torch.Tensor)
                                   else value for name, value in given.items()}, target)


def run(given: dict[str, Any], target: Target = HOST) -> torch.Tensor:
    call = call_of(given, target)
    assert KERNEL.supports(call) is None
    return KERNEL.bind(call)(*call.run_time(given))[0]


def check(given: dict[str, Any], found: torch.Tensor) -> None:
    """Equal but for rounding, and for rows in which a probability is between two levels."""
    wanted = binary_attention.reference(*given.values())[0]
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    doubt = binary_attention.doubtful_rows(given)
    kept = torch.ones(wanted.shape[:-1].numel(), dtype=torch.bool) if doubt is None else ~doubt
    assert not kept.numel() or kept.float().mean() > 0.6
    width = wanted.shape[-1]
    torch.testing.assert_close(found.reshape(-1, width)[kept], wanted.reshape(-1, width)[kept],
                               rtol=2e-5, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_size_agrees_with_the_reference(kind: tuple[Any, ...]) -> None:
    for sizes in SIZES:
        given = arguments(kind, sizes)
        check(given, run(given))


@pytest.mark.slow
@pytest.mark.parametrize("features", [*range(1, 18), 31, 32, 33, 63, 65, 100, 127, 128, 129, 257])
@pytest.mark.parametrize("probabilities", ["uint8", "float"])
def test_every_width_agrees_with_the_reference(features: int, probabilities: str) -> None:
    values = "binary" if probabilities == "uint8" else "float"
    for masked in (False, True):
        given = arguments((features, 131 - features % 131, probabilities, values, masked),
                          (2, 2, 35, 70))
        check(given, run(given))


@pytest.mark.parametrize("target", [ISAS[0], pytest.param(ISAS[1], marks=pytest.mark.slow)],
                         ids=str)
def test_instruction_sets_agree(target: Target) -> None:
    if not set(target.instructions.needs) <= set(HOST.features):
        pytest.skip(f"this machine has no {target.isa}")
    given = arguments(KINDS[1], (2, 2, 19, 40))
    found = run(given, target)
    check(given, found)
    if target.isa == "avx2" and HOST.isa.startswith("avx512"):
        assert torch.equal(found, run(given))


def test_rows_are_the_same_however_the_work_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tvm_binary_attention, "WORTH_THREADS", 0)
    threads = torch.get_num_threads()
    try:
        for kind in KINDS[:2]:
            for batch, count in ((1, 1), (2, 3)):
                given = arguments(kind, (batch, count, 70, 45))
                torch.set_num_threads(1)
                alone = run(given)
                for several in (2, 3):
                    torch.set_num_threads(several)
                    assert all(torch.equal(run(given), alone) for _ in range(3))
    finally:
        torch.set_num_threads(threads)


def test_each_mode_of_splitting_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    mode = tvm_binary_attention._mode
    assert [mode(12, 1 << 14), mode(1, 1 << 20), mode(1, 100)] == ["rows", "panels", "serial"]


@pytest.mark.parametrize("place", ["query", "key", "value", "bias"])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", [KINDS[1], KINDS[2], KINDS[5]], ids=str)
def test_nan_and_infinities_go_where_the_reference_has_them(
        place: str, number: float, kind: tuple[Any, ...]) -> None:
    given = arguments(kind, (2, 2, 20, 40))
    given[place][..., -1 if place != "value" else 30, 0] = number
    found, wanted = run(given), binary_attention.reference(*given.values())[0]
    assert wanted.isfinite().any() or place in ("value", "bias", "key")
    assert torch.equal(found.isnan(), wanted.isnan())
    check(given, found)


def test_scores_of_any_size_are_those_of_the_reference() -> None:
    for scale in (0.0, -0.3, 30.0, 1e4):
        for kind in (KINDS[0], KINDS[3]):
            given = arguments(kind, (1, 2, 20, 40)) | {"scale": scale}
            check(given, run(given))
    given = arguments(KINDS[0], (1, 2, 20, 40))
    given["value"][:, :, 3:30] = 0.0  # values of zero have a share of the sum
    given["value"][:, :, 30:] *= 1e-6
    check(given, run(given))


def test_heads_are_merged_without_a_copy() -> None:
    for shape in ((2, 3, 5, 7), (1, 2, 9, 9)):
        out = run(arguments(KINDS[0], shape))
        batch, count, rows, width = out.shape
        merged = out.transpose(1, 2).reshape(batch, rows, count * width)
        assert merged.data_ptr() == out.data_ptr() and merged.is_contiguous()


@pytest.mark.parametrize("shape", [(40,), (1, 40), (20, 40), (20, 1), (2, 1, 1, 40), (3, 20, 40),
                                   (1,), ()], ids=str)
def test_bias_and_mask_repeat_along_any_axis(shape: tuple[int, ...]) -> None:
    given = arguments(KINDS[2], (2, 3, 20, 40))
    given["bias"], given["mask"] = torch.randn(shape), torch.rand(shape) > 0.3
    check(given, run(given))


def test_inputs_may_lie_anyhow() -> None:
    given = arguments(KINDS[2], (2, 3, 20, 40))
    given["query"] = torch.randn(2, 3, 37, 20).mT
    given["key"] = torch.randn(3, 2, 41, 38).transpose(0, 1)[:, :, 1:, 1:]
    given["value"] = torch.randn(2, 1, 40, 19).expand(2, 3, 40, 19)
    given["bias"] = torch.randn(40, 20).T
    check(given, run(given))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_float32(dtype: torch.dtype) -> None:
    given = {name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point()
             else value for name, value in arguments(KINDS[2], (2, 3, 20, 40)).items()}
    found, wanted = run(given), binary_attention.reference(*given.values())[0]
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("changed", "reason"), [
    ({"need_weights": True}, "weights are asked for"),
    ({"drop": torch.ones(2, 3, 20, 40)}, "dropped"),
    ({"value": torch.randn(2, 3, 40, 5, dtype=torch.float64)}, "value of torch.float64"),
    ({"query": torch.randn(2, 3, 20, 0)}, "features"),
    ({"scale": Dynamic(0.5)}, "scale is known only"),
], ids=lambda value: value if isinstance(value, str) else next(iter(value)))
def test_what_it_does_not_do_is_left_to_the_reference(changed: dict[str, Any],
                                                      reason: str) -> None:
    call = call_of(arguments(KINDS[2], (2, 3, 20, 40)) | changed)
    assert reason in str(KERNEL.supports(call)) and choose(call).name == "reference"


@pytest.mark.parametrize(("name", "shape"), [("key", (2, 2, 40, 37)), ("value", (2, 3, 39, 19)),
                                             ("key", (1, 3, 40, 37))])
def test_sizes_that_do_not_fit_are_refused(name: str, shape: tuple[int, ...]) -> None:
    given = arguments(KINDS[2], (2, 3, 20, 40))
    call = call_of(given)
    given[name] = torch.randn(shape)
    with pytest.raises(InputError, match=name):
        KERNEL.bind(call)(*call.run_time(given))
