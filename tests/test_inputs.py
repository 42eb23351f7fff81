"""Kinds of models and inputs: each gives eager's results, or an error that says what to change."""

from __future__ import annotations

import dataclasses
import functools
import io
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from torch.utils import _pytree as pytree

import bincompile as bc
from bincompile.errors import BincompileError, CaptureError, ConfigError, InputError, InputTypeError
from bincompile.structure import hold


class Attention(nn.Module):
    """A fused projection, four heads, an optional mask."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        rows, length, _ = x.shape
        q, k, v = self.mix(x).view(rows, length, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-1, -2) / 2
        scores = scores if mask is None else scores + mask
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(rows, length, 16))


class Function(nn.Module):
    """A function as a model."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def tensor(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def model_of(function: Callable[..., Any]) -> nn.Module:
    return Function(function).eval()


def operators(compiled: Any) -> list[str]:
    return [m.operator for m in compiled.report.matches]


def assert_same(expected: Any, found: Any, limit: float = 1e-5) -> None:
    for a, b in zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(b, a, rtol=limit, atol=limit)
            assert a.stride() == b.stride()
        else:
            assert a == b


# Forms of a model.


class Tokens(nn.Module):
    """An embedding, torch's attention and an encoder: leaves of a symbolic trace."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        return self.encoder(self.attention(x, x, x, need_weights=False)[0])


def test_a_graph_module_with_opaque_layers_is_matched_inside_of_them() -> None:
    model = Tokens().eval()
    traced = fx.symbolic_trace(model)
    assert {n.target for n in traced.graph.nodes if n.op == "call_module"} >= {"attention"}
    compiled = bc.optimize(traced, (torch.randint(0, 10, (2, 5)),))
    tokens = torch.randint(0, 10, (3, 7))
    with torch.no_grad():
        assert_same(model(tokens), compiled(tokens))
    assert [m.path for m in compiled.report.matches] == [
        "table", "attention", "encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]


def test_a_graph_module_keeps_the_paths_that_it_was_traced_with() -> None:
    model = nn.Sequential(nn.Linear(16, 16), Attention()).eval()
    compiled = bc.optimize(fx.symbolic_trace(model), (tensor(2, 5, 16),))
    assert [m.path for m in compiled.report.matches] == ["1"]


def test_a_graph_of_plain_operators_is_a_model_though_its_flag_says_training() -> None:
    model = Attention().eval()
    graph = make_fx(lambda x: model(x))(tensor(2, 5, 16))
    assert graph.training
    compiled, x = bc.optimize(graph, (tensor(2, 5, 16),)), tensor(2, 5, 16)
    assert_same(model(x), compiled(x))


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    sizes = {0: Dim("rows", max=64), 1: Dim("length", max=99)}
    return torch.export.export(model, (tensor(2, 5, 16),), dynamic_shapes={"x": sizes})


@pytest.mark.parametrize("loaded", [False, True])
def test_an_exported_program_with_named_sizes(loaded: bool) -> None:
    model = Attention().eval()
    program = exported(model)
    if loaded:
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        program = torch.export.load(file)
    compiled = bc.optimize(program)
    for shape in ((3, 7, 16), (1, 99, 16)):
        x = tensor(*shape)
        assert_same(model(x), compiled(x))
    assert operators(compiled) == ["attention"]
    for shape in ((65, 5, 16), (2, 100, 16), (2, 5, 17)):
        with pytest.raises(InputError):
            compiled(tensor(*shape))


def test_a_loaded_program_keeps_its_branch() -> None:
    program = torch.export.export(model_of(lambda x: x * 2 if x.shape[0] % 3 == 0 else x * 3),
                                  (tensor(6, 4),), dynamic_shapes=(({0: Dim.AUTO},),))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    compiled, x = bc.optimize(torch.export.load(file)), tensor(9, 4)
    assert_same(x * 2, compiled(x))
    with pytest.raises(InputError, match=r"dimension 0 of .* = 8"):
        compiled(tensor(8, 4))


class Counting(nn.Module):
    """Writes to its buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return x + self.calls


@pytest.mark.parametrize("as_program", [False, True])
def test_a_buffer_that_changes_is_refused_and_left_alone(as_program: bool) -> None:
    model = Counting().eval()
    given = torch.export.export(model, (tensor(2),)) if as_program else model
    with pytest.raises(CaptureError, match="changes calls in place"):
        bc.optimize(given, (tensor(2),))
    assert model.calls.item() == 0


class Wrapped(nn.Module):
    """As nn.DataParallel and others hold a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def with_partial_forward(model: nn.Module) -> nn.Module:
    model.forward = functools.partial(model.forward, mask=None)
    return model


def with_hook(model: nn.Module) -> nn.Module:
    model.mix.register_forward_hook(lambda module, args, result: result * 2)
    return model


def shared(model: nn.Module) -> nn.Module:
    return nn.Sequential(model, nn.ReLU(), model)


def weight_normed(model: nn.Module) -> nn.Module:
    nn.utils.parametrizations.weight_norm(model.mix)
    return model


FORMS = {"wrapped": Wrapped, "data parallel": nn.DataParallel, "partial": with_partial_forward,
         "hook": with_hook, "shared": shared, "weight norm": weight_normed,
         "compiled": functools.partial(torch.compile, backend="eager")}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_module(form: str) -> None:
    model = FORMS[form](Attention()).eval()
    compiled, x = bc.optimize(model, (tensor(2, 5, 16),)), tensor(3, 7, 16)
    with torch.no_grad():
        assert_same(model(x), compiled(x))
    assert set(operators(compiled)) == {"attention"}


NO_MODELS: dict[str, tuple[Callable[[], Any], type[BincompileError], str]] = {
    "scripted": (lambda: torch.jit.script(nn.Linear(16, 3).eval()), InputTypeError, "scripted"),
    "a function": (lambda: lambda x: x, InputTypeError, "forward of an nn.Module"),
    "a partial": (lambda: functools.partial(Attention().eval(), mask=None), InputTypeError,
                  "forward of an nn.Module"),
    "lazy": (lambda: nn.LazyLinear(3).eval(), ConfigError, "call the model once"),
    "meta": (lambda: Attention().to("meta").eval(), ConfigError, "to_empty"),
}


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
@pytest.mark.parametrize("name", NO_MODELS)
def test_what_can_not_be_compiled_says_what_to_change(name: str) -> None:
    make, error, word = NO_MODELS[name]
    with pytest.raises(error, match=word):
        bc.optimize(make(), (tensor(2, 5, 16),))


# Structures.


@dataclasses.dataclass
class Pair:
    """A dataclass that nobody registered."""

    left: torch.Tensor
    right: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    """The same, frozen and with slots."""

    left: torch.Tensor
    right: Any = None


class Named(dict):
    """A dict of a class of its own, with an attribute."""

    def __init__(self, **items: Any) -> None:
        super().__init__(items)
        self.kind = "named"


OBJECTS = {"dataclass": Pair, "frozen": Frozen, "namespace": types.SimpleNamespace}


@pytest.mark.parametrize("name", OBJECTS)
def test_objects_with_tensors_go_in_and_come_out(name: str) -> None:
    kind = OBJECTS[name]
    model = model_of(lambda x, pair: kind(left=x + pair.left, right=[pair.right["n"] * x, 3, None]))
    compiled = bc.optimize(model, (tensor(2, 3), kind(left=tensor(2, 3), right={"n": 2})))
    x, pair = tensor(4, 5), kind(left=tensor(4, 5), right={"n": 2})
    found = compiled(x, pair)
    assert type(found) is kind and found.right[1:] == [3, None]
    assert_same((x + pair.left, x * 2), (found.left, found.right[0]))
    with pytest.raises(InputTypeError):
        compiled(x, kind(left=tensor(4, 5), right={"n": 3}))
    with pytest.raises(InputTypeError):
        compiled(x, tensor(4, 5))


def test_dicts_of_a_class_of_their_own() -> None:
    compiled = bc.optimize(model_of(lambda d: Named(double=d["x"] * 2)), (Named(x=tensor(3, 4)),))
    x = tensor(5, 6)
    found = compiled(Named(x=x))
    assert type(found) is Named and found.kind == "named" and list(found) == ["double"]
    assert_same(x * 2, found["double"])


def test_an_object_that_holds_itself_is_a_leaf_at_the_end() -> None:
    knot = types.SimpleNamespace(x=torch.ones(2))
    knot.self = knot
    assert len(pytree.tree_leaves(hold(knot))) < 20


def test_a_cache_of_transformers_comes_out() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64)
    model = transformers.LlamaForCausalLM(config).eval()
    compiled = bc.optimize(model, (torch.randint(0, 50, (2, 7)),))
    ids = torch.randint(0, 50, (3, 9))
    with torch.no_grad():
        expected, found = model(ids), compiled(ids)
    assert type(found) is type(expected)
    assert type(found.past_key_values) is type(expected.past_key_values)
    assert found.past_key_values.get_seq_length() == 9
    assert_same(expected.logits, found.logits)
    assert_same([layer.keys for layer in expected.past_key_values.layers],
                [layer.keys for layer in found.past_key_values.layers])


class Optional(nn.Module):
    """Numbers, texts and flags beside a tensor."""

    def forward(self, x: torch.Tensor, mode: str = "scale", *, flag: bool = True,
                number: float = 2.0, other: torch.Tensor | None = None) -> torch.Tensor:
        x = x * number if mode == "scale" and flag else -x
        return x if other is None else x + other


@pytest.mark.parametrize(("kwargs", "accepted"), [
    ({}, True), ({"number": 2.0, "flag": True}, True), ({"mode": "scale"}, True),
    ({"other": None}, True), ({"number": 2}, False), ({"flag": 1}, False),
    ({"number": -2.0}, False), ({"mode": "none"}, False)])
def test_constants_are_of_the_captured_value_and_type(kwargs: dict[str, Any],
                                                      accepted: bool) -> None:
    model, x = Optional().eval(), tensor(3, 4)
    for given in ({}, {"flag": True, "number": 2.0, "other": None}):
        compiled = bc.optimize(model, (tensor(2, 4),), given)
        if accepted:
            assert_same(model(x, **kwargs), compiled(x, **kwargs))
        else:
            with pytest.raises(InputTypeError):
                compiled(x, **kwargs)


def test_signs_of_zero_are_told_apart() -> None:
    compiled = bc.optimize(model_of(lambda x, n: x / n), (tensor(3), 0.0))
    with pytest.raises(InputTypeError):
        compiled(tensor(3), -0.0)


class Open(nn.Module):
    """Tensors by any name."""

    def forward(self, x: torch.Tensor, **others: torch.Tensor) -> torch.Tensor:
        return x + others["y"]


@pytest.mark.parametrize("form", ["inside", "beside", "in order"])
def test_sizes_are_stated_for_open_arguments(form: str) -> None:
    rows = {0: Dim("rows")}
    shapes = {"inside": {"x": rows, "others": {"y": rows}}, "beside": {"x": rows, "y": rows},
              "in order": (rows, {"y": rows})}[form]
    compiled = bc.optimize(Open().eval(), (tensor(2, 3),), {"y": tensor(2, 3)},
                           dynamic_shapes=shapes)
    x, y = tensor(5, 3), tensor(5, 3)
    assert_same(x + y, compiled(x, y=y))
    for bad in ((tensor(5, 4), tensor(5, 4)), (tensor(5, 3), tensor(4, 3))):
        with pytest.raises(InputError):
            compiled(bad[0], y=bad[1])
    with pytest.raises(InputTypeError, match="'z'"):
        bc.optimize(Open().eval(), (tensor(2, 3),), {"y": tensor(2, 3)},
                    dynamic_shapes={"x": rows, "z": rows})


# Sizes, dtypes and layouts.


@pytest.mark.parametrize("first", [(1, 1, 16), (1, 5, 16), (2, 1, 16)])
def test_examples_with_sizes_of_one(first: tuple[int, ...]) -> None:
    model = Attention().eval()
    compiled = bc.optimize(model, (tensor(*first),))
    for shape in ((1, 1, 16), (3, 7, 16), (1, 9, 16), (4, 1, 16)):
        x = tensor(*shape)
        assert_same(model(x), compiled(x))


def test_time_may_be_the_last_axis() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.attention = nn.Conv1d(16, 16, 1), Attention()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(self.first(x).transpose(1, 2)).transpose(1, 2)

    model = Last().eval()
    compiled = bc.optimize(model, (tensor(2, 16, 9),))
    for shape in ((3, 16, 7), (1, 16, 1)):
        x = tensor(*shape)
        with torch.no_grad():
            assert_same(model(x), compiled(x))
    assert "fixes dimension 1 of x to 16" in "\n".join(compiled.report.notes)


def test_cached_keys_grow() -> None:
    class Cached(nn.Module):
        def forward(self, x: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
            key = torch.cat((past, x), 2)
            return functional.scaled_dot_product_attention(x, key, key)

    model = Cached().eval()
    compiled = bc.optimize(model, (tensor(2, 4, 3, 8), tensor(2, 4, 9, 8)))
    args = tensor(3, 4, 1, 8), tensor(3, 4, 12, 8)
    assert_same(model(*args), compiled(*args))


def test_an_error_names_the_input_and_its_axis() -> None:
    model = model_of(lambda x: x * 2 if x.shape[0] * x.shape[1] % 6 == 0 else x)
    compiled = bc.optimize(model, (tensor(2, 9),))
    with pytest.raises(InputError) as caught:
        compiled(tensor(2, 8))
    assert "dimension 1 of arg0 (" in caught.value.found and ") = 8" in caught.value.found
    assert "% 6 == 0" in caught.value.allowed and "((" not in caught.value.allowed


def test_a_float32_result_of_half_layers_is_held_to_their_rounding() -> None:
    inner = Attention().bfloat16().eval()
    model = Wrapped(inner)
    model.forward = lambda x: inner(x.bfloat16()).float()
    compiled, x = bc.optimize(model.eval(), (tensor(2, 5, 16),)), tensor(3, 7, 16)
    with torch.no_grad():
        assert_same(model(x), compiled(x), 3e-2)
    assert operators(compiled) == ["attention"]


LAYOUTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "transposed": lambda x: (x * 2).transpose(0, 1), "contiguous": lambda x: x.mT.contiguous(),
    "three axes": lambda x: (x[..., None] * torch.ones(3)).permute(2, 0, 1),
    "attention": lambda x: functional.scaled_dot_product_attention(
        x[None, None], x[None, None], x[None, None]).transpose(1, 2).contiguous(),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_results_lie_in_memory_as_the_models_do(name: str) -> None:
    model = model_of(LAYOUTS[name])
    compiled, x = bc.optimize(model, (tensor(4, 6),)), tensor(5, 7)
    assert_same(model(x), compiled(x))


def test_the_callers_autocast_does_not_reach_inside() -> None:
    model, x = Attention().eval(), tensor(2, 5, 16)
    compiled = bc.optimize(model, (x,))
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(expected, compiled(x))
        inside = bc.optimize(model, (x,))
        assert inside(x).dtype == model(x).dtype == torch.bfloat16
    assert inside(x).dtype == torch.bfloat16


def test_complex_numbers_inside() -> None:
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(16, 48)
            angles = torch.outer(torch.arange(32.0), torch.tensor([1.0, 0.1]))
            self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles),
                                 persistent=False)

        def turned(self, x: torch.Tensor) -> torch.Tensor:
            pairs = torch.view_as_complex(x.unflatten(-1, (2, 2)))
            return torch.view_as_real(pairs * self.turns[:x.shape[-2]]).flatten(-2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2).contiguous()
                       for t in self.mix(x).chunk(3, -1))
            weights = (self.turned(q) @ self.turned(k).mT / 2).softmax(-1)
            return (weights @ v).transpose(1, 2).flatten(2)

    model, x = Rotary().eval(), tensor(3, 9, 16)
    compiled = bc.optimize(model, (tensor(2, 5, 16),))
    assert_same(model(x), compiled(x))
    assert operators(compiled) == ["attention"]


def test_a_wrong_dtype_without_inputs_is_the_models_own_error() -> None:
    compiled = bc.optimize(Attention().eval())
    assert compiled(tensor(2, 5, 16)).shape == (2, 5, 16)
    with pytest.raises(CaptureError, match="same dtype"):
        compiled(tensor(2, 5, 16).double())
    assert compiled(tensor(3, 4, 16)).shape == (3, 4, 16) and len(compiled.variants) == 1


def test_threads_may_compile_at_once() -> None:
    failed: list[BaseException] = []

    def compile_one() -> None:
        try:
            model, x = Attention().eval(), tensor(2, 5, 16)
            assert_same(model(x), bc.optimize(model, (x,))(x))
        except BaseException as error:  # for the main thread to show
            failed.append(error)

    threads = [threading.Thread(target=compile_one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
