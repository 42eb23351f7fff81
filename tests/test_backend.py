"""torch.compile(backend="bincompile"): the results and gradients of eager, whatever is compiled."""

from __future__ import annotations

import gc
import importlib.metadata
import logging
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import bincompile as bc
from bincompile import backend
from bincompile.backend import compile_graph, reports
from bincompile.dynamo import path_in
from bincompile.errors import AccuracyUnknownError, ConfigError

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    gc.collect()
    backend._alive.clear()
    yield
    torch._dynamo.reset()


class Attention(nn.Module):
    """A hand-written attention behind an embedding, with an MLP after it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(20, 16), nn.Linear(16, 48)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.mix(x).chunk(3, -1))
        mixed = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
        return x + self.mlp(mixed.transpose(1, 2).flatten(2))


class Breaking(nn.Module):
    """Two attentions with a branch on values between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(16, 4, batch_first=True)
        self.second = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x, x, x, need_weights=False)[0]
        if x.sum() > 0:
            x = x * 2
        return self.second(x, x, x, need_weights=False)[0]


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 20, shape)


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend=compile_graph, **options)


def assert_same(model: Any, found: Any, *args: Any, **kwargs: Any) -> None:
    with torch.no_grad():
        left, right = model(*args, **kwargs), found(*args, **kwargs)
    for a, b in zip(pytree.tree_leaves(left), pytree.tree_leaves(right), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
        assert not isinstance(a, torch.Tensor) or a.stride() == b.stride()


def operators() -> list[str]:
    return [m.operator for report in reports() for m in report.matches]


def notes() -> str:
    return "\n".join(note for report in reports() for note in report.notes)


def test_a_model_gives_what_eager_gives_at_new_sizes_too() -> None:
    model = Attention().eval()
    found = compiled(model)
    for shape in ((2, 5), (3, 7), (4, 9), (1, 1)):
        assert_same(model, found, tokens(*shape))
    assert operators()[:2] == ["embedding", "attention"] and "runs as it is" not in notes()
    assert reports()[0].matches[0].path == "table"


def test_layers_of_torch_keep_their_paths() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, activation="gelu")
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    found = compiled(model, fullgraph=True, dynamic=True)
    for shape in ((2, 5, 16), (3, 7, 16)):
        assert_same(model, found, torch.randn(shape))
    assert [m.path for m in reports()[0].matches] == ["layers.0", "layers.1"]


@pytest.mark.parametrize("masked", ["neither", "causal", "padding", "both"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_the_fast_path_of_torch_is_seen_through(masked: str, norm_first: bool) -> None:
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first).eval()
    kwargs: dict[str, torch.Tensor] = {}
    if masked in ("causal", "both"):
        kwargs["src_mask"] = torch.ones(5, 5, dtype=torch.bool).triu(1)
    if masked in ("padding", "both"):
        kwargs["src_key_padding_mask"] = torch.zeros(2, 5, dtype=torch.bool)
        kwargs["src_key_padding_mask"][1, 3:] = True
    assert_same(model, compiled(model), torch.randn(2, 5, 16), **kwargs)
    assert operators() == ["attention"] and "runs as it is" not in notes()


def test_a_transformers_encoder() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, attn_implementation="eager")
    model = transformers.BertModel(config).eval()
    found = compiled(model)
    for shape in ((2, 7), (3, 9)):
        mask = torch.ones(shape, dtype=torch.int64)
        mask[1, -2:] = 0
        assert_same(model, found, input_ids=torch.randint(0, 50, shape), attention_mask=mask)
    assert operators()[:5] == ["embedding"] * 3 + ["attention"] * 2
    assert "runs as it is" not in notes()


def test_graph_breaks_give_one_report_each() -> None:
    model = Breaking().eval()
    found = compiled(model)
    for sign in (1, -1):
        assert_same(model, found, sign * torch.randn(2, 5, 16))
    paths = [m.path for report in reports() for m in report.matches]
    assert set(paths) == {"first", "second"}


def test_an_argument_that_is_a_number_compiles_anew() -> None:
    model = nn.Softmax(-1)
    found = torch.compile(lambda x, n: model(x) * n, backend=compile_graph)
    x = torch.randn(3, 5)
    for n in range(1, 14):  # more than `MOST_VARIANTS`
        torch.testing.assert_close(found(x, n), model(x) * n)
    assert "compiled 8 times" in notes()


# Weights.


def change_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)


def change_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.mul_(1.5)


def load(model: nn.Module) -> None:
    model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()})


def assign(model: nn.Module) -> None:
    model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()}, assign=True)


def replace(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data * 1.5


class Scaled(nn.Module):
    """An attention whose scale, mask and norm are stored: what their values are may be baked in."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.25))
        self.norm, self.mix = nn.BatchNorm1d(8), nn.Linear(8, 24)
        self.register_buffer("mask", torch.ones(5, 5).triu(1) * -1e9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.mix(self.norm(x.mT).mT).chunk(3, -1)
        return (q @ k.mT * self.scale + self.mask).softmax(-1) @ v


@pytest.mark.parametrize("change", [change_in_place, change_data, load, assign, replace])
@pytest.mark.parametrize("model", [Attention, Scaled])
def test_weights_that_change_are_seen(model: Callable[[], nn.Module],
                                      change: Callable[[nn.Module], None]) -> None:
    made = model().eval()
    x = tokens(2, 5) if model is Attention else torch.randn(2, 5, 8)
    found = compiled(made)
    assert_same(made, found, x)
    before = found(x).detach()
    change(made)
    assert_same(made, found, x)
    assert not torch.allclose(before, found(x).detach(), atol=1e-3)
    assert "attention" in operators()


def test_buffers_that_change_are_seen() -> None:
    model, x = Scaled().eval(), torch.randn(2, 5, 8)
    found = compiled(model)
    assert_same(model, found, x)
    for buffer in (model.mask, model.norm.running_mean, model.norm.running_var):
        buffer.data.add_(torch.rand(buffer.shape))
        assert_same(model, found, x)


def test_layers_of_the_same_code_share_one_graph() -> None:
    layers = nn.Sequential(*(Scaled() for _ in range(12))).eval()
    for index, layer in enumerate(layers):
        layer.mix = nn.Linear(8, 24)
        layer.scale.data.fill_(0.25 if index % 2 else 0.5)
    inner = nn.Sequential(*(nn.Sequential(layer, nn.Linear(8, 8)) for layer in layers)).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        expected = inner(x)
        for block in inner:
            block.compile(backend=compile_graph)
        torch.testing.assert_close(inner(x), expected, rtol=1e-5, atol=1e-5)
    assert len(reports()) == 1 and "runs as it is" not in notes()


def test_packed_weights_that_change_are_packed_anew() -> None:
    model, x = bc.nn.BinaryLinear(64, 8).eval(), torch.randn(3, 64)
    found = compiled(model)
    assert_same(model, found, x)
    with torch.no_grad():
        model.weight.neg_()
    assert_same(model, found, x)
    assert "binary_linear" in [r.operator for report in reports() for r in report.rewrites]


# Gradients and state.


def test_a_training_step_has_the_gradients_of_eager() -> None:
    model = Attention()
    found, optimizer = compiled(model), torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        ids = tokens(2, 5)
        expected = torch.autograd.grad(model(ids).square().sum(), list(model.parameters()))
        optimizer.zero_grad()
        found(ids).square().sum().backward()
        for p, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, gradient)
        optimizer.step()
    assert "gradients are needed" in notes() and not operators()
    assert_same(model, found, tokens(2, 5))
    assert operators() == ["embedding", "attention"]


def test_a_gradient_of_an_input_alone() -> None:
    model = nn.Softmax(-1)
    x = torch.randn(2, 5, requires_grad=True)
    compiled(model)(x)[0, 0].backward()
    expected, = torch.autograd.grad(model(x)[0, 0], x)
    torch.testing.assert_close(x.grad, expected)


def test_weights_frozen_and_thawed() -> None:
    model, ids = Attention().eval().requires_grad_(False), tokens(2, 5)
    found = compiled(model)
    torch.testing.assert_close(found(ids), model(ids), rtol=1e-5, atol=1e-5)
    assert operators() == ["embedding", "attention"]
    model.requires_grad_(True)
    found(ids).sum().backward()
    assert model.mix.weight.grad is not None


def test_state_is_changed_as_in_eager() -> None:
    left, right = nn.BatchNorm1d(4).train(), nn.BatchNorm1d(4).train()
    found = compiled(right)
    for _ in range(3):
        x = torch.randn(8, 4)
        assert_same(left, found, x)
    assert left.num_batches_tracked == right.num_batches_tracked == 3
    torch.testing.assert_close(left.running_mean, right.running_mean)
    assert "in place" in notes()


def test_dropout_in_training_draws_anew() -> None:
    model = nn.Dropout(0.5).train()
    found, x = compiled(model), torch.ones(4, 64)
    with torch.no_grad():
        assert not torch.equal(found(x), found(x))
    assert "random numbers" in notes()


def test_results_that_are_views_stay_views() -> None:
    found = torch.compile(lambda x: x.chunk(2, -1), backend=compile_graph)
    x = torch.zeros(2, 4)
    found(x)[0].fill_(1)
    assert x.sum() == 4


# What torch can do around a call.


def test_inference_mode_and_autocast() -> None:
    model, x = nn.MultiheadAttention(16, 4, batch_first=True).eval(), torch.randn(2, 5, 16)
    found = compiled(model)
    with torch.inference_mode():
        torch.testing.assert_close(found(x, x, x)[0], model(x, x, x)[0], rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        left, right = model(x, x, x)[0], found(x, x, x)[0]
    assert right.dtype == left.dtype
    torch.testing.assert_close(right.float(), left.float(), rtol=2e-2, atol=2e-2)
    assert operators() == ["attention"] * 2


def test_autocast_inside_of_a_model() -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention()

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                mixed = self.inner(ids)
            return mixed.float() @ torch.eye(16)

    model, ids = Inside().eval(), tokens(2, 5)
    with torch.no_grad():
        found = compiled(model)(ids)
        torch.testing.assert_close(found, model(ids), rtol=2e-2, atol=2e-2)
    assert operators() == ["embedding", "attention"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model, ids = Attention().eval().to(dtype), tokens(2, 5)
    with torch.no_grad():
        found = compiled(model)(ids)
        limit = 16 * torch.finfo(dtype).eps
        torch.testing.assert_close(found, model(ids), rtol=limit, atol=limit)
    assert operators() == ["embedding", "attention"]


def test_errors_of_bad_inputs_keep_their_type() -> None:
    model = Attention().eval()
    found = compiled(model)
    assert_same(model, found, tokens(2, 5))
    with torch.no_grad(), pytest.raises(IndexError):
        found(tokens(2, 5) + 100)


def test_threads_share_a_compiled_model() -> None:
    model, ids, wrong = Attention().eval(), [tokens(2, 5) for _ in range(8)], []
    with torch.no_grad():
        expected = [model(i) for i in ids]
    found = compiled(model)
    assert_same(model, found, ids[0])

    def call(index: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                if not torch.allclose(found(ids[index]), expected[index], atol=1e-5):
                    wrong.append(index)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Options, logs and the entry point.


def test_a_lossy_option_has_to_accept_an_unknown_accuracy() -> None:
    model, x = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)).eval(), torch.randn(4, 64)
    with torch.no_grad():
        with pytest.raises(AccuracyUnknownError):
            compiled(model, options={"binary": "w1a32"})(x)
        torch._dynamo.reset()
        found = compiled(model, options={"binary": "w1a32", "guard": None})(x)
    expected = bc.optimize(model, (x,), binary="w1a32", guard=None)
    torch.testing.assert_close(found, expected(x))
    assert reports()[-1].lossy


@pytest.mark.parametrize("asked", [{"mode": "max-autotune"}, {"options": {"fast": True}},
                                   {"options": {"guard": 3}}, {"options": {"binary": "w9"}}])
def test_what_can_not_be_asked_for_is_an_error(asked: dict[str, Any]) -> None:
    with torch.no_grad(), pytest.raises(ConfigError):
        compiled(nn.Softmax(-1), **asked)(torch.randn(2, 3))


def test_the_log_says_what_was_done(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = Attention().eval(), tokens(2, 5)
    with caplog.at_level(logging.INFO, "bincompile.backend"):
        assert_same(model, compiled(model), ids)
        compiled(Attention())(ids)
    assert "found and proven: 1 embedding, 1 attention" in caplog.text
    assert "torch.no_grad()" in caplog.text


def test_reports_end_with_their_graphs() -> None:
    assert_same(nn.Softmax(-1), compiled(nn.Softmax(-1)), torch.randn(2, 3))
    assert len(reports()) == 1
    torch._dynamo.reset()
    gc.collect()
    assert reports() == ()


@pytest.mark.parametrize(("source", "path"), [
    ("L['self']._modules['layers']._modules['0']._parameters['weight']", "layers.0.weight"),
    ("L['self'].layers[3].bias", "layers.3.bias"), ("G['model']._buffers['mask']", "mask"),
    ("L['weights']['a.b']", "a_b"), ("L['x']", ""),
])
def test_names_of_weights_are_read_from_sources(source: str, path: str) -> None:
    assert path_in(source) == path


def test_the_entry_point_names_the_backend(tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    entry = project["entry-points"]["torch_dynamo_backends"]["bincompile"]
    point = importlib.metadata.EntryPoint("bincompile", entry, "torch_dynamo_backends")
    assert point.load() is compile_graph
    info = tmp_path / "bincompile-0.dist-info"  # as an installation would write it
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bincompile\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[torch_dynamo_backends]\nbincompile = {entry}\n")
    code = ("import torch; assert 'bincompile' in torch._dynamo.list_backends(None); "
            "f = torch.compile(torch.nn.Softmax(-1), backend='bincompile'); x = torch.ones(2, 4); "
            "assert torch.equal(f(x), x / 4)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, done.stderr
