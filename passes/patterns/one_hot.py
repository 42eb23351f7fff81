"""Look-ups that are spelled as one-hot vectors times a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from bincompile.ops.embedding import embedding
from bincompile.passes.graph import arguments, aten, is_tensor, number, shape_of, value_of
from bincompile.passes.patterns import Candidate, Context, Example, Pattern, TableUse, owner_of
from bincompile.passes.sizes import equal
from bincompile.passes.tables import CASTS, behind, finite, is_index, is_table, table_attrs
from bincompile.program import attribute


@dataclasses.dataclass(frozen=True)
class OneHot:
    """Vectors that are 1 at an index and else 0.

    Args:
        indices: the indices.
        last: whether they have an axis of size 1 at their end.
        allowed: as in `TableUse.indices`; an index that is in no vector is "any".
    """

    indices: fx.Node
    last: bool
    allowed: str


def one_hot(node: fx.Node, context: Context) -> OneHot | None:
    """The one-hot vectors that a node holds, or None."""
    node = behind(node, CASTS)
    reader = _READERS.get(node.target) if node.op == "call_function" else None
    found = None if reader is None else reader(node, context)
    return found if found is not None and is_index(found.indices) else None


def _of_operator(node: fx.Node, context: Context) -> OneHot:
    return OneHot(node.args[0], False, "rows")


def _of_comparison(node: fx.Node, context: Context) -> OneHot | None:
    """ids[..., None] == arange(n): an index outside is a vector of zeros."""
    for indices, classes in (node.args, node.args[::-1]):
        if is_tensor(indices) and is_tensor(classes) and _counts(classes, context) \
                and equal(shape_of(node)[-1], shape_of(classes)[-1]) \
                and len(shape_of(indices)) == len(shape_of(node)) and shape_of(indices)[-1] == 1:
            return _of_last(indices, "any")
    return None


def _of_last(indices: fx.Node, allowed: str) -> OneHot:
    rank = len(shape_of(indices))
    if indices.target is aten.unsqueeze.default and indices.args[1] % rank == rank - 1:
        return OneHot(indices.args[0], False, allowed)
    return OneHot(indices, True, allowed)


def _counts(node: fx.Node, context: Context) -> bool:
    """Whether a value is 0, 1, 2, ... along its last axis, and has no other."""
    if node in context.activations or any(s != 1 for s in shape_of(node)[:-1]):
        return False
    source = behind(node)
    if source.op == "get_attr":
        stored = attribute(context.graph_module, source.target).flatten()
        return torch.equal(stored, torch.arange(stored.numel(), dtype=stored.dtype))
    if source.target is aten.arange.default:
        return True
    return source.target in (aten.arange.start, aten.arange.start_step) \
        and source.args[0] == 0 and source.args[2:] in ((), (1,))


def _of_scatter(node: fx.Node, context: Context) -> OneHot | None:
    """zeros(..., n).scatter(-1, ids[..., None], 1)."""
    base, axis, indices, filled = node.args
    rank = len(shape_of(node))
    if number(context.graph_module, filled) != 1.0 or axis % rank != rank - 1 \
            or shape_of(indices)[-1] != 1 or not _zeros(base, context) \
            or not all(map(equal, shape_of(indices)[:-1], shape_of(node)[:-1])):
        return None
    return _of_last(indices, "rows")


def _zeros(node: fx.Node, context: Context) -> bool:
    made = (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
    filled = (aten.full.default, aten.full_like.default)
    return node.target in made or (
        node.target in filled and number(context.graph_module, node.args[1]) == 0.0)


def _of_identity(node: fx.Node, context: Context) -> OneHot | None:
    """eye(n)[ids]."""
    source, indices = behind(node.args[0], CASTS), node.args[1]
    square = source.target is aten.eye.default and len(source.args) == 1
    return OneHot(indices[0], False, "negative") if square and len(indices) == 1 else None


_READERS: dict[Any, Callable[[fx.Node, Context], OneHot | None]] = {
    aten.one_hot.default: _of_operator, aten.eq.Tensor: _of_comparison,
    aten.scatter.value: _of_scatter, aten.index.Tensor: _of_identity,
}


@dataclasses.dataclass(frozen=True)
class Product:
    """A product with a table: vectors, table, which axis of it is summed over, what is added."""

    vectors: fx.Node
    table: fx.Node
    axis: int
    bias: fx.Node | None = None
    moved: int = -1  # where the features stand in the result


def _product(node: fx.Node) -> Product | None:
    found = arguments(node)
    if node.target is aten.einsum.default:
        return _einsum(*node.args[:2])
    if node.target is aten.linear.default:
        return Product(found["input"], found["weight"], 1, found["bias"])
    return Product(node.args[0], node.args[1], 0)


def _einsum(equation: str, operands: list[fx.Node]) -> Product | None:
    """Two operands: vectors that are summed over their last axis, and a table of two axes."""
    inputs, _, output = equation.replace(" ", "").partition("->")
    labels = inputs.split(",")
    if len(labels) != 2 or len(operands) != 2 or "." in equation or "->" not in equation:
        return None
    for first, second in ((0, 1), (1, 0)):
        vectors, table = labels[first], labels[second]
        summed = vectors[-1:]
        distinct = all(len(set(names)) == len(names) for names in (vectors, table, output))
        if len(table) != 2 or summed not in table or not distinct:
            continue
        feature = table.replace(summed, "")
        if feature not in vectors and output.replace(feature, "") == vectors[:-1] \
                and feature in output:
            return Product(operands[first], operands[second], table.index(summed),
                           moved=output.index(feature))
    return None


def _match(node: fx.Node, context: Context) -> Candidate | None:
    product = _product(node)
    if product is None or not is_table(product.table, context) \
            or len(shape_of(product.table)) != 2:
        return None
    vectors = one_hot(product.vectors, context)
    if vectors is None or value_of(product.vectors).dtype != value_of(product.table).dtype \
            or not finite(product.table, context):
        return None
    inputs = {"table": product.table, "indices": vectors.indices,
              **({} if product.bias is None else {"bias": product.bias})}
    sizes = shape_of(product.table)
    attrs = {"num_embeddings": sizes[product.axis], "embedding_dim": sizes[1 - product.axis],
             "padding_idx": None, **table_attrs(product.table, node, context)}

    def emit(build: Any, values: Mapping[str, Any]) -> tuple[Any, ...]:
        return (_emit(build, values, product, vectors),)

    return Candidate("embedding", node, inputs, (node,), emit, attrs, owner_of((node,)),
                     table_use=TableUse(product.axis, 1 - product.axis, vectors.allowed))


def _emit(build: Any, values: Mapping[str, Any], product: Product, vectors: OneHot) -> Any:
    table, indices = values["table"], values["indices"]
    if product.axis:
        table = build.call(aten.permute.default, table, [1, 0])
    if vectors.last:
        indices = build.call(aten.select.int, indices, -1, 0)
    if vectors.allowed == "any":
        rows = _known_rows(build, table, indices, shape_of(product.table)[product.axis])
    else:
        rows = build.call(embedding.overload, table, indices,
                          *([True] if vectors.allowed == "negative" else []))
    if "bias" in values:
        rows = build.call(aten.add.Tensor, rows, values["bias"])
    last = len(build.shape(indices))
    if product.moved in (-1, last):
        return rows
    order = list(range(last))
    return build.call(aten.permute.default, rows,
                      [*order[:product.moved], last, *order[product.moved:]])


def _known_rows(build: Any, table: Any, indices: Any, rows: int) -> Any:
    """Rows of a table, and zeros for an index that it has not."""
    known = build.call(aten.logical_and.default, build.call(aten.ge.Scalar, indices, 0),
                       build.call(aten.lt.Scalar, indices, rows))
    inside = build.call(aten.where.ScalarOther, known, indices, 0)
    found = build.call(embedding.overload, table, inside)
    return build.call(aten.where.ScalarOther, build.call(aten.unsqueeze.default, known, -1),
                      found, 0.0)


class _Read(nn.Module):
    """`read(table, indices)` of a stored table."""

    def __init__(self, read: Callable[..., torch.Tensor], *sizes: int) -> None:
        super().__init__()
        self.table, self.read = nn.Parameter(torch.randn(sizes or (9, 4))), read
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return self.read(self, indices)


def _indices() -> tuple[torch.Tensor]:
    return (torch.tensor([[1, 5, 0], [3, 3, 8]]),)


def _outside() -> tuple[torch.Tensor]:
    return (torch.tensor([[-1, 9, 0], [3, 30, 8]]),)


def _hot(indices: torch.Tensor) -> torch.Tensor:
    return functional.one_hot(indices, 9).float()


def _scattered(indices: torch.Tensor, value: float = 1.0) -> torch.Tensor:
    return torch.zeros(*indices.shape, 9).scatter_(-1, indices.unsqueeze(-1), value)


def _compared(indices: torch.Tensor, start: int = 0) -> torch.Tensor:
    return (indices[..., None] == torch.arange(start, start + 9)).float()


def _example(read: Callable[..., torch.Tensor], *sizes: int,
             inputs: Callable[[], tuple[Any, ...]] = _indices) -> Example:
    return Example(lambda: _Read(read, *sizes), inputs)


one_hot_table = Pattern(
    "one_hot_table", "embedding",
    (aten.matmul.default, aten.mm.default, aten.linear.default, aten.einsum.default), _match,
    examples=(
        _example(lambda own, ids: _hot(ids) @ own.table),
        _example(lambda own, ids: _hot(ids.view(-1)) @ own.table),
        _example(lambda own, ids: functional.linear(_hot(ids), own.table, own.bias), 4, 9),
        _example(lambda own, ids: functional.linear(_hot(ids), own.table.t())),
        _example(lambda own, ids: torch.einsum("blv,vd->bld", _hot(ids), own.table)),
        _example(lambda own, ids: torch.einsum("dv,blv->bdl", own.table, _hot(ids)), 4, 9),
        _example(lambda own, ids: _compared(ids) @ own.table, inputs=_outside),
        _example(lambda own, ids: _scattered(ids) @ own.table),
        _example(lambda own, ids: torch.eye(9)[ids - 9] @ own.table),
    ),
    near_misses=(
        _example(lambda own, ids: _hot(ids).transpose(1, 2)[:, :4] @ _hot(ids) @ own.table),
        _example(lambda own, ids: _scattered(ids, 2.0) @ own.table),
        _example(lambda own, ids: _compared(ids, 1) @ own.table),
        _example(lambda own, ids: _hot(ids).sum(1) @ own.table),
        _example(lambda own, ids: _hot(ids) @ (own.table * ids.sum())),
        _example(lambda own, ids: functional.linear(_hot(ids).abs(), own.table), 4, 9),
    ),
)
