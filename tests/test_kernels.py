"""Every kernel against its operator's reference, and programs that are bound to kernels."""

from __future__ import annotations

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from stored import STORED
from torch import fx
from torch.utils import _pytree as pytree

from bincompile.config import INSTRUCTION_SETS, Target
from bincompile.errors import InputError, KernelError
from bincompile.op import Operator, Sample
from bincompile.ops import OPERATORS, bits
from bincompile.program import Program
from bincompile.runtime import Call, bind, choose, explain, kernels_of
from bincompile.runtime.kernels import sample_call
from bincompile.runtime.library import tvm_binary_embedding, tvm_w1a1_linear, tvm_w1a32_linear
from bincompile.runtime.schedules import common
from bincompile.signature import InputSpec, Signature

HOST = Target.host()
USABLE = [Target("cpu", isa.name, HOST.features) for isa in INSTRUCTION_SETS
          if set(isa.needs) <= set(HOST.features)]
ODD = (1, 2, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 100, 128, 129, 255, 256, 257)


def samples() -> list[Any]:
    """Every sample of every operator; references are what the operator itself gives."""
    return [pytest.param(operator, sample, id=f"{operator.name}-{number}")
            for operator in OPERATORS.values()
            for number, sample in enumerate(operator.samples(torch.Generator().manual_seed(11)))]


def call_of(operator: Operator, sample: Sample, target: Target = HOST,
            stored: tuple[str, ...] = STORED) -> Call:
    """A call whose stored tensors are those that a model would store."""
    kept = stored if operator.name != "attention" else ()
    sample = sample if stored else dataclasses.replace(sample, stored=())
    return sample_call(operator, sample, target, kept)


def run(kernel: Any, call: Call) -> tuple[torch.Tensor, ...]:
    """What a kernel gives, and what it has then written to arguments."""
    values = call.operator.isolated({name: call.value(name) for name in call.operator.arguments})
    results = flat(kernel.bind(call)(*call.run_time(values)))
    return (*results, *(values[name] for name in call.operator.mutated))


def flat(result: Any) -> tuple[torch.Tensor, ...]:
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def linear_call(features: int, outputs: int, target: Target = HOST, rank: int = 2,
                **options: Any) -> Call:
    """A binary linear layer with random weights; its input is known at run time."""
    operator, given = OPERATORS["binary_linear"], {"activation": "binary"} | options
    sample = Sample((torch.empty(*(1,) * (rank - 1), features),
                     bits.pack(torch.randn(outputs, features)), torch.rand(outputs),
                     torch.randn(outputs), features), given)
    return call_of(operator, sample, target)


def reference(call: Call, x: torch.Tensor) -> torch.Tensor:
    return call.operator.overload(**{**call.arguments, "x": x})


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan())
            and torch.equal(a.nan_to_num(), b.nan_to_num()))


@pytest.mark.parametrize("stored", [STORED, ()], ids=["stored", "dynamic"])
@pytest.mark.parametrize(("operator", "sample"), samples())
def test_every_kernel_that_accepts_a_sample_agrees_with_the_reference(
        operator: Operator, sample: Sample, stored: tuple[str, ...]) -> None:
    call = call_of(operator, sample, HOST, stored)
    given = operator.isolated(operator.bind(sample.args, sample.kwargs))
    expected = (*flat(operator.overload(**given)), *(given[name] for name in operator.mutated))
    limit = operator.tolerance
    accepting = [k for k in kernels_of(operator.name) if k.supports(call) is None]
    assert accepting[-1].name == "reference"
    for kernel in accepting:
        for found, wanted in zip(run(kernel, call), expected, strict=True):
            assert found.shape == wanted.shape and found.dtype == wanted.dtype
            if limit.bits:
                assert same_bits(found, wanted), kernel.name
            torch.testing.assert_close(found, wanted, equal_nan=True, rtol=limit.rtol,
                                       atol=limit.atol)


def test_every_operator_that_has_a_faster_kernel_uses_it_for_some_sample() -> None:
    chosen: dict[str, set[str]] = {name: set() for name in OPERATORS}
    for param in samples():
        operator, sample = param.values
        for target in (HOST, Target("cpu")):
            chosen[operator.name].add(choose(call_of(operator, sample, target)).name)
    for name in OPERATORS:
        assert {k.name for k in kernels_of(name)} - {"reference"} <= chosen[name]


@pytest.mark.parametrize(("features", "target"), [
    pytest.param(features, target, id=f"{features}-{target}")
    for target in USABLE for features in (ODD if target is USABLE[0] else ODD[::3])])
def test_w1a1_is_bit_equal_for_any_size_and_instruction_set(features: int, target: Target) -> None:
    call = linear_call(features, ODD[-1 - ODD.index(features)], target)
    kernel = choose(call)
    assert kernel.name == "tvm-w1a1"
    bound = kernel.bind(call)
    for rows in (0, 1, 3, 32, 33, 70):
        x = torch.randn(rows, features)
        assert same_bits(bound(x), reference(call, x)), rows


def test_schedules_add_in_the_lanes_of_the_reference() -> None:
    assert common.LANE == bits.LANES  # a schedule's text is its cache key: it may not import this


@pytest.mark.slow
@pytest.mark.parametrize("features", range(1, 258))
def test_w1a1_is_bit_equal_for_every_width_up_to_257(features: int) -> None:
    call = linear_call(features, 1 + features * 7 % 131)
    x = torch.randn(37, features)
    assert same_bits(choose(call).bind(call)(x), reference(call, x))


@pytest.mark.parametrize("target", USABLE, ids=str)
@pytest.mark.parametrize("options", [
    {"bias": None}, {"activation_scale": torch.tensor(0.3)}, {"activation_scale": torch.ones(1)},
    {"shift": torch.randn(70)}, {"weight_scale": torch.tensor([0.7])},
    {"bias": None, "shift": torch.randn(70), "activation_scale": torch.tensor(0.3)},
], ids=["no bias", "scalar", "one", "shift", "one weight scale", "all"])
def test_w1a1_is_bit_equal_with_every_option(options: dict[str, Any], target: Target) -> None:
    plain = linear_call(70, 90, target)
    call = Call(plain.operator, {**plain.arguments, **options}, target)
    x = torch.randn(40, 70)
    assert same_bits(choose(call, "tvm-w1a1").bind(call)(x), reference(call, x))


@pytest.mark.parametrize("target", USABLE, ids=str)
def test_nan_is_negative_zero_is_not_and_infinities_pass(target: Target) -> None:
    call = linear_call(40, 30, target)
    x = torch.randn(6, 40)
    x[0, 0], x[1], x[2], x[3, 1], x[4, 5:7] = math.nan, 0.0, -0.0, math.inf, -math.inf
    assert same_bits(choose(call, "tvm-w1a1").bind(call)(x), reference(call, x))


@pytest.mark.parametrize("features", [1, 3, 4, 33, 70, 256])
@pytest.mark.parametrize("target", [t for t in USABLE if t.isa in tvm_w1a32_linear.TABLES], ids=str)
def test_w1a32_agrees_for_odd_sizes_and_options(features: int, target: Target) -> None:
    call = linear_call(features, 75, target, activation="float", shift=torch.randn(features))
    kernel = choose(call)
    assert kernel.name == "tvm-w1a32"
    for rows in (0, 1, 4, 5, 35):
        x = torch.randn(rows, features)
        torch.testing.assert_close(kernel.bind(call)(x), reference(call, x), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("activation", ["binary", "float"])
def test_an_input_may_have_any_layout_and_rank(activation: str) -> None:
    flat = torch.randn(1 + 64 * 6)
    for x in (flat[1:].view(6, 64), torch.randn(64, 5).T, torch.randn(2, 64)[::2], flat[:64],
              torch.randn(1, 64).expand(5, 64), torch.randn(2, 3, 64), torch.randn(2, 0, 64),
              torch.randn(64).as_strided((1, 64), (7, 1)), torch.randn(3, 64).half(),
              torch.randn(3, 64).bfloat16(), torch.randn(3, 64, requires_grad=True)):
        call = linear_call(64, 70, rank=x.ndim, activation=activation)
        found = choose(call).bind(call)(x)
        torch.testing.assert_close(found, reference(call, x.detach()), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("activation", ["binary", "float"])
def test_threads_give_the_same_bits(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tvm_w1a1_linear, "WORTH_THREADS", 0)
    monkeypatch.setattr(tvm_w1a32_linear, "WORTH_THREADS", 0)
    call = linear_call(96, 200, activation=activation)
    bound = choose(call).bind(call)
    for rows in (1, 5, 33, 600):
        x, results = torch.randn(rows, 96), []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(bound(x))
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_many_python_threads_share_one_bound_kernel() -> None:
    call = linear_call(256, 128)
    bound = choose(call).bind(call)
    inputs = [torch.randn(1 + n % 40, 256) for n in range(200)]
    expected = [bound(x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(bound, inputs * 5))
    assert all(map(torch.equal, found, expected * 5))


@pytest.mark.parametrize("target", [*USABLE, Target("cpu")], ids=str)
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 15, 16, 17, 24, 25, 40, 64])
def test_binary_rows_are_bit_equal_for_any_width(columns: int, target: Target) -> None:
    table, scale = bits.pack(torch.randn(300, columns)), torch.randn(300)
    for shape in ((), (0,), (3,), (2, 130)):
        sample = Sample((torch.randint(300, shape), table, scale, columns))
        call = call_of(OPERATORS["binary_embedding"], sample, target)
        assert same_bits(run(choose(call), call)[0], call.operator.overload(*sample.args))


def test_binary_rows_on_threads_are_the_same_and_bad_indices_found(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tvm_binary_embedding, "WORTH_THREADS", 0)
    table, scale = bits.pack(torch.randn(50, 30)), torch.rand(50)
    indices = torch.randint(50, (7, 100), dtype=torch.int32).T
    call = call_of(OPERATORS["binary_embedding"], Sample((indices, table, scale, 30)))
    bound = choose(call, "tvm-bits").bind(call)
    torch.set_num_threads(3)
    assert same_bits(bound(indices), call.operator.overload(indices, table, scale, 30))
    indices[99, 6] = 50
    with pytest.raises(InputError, match="index 50"):
        bound(indices)


@pytest.mark.parametrize("name", ["embedding", "embedding_bag", "binary_embedding"])
@pytest.mark.parametrize("index", [7, -1, 1 << 40])
def test_a_bad_index_is_named_by_every_kernel(name: str, index: int) -> None:
    table = {"embedding": (torch.ones(7, 8),), "embedding_bag": (torch.ones(7, 8),),
             "binary_embedding": (torch.zeros(7, 1, dtype=torch.uint8), torch.ones(7), 8)}[name]
    bad = torch.tensor([[0, index]])
    rest = {"embedding": (bad,), "embedding_bag": (bad, None, "sum")}.get(name, ())
    args = (*table, *rest) if rest else (bad, *table)
    call = call_of(OPERATORS[name], Sample(args))
    for kernel in kernels_of(name):
        with pytest.raises(InputError, match=f"index {index}"):
            run(kernel, call)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_a_bad_index_in_any_bag_mode_is_an_error(mode: str) -> None:
    indices, offsets = torch.tensor([1, 7]).int(), torch.tensor([0]).int()
    call = call_of(OPERATORS["embedding_bag"], Sample((torch.ones(7, 8), indices, offsets, mode)))
    with pytest.raises(InputError, match="index 7"):
        run(choose(call), call)


@pytest.mark.parametrize("fill", [-1e9, -50.0, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("size", [1.0, 1e3])
@pytest.mark.parametrize("empty_row", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_a_finite_fill_is_exact(fill: float, size: float, empty_row: bool, causal: bool) -> None:
    query, key, value = (torch.randn(2, 3, n, 8) * size for n in (5, 7, 7))
    mask = torch.rand(2, 1, 5, 7) > 0.4
    mask[..., 0] = True
    if empty_row:  # the first row of sample 1 has keys left, but not with the causal mask
        mask[0, 0, 2], mask[1, 0, 0, 0] = False, False
        mask[1, 0, 0, 3] = True
    sample = Sample((query, key, value, None, mask, 0.3, fill, causal))
    call = call_of(OPERATORS["attention"], sample)
    found = run(choose(call, "torch-sdpa"), call)[0]
    expected = call.operator.overload(*sample.args)[0]
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5 * size, equal_nan=True)


@pytest.mark.parametrize("shapes", [
    ((5, 8), (7, 8), (7, 8), (5, 7)), ((3, 5, 8), (3, 7, 8), (3, 7, 4), (1, 7)),
    ((2, 1, 5, 8), (2, 3, 7, 8), (3, 7, 8), (2, 1, 1, 7)), ((5, 8), (7, 8), (7, 2), (4, 5, 7)),
    ((1, 2, 3, 5, 8), (1, 2, 3, 7, 8), (1, 2, 3, 7, 8), (7,)),
    ((2, 5, 8), (2, 0, 8), (2, 0, 8), (5, 0)), ((2, 5, 8), (2, 7, 8), (2, 7, 8), (7,)),
], ids=str)
@pytest.mark.parametrize("kind", ["bias", "mask", "none"])
@pytest.mark.parametrize("masked_row", ["nan", "zero"])
def test_attention_of_every_rank_and_broadcast(
        shapes: tuple[tuple[int, ...], ...], kind: str, masked_row: str) -> None:
    query, key, value, extra = map(torch.randn, shapes)
    masks = {"bias": (torch.where(extra > 0, extra, -math.inf), None), "mask": (None, extra > 0.5),
             "none": (None, None)}[kind]
    sample = Sample((query, key, value, *masks, 0.4), {"masked_row": masked_row})
    call = call_of(OPERATORS["attention"], sample)
    expected = call.operator.overload(*sample.args, **sample.kwargs)[0]
    for kernel in kernels_of("attention"):
        if kernel.supports(call) is None:
            found = run(kernel, call)[0]
            torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5, equal_nan=True)


def test_explain_gives_every_kernel_and_why_not() -> None:
    said = dict(explain(linear_call(8, 8)))
    assert said == {"tvm-w1a1": "chosen", "tvm-w1a32": "the activations are not float",
                    "tvm-w1a8": "the activations are not int8",
                    "torch-byte-table": "accepts", "reference": "accepts"}
    unknown = dict(explain(linear_call(8, 8, Target("cpu"))))
    assert unknown["torch-byte-table"] == "chosen" and "no instruction set" in unknown["tvm-w1a1"]
    cuda = dict(explain(linear_call(8, 8, Target("cuda"))))
    assert cuda["reference"] == "chosen" and "cuda" in cuda["tvm-w1a1"]


def test_prefer_takes_a_kernel_that_accepts_and_refuses_a_name_that_is_not_one() -> None:
    call = linear_call(8, 8)
    assert choose(call, "reference").name == "reference"
    assert choose(call, "tvm-w1a32").name == "tvm-w1a1"
    with pytest.raises(KernelError, match="tvm-w1a1"):
        choose(call, "fastest")


class Layer(torch.nn.Module):
    """Two of our operators and torch's between them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("packed", bits.pack(torch.randn(24, 40)))
        self.scale = torch.nn.Parameter(torch.rand(24))
        self.bias = torch.nn.Parameter(torch.ones(24))
        self.table = torch.nn.Parameter(torch.randn(9, 40))

    def forward(self, indices: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor]:
        rows = torch.ops.bincompile.embedding.default(self.table, indices)
        mixed = torch.ops.aten.mul.Tensor(rows, x)
        return (torch.ops.bincompile.binary_linear.default(mixed, self.packed, self.scale,
                                                           self.bias, 40),)


def program() -> tuple[Program, tuple[torch.Tensor, torch.Tensor]]:
    inputs = (torch.tensor([1, 0, 8]), torch.randn(3, 40))
    module = fx.symbolic_trace(Layer())
    with torch.no_grad():
        for node, value in zip(module.graph.nodes, _values(module, inputs), strict=True):
            node.meta["val"] = value
    specs = tuple(InputSpec(f"in{n}", v.dtype, tuple(v.shape)) for n, v in enumerate(inputs))
    signature = Signature(specs, pytree.tree_structure((inputs, {})), pytree.tree_structure((0,)))
    return Program(module, signature), inputs


def _values(module: fx.GraphModule, inputs: tuple[torch.Tensor, ...]) -> list[Any]:
    interpreter = fx.Interpreter(module, garbage_collect_values=False)
    interpreter.run(*inputs)
    return [interpreter.env.get(node) for node in module.graph.nodes]


def test_an_executable_runs_the_program_with_the_chosen_kernels() -> None:
    source, inputs = program()
    before = str(source)
    executable = bind(source, HOST)
    linear = next(n for n in executable.kernels if "linear" in n)
    assert sorted(executable.kernels.values()) == ["torch-embedding", "tvm-w1a1"]
    assert ("reference", "accepts") in executable.explain()[linear]
    found = executable(*inputs)
    assert torch.equal(found[0], source.graph_module(*inputs)[0].detach())
    assert not found[0].requires_grad and torch.is_grad_enabled() and str(source) == before
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: executable(*inputs)[0], range(40)))
    assert all(torch.equal(r, found[0]) for r in results)


def test_choices_are_taken_and_wrong_ones_refused() -> None:
    source, inputs = program()
    linear = next(n for n in bind(source, HOST).kernels if "linear" in n)
    plain = bind(source, HOST, {linear: "reference"})
    assert plain.kernels[linear] == "reference"
    assert dict(plain.explain()[linear])["tvm-w1a1"] == "accepts"
    assert torch.equal(plain(*inputs)[0], bind(source, HOST)(*inputs)[0])
    with pytest.raises(KernelError, match="nowhere"):
        bind(source, HOST, {"nowhere": "reference"})


def test_calls_name_their_run_time_arguments_in_schema_order() -> None:
    call = call_of(OPERATORS["binary_linear"], Sample(
        (torch.ones(1, 8), torch.zeros(2, 1, dtype=torch.uint8), torch.ones(2), None, 8)),
        stored=("weight",))
    assert call.dynamic == ("x", "weight_scale")
    values = call.partial(lambda *values: values)(1, 2)
    assert (values[0], values[2], values[3], values[4]) == (1, 2, None, 8)
