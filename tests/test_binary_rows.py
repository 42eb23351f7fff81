"""Look-ups and bags of 1-bit rows: every mode, kind of index and instruction set."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from bincompile.config import INSTRUCTION_SETS, Target
from bincompile.errors import InputError
from bincompile.nn import BinaryEmbeddingBag
from bincompile.op import Sample
from bincompile.ops import OPERATORS, bases
from bincompile.runtime import Call, choose
from bincompile.runtime.kernels import sample_call
from bincompile.runtime.library import tvm_binary_bag

HOST = Target.host()
USABLE = [Target("cpu", isa.name, HOST.features) for isa in INSTRUCTION_SETS
          if set(isa.needs) <= set(HOST.features)]
BAG, LOOK_UP = OPERATORS["binary_embedding_bag"], OPERATORS["binary_embedding"]
MODES = ("sum", "mean", "max", "majority")
ROWS = 60
RAGGED = (0, 0, 1, 9, 9, 26, 90, 90)  # empty bags at both ends and between, one above 16 and 32


def table(columns: int, count: int = 1, mode: str = "sum") -> tuple[torch.Tensor, torch.Tensor]:
    """A packed table and its scales, a row of zeros among them."""
    packed = bases.join(torch.randn(ROWS, count, columns))
    scale = torch.ones(ROWS, count) if mode == "majority" else torch.randn(ROWS, count)
    scale[5] = 0.0
    return packed, scale[:, 0] if count == 1 else scale


def bag_call(columns: int, mode: str, count: int = 1, target: Target = HOST, *,
             offsets: torch.Tensor | None = None, indices: torch.Tensor | None = None,
             **options: Any) -> Call:
    packed, scale = table(columns, count, mode)
    if indices is None:
        indices = torch.randint(ROWS, (4, 6) if offsets is None else (90,))
    sample = Sample((packed, indices, offsets, scale, columns, mode), options)
    return sample_call(BAG, sample, target, ("table", "row_scale"))


def bound(call: Call, name: str = "tvm-bags") -> Any:
    kernel = choose(call)
    assert kernel.name == name
    return kernel.bind(call)


def run_time(call: Call) -> tuple[torch.Tensor, ...]:
    return call.run_time({name: call.value(name) for name in call.operator.arguments})


def expected(call: Call, **changed: Any) -> torch.Tensor:
    arguments = {name: call.value(name) for name in call.operator.arguments}
    return call.operator.overload(**(arguments | changed))


def agree(call: Call) -> None:
    found, wanted = bound(call)(*run_time(call)), expected(call)
    if call.value("weights") is None:
        assert torch.equal(found, wanted)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("columns", "target"), [
    pytest.param(columns, target, id=f"{columns}-{target}")
    for target in USABLE for columns in ((1, 100, 264) if target is USABLE[0] else (100,))])
def test_bags_of_one_length_are_those_of_the_reference(
        columns: int, mode: str, target: Target) -> None:
    call = bag_call(columns, mode, target=target)
    kernel = bound(call)
    for shape in ((4, 6), (0, 6), (3, 0), (1, 1), (2, 7), (9, 8), (2, 77)):
        indices = torch.randint(ROWS, shape)
        assert torch.equal(kernel(indices), expected(call, indices=indices)), shape


@pytest.mark.parametrize(("mode", "count"), [("sum", 1), ("sum", 3), ("mean", 2), ("max", 1),
                                             ("max", 2), ("majority", 1)])
@pytest.mark.parametrize("last", [False, True], ids=["int32", "int64, last"])
def test_ragged_bags_are_those_of_the_reference(mode: str, count: int, last: bool) -> None:
    dtypes = (torch.int32, torch.int64) if last else (torch.int64, torch.int32)
    offsets = torch.tensor(RAGGED, dtype=dtypes[0])
    indices = torch.randint(ROWS, (90,), dtype=dtypes[1])
    for padding, weighted in ((None, False), (7, False), (0, mode == "sum")):
        agree(bag_call(33, mode, count, offsets=offsets, indices=indices, padding_idx=padding,
                       include_last_offset=last, tie=0.0,
                       weights=torch.randn(90) if weighted else None))


@pytest.mark.parametrize("tie", [1.0, -0.5])
def test_a_majority_is_exact_for_any_number_of_votes(tie: float) -> None:
    call = bag_call(70, "majority", padding_idx=3, tie=tie)
    kernel = bound(call)
    for length in (*range(1, 35), 63, 64, 65, 511, 1100):
        indices = torch.randint(ROWS, (3, length))
        assert torch.equal(kernel(indices), expected(call, indices=indices)), length
        assert torch.equal(kernel(indices[:, :1].expand(3, length)),
                           expected(call, indices=indices[:, :1].expand(3, length))), length


@pytest.mark.parametrize("mode", MODES)
def test_bags_are_the_same_on_any_number_of_threads(
        mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tvm_binary_bag, "WORTH_THREADS", 0)
    call = bag_call(40, mode)
    kernel, indices, results = bound(call), torch.randint(ROWS, (333, 11)), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(kernel(indices))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert torch.equal(results[0], expected(call, indices=indices))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("threads", [1, 2])
def test_hostile_indices_and_offsets_are_named_and_write_nothing_outside(
        mode: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tvm_binary_bag, "WORTH_THREADS", 0)
    torch.set_num_threads(threads)
    offsets = torch.tensor([0, 2, 5])
    call = bag_call(17, mode, offsets=offsets, indices=torch.randint(ROWS, (9,)))
    kernel, fine = bound(call), torch.randint(ROWS, (9,))
    for place, wrong in itertools.product((0, 4, 8), (ROWS, -1, 1 << 40, -(1 << 62))):
        indices = fine.clone()
        indices[place] = wrong
        memory = torch.full((5, 17), 7.0)
        with pytest.raises(InputError, match=f"index {wrong}"):
            kernel.into(indices, offsets, memory[1:4])
        assert (memory[[0, 4]] == 7).all()
    for wrong, word in (([1, 2, 5], "start at 0"), ([0, 6, 5], "never fall"), ([0, 2, 10], "end"),
                        ([0, -1, 5], "never fall"), ([0, 2, 1 << 40], "end by")):
        with pytest.raises(InputError, match=word):
            kernel(fine, torch.tensor(wrong))
    assert torch.equal(kernel(fine, offsets), expected(call, indices=fine))


def test_an_end_without_beginnings_is_no_bag_and_no_offset_an_error() -> None:
    call = bag_call(9, "max", offsets=torch.tensor([0, 4]), include_last_offset=True)
    kernel, indices = bound(call), torch.randint(ROWS, (90,))
    for end in ([0], [0, 4], [0, 4, 90]):  # torch itself would write behind its result here
        changed = {"indices": indices, "offsets": torch.tensor(end)}
        assert torch.equal(kernel(*changed.values()), expected(call, **changed))
    with pytest.raises(InputError, match="no offsets"):
        kernel(indices, torch.tensor([], dtype=torch.int64))
    layer = BinaryEmbeddingBag(ROWS, 9, mode="max", include_last_offset=True, packed=False)
    found, wanted = (layer(part, torch.tensor([0, 4])) for part in (indices, indices[:4]))
    assert found.shape == (1, 9) and torch.equal(found, wanted)


@pytest.mark.parametrize("mode", MODES)
def test_bags_of_one_length_have_no_last_offset(mode: str) -> None:
    call = bag_call(9, mode, include_last_offset=True)
    agree(call)
    indices, plain = call.value("indices"), expected(call, include_last_offset=False)
    assert torch.equal(expected(call), plain) and plain.shape == (4, 9)
    for packed in (False, True):
        layer = BinaryEmbeddingBag(ROWS, 9, mode=mode, include_last_offset=True, packed=packed)
        assert layer(indices).shape == (4, 9)


def test_weights_have_to_fit_and_may_be_anything() -> None:
    call = bag_call(20, "sum", weights=torch.randn(4, 6))
    kernel, indices = bound(call), torch.randint(ROWS, (4, 6))
    with pytest.raises(InputError, match="weights of shape"):
        kernel(indices, torch.randn(6, 4))
    for weights in (torch.randn(6, 4).T, torch.randn(4, 6).double(), torch.randn(4, 6).half(),
                    torch.randn(4, 1).expand(4, 6), torch.randn(4, 6, requires_grad=True),
                    torch.tensor([1e30, -1e30, 0.0, 1.0, math.inf, math.nan]).expand(4, 6)):
        torch.testing.assert_close(
            kernel(indices, weights), expected(call, indices=indices, weights=weights.detach()),
            rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("scale", [
    torch.full((ROWS,), 0.3), torch.rand(ROWS), -torch.ones(ROWS), torch.full((ROWS,), math.nan),
], ids=["0.3", "rows", "-1", "nan"])
def test_a_majority_that_rounds_is_left_to_the_reference(scale: torch.Tensor) -> None:
    call = bag_call(8, "majority")
    assert choose(Call(BAG, {**call.arguments, "row_scale": scale}, HOST)).name == "torch-blocks"
    agree(Call(BAG, {**call.arguments, "row_scale": torch.full((ROWS,), 0.25)}, HOST))


def test_a_maximum_of_scales_that_are_not_finite_is_left_to_torch() -> None:
    call = bag_call(8, "max")
    scale = call.value("row_scale").clone()
    scale[3] = math.inf
    assert choose(Call(BAG, {**call.arguments, "row_scale": scale}, HOST)).name == "torch-blocks"


@pytest.mark.parametrize("target", USABLE, ids=str)
@pytest.mark.parametrize(("columns", "count"), [(1, 1), (1, 3), (8, 2), (23, 2), (49, 3)])
def test_rows_of_bases_are_bit_equal(columns: int, count: int, target: Target) -> None:
    packed, scale = table(columns, count)
    for dtype in (torch.int32, torch.int64):
        indices = torch.randint(ROWS, (7, 13), dtype=dtype)
        call = sample_call(LOOK_UP, Sample((indices, packed, scale, columns)), target,
                           ("table", "row_scale"))
        kernel = bound(call, "tvm-bits")
        assert torch.equal(kernel(indices.T), expected(call, indices=indices.T))
        memory = torch.full((93 * columns + 1,), 7.0)
        out = memory[1:-columns - columns].view(7, 13, columns)  # at an odd address
        kernel.into(indices, out)
        assert torch.equal(out, expected(call)) and (memory[-2 * columns:] == 7).all()


@pytest.mark.slow
@pytest.mark.parametrize("columns", range(1, 258))
def test_rows_and_bags_of_every_width_up_to_257(columns: int) -> None:
    packed, scale = table(columns, 1 + columns % bases.MOST)
    call = sample_call(LOOK_UP, Sample((torch.randint(ROWS, (37,)), packed, scale, columns)), HOST,
                       ("table", "row_scale"))
    assert torch.equal(bound(call, "tvm-bits")(*run_time(call)), expected(call))
    agree(bag_call(columns, MODES[columns % len(MODES)], padding_idx=2,
                   indices=torch.randint(ROWS, (5, 21))))
    agree(bag_call(columns, "majority", indices=torch.randint(ROWS, (5, 21))))


@pytest.mark.parametrize(("columns", "target"), [
    pytest.param(columns, target, id=f"{columns}-{target}")
    for target in USABLE for columns in ((1, 300) if target is USABLE[0] else (37,))])
def test_a_maximum_of_float_rows_is_that_of_torch(columns: int, target: Target) -> None:
    rows = torch.randn(ROWS, columns)
    rows[3, 0], rows[4:6], rows[6], rows[7] = math.nan, 0.0, -0.0, -math.inf
    offsets = torch.tensor(RAGGED)
    for given in ((torch.randint(ROWS, (8, 5)), None), (torch.randint(8, (300, 3)).int(), None),
                  (torch.randint(9, (90,)), offsets), (torch.randint(9, (90,)).int(), offsets)):
        for padding in (None, 3):
            sample = Sample((rows, *given, "max", None, given[1] is not None, padding))
            call = sample_call(OPERATORS["embedding_bag"], sample, target, ("table",))
            found, wanted = bound(call, "tvm-maximum")(*run_time(call)), expected(call)
            assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))


def test_a_maximum_of_float_rows_refuses_what_torch_can_not_take() -> None:
    sample = Sample((torch.randn(9, 4), torch.randint(9, (6,)), torch.tensor([0, 3]), "max"))
    call = sample_call(OPERATORS["embedding_bag"], sample, HOST, ("table",))
    kernel = bound(call, "tvm-maximum")
    for wrong, word in (([0, 7], "end by"), ([0, 4, 3], "never fall"), ([1, 2], "start at 0")):
        with pytest.raises(InputError, match=word):
            kernel(torch.randint(9, (6,)), torch.tensor(wrong))
    with pytest.raises(InputError, match="index 9"):
        kernel(torch.tensor([1, 9]), torch.tensor([0]))
    plain = sample_call(OPERATORS["embedding_bag"], Sample(
        (torch.randn(9, 4), torch.randint(9, (6, 2)), None, "max")), HOST, ("table",))
    with pytest.raises(RuntimeError):
        plain.operator.overload(plain.value("table"), torch.zeros(2, 0, dtype=torch.int64), None,
                                "max")
    with pytest.raises(RuntimeError):
        bound(plain, "tvm-maximum")(torch.zeros(2, 0, dtype=torch.int64))
