"""Look-ups in every spelling: bad indices raise as in the model, tables say who reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

import bincompile as bc
from bincompile.errors import InputError
from bincompile.ops import OPERATORS
from bincompile.passes.capture import capture
from bincompile.passes.graph import aten
from bincompile.passes.matching import anchors, candidate_at
from bincompile.passes.normalise import normalise
from bincompile.passes.patterns import Candidate, Context
from bincompile.passes.validate import validate
from bincompile.record import Evidence

ROWS = 9
Read = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Table(nn.Module):
    """`read(table, indices)` of a stored table."""

    def __init__(self, read: Read, *sizes: int) -> None:
        super().__init__()
        self.table, self.read = nn.Parameter(torch.randn(sizes or (ROWS, 4))), read

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return self.read(self.table, indices)


def hot(indices: torch.Tensor) -> torch.Tensor:
    return functional.one_hot(indices, ROWS).float()


def compared(table: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return (indices.unsqueeze(-1) == torch.arange(ROWS)).float() @ table


def scattered(table: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return torch.zeros(*indices.shape, ROWS).scatter(-1, indices.unsqueeze(-1), 1.0) @ table


SPELLINGS: dict[str, Read] = {
    "embedding": lambda table, indices: functional.embedding(indices, table),
    "index": lambda table, indices: table[indices],
    "index select": lambda table, indices: torch.index_select(table, 0, indices),
    "gather": lambda table, indices: table.gather(0, indices[:, None].expand(-1, 4)),
    "take along": lambda table, indices: torch.take_along_dim(table, indices[:, None], 0),
    "one-hot": lambda table, indices: hot(indices) @ table,
    "one-hot linear": lambda table, indices: functional.linear(hot(indices), table.t()),
    "one-hot einsum": lambda table, indices: torch.einsum("nv,vd->nd", hot(indices), table),
    "scattered": scattered,
    "identity": lambda table, indices: torch.eye(ROWS)[indices] @ table,
    "compared": compared,
    "bag": lambda table, indices: functional.embedding(indices, table).sum(0),
    "bag of index": lambda table, indices: table[indices].mean(0),
    "flat": lambda table, indices: table.flatten()[indices],
    "take": lambda table, indices: torch.take(table[:, 0], indices),
    "columns": lambda table, indices: table.t()[:, indices],
}
FLOAT32_VECTORS = ("scattered", "identity", "compared")  # and each one-hot: a product with float32
# Offsets that bring a spelling's indices to the edges of its table, and beyond them.
EDGES = (0, 1, ROWS - 1, ROWS, ROWS + 1, 4 * ROWS - 1, 4 * ROWS, -1, -ROWS, -ROWS - 1, -4 * ROWS,
         -4 * ROWS - 1)


def result(call: Callable[..., torch.Tensor], *args: torch.Tensor) -> torch.Tensor | None:
    """What a call gives; None where it raises."""
    try:
        return call(*args)
    except (IndexError, RuntimeError, InputError):
        return None


@pytest.mark.parametrize("name", SPELLINGS)
def test_an_index_out_of_range_raises_where_the_model_raises(name: str) -> None:
    model = Table(SPELLINGS[name]).eval()
    compiled = bc.optimize(model, (torch.tensor([3, 0, 5, 5]),))
    [match] = compiled.report.matches
    assert match.operator in ("embedding", "embedding_bag") and match.validated
    raised = 0
    for edge in EDGES:
        indices = torch.tensor([2, edge, 1])
        expected = result(model, indices)
        if expected is not None:
            torch.testing.assert_close(compiled(indices), expected)
            continue
        raised += 1
        with pytest.raises(InputError) as caught:
            compiled(indices)
        assert f"index {edge} " in str(caught.value) or "bag of index" in name
    assert raised or name in ("compared", "take along")  # which take any


@pytest.mark.parametrize("name", [name for name in SPELLINGS if name not in FLOAT32_VECTORS
                                  and not name.startswith("one-hot")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_spelling_is_found_in_every_float_dtype(name: str, dtype: torch.dtype) -> None:
    model = Table(SPELLINGS[name]).to(dtype).eval()
    indices = torch.tensor([3, 0, 5, 5])
    compiled = bc.optimize(model, (indices,))
    assert [m.operator.removesuffix("_bag") for m in compiled.report.matches] == ["embedding"]
    assert compiled(indices).dtype == dtype
    torch.testing.assert_close(compiled(indices), model(indices))


def test_a_table_that_is_not_finite_is_no_product_of_one_hot_vectors() -> None:
    model = Table(SPELLINGS["one-hot"]).eval()
    with torch.no_grad():
        model.table[2] = torch.inf
    indices = torch.tensor([3, 2])
    compiled = bc.optimize(model, (indices,))
    assert not compiled.report.matches
    torch.testing.assert_close(compiled(indices), model(indices), equal_nan=True)
    assert compiled(indices).isnan().any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_negative_indices_count_from_the_end(dtype: torch.dtype) -> None:
    model = Table(SPELLINGS["index"]).eval()
    indices = torch.tensor([[-1, 0], [-ROWS, 8]], dtype=dtype)
    compiled = bc.optimize(model, (indices,))
    assert compiled.report.matches[0].attrs["negative"] is True
    torch.testing.assert_close(compiled(indices), model(indices), rtol=0, atol=0)


NEVER_NEGATIVE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "remainder": lambda x: x % ROWS, "clamped": lambda x: x.clamp(0, ROWS - 1),
    "places": lambda x: torch.arange(x.shape[0]), "absolute": lambda x: x.abs() * 1 + 0,
    "greatest": lambda x: torch.eye(ROWS)[x % ROWS].argmax(-1),
    "both": lambda x: torch.cat([x % 2, torch.arange(4)]),
}
MAYBE_NEGATIVE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "itself": lambda x: x, "difference": lambda x: x % ROWS - 1,
    "subtracted": lambda x: torch.add(x % 4, x % 4, alpha=-1), "clamped above": lambda x: x.clamp(
        max=ROWS - 1), "below": lambda x: x % -ROWS, "from below": lambda x: torch.arange(-3, 4),
}


@pytest.mark.parametrize("name", [*NEVER_NEGATIVE, *MAYBE_NEGATIVE])
def test_it_is_known_where_no_index_can_be_negative(name: str) -> None:
    made = {**NEVER_NEGATIVE, **MAYBE_NEGATIVE}[name]
    model = Table(lambda table, x: table[made(x)] + 0 * x.sum()).eval()
    indices = torch.tensor([3, 0, -2, 5])
    compiled = bc.optimize(model, (indices,))
    assert compiled.report.matches[0].attrs.get("negative", False) is (name in MAYBE_NEGATIVE)
    torch.testing.assert_close(compiled(indices), model(indices))


class Tied(nn.Module):
    """A table that two embeddings and the output head share."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Embedding(90, 16), nn.Embedding(90, 16)
        self.head, self.between = nn.Linear(16, 90, bias=False), nn.Linear(16, 16)
        self.decoder.weight = self.head.weight = self.encoder.weight

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.head(self.between(self.encoder(source)) + self.decoder(target))


WORDS = (torch.tensor([[1, 5, 0], [3, 3, 89]]), torch.tensor([[2, 7, 8], [0, 1, 2]]))


def test_a_match_names_its_table_and_who_shares_it() -> None:
    report = bc.inspect(Tied().eval(), WORDS)
    shared = {m.path: (m.attrs["table"], set(m.attrs["shared"])) for m in report.matches}
    [name] = {table for table, _ in shared.values()}
    assert name in dict(Tied().named_parameters(remove_duplicate=False))
    assert {path: others for path, (_, others) in shared.items()} == {
        "encoder": {"decoder", "head"}, "decoder": {"encoder", "head"}}


def stored(compiled: bc.CompiledModel) -> dict[str, torch.Tensor]:
    return compiled.program.tensors()


def test_layers_that_share_a_table_share_its_bits() -> None:
    model = Tied().eval()
    compiled = bc.optimize(model, WORDS, binary=bc.Binary("w1a32", keep=("between",)), guard=None)
    assert sorted(r.operator for r in compiled.report.rewrites if r.kind == "lossy") == [
        "binary_embedding", "binary_embedding", "binary_linear"]
    kinds = [t.dtype for t in stored(compiled).values() if t.shape[0] == 90]
    assert sorted(map(str, kinds)) == ["torch.float32", "torch.uint8"]  # scales and signs, once
    weight = model.head.weight.detach()
    signs = torch.where(weight >= 0, 1.0, -1.0) * weight.abs().mean(1, keepdim=True)
    with torch.no_grad():
        model.head.weight.copy_(signs)
        torch.testing.assert_close(compiled(*WORDS), model(*WORDS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", ["head", "encoder"])
def test_a_shared_table_that_one_layer_keeps_stays_float_for_it(layers: str) -> None:
    model = Tied().eval()
    before = model.head.weight.detach().clone()
    compiled = bc.optimize(model, WORDS, binary=bc.Binary("w1a32", layers=layers), guard=None)
    shapes = [(tuple(t.shape), t.dtype) for t in stored(compiled).values()]
    assert ((90, 16), torch.float32) in shapes and ((90, 2), torch.uint8) in shapes
    assert torch.equal(model.head.weight, before)
    assert compiled(*WORDS).shape == model(*WORDS).shape


BINARY = ("index", "index select", "gather", "one-hot", "compared", "bag", "bag of index",
          "columns")


@pytest.mark.parametrize("name", BINARY)
def test_tables_of_every_spelling_can_be_made_binary(name: str) -> None:
    model = Table(SPELLINGS[name]).eval()
    indices = torch.tensor([3, 0, 8, 5]) - (ROWS if name in ("index", "columns") else 0)
    compiled = bc.optimize(model, (indices,), binary="w1a32", guard=None)
    [rewrite] = [r for r in compiled.report.rewrites if r.operator != "fused_rows"]
    assert rewrite.operator in ("binary_embedding", "binary_embedding_bag")
    assert rewrite.kind == "lossy" and rewrite.bytes_after < rewrite.bytes_before
    with torch.no_grad():
        table = model.table
        table.copy_(torch.where(table >= 0, 1.0, -1.0) * table.abs().mean(1, keepdim=True))
    torch.testing.assert_close(compiled(indices), model(indices))


@pytest.mark.parametrize(("read", "sizes"), [
    (lambda table, x: table[x, x % 4], (ROWS, 4)),
    (lambda table, x: table[:, x, x], (2, ROWS, ROWS))])
def test_a_table_indexed_by_several_tensors_is_refused_with_the_reason(
        read: Read, sizes: tuple[int, ...]) -> None:
    indices = torch.tensor([3, 0, 5])
    compiled = bc.optimize(Table(read, *sizes).eval(), (indices,))
    [refusal] = compiled.report.refusals
    assert refusal.reason == "the table is indexed by 2 tensors at once"
    assert not compiled.report.matches




@pytest.mark.parametrize("read", [
    lambda table, x: (table * x.sum())[x],
    lambda table, x: table[2] + x[:, None],
    lambda table, x: table[torch.arange(ROWS) > 3] + x.sum(),
    lambda table, x: torch.gather(table * x.sum(), 0, x[:, None]),
    lambda table, x: torch.arange(ROWS).float()[x],
    lambda table, x: (table > 0)[x],
    lambda table, x: torch.softmax(table, 0)[:x.shape[0]],
])
def test_what_is_not_a_look_up_is_left_alone(read: Read) -> None:
    model, indices = Table(read).eval(), torch.tensor([3, 0, 5])
    compiled = bc.optimize(model, (indices,))
    assert not [m for m in compiled.report.matches if m.operator != "attention"]
    torch.testing.assert_close(compiled(indices), model(indices))


def test_rows_that_others_read_too_are_looked_up_and_then_summed() -> None:
    model = Table(lambda table, x: table[x].sum(0) + table[x][0]).eval()
    again = Table(lambda table, x: (lambda rows: rows.sum(0) + rows[0])(table[x])).eval()
    indices = torch.tensor([3, 0, 5])
    both = [[m.operator for m in bc.optimize(m, (indices,)).report.matches] for m in (model, again)]
    assert both == [["embedding_bag", "embedding"], ["embedding"]]


def candidate_of(model: nn.Module, *args: torch.Tensor) -> tuple[Candidate, fx.GraphModule]:
    """The only look-up of a model, not proven yet."""
    program = normalise(capture(model.eval(), args, {}).program)
    context = Context.of(program)
    found = [candidate_at(p, n, context) for p, n in anchors(program, "canonical")
             if p.name in ("indexed_table", "one_hot_table", "pooled_embedding")]
    [candidate] = [f for f in found if isinstance(f, Candidate)]
    return candidate, program.graph_module


def looked_up(build: Any, table: Any, indices: Any) -> Any:
    return build.call(OPERATORS["embedding"].overload, table, indices)


def bag_of(build: Any, v: Mapping[str, Any], mode: str, *rest: Any) -> Any:
    return build.call(OPERATORS["embedding_bag"].overload, v["table"], v["indices"], None, mode,
                      *rest)


def weighted(table: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return (functional.embedding(indices, table) * (indices * 0.5).unsqueeze(-1)).sum(1)


WRONG: dict[str, tuple[Read, Callable[[Any, Mapping[str, Any]], Any]]] = {
    "negative indices raise": (SPELLINGS["index"],
                               lambda b, v: looked_up(b, v["table"], v["indices"])),
    "absolute indices": (SPELLINGS["index"], lambda b, v: looked_up(
        b, v["table"], b.call(aten.abs.default, v["indices"]))),
    "the next row": (SPELLINGS["one-hot"], lambda b, v: looked_up(b, v["table"], b.call(
        aten.remainder.Scalar, b.call(aten.add.Tensor, v["indices"], 1), ROWS))),
    "unknown rows are the first": (compared, lambda b, v: looked_up(b, v["table"], b.call(
        aten.remainder.Scalar, v["indices"], ROWS))),
    "a mean for a sum": (lambda table, x: functional.embedding(x, table).sum(1),
                         lambda b, v: bag_of(b, v, "mean")),
    "a maximum for a mean": (lambda table, x: functional.embedding(x, table).mean(1),
                             lambda b, v: bag_of(b, v, "max")),
    "dropped weights": (weighted, lambda b, v: bag_of(b, v, "sum")),
    "a padding row": (lambda table, x: functional.embedding(x, table).sum(1),
                      lambda b, v: bag_of(b, v, "sum", None, False, 0)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_of_a_look_up_is_refused(name: str) -> None:
    read, emit = WRONG[name]
    right, graph = candidate_of(Table(read), torch.tensor([[3, 0, 5], [8, 1, 1]]))
    assert isinstance(validate(right, graph), Evidence)
    wrong = dataclasses.replace(right, emit=lambda build, values: (emit(build, values),))
    assert isinstance(validate(wrong, graph), str)


def test_bags_by_maximum_with_an_end_are_not_tried_at_sizes_at_which_torch_writes_elsewhere():
    torch.manual_seed(0)
    bags = nn.EmbeddingBag(100, 24, mode="max", include_last_offset=True).eval()
    indices = torch.randint(100, (30,))
    compiled = bc.optimize(bags, (indices, torch.tensor([0, 3, 30])))
    assert [m.operator for m in compiled.report.matches] == ["embedding_bag"]
    offsets = torch.tensor([0, 10, 20, 50])
    longer = torch.randint(100, (50,))
    assert torch.equal(compiled(longer, offsets), bags(longer, offsets))
