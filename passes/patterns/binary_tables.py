"""Look-ups, bags and output heads whose rows are binary bases: packed, or behind float masters."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from bincompile.ops import bits
from bincompile.ops.binary_embedding import binary_embedding
from bincompile.ops.binary_embedding_bag import MAJORITY, MODES, binary_embedding_bag
from bincompile.ops.binary_linear import binary_linear
from bincompile.ops.embedding import embedding
from bincompile.ops.embedding_bag import embedding_bag
from bincompile.ops.fake_binary_rows import fake_binary_rows
from bincompile.ops.fake_signs import fake_signs
from bincompile.ops.pack_bases import pack_bases
from bincompile.passes.graph import aten, is_tensor, shape_of
from bincompile.passes.patterns import Candidate, Context, Example, Pattern, TableUse, owner_of
from bincompile.passes.tables import wrapped

Values = Mapping[str, Any]


def _from_masters(node: Any, operator: Any, context: Context) -> dict[str, Any] | None:
    """The arguments of `operator` at a node, if it is applied to something that is stored."""
    if not is_tensor(node) or node.target is not operator.overload:
        return None
    found = operator.bind(node.args, dict(node.kwargs))
    return None if found["x"] in context.activations else found


def _packed(build: Any, masters: Any, count: int) -> tuple[Any, Any]:
    both = build.call(pack_bases.overload, masters, count)
    return build.item(both, 0), build.item(both, 1)


def _sizes(table: fx.Node, count: int) -> dict[str, Any]:
    rows, columns = shape_of(table)
    return {"num_embeddings": rows, "embedding_dim": columns, "bases": count}


def _match_masters(node: fx.Node, context: Context) -> Candidate | None:
    """Binary bases of rows that were looked up."""
    found = fake_binary_rows.bind(node.args, dict(node.kwargs))
    rows, count = found["x"], found["count"]
    if not is_tensor(rows) or rows.target is not embedding.overload:
        return None
    read = embedding.bind(rows.args, dict(rows.kwargs))
    table, wrap = read["table"], read["wrap"]
    if table in context.activations:
        return None
    columns = shape_of(table)[1]

    def emit(build: Any, values: Values) -> tuple[Any, ...]:
        packed, scale = _packed(build, values["table"], count)
        indices = values["indices"]
        if wrap:
            indices = wrapped(build, indices, build.size(values["table"], 0))
        return (build.call(binary_embedding.overload, indices, packed, scale, columns),)

    return Candidate("embedding", node, {"table": table, "indices": read["indices"]}, (node,),
                     emit, _sizes(table, count), owner_of((node,)),
                     table_use=TableUse(indices="negative" if wrap else "rows"))


def _bag_candidate(node: fx.Node, bag: fx.Node, table: fx.Node, count: int, mode: str,
                   tie: float) -> Candidate:
    found = embedding_bag.bind(bag.args, dict(bag.kwargs))
    columns, last, padding = (shape_of(table)[1], found["include_last_offset"],
                              found["padding_idx"])
    inputs = {"table": table, **{role: found[role] for role in ("indices", "offsets", "weights")
                                 if found[role] is not None}}

    def emit(build: Any, values: Values) -> tuple[Any, ...]:
        packed, scale = _packed(build, values["table"], count)
        if mode == MAJORITY:
            scale = build.call(aten.ones_like.default, scale)
        return (build.call(binary_embedding_bag.overload, packed, values["indices"],
                           values.get("offsets"), scale, columns, mode, values.get("weights"),
                           last, padding, tie),)

    attrs = {**_sizes(table, count), "mode": mode, "padding_idx": padding}
    return Candidate("embedding_bag", node, inputs, (node,), emit, attrs, owner_of((node,)))


def _match_bag(node: fx.Node, context: Context) -> Candidate | None:
    """A bag of binary bases of a whole table."""
    masters = _from_masters(node.args[0], fake_binary_rows, context)
    if masters is None:
        return None
    mode = embedding_bag.bind(node.args, dict(node.kwargs))["mode"]
    return _bag_candidate(node, node, masters["x"], masters["count"], mode, 1.0)


def _match_majority(node: fx.Node, context: Context) -> Candidate | None:
    """The sign of a mean of signs."""
    found = fake_signs.bind(node.args, dict(node.kwargs))
    bag = found["x"]
    if not is_tensor(bag) or bag.target is not embedding_bag.overload:
        return None
    signs = _from_masters(bag.args[0], fake_signs, context)
    reads = embedding_bag.bind(bag.args, dict(bag.kwargs))
    if signs is None or signs["tie"] != 1.0 or reads["mode"] != "mean":
        return None
    return _bag_candidate(node, bag, signs["x"], 1, MAJORITY, found["tie"])


def _match_head(node: fx.Node, context: Context) -> Candidate | None:
    """An output head tied to a table of binary bases."""
    x, weight, bias = (*node.args, None)[:3]
    masters = _from_masters(weight, fake_binary_rows, context)
    if masters is None or x not in context.activations or bias is not None:
        return None
    table, count = masters["x"], masters["count"]
    columns = shape_of(table)[1]
    width = bits.packed_width(columns)

    def emit(build: Any, values: Values) -> tuple[Any, ...]:
        packed, scale = _packed(build, values["table"], count)
        out = None
        for base in range(count):
            part = build.call(aten.slice.Tensor, packed, 1, base * width, (base + 1) * width)
            own = scale if count == 1 else build.call(aten.select.int, scale, 1, base)
            scores = build.call(binary_linear.overload, values["x"], part, own, None, columns,
                                "float")
            out = scores if out is None else build.call(aten.add.Tensor, out, scores)
        return (out,)

    return Candidate("linear", node, {"x": x, "table": table}, (node,), emit,
                     {"in_features": columns, "out_features": shape_of(table)[0],
                      "bases": count, "activation": "float"}, owner_of((node,)))


PACKED = {  # what is packed already: its operator, and the arguments that hold the table
    binary_embedding.overload: (binary_embedding, "embedding", "table", "row_scale"),
    binary_embedding_bag.overload: (binary_embedding_bag, "embedding_bag", "table", "row_scale"),
    binary_linear.overload: (binary_linear, "linear", "weight", "weight_scale"),
}
SHOWN = ("embedding_dim", "in_features", "mode", "padding_idx", "activation")


def _match_packed(node: fx.Node, context: Context) -> Candidate | None:
    """An operator that reads packed bits: it stays what it is, and is proven to run alone."""
    operator, name, bits_role, scale_role = PACKED[node.target]
    found = operator.bind(node.args, dict(node.kwargs))
    table, scale = found[bits_role], found[scale_role]
    if table in context.activations or scale in context.activations:
        return None

    def emit(build: Any, values: Values) -> tuple[Any, ...]:
        return (build.call(operator.overload, *{**found, **values}.values()),)

    attrs = {"rows": shape_of(table)[0], **{k: found[k] for k in SHOWN if k in found}}
    roles = {role: value for role, value in found.items() if is_tensor(value)}
    return Candidate(name, node, roles, (node,), emit, attrs, owner_of((node,)))


class _LookUp(nn.Module):
    """Rows of binary bases behind masters; `inside` is done to the table, `after` to the rows."""

    def __init__(self, count: int = 1, shift: float = 0.0) -> None:
        super().__init__()
        self.table, self.count, self.shift = nn.Parameter(torch.randn(9, 12)), count, shift

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        rows = nn.functional.embedding(indices, self.table)
        return fake_binary_rows.overload(rows + self.shift if self.shift else rows, self.count)


class _Indexed(nn.Module):
    """Binary rows of a table that is indexed: negative indices count from the end."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 12))

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return fake_binary_rows.overload(self.table[indices], 1)


class _Bag(nn.Module):
    """A bag over bases, or a majority over signs."""

    def __init__(self, mode: str = MAJORITY, count: int = 1, reduction: str = "mean",
                 tie: float = 1.0) -> None:
        super().__init__()
        self.table, self.mode, self.count = nn.Parameter(torch.randn(9, 12)), mode, count
        self.reduction, self.tie = reduction, tie

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        if self.mode != MAJORITY:
            return nn.functional.embedding_bag(
                indices, fake_binary_rows.overload(self.table, self.count), mode=self.mode)
        votes = nn.functional.embedding_bag(indices, fake_signs.overload(self.table),
                                            mode=self.reduction)
        return fake_signs.overload(votes, self.tie)


class _Head(nn.Module):
    def __init__(self, count: int = 1) -> None:
        super().__init__()
        self.table, self.count = nn.Parameter(torch.randn(9, 12)), count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, fake_binary_rows.overload(self.table, self.count))


class _BitsHead(nn.Module):
    """A packed output head; with `computed`, its scales come from the input."""

    packed: torch.Tensor
    scale: torch.Tensor

    def __init__(self, computed: bool = False) -> None:
        super().__init__()
        packed, scale = pack_bases.reference(torch.randn(9, 12), 1)
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self.computed = computed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.scale * x.sum() if self.computed else self.scale
        return binary_linear.overload(x, self.packed, scale, None, 12, "float")


class _Bits(nn.Module):
    """A packed table; with `computed`, its scales come from the input."""

    packed: torch.Tensor
    scale: torch.Tensor

    def __init__(self, count: int = 1, mode: str | None = None, computed: bool = False) -> None:
        super().__init__()
        packed, scale = pack_bases.reference(torch.randn(9, 12), count)
        self.register_buffer("packed", packed)
        self.register_buffer("scale", torch.ones_like(scale) if mode == MAJORITY else scale)
        self.mode, self.computed = mode, computed

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        scale = self.scale * indices.sum() if self.computed else self.scale
        if self.mode is None:
            return binary_embedding.overload(indices, self.packed, scale, 12)
        return binary_embedding_bag.overload(self.packed, indices, None, scale, 12, self.mode)


def _indices() -> tuple[torch.Tensor]:
    return (torch.tensor([[1, 5, 0], [3, 3, 8]]),)


def _rows() -> tuple[torch.Tensor]:
    return (torch.randn(2, 3, 12),)


table_masters = Pattern(
    "table_masters", "embedding", (fake_binary_rows.overload,), _match_masters,
    examples=(*(Example(functools.partial(_LookUp, count), _indices) for count in (1, 2, 3)),
              Example(_Indexed, lambda: (torch.tensor([[-1, 5], [3, -9]]),))),
    near_misses=(Example(lambda: _LookUp(shift=0.5), _indices), Example(_Head, _rows)),
    stage="packed",
)
table_bag = Pattern(
    "table_bag", "embedding_bag", (embedding_bag.overload,), _match_bag,
    examples=tuple(Example(functools.partial(_Bag, mode, count), _indices)
                   for mode in MODES if mode != MAJORITY for count in (1, 2)),
    near_misses=(Example(lambda: nn.EmbeddingBag(9, 12), _indices), Example(_Bag, _indices)),
    stage="packed",
)
table_majority = Pattern(
    "table_majority", "embedding_bag", (fake_signs.overload,), _match_majority,
    examples=(Example(_Bag, _indices), Example(lambda: _Bag(tie=0.0), _indices)),
    near_misses=(Example(lambda: _Bag(reduction="max"), _indices),
                 Example(lambda: _Bag("sum"), _indices)),
    stage="packed",
)
table_head = Pattern(
    "table_head", "linear", (aten.linear.default,), _match_head,
    examples=(Example(_Head, _rows), Example(lambda: _Head(2), _rows)),
    near_misses=(Example(lambda: nn.Linear(12, 9), _rows),),
    stage="packed",
)
packed_table = Pattern(
    "packed_table", "embedding", (binary_embedding.overload,), _match_packed,
    examples=tuple(Example(functools.partial(_Bits, count), _indices) for count in (1, 2, 3)),
    near_misses=(Example(lambda: _Bits(computed=True), _indices),
                 Example(lambda: nn.Embedding(9, 12), _indices)),
    stage="packed",
)
packed_bag = Pattern(
    "packed_bag", "embedding_bag", (binary_embedding_bag.overload,), _match_packed,
    examples=tuple(Example(functools.partial(_Bits, 1, mode), _indices) for mode in MODES),
    near_misses=(Example(lambda: _Bits(1, "sum", computed=True), _indices),
                 Example(lambda: nn.EmbeddingBag(9, 12), _indices)),
    stage="packed",
)
packed_head = Pattern(
    "packed_head", "linear", (binary_linear.overload,), _match_packed,
    examples=(Example(_BitsHead, _rows),),
    near_misses=(Example(lambda: _BitsHead(computed=True), _rows),),
    stage="packed",
)
