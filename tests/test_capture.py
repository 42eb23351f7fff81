"""Capture of what users write: a call gives the model's results or a clear error, never others."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils import _pytree as pytree

import bincompile as bc
from bincompile.errors import (
    BincompileError,
    CaptureError,
    ConfigError,
    InputError,
    InputTypeError,
    ProofError,
)

Pair = collections.namedtuple("Pair", "first second")


class Function(nn.Module):
    """A function as a model; it may use the module's parts."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


class Named(nn.Module):
    """A forward with named parameters and defaults."""

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None, scale: float = 2.0,
                negate: bool = False) -> torch.Tensor:
        total = x * scale if y is None else x * scale + y
        return -total if negate else total


def model_of(function: Callable[..., Any], **parts: Any) -> nn.Module:
    return Function(function, **parts).eval()


def tensor(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def assert_same(expected: Any, found: Any) -> None:
    left, left_spec = pytree.tree_flatten(expected)
    right, right_spec = pytree.tree_flatten(found)
    assert left_spec == right_spec
    for a, b in zip(left, right, strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
        else:
            assert a == b


# Sizes: what is accepted is right, and what is refused says so.

BRANCHES: dict[str, tuple[Callable[..., Any], tuple[int, int]]] = {
    "one row apart": (lambda m, x: x * 2 if x.size(0) == 1 else x * 3, (2, 6)),
    "one row apart, seen": (lambda m, x: x * 2 if x.size(0) == 1 else x * 3, (1, 6)),
    "many tokens": (lambda m, x: x * 2 if x.shape[1] > 4 else x * 3, (2, 6)),
    "few tokens": (lambda m, x: x * 2 if x.shape[1] > 4 else x * 3, (2, 3)),
    "one size apart": (lambda m, x: x * 2 if x.shape[1] == 7 else x * 3, (2, 6)),
    "thirds": (lambda m, x: x * 2 if x.shape[1] % 3 == 0 else x * 3, (2, 6)),
    "eighths": (lambda m, x: x * 2 if x.shape[1] // 4 % 2 else x * 3, (2, 6)),
    "more rows than tokens": (lambda m, x: x * 2 if x.shape[0] > x.shape[1] else x * 3, (2, 6)),
    "elements": (lambda m, x: x * 2 if x.numel() > 100 else x * 3, (2, 6)),
    "a number of it": (lambda m, x: x * int(x.shape[1]), (2, 6)),
    "halves": (lambda m, x: x[:, :x.shape[1] // 2] * 2, (2, 6)),
    "a loop over tokens": (lambda m, x: sum(x[:, i] for i in range(x.shape[1])), (2, 6)),
    "padded to a multiple": (
        lambda m, x: functional.pad(x, (0, 0, 0, -x.shape[1] % 4)).unflatten(1, (-1, 4)), (2, 6)),
    "cut to four": (lambda m, x: x[:, :4], (2, 6)),
    "last three": (lambda m, x: x[:, -3:], (2, 6)),
    "both": (lambda m, x: x * 2 if x.shape[0] == 2 and x.shape[1] == 6 else x * 3, (2, 6)),
}
SIZES = [(rows, tokens) for rows in (1, 2, 3, 5, 8) for tokens in (1, 2, 3, 4, 5, 6, 7, 9, 12, 40)]


@pytest.mark.parametrize("name", BRANCHES)
def test_no_size_gives_a_silently_wrong_result(name: str) -> None:
    function, size = BRANCHES[name]
    model = model_of(function)
    compiled = bc.optimize(model, (tensor(*size, 4),))
    answered = 0
    for rows, tokens in SIZES:
        x = tensor(rows, tokens, 4)
        try:
            found = compiled(x)
        except InputError as error:
            assert "arg0" in str(error)
            continue
        assert_same(model(x), found)
        answered += 1
    assert answered > 0
    assert_same(model(tensor(*size, 4) * 0 + 1), compiled(tensor(*size, 4) * 0 + 1))


def test_without_a_branch_every_size_is_accepted() -> None:
    model = model_of(lambda m, x: torch.softmax(x @ x.mT, -1) @ x)
    for first in ((1, 6, 4), (2, 1, 4), (1, 1, 4), (3, 5, 4)):
        compiled = bc.optimize(model, (tensor(*first),))
        for rows, tokens in ((5, 6), (1, 1), (1, 9), (4, 4)):
            x = tensor(rows, tokens, 4)
            assert_same(model(x), compiled(x))


@pytest.mark.parametrize("shape", [(0, 6, 4), (2, 0, 4)])
def test_an_empty_input_works_or_says_why_not(shape: tuple[int, ...]) -> None:
    compiled = bc.optimize(model_of(lambda m, x: x * 2), (tensor(2, 6, 4),))
    with pytest.raises(InputError, match="with size 0"):
        compiled(tensor(*shape))
    captured = bc.optimize(model_of(lambda m, x: x * 2), (tensor(*shape),))
    assert captured(tensor(*shape)).shape == shape


def test_sizes_that_belong_together_are_held_together() -> None:
    model = model_of(lambda m, x, y: torch.cat((x, x), 1) + y)
    compiled = bc.optimize(model, (tensor(2, 3, 4), tensor(2, 6, 4)))
    args = tensor(3, 5, 4), tensor(3, 10, 4)
    assert_same(model(*args), compiled(*args))
    for bad in ((tensor(2, 5, 4), tensor(2, 9, 4)), (tensor(2, 3, 4), tensor(3, 6, 4))):
        with pytest.raises(InputError):
            compiled(*bad)


def test_equal_sizes_of_the_example_may_differ_later() -> None:
    model = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    x = tensor(1, 6, 16)
    compiled = bc.optimize(model, (x, x, x))
    query, key = tensor(5, 3, 16), tensor(5, 7, 16)
    assert_same(model(query, key, key), compiled(query, key, key))
    with pytest.raises(InputError):
        compiled(tensor(2, 3, 16), tensor(4, 7, 16), tensor(4, 7, 16))


def test_static_shapes_refuse_other_sizes() -> None:
    compiled = bc.optimize(model_of(lambda m, x: x * 2), (tensor(2, 6, 4),), dynamic_shapes=None)
    with pytest.raises(InputError, match="fixed by the capture"):
        compiled(tensor(3, 6, 4))


def test_conditions_are_saved_with_the_program(tmp_path) -> None:
    function, size = BRANCHES["thirds"]
    compiled = bc.optimize(model_of(function), (tensor(*size, 4),))
    compiled.save(tmp_path / "model.bc")
    loaded = bc.load(tmp_path / "model.bc")
    x = tensor(3, 9, 4)
    assert torch.equal(loaded(x), x * 2)
    with pytest.raises(InputError, match="% 3"):
        loaded(tensor(3, 8, 4))


# Calls: positional, named, nested, with defaults.


def test_aliased_inputs_stay_apart() -> None:
    model, x = model_of(lambda m, a, b: a * 2 + b), tensor(2, 6, 4)
    compiled = bc.optimize(model, (x, x))
    args = tensor(2, 6, 4), tensor(2, 6, 4)
    assert_same(model(*args), compiled(*args))
    named = bc.optimize(Named().eval(), (), {"x": x, "y": x})
    assert_same(args[0] * 2 + args[1], named(y=args[1], x=args[0]))


CALLS: list[tuple[tuple[int, ...], dict[str, Any], bool]] = [
    ((0,), {}, True), ((0,), {"y": None}, True), ((0,), {"scale": 2.0}, True),
    ((), {"x": 0}, True), ((), {"x": 0, "negate": False}, True), ((0, 1), {}, False),
    ((0,), {"y": 1}, False), ((0,), {"scale": 3.0}, False), ((0,), {"negate": True}, False),
    ((), {}, False), ((0, 1, 2), {}, False), ((0,), {"other": 1}, False),
]


@pytest.mark.parametrize("named", [False, True])
def test_a_call_may_be_positional_named_or_by_default(named: bool) -> None:
    model, tensors = Named().eval(), [tensor(3, 5) for _ in range(3)]
    compiled = bc.optimize(model, () if named else (tensor(3, 5),),
                           {"x": tensor(3, 5)} if named else None)
    for places, kwargs, accepted in CALLS:
        args = tuple(tensors[i] for i in places)
        call = {k: tensors[v] if type(v) is int else v for k, v in kwargs.items()}
        if accepted:
            assert_same(model(*args, **call), compiled(*args, **call))
        else:
            with pytest.raises(InputTypeError):
                compiled(*args, **call)


@pytest.mark.parametrize("named", [False, True])
def test_two_tensors_in_any_form(named: bool) -> None:
    model, x, y = Named().eval(), tensor(3, 5), tensor(3, 5)
    compiled = bc.optimize(model, () if named else (x, y), {"y": y, "x": x} if named else None)
    for args, kwargs in (((x, y), {}), ((x,), {"y": y}), ((), {"x": x, "y": y}),
                         ((), {"y": y, "x": x}), ((x, y, 2.0), {})):
        assert_same(model(*args, **kwargs), compiled(*args, **kwargs))
    with pytest.raises(InputTypeError):
        compiled(x)


def test_open_ended_arguments() -> None:
    stars = bc.optimize(model_of(lambda m, *a: a[0] - a[1] * a[2]), tuple(map(tensor, (3, 3, 3))))
    args = tensor(3), tensor(3), tensor(3)
    assert_same(args[0] - args[1] * args[2], stars(*args))
    with pytest.raises(InputTypeError):
        stars(*args[:2])
    named = bc.optimize(model_of(lambda m, a, **k: a + k["b"] - k["c"]), (args[0],),
                        {"b": args[1], "c": args[2]})
    assert_same(args[0] + args[1] - args[2], named(args[0], c=args[2], b=args[1]))
    with pytest.raises(InputTypeError):
        named(args[0], b=args[1])


def test_nested_inputs_and_outputs() -> None:
    def function(m: nn.Module, tree: dict[str, Any]) -> dict[str, Any]:
        return {"sum": tree["a"]["b"] + tree["c"][0], "rest": (None, 3, "text", tree["c"][1] * 2),
                "pair": Pair(tree["a"]["b"], [tree["c"][0]])}

    model = model_of(function)
    compiled = bc.optimize(model, ({"a": {"b": tensor(2, 6)}, "c": [tensor(2, 6), tensor(3)]},))
    b, first, second = tensor(4, 5), tensor(4, 5), tensor(3)
    expected = model({"a": {"b": b}, "c": [first, second]})
    assert_same(expected, compiled({"a": {"b": b}, "c": [first, second]}))
    assert_same(expected, compiled({"c": [first, second], "a": {"b": b}}))
    assert isinstance(compiled({"a": {"b": b}, "c": [first, second]})["pair"], Pair)
    with pytest.raises(InputTypeError):
        compiled({"a": {"b": b}, "c": [first]})


def test_results_without_tensors() -> None:
    assert bc.optimize(model_of(lambda m, x: None), (tensor(2),))(tensor(2)) is None
    assert_same((None, tensor(2) * 0), bc.optimize(
        model_of(lambda m, x: (None, x * 0)), (tensor(2),))(tensor(2)))


def test_a_registered_dataclass_comes_back_as_itself() -> None:
    pytree.register_dataclass(Registered)
    model = model_of(lambda m, x: Registered(x * 2, x + 1))
    found = bc.optimize(model, (tensor(2, 3),))(torch.ones(4, 3))
    assert type(found) is Registered and torch.equal(found.first, torch.full((4, 3), 2.0))


@dataclasses.dataclass
class Registered:
    first: torch.Tensor
    second: torch.Tensor


def test_numbers_are_part_of_the_program() -> None:
    compiled = bc.optimize(model_of(lambda m, x, n: x * n), (tensor(3), 3))
    assert_same(torch.full((3,), 3.0), compiled(torch.ones(3), 3))
    with pytest.raises(InputTypeError, match="arg1=4"):
        compiled(torch.ones(3), 4)


@pytest.mark.parametrize(("call", "error", "word"), [
    (lambda: (torch.ones(2, 6, dtype=torch.float64),), InputTypeError, "float64"),
    (lambda: (torch.ones(6),), InputError, "rank 1"),
    (lambda: (torch.ones(2, 6), torch.ones(2, 6)), InputTypeError, "1 inputs"),
    (lambda: (), InputTypeError, "1 inputs"),
    (lambda: ([1.0, 2.0],), InputTypeError, "a tensor: arg0"),
    (lambda: (None,), InputTypeError, "tensor"),
    (lambda: ("text",), InputTypeError, "is a str"),
])
def test_a_wrong_call_says_what_is_allowed(call, error, word) -> None:
    compiled = bc.optimize(model_of(lambda m, x: x * 2), (tensor(2, 6),))
    with pytest.raises(error, match=word) as caught:
        compiled(*call())
    assert caught.value.found and caught.value.allowed and caught.value.change


@pytest.mark.parametrize("model", [[1], lambda x: x, None, "model", torch.ones(2)])
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(InputTypeError, match=r"nn\.Module"):
        bc.optimize(model, (tensor(2),))


def test_a_call_without_tensors_is_refused() -> None:
    with pytest.raises(InputTypeError, match="at least one tensor"):
        bc.optimize(model_of(lambda m: m.w, w=nn.Parameter(tensor(3))), ())
    with pytest.raises(InputTypeError, match="a tuple"):
        bc.optimize(model_of(lambda m, x: x), tensor(3))


# Models that have no graph, or none that can be trusted.


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:  # the line that the error names
            return x * 2
        return x


def test_control_flow_on_values_names_the_line() -> None:
    lines, start = inspect.getsourcelines(Branching)
    number = start + next(i for i, text in enumerate(lines) if "x.sum() > 0" in text)
    with pytest.raises(CaptureError, match=f"test_capture.py:{number}: if x.sum") as caught:
        bc.optimize(Branching().eval(), (tensor(2, 3),))
    assert "torch.where" in caught.value.change


def test_training_mode_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout())
    for trained in (model.train(), nn.Sequential(nn.Linear(4, 4).eval(), nn.Dropout())):
        with pytest.raises(ConfigError, match="training mode"):
            bc.optimize(trained, (tensor(2, 4),))
        with pytest.raises(ConfigError, match="training mode"):
            bc.optimize(trained)
    half = nn.Sequential(nn.Linear(4, 4), nn.Dropout()).eval()
    half[1].train()
    with pytest.raises(ConfigError, match=r"^1 is in training mode"):
        bc.optimize(half, (tensor(2, 4),))


RANDOM = {
    "dropout": lambda m, x: functional.dropout(x, 0.5, training=True),
    "faint noise": lambda m, x: x + 1e-9 * torch.randn_like(x),
    "rand": lambda m, x: x + torch.rand(4),
    "bernoulli, unused sum": lambda m, x: x + 0 * torch.bernoulli(x.sigmoid()),
    "attention": lambda m, x: functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    "multinomial": lambda m, x: torch.multinomial(x.softmax(-1), 2).float(),
    "alpha dropout": lambda m, x: functional.alpha_dropout(x, 0.5, training=True),
    "noisy relu": lambda m, x: functional.rrelu(x, training=True),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_results_are_refused(name: str) -> None:
    with pytest.raises(CaptureError, match=r"random numbers at .*test_capture.py"):
        bc.optimize(model_of(RANDOM[name]), (tensor(3, 4),))


def test_dropout_in_eval_mode_is_nothing() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout1d(), nn.AlphaDropout(), nn.RReLU()).eval()
    x = tensor(2, 3, 4)
    assert_same(model(x), bc.optimize(model, (tensor(2, 3, 4),))(x))


def counted(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    m.calls += 1
    return x * m.calls


def raising(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    raise KeyError("zz")


def counting_buffer(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    m.buffer.add_(1)
    return x + m.buffer


BROKEN: dict[str, tuple[Callable[..., Any], type[BincompileError], str]] = {
    "state of Python": (counted, ProofError, "differs"),
    "buffer": (counting_buffer, CaptureError, "buffer in place"),
    "input": (lambda m, x: x.mul_(2), CaptureError, "in place"),
    "an error of its own": (raising, CaptureError, "KeyError: 'zz'"),
    "a wrong shape": (lambda m, x: x @ torch.ones(3, 3), CaptureError, "test_capture.py"),
    "numpy": (lambda m, x: torch.from_numpy(x.numpy() * 2), CaptureError, "numpy"),
    "a Python number of it": (lambda m, x: x[:int(x.abs().sum())], CaptureError, "captured"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_can_not_be_captured_is_a_capture_error(name: str) -> None:
    function, error, word = BROKEN[name]
    model = model_of(function, calls=0, w=nn.Linear(1, 1))
    model.register_buffer("buffer", torch.zeros(4))
    with pytest.raises(error, match=word):
        bc.optimize(model, (tensor(2, 4),))


def test_an_embedding_that_renormalises_its_table_is_refused() -> None:
    with pytest.raises(CaptureError, match="weight in place"):
        bc.optimize(nn.Embedding(5, 4, max_norm=0.1).eval(), (torch.tensor([1, 2]),))


def test_dynamic_shapes_of_torch_export() -> None:
    model, batch = nn.Linear(4, 3).eval(), torch.export.Dim("batch", min=2, max=64)
    compiled = bc.optimize(model, (tensor(2, 6, 4),), dynamic_shapes=({0: batch},))
    x = tensor(9, 6, 4)
    assert_same(model(x), compiled(x))
    for bad in (tensor(9, 5, 4), tensor(65, 6, 4)):
        with pytest.raises(InputError):
            compiled(bad)
    with pytest.raises(CaptureError):
        bc.optimize(model, (tensor(2, 6, 4),), dynamic_shapes={"zz": {0: batch}})


# Results have their own memory, and the model is left alone.

VIEWS = {
    "the input": lambda m, x: x, "the weight": lambda m, x: (x + m.w, m.w, m.w.T),
    "transposed": lambda m, x: x.mT, "cut": lambda m, x: (x[:, 1:], x.narrow(0, 0, 1), x[..., 0]),
    "unfolded": lambda m, x: x.unfold(0, 2, 1), "diagonal": lambda m, x: x.diagonal(),
    "strided": lambda m, x: torch.as_strided(x, (2, 2), (1, 2)),
    "einsum": lambda m, x: torch.einsum("ab->ba", x), "halves": lambda m, x: x.chunk(2),
    "regrouped": lambda m, x: (x.reshape(-1), x.view(-1, 1), x.flatten(), x.unflatten(1, (2, 2))),
    "expanded": lambda m, x: (x.expand(2, -1, -1), x[None], x.squeeze()),
    "nothing done": lambda m, x: (x.contiguous(), x.to(x.dtype), functional.dropout(x, 0.5, False)),
    "one value twice": lambda m, x: (lambda y: (y, y.mT, y[0]))(x * 2),
}


@pytest.mark.parametrize("name", VIEWS)
def test_results_have_their_own_memory(name: str) -> None:
    model = model_of(VIEWS[name], w=nn.Parameter(tensor(4, 4)))
    compiled, x = bc.optimize(model, (tensor(4, 4),)), tensor(4, 4)
    before, weight = x.clone(), model.w.detach().clone()
    with torch.no_grad():
        assert_same(model(x), compiled(x))
        expected = pytree.tree_map(torch.clone, model(x))
    for result in pytree.tree_leaves(compiled(x)):
        assert not result.requires_grad
        if result.numel() == result.untyped_storage().nbytes() // 4:
            result.add_(1)
    assert torch.equal(x, before) and torch.equal(model.w, weight)
    assert_same(expected, compiled(x))
    results = pytree.tree_leaves(compiled(x))
    places = {r.untyped_storage().data_ptr() for r in results}
    assert len(places) == len(results)
    assert not places & {x.untyped_storage().data_ptr(), model.w.untyped_storage().data_ptr()}


def digest(model: nn.Module) -> str:
    total = hashlib.sha256()
    for name, value in model.state_dict().items():
        total.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        total.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def test_the_model_is_not_changed() -> None:
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    before, fast = digest(model), torch.backends.mha.get_fastpath_enabled()
    kept = {id(p): p.requires_grad for p in model.parameters()}
    state, x = torch.random.get_rng_state(), torch.ones(2, 5, 16)
    bc.optimize(model, (x,))(x)
    assert digest(model) == before and not model.training
    assert {id(p): p.requires_grad for p in model.parameters()} == kept
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not vars(model).keys() & {"_bincompile", "compiled"}


# Kinds of models and dtypes.


def test_without_inputs_there_is_one_capture_for_many_sizes() -> None:
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    compiled = bc.optimize(model)
    for shape in ((2, 5, 16), (1, 3, 16), (7, 1, 16)):
        x = tensor(*shape)
        assert_same(model(x), compiled(x))
    assert len(compiled.variants) == 1
    x = tensor(5, 16)
    assert_same(model(x), compiled(x))
    assert len(compiled.variants) == 2


def test_without_inputs_a_new_structure_dtype_or_branch_is_captured_anew() -> None:
    model = model_of(lambda m, x, y=None: (x * 2 if x.shape[0] % 3 else x * 5) + (
        0 if y is None else y))
    compiled, counts = bc.optimize(model), []
    for args in ((tensor(2),), (tensor(4),), (torch.arange(4),), (tensor(6),), (tensor(9),),
                 (tensor(2), tensor(2)), (tensor(8),)):
        assert_same(model(*args), compiled(*args))
        counts.append(len(compiled.variants))
    assert counts == [1, 1, 2, 3, 3, 4, 4]


def test_exported_programs_and_graph_modules() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU()).eval()
    graph = torch.fx.symbolic_trace(model)
    x = tensor(3, 7, 4)
    assert_same(model(x), bc.optimize(graph.eval(), (tensor(2, 6, 4),))(x))
    rows = ({0: torch.export.Dim.AUTO},)
    exported = torch.export.export(model, (tensor(2, 6, 4),), dynamic_shapes=rows)
    for compiled in (bc.optimize(exported), bc.optimize(exported, (tensor(2, 6, 4),))):
        x = tensor(5, 6, 4)
        assert_same(model(x), compiled(x))
        with pytest.raises(InputError, match="fixed by the capture"):
            compiled(tensor(5, 7, 4))


def test_an_exported_program_keeps_its_branch() -> None:
    model = model_of(lambda m, x: x * 2 if x.shape[0] % 3 == 0 else x * 3)
    rows = {"args": ({0: torch.export.Dim.AUTO},)}
    compiled = bc.optimize(torch.export.export(model, (tensor(6, 4),), dynamic_shapes=rows))
    x = tensor(9, 4)
    assert_same(model(x), compiled(x))
    with pytest.raises(InputError):
        compiled(tensor(8, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_dtypes(dtype: torch.dtype) -> None:
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).to(dtype).eval()
    compiled, x = bc.optimize(model, (tensor(2, 5, 16).to(dtype),)), tensor(3, 7, 16).to(dtype)
    found = compiled(x)
    assert found.dtype == dtype and [m.operator for m in compiled.report.matches] == ["attention"]
    limit = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, model(x), rtol=limit, atol=limit)


@pytest.mark.parametrize("x", [torch.arange(6).view(2, 3), torch.ones(2, 3, dtype=torch.bool),
                               torch.tensor(2.0), torch.ones(2, 3, dtype=torch.uint8)])
def test_inputs_that_are_no_float_matrices(x: torch.Tensor) -> None:
    model = model_of(lambda m, x: (x + x, x.float().mean()))
    assert_same(model(x), bc.optimize(model, (x.clone(),))(x))


def test_tied_weights_are_read_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(50, 16), nn.Linear(16, 50, bias=False)
            self.head.weight = self.table.weight

        def forward(self, indices: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(indices))

    model = Tied().eval()
    compiled = bc.optimize(model, (torch.tensor([[1, 2]]),))
    indices = torch.tensor([[0, 49, 3]] * 4)
    assert_same(model(indices), compiled(indices))
    assert compiled.nbytes == 50 * 16 * 4
    for bad in (50, -1):
        with pytest.raises(InputError, match=f"index {bad}"):
            compiled(torch.tensor([[bad, 0]]))


def test_other_layers_pass_through() -> None:
    for model, x in ((nn.LSTM(4, 5, batch_first=True), tensor(2, 6, 4)),
                     (nn.BatchNorm1d(6), tensor(2, 6, 4)),
                     (nn.Conv1d(6, 3, 3, padding=1), tensor(2, 6, 9))):
        model = model.eval()
        other = x[:1] * 2
        assert_same(model(other), bc.optimize(model, (x,))(other))
