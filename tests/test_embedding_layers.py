"""Binary embeddings and bags: values, gradients, the seed pages' defects E1-E16 and G1-G9."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import bincompile as bc
from bincompile.models import minilm
from bincompile.nn import BinaryEmbedding, BinaryEmbeddingBag, BinaryEmbeddingForward
from bincompile.ops import bits

MODES = ("majority", "sum", "mean", "max")
BAD = [
    {"num_embeddings": 0}, {"embedding_dim": True}, {"embedding_dim": 2.0}, {"padding_idx": 7},
    {"padding_idx": -8}, {"padding_idx": True}, {"bases": 0}, {"bases": 9}, {"bases": True},
    {"packed": 1}, {"dtype": torch.int8}, {"learn_scale": "yes"},
    {"learn_scale": True, "packed": False},
]
BAD_BAG = [{"mode": "median"}, {"ties": "random"}, {"include_last_offset": 1},
           {"mode": "majority", "bases": 2}, {"mode": "majority", "learn_scale": True}]


def rows_of(layer: nn.Module) -> np.ndarray:
    """The rows that a packed layer stands for, bit by bit, in float64."""
    table, scale = layer.qweight.numpy(), layer.embed_scale.detach().double().numpy()
    dim, width = layer.embedding_dim, -(-layer.embedding_dim // 8)
    out = np.zeros((layer.num_embeddings, dim))
    for row in range(layer.num_embeddings):
        for base in range(layer.bases):
            for column in range(dim):
                byte = int(table[row, base * width + column // 8])
                out[row, column] += scale[row, base] * (1 if byte >> column % 8 & 1 else -1)
    return out


def bag_formula(layer: nn.Module, bags: list[list[int]]) -> np.ndarray:
    """Each bag from its definition."""
    rows, out = rows_of(layer), np.zeros((len(bags), layer.embedding_dim))
    for number, bag in enumerate(bags):
        kept = [rows[i] for i in bag if i != layer.padding_idx]
        if layer.mode == "majority":
            votes = sum((np.sign(r) for r in kept), np.zeros(layer.embedding_dim))
            out[number] = np.sign(votes) + (votes == 0) * (layer.ties == "positive")
        elif kept:
            out[number] = {"sum": np.sum, "mean": np.mean, "max": np.max}[layer.mode](kept, axis=0)
    return out


@pytest.fixture(scope="module")
def encoder() -> tuple[nn.Module, torch.Tensor]:
    """A real sentence encoder and its word table; tests put another table into it."""
    model = minilm.build()
    return model, model.embeddings.word_embeddings.weight.detach()


def layers_of(**options: Any) -> list[nn.Module]:
    """The four bags and the look-up, all with the same options."""
    return [BinaryEmbedding(7, 13, **options),
            *(BinaryEmbeddingBag(7, 13, mode=mode, **options) for mode in MODES)]


# the pages' examples


def test_the_page_of_binary_embedding_forward_runs_as_printed() -> None:
    input = torch.randint(0, 10, (4, 6))
    qweight = torch.randint(0, 256, (10, 2), dtype=torch.uint8)
    embed_scale = torch.rand(10, 1)
    out = BinaryEmbeddingForward.apply(input, qweight, embed_scale, 13, False)
    signs = bits.unpack(qweight, 13, torch.float32)
    assert out.shape == (4, 6, 13) and out.dtype == embed_scale.dtype
    assert torch.equal(out, (signs * embed_scale)[input]) and not out.requires_grad


def test_the_page_of_binary_embedding_bag_runs_as_printed() -> None:
    layer = BinaryEmbeddingBag(num_embeddings=9, embedding_dim=5, padding_idx=2)
    layer.reset_parameters()
    assert layer.training and layer(torch.tensor([[1, 2, 3]])).shape == (1, 5)


# values


@given(rows=st.integers(1, 40), dim=st.integers(1, 70), bases=st.integers(1, 3),
       shape=st.lists(st.integers(0, 3), max_size=3), padded=st.booleans(), packed=st.booleans(),
       index=st.sampled_from([torch.int32, torch.int64]), seed=st.integers(0, 2**31))
def test_a_look_up_is_its_formula(rows: int, dim: int, bases: int, shape: list[int], padded: bool,
                                  packed: bool, index: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    layer = BinaryEmbedding(rows, dim, rows // 2 if padded else None, bases=bases, packed=packed,
                            dtype=torch.float64)
    indices = torch.randint(rows, shape, dtype=index)
    found = layer(indices)
    expected = rows_of(layer.pack())[indices.numpy()]
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(layer(indices), found)
    assert torch.equal(layer.pack()(indices), found)


@given(mode=st.sampled_from(MODES), ties=st.sampled_from(["positive", "zero"]),
       sizes=st.lists(st.integers(0, 5), min_size=1, max_size=5), last=st.booleans(),
       padded=st.booleans(), packed=st.booleans(), seed=st.integers(0, 2**31))
def test_a_bag_is_its_formula(mode: str, ties: str, sizes: list[int], last: bool, padded: bool,
                              packed: bool, seed: int) -> None:
    torch.manual_seed(seed)
    layer = BinaryEmbeddingBag(6, 11, 0 if padded else None, mode=mode, ties=ties, packed=packed,
                               include_last_offset=last, dtype=torch.float64)
    bags = [torch.randint(6, (size,)).tolist() for size in sizes]
    flat = torch.tensor([i for bag in bags for i in bag], dtype=torch.int64)
    ends = torch.tensor([0, *sizes]).cumsum(0)
    offsets = ends if last else ends[:-1]
    found = layer(flat, offsets)
    np.testing.assert_allclose(found.detach().numpy(), bag_formula(layer.pack(), bags), atol=1e-12)
    with torch.no_grad():
        assert torch.equal(layer(flat, offsets), found)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_bag_agrees_with_torch(mode: str, packed: bool) -> None:
    layer = BinaryEmbeddingBag(9, 12, 4, mode=mode, bases=2, packed=packed)
    table = torch.from_numpy(rows_of(layer.pack())).float()
    peer = nn.EmbeddingBag.from_pretrained(table, mode=mode, padding_idx=4)
    indices = torch.randint(9, (5, 6))
    weights = torch.rand(5, 6) if mode == "sum" else None
    torch.testing.assert_close(layer(indices, None, weights), peer(indices, None, weights))


def test_gradients_of_per_sample_weights_and_of_a_learned_scale() -> None:
    layer = BinaryEmbeddingBag(9, 12, 4, mode="sum", bases=2, learn_scale=True,
                               dtype=torch.float64)
    indices, weights = torch.randint(9, (5, 6)), torch.rand(5, 6, dtype=torch.float64)
    indices[0, 0] = 4
    weights.requires_grad_()
    upstream = torch.randn(5, 12, dtype=torch.float64)
    layer(indices, None, weights).backward(upstream)
    table = torch.from_numpy(rows_of(layer)).requires_grad_()
    again = weights.detach().clone().requires_grad_()
    F.embedding_bag(indices, table, mode="sum", per_sample_weights=again,
                    padding_idx=4).backward(upstream)
    torch.testing.assert_close(weights.grad, again.grad)
    signs = bits.unpack(layer.qweight.unflatten(1, (2, -1)), 12, torch.float64)
    wanted = torch.einsum("vd,vkd->vk", table.grad, signs)
    torch.testing.assert_close(layer.embed_scale.grad, wanted)
    assert layer.embed_scale.grad[4].eq(0).all()
    dense = layer.qweight.sparse_grad.to_dense()
    torch.testing.assert_close(dense, table.grad[:, None] * layer.embed_scale.detach()[..., None])


@pytest.mark.parametrize("bases", [1, 2, 3])
@pytest.mark.parametrize("sparse", [False, True])
def test_the_gradient_of_masters_is_that_of_their_rows(bases: int, sparse: bool) -> None:
    layer = BinaryEmbedding(8, 5, 3, bases=bases, packed=False, sparse=sparse)
    peer = nn.Embedding(8, 5, 3, sparse=sparse)
    indices, upstream = torch.tensor([[1, 3, 1], [7, 0, 3]]), torch.randn(2, 3, 5)
    layer(indices).backward(upstream)
    peer(indices).backward(upstream)
    assert layer.weight.grad.is_sparse == sparse
    found, wanted = (g.to_dense() if sparse else g for g in (layer.weight.grad, peer.weight.grad))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_of_a_bag_of_masters_is_that_of_the_rows_in_it(mode: str) -> None:
    layer = BinaryEmbeddingBag(8, 5, 3, mode=mode, packed=False)
    indices, upstream = torch.tensor([[1, 3, 1], [7, 0, 2]]), torch.randn(2, 5)
    layer(indices).backward(upstream)
    table = torch.from_numpy(rows_of(layer.pack())).float().requires_grad_()
    F.embedding_bag(indices, table, mode="mean" if mode == "majority" else mode,
                    padding_idx=3).backward(upstream)
    assert torch.equal(layer.weight.grad, table.grad)


def test_more_bases_are_closer_and_refining_helps() -> None:
    table = torch.randn(50, 33)
    errors = []
    for count in (1, 2, 3):
        greedy = BinaryEmbedding(50, 33, bases=count, packed=False)
        greedy.assign_rows(table)
        fitted = BinaryEmbedding.from_pretrained(table, bases=count)
        every = torch.arange(50)
        errors.append([(layer(every) - table).square().mean().item() for layer in (greedy, fitted)])
    (one, one_fitted), (two, two_fitted), (three, three_fitted) = errors
    assert one_fitted == pytest.approx(one, rel=1e-6) and one > two > three
    assert two_fitted < two and three_fitted < three and three_fitted < 0.06


@pytest.mark.parametrize(("bases", "least", "smaller"), [(1, 0.80, 28), (2, 0.945, 15),
                                                         (3, 0.98, 10)])
def test_a_real_word_table_keeps_its_similarities(
        encoder: tuple[nn.Module, torch.Tensor], bases: int, least: float, smaller: int) -> None:
    model, table = encoder
    layer = BinaryEmbedding.from_pretrained(table, bases=bases, dtype=torch.float16)
    model.embeddings.word_embeddings = layer
    assert minilm.evaluate(model)["spearman"] >= least
    assert smaller * (layer.qweight.nbytes + layer.embed_scale.nbytes) <= table.nbytes


def test_from_pretrained_takes_signs_and_row_means() -> None:
    rows = torch.randn(4, 6)
    layer = BinaryEmbedding.from_pretrained(rows, padding_idx=-1)
    expected = torch.where(rows >= 0, 1.0, -1.0) * rows.abs().mean(1, keepdim=True)
    expected[3] = 0
    torch.testing.assert_close(layer(torch.arange(4)), expected)
    assert not layer(torch.arange(4)).requires_grad
    bag = BinaryEmbeddingBag.from_pretrained(rows, freeze=False)
    assert torch.equal(bag(torch.arange(4).unsqueeze(1)), torch.where(rows >= 0, 1.0, -1.0))
    assert bag(torch.arange(4).unsqueeze(1)).requires_grad


@pytest.mark.parametrize(("data", "error", "word"), [
    (torch.ones(2, 3).long(), bc.InputTypeError, "int64"), ([1.0], bc.InputTypeError, "list"),
    (torch.ones(3), bc.InputError, "shape"), (torch.full((2, 2), math.nan), bc.InputError, "NaN")])
def test_from_pretrained_refuses(data: Any, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        BinaryEmbedding.from_pretrained(data)


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("kind", [BinaryEmbedding, BinaryEmbeddingBag])
def test_a_wrong_argument_is_named(kind: type[nn.Module], bad: dict[str, Any]) -> None:
    with pytest.raises(bc.ConfigError) as caught:
        kind(**({"num_embeddings": 7, "embedding_dim": 4} | bad))
    assert caught.value.found.startswith(kind.__name__) and caught.value.change


@pytest.mark.parametrize("bad", BAD_BAG, ids=str)
def test_a_wrong_argument_of_a_bag_is_named(bad: dict[str, Any]) -> None:
    with pytest.raises(bc.ConfigError, match="BinaryEmbeddingBag"):
        BinaryEmbeddingBag(7, 4, **bad)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_wrong_index_is_named_with_the_size_of_the_table(packed: bool, grad: bool) -> None:
    bag = BinaryEmbeddingBag(7, 4, packed=packed)
    layers = [bag, BinaryEmbedding(7, 4)] if packed else [bag]
    with torch.set_grad_enabled(grad):
        for layer in layers:
            for index in (7, -1):
                with pytest.raises(bc.InputError, match=f"index {index} into a table of 7 rows"):
                    layer(torch.tensor([[0, index]]))
            with pytest.raises(bc.InputTypeError, match="float32"):
                layer(torch.ones(1, 2))


@pytest.mark.parametrize("packed", [False, True])
def test_offsets_and_weights_that_do_not_fit_are_refused(packed: bool) -> None:
    bag, mean = (BinaryEmbeddingBag(7, 4, mode=m, packed=packed) for m in ("sum", "mean"))
    one, two = torch.zeros(3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)
    for layer, args, word in (
            (bag, (one,), "without offsets"), (bag, (two, one), "with offsets"),
            (bag, (one, torch.zeros(1)), "offsets"), (bag, (one, one + 1), "start at 0"),
            (mean, (two, None, torch.ones(2, 3)), "sum"),
            (bag, (two, None, torch.ones(3)), "weights")):
        with pytest.raises(bc.InputError, match=word):
            layer(*args)


def test_fresh_rows_have_mean_0_and_variance_1() -> None:
    for bases in (1, 2, 3):
        rows = BinaryEmbedding(400, 50, bases=bases)(torch.arange(400))
        assert abs(rows.mean().item()) < 0.02 and rows.var().item() == pytest.approx(1, abs=0.02)


def test_repr_says_what_differs_from_the_default() -> None:
    layer = BinaryEmbedding(7, 4, -1, bases=2)
    assert repr(layer) == "BinaryEmbedding(7, 4, padding_idx=6, bases=2)"
    assert "mode='sum'" in repr(BinaryEmbeddingBag(7, 4, mode="sum"))
    assert "packed=False" in repr(BinaryEmbedding(7, 4, packed=False))


# export and compilation


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("number", range(5))
def test_layers_compile_to_bits_and_give_the_same_values(packed: bool, number: int) -> None:
    layer = layers_of(padding_idx=3, packed=packed)[number].eval()
    indices = torch.randint(7, (5, 4))
    compiled = bc.optimize(layer, (indices,))
    rewrite, = compiled.report.rewrites
    name = "binary_embedding_bag" if number else "binary_embedding"
    assert rewrite.operator == name and rewrite.kind == "exact"
    assert [m.validated for m in compiled.report.matches] == [True]
    assert rewrite.bytes_after == 7 * 2 + 7 * 4 and not compiled.report.lossy
    for shape in ((5, 4), (1, 9), (6, 1)):
        indices = torch.randint(7, shape)
        assert torch.equal(compiled(indices), layer(indices))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bases", [1, 2])
def test_bags_with_offsets_and_weights_compile(packed: bool, bases: int) -> None:
    layer = BinaryEmbeddingBag(9, 20, 1, mode="sum", bases=bases, packed=packed).eval()
    args = torch.randint(9, (11,)), torch.tensor([0, 4, 4, 9]), torch.rand(11)
    compiled = bc.optimize(layer, args)
    assert compiled.report.rewrites[0].operator == "binary_embedding_bag"
    more = torch.randint(9, (30,)), torch.tensor([0, 7, 29]), torch.rand(30)
    for call in (args, more):  # torch rounds a weighted row once less
        torch.testing.assert_close(compiled(*call), layer(*call), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layer", [BinaryEmbedding(7, 13, 3, bases=2),
                                   BinaryEmbeddingBag(7, 13, 3, packed=False)], ids=repr)
def test_export_keeps_the_batch_free(layer: nn.Module) -> None:
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    exported = torch.export.export(layer, (torch.randint(7, (5, 4)),), dynamic_shapes=(dims,))
    indices = torch.randint(7, (2, 9))
    assert torch.equal(exported.module()(indices), layer(indices))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bases", [1, 2])
def test_a_tied_head_scores_every_row(packed: bool, bases: int) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = BinaryEmbedding(9, 20, 4, bases=bases, packed=packed)

        def forward(self, indices: torch.Tensor) -> torch.Tensor:
            return self.words.logits(torch.tanh(self.words(indices)))

    model, indices = Tied().eval(), torch.randint(9, (3, 5))
    every = torch.from_numpy(rows_of(model.words.pack())).float()
    wanted = torch.tanh(every[indices]) @ every.T
    torch.testing.assert_close(model(indices), wanted, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(indices), wanted, rtol=1e-5, atol=1e-5)
    compiled = bc.optimize(model, (indices,))
    assert {r.operator for r in compiled.report.rewrites} >= {"binary_linear", "binary_embedding"}
    torch.testing.assert_close(compiled(indices), wanted, rtol=1e-5, atol=1e-5)
    some = torch.tensor([2, 8])
    torch.testing.assert_close(model.words.logits(every[:3], some), every[:3] @ every[some].T,
                               rtol=1e-5, atol=1e-5)


def test_a_tied_head_trains_the_rows_that_it_scores() -> None:
    layer = BinaryEmbedding(9, 6)
    hidden, some = torch.randn(4, 6), torch.tensor([2, 8])
    layer.logits(hidden, some).sum().backward()
    grad = layer.qweight.sparse_grad
    assert grad.indices().tolist() == [[2, 8]]
    torch.testing.assert_close(grad.values(), hidden.sum(0).expand(2, 6))


# the defects of the originals


@pytest.mark.parametrize("row", [0, 3, 6, -1])
def test_e1_g1_any_padding_row_can_be_chosen(row: int) -> None:
    for layer in layers_of(padding_idx=row):
        assert layer.padding_idx == row % 7
    assert BinaryEmbedding(7, 13, row)(torch.tensor(row % 7)).eq(0).all()


def test_e2_g2_layers_are_made_and_trained_on_stock_torch() -> None:
    for layer in layers_of():
        indices = torch.tensor([[1, 2, 1]])
        layer(indices).sum().backward()
        assert layer.qweight.sparse_grad.indices().tolist() == [[1, 2]]
        assert not layer.qweight.requires_grad


def test_e3_packing_runs_on_the_processor() -> None:
    layer = BinaryEmbedding(7, 13)
    assert layer.qweight.device.type == "cpu" and layer.qweight.dtype == torch.uint8
    assert torch.equal(bits.pack(layer(torch.arange(7))), layer.qweight)


@pytest.mark.parametrize("dim", [5, 8, 13])
def test_e7_scales_leave_out_padding_columns_and_padding_rows_are_zero(dim: int) -> None:
    rows = torch.randn(6, dim)
    layer = BinaryEmbedding.from_pretrained(rows, padding_idx=2)
    wanted = rows.abs().mean(1)
    wanted[2] = 0
    torch.testing.assert_close(layer.embed_scale[:, 0], wanted)
    assert layer(torch.tensor([2])).eq(0).all()
    assert torch.equal(layer.qweight & ~bits.pack(torch.ones(dim)), torch.zeros_like(layer.qweight))


def test_e8_padding_rows_get_no_gradient() -> None:
    indices = torch.tensor([[3, 1], [3, 3]])
    for layer in layers_of(padding_idx=3):
        layer(indices).sum().backward()
        assert layer.qweight.sparse_grad.indices().tolist() == [[1]]
    for layer in layers_of(padding_idx=3, packed=False):
        layer(indices).sum().backward()
        assert layer.weight.grad[3].eq(0).all() and layer.weight.grad[1].ne(0).any()


def test_e9_the_incoming_gradient_is_left_as_it_was() -> None:
    layer = BinaryEmbedding.from_pretrained(torch.randn(7, 13), freeze=False)
    upstream = torch.randn(2, 3, 13)
    kept = upstream.clone()
    layer(torch.randint(7, (2, 3))).backward(upstream)
    assert torch.equal(upstream, kept)


@pytest.mark.parametrize("shape", [(), (3,), (2, 4), (2, 3, 4), (1, 2, 1, 3), (0,), (2, 0)])
def test_e10_inputs_have_any_rank(shape: tuple[int, ...]) -> None:
    layer, indices = BinaryEmbedding(7, 8), torch.randint(7, shape)
    out = layer(indices)
    assert out.shape == (*shape, 8)
    flat = layer(indices.reshape(-1))
    assert torch.equal(out.reshape(-1, 8), flat)
    out.sum().backward()
    assert layer.qweight.sparse_grad.indices()[0].tolist() == indices.unique().tolist()


def test_e11_gradients_add_up_over_look_ups_and_passes_and_belong_to_one_table() -> None:
    layer, other = BinaryEmbedding(7, 4), BinaryEmbedding(7, 4)
    first, second, third = torch.tensor([5, 1]), torch.tensor([1, 1, 0]), torch.tensor([[5]])
    (layer(first).sum() + 2 * layer(second).sum()).backward()
    (4 * layer(third)).sum().backward()
    grad = layer.qweight.sparse_grad
    assert grad.is_coalesced() and grad.indices().tolist() == [[0, 1, 5]]
    assert grad.values()[:, 0].tolist() == [2.0, 5.0, 5.0]
    assert not hasattr(other.qweight, "sparse_grad") and not hasattr(torch.Tensor, "sparse_grad")


def test_e12_a_look_up_in_eval_mode_can_be_differentiated_or_is_a_constant() -> None:
    for layer in layers_of():
        layer.eval()(torch.tensor([[1, 2]])).sum().backward()
        assert layer.qweight.sparse_grad._nnz() == 2
    weight = torch.ones(3, requires_grad=True)
    table, scale = torch.zeros(4, 1, dtype=torch.uint8), torch.ones(4, 1, requires_grad=True)
    rows = BinaryEmbeddingForward.apply(torch.tensor([1]), table, scale, 3, False)
    (rows * weight).sum().backward()
    assert weight.grad.tolist() == [-1.0] * 3 and scale.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_e13_the_result_has_the_dtype_of_the_layer(dtype: torch.dtype) -> None:
    for layer in (*layers_of(dtype=dtype), *layers_of(dtype=dtype, packed=False)):
        out = layer(torch.tensor([[1, 2]]))
        assert out.dtype == dtype
        out.float().sum().backward()
    layer = BinaryEmbedding(7, 13).to(dtype)
    assert layer.qweight.dtype == torch.uint8 and layer(torch.tensor([1])).dtype == dtype


def test_e14_the_state_has_the_same_keys_always_and_loads() -> None:
    layer = BinaryEmbedding(7, 13)
    with torch.no_grad():
        layer.qweight.zero_()  # every sign -1: a table like any other
    before = set(layer.state_dict())
    assert layer(torch.arange(7)).eq(-1).all()
    layer.eval()(torch.arange(7))
    assert set(layer.state_dict()) == before == {"qweight", "embed_scale"}
    fresh = BinaryEmbedding(7, 13)
    assert fresh.load_state_dict(layer.state_dict()).missing_keys == []
    assert torch.equal(fresh.qweight, layer.qweight)
    twin = copy.deepcopy(nn.Sequential(layer))
    assert torch.equal(twin(torch.arange(7)), layer(torch.arange(7)))
    assert set(BinaryEmbedding(7, 13, packed=False).state_dict()) == {"weight"}


def test_a_table_of_bitorch_engine_loads_and_its_padding_row_becomes_zero() -> None:
    theirs = {"qweight": torch.randint(256, (7, 2), dtype=torch.uint8),
              "scale_w": torch.rand(7, 1)}
    layer = BinaryEmbedding(7, 16, padding_idx=2)
    layer.load_state_dict(theirs)
    wanted = bits.unpack(theirs["qweight"], 16, torch.float32) * theirs["scale_w"]
    wanted[2] = 0
    assert torch.equal(layer(torch.arange(7)), wanted) and set(theirs) == {"qweight", "scale_w"}


@pytest.mark.parametrize("kind", [BinaryEmbedding, BinaryEmbeddingBag])
def test_a_model_that_was_traced_by_fx_compiles(kind: type[nn.Module]) -> None:
    model, indices = nn.Sequential(kind(9, 8), nn.Linear(8, 2)).eval(), torch.tensor([[1, 2]])
    traced = torch.fx.symbolic_trace(model).eval()
    compiled = bc.optimize(traced, (indices,))
    assert compiled.report.rewrites[0].operator.startswith("binary_embedding")
    assert torch.equal(compiled(indices), model(indices))


def test_e16_arguments_have_positions_and_none_is_swallowed() -> None:
    assert BinaryEmbedding(7, 4, 2).padding_idx == BinaryEmbeddingBag(7, 4, 2).padding_idx == 2
    for kind in (BinaryEmbedding, BinaryEmbeddingBag):
        with pytest.raises(TypeError, match="max_norm"):
            kind(7, 4, max_norm=1.0)
    frozen = BinaryEmbedding(7, 4).requires_grad_(False)
    assert not frozen(torch.tensor([1])).requires_grad
    assert BinaryEmbedding(7, 4, packed=False, sparse=True).sparse


def test_g3_gradients_go_to_the_rows_of_their_own_bag() -> None:
    layer = BinaryEmbeddingBag(7, 2)
    layer(torch.tensor([[0, 1], [2, 3]])).backward(torch.tensor([[1.0, 1.0], [-2.0, 4.0]]))
    grad = layer.qweight.sparse_grad
    assert grad.indices().tolist() == [[0, 1, 2, 3]]
    assert grad.values().tolist() == [[0.5, 0.5], [0.5, 0.5], [-1.0, 2.0], [-1.0, 2.0]]


def test_g4_the_majority_is_float_and_feeds_a_linear_layer() -> None:
    model = nn.Sequential(BinaryEmbeddingBag(7, 4), nn.Linear(4, 2))
    out = model(torch.tensor([[1, 2, 3]], dtype=torch.int32))
    out.sum().backward()
    assert out.is_floating_point() and model[0].qweight.sparse_grad.values().ne(0).any()


def test_g5_padding_neither_votes_nor_counts() -> None:
    rows = torch.tensor([[1.0], [-1.0], [-1.0]])
    bag = BinaryEmbeddingBag.from_pretrained(rows, padding_idx=2)
    assert bag(torch.tensor([[0, 2, 2]])).item() == 1.0
    assert bag(torch.tensor([[1, 2, 2]])).item() == -1.0
    mean = BinaryEmbeddingBag.from_pretrained(rows, padding_idx=2, mode="mean")
    assert mean(torch.tensor([[0, 0, 2]])).item() == 1.0


@pytest.mark.parametrize("bases", [1, 2, 3])
def test_g6_a_number_takes_one_bit_of_each_base(bases: int) -> None:
    layer = BinaryEmbedding(1000, 256, bases=bases)
    assert layer.qweight.nbytes == bases * 1000 * 256 // 8
    assert layer.embed_scale.nbytes == bases * 1000 * 4


def test_g8_ties_are_stated_and_all_forms_are_there() -> None:
    rows = torch.tensor([[1.0, 1.0], [-1.0, 1.0]])
    tie, empty = torch.tensor([0, 1]), torch.tensor([0, 0])
    for ties, wanted in (("positive", 1.0), ("zero", 0.0)):
        for packed in (False, True):
            bag = BinaryEmbeddingBag.from_pretrained(rows, ties=ties, packed=packed)
            assert bag(tie, empty).tolist() == [[wanted, wanted], [wanted, 1.0]]
            assert bag(tie.view(1, 2)).tolist() == [[wanted, 1.0]]
    bag = BinaryEmbeddingBag.from_pretrained(rows)
    with pytest.raises(bc.InputError, match="without offsets"):
        bag(tie)
