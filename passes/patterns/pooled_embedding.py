"""Bags that are written by hand: rows of a table, weighted or not, summed over an axis.

A mean is a sum, divided. A maximum stays as it is: a bag's takes torch five times as long as a
look-up and amax (64 bags of 8 rows of 64 numbers: 51 us, not 11 us); its sums take less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional

from bincompile.ops.embedding_bag import embedding_bag
from bincompile.passes.graph import arguments, aten, is_tensor, shape_of, users, value_of
from bincompile.passes.look_ups import LookUp, look_up
from bincompile.passes.patterns import Candidate, Context, Example, Pattern, TableUse, owner_of
from bincompile.passes.sizes import equal
from bincompile.passes.tables import table_attrs

MODES = {aten.sum.dim_IntList: "sum", aten.mean.dim: "mean"}
WHOLE = (torch.float32, torch.float64)  # what both spellings add up in the same precision


def _match(node: fx.Node, context: Context) -> Candidate | None:
    """The rows are read by the sum alone, over axes of the indices; else they stay a look-up."""
    found, mode = arguments(node), MODES[node.target]
    rows, weights = _weighted(found["self"], context) if mode == "sum" else (found["self"], None)
    read = look_up(rows, context)
    if read is None or not read.plain or found.get("dtype") is not None \
            or value_of(node).dtype not in WHOLE or not found["dim"]:
        return None
    rank = len(shape_of(rows))
    axes = tuple(sorted(d % rank for d in found["dim"]))
    alone = [*users(rows)] == [node if weights is None else found["self"]] \
        and (weights is None or [*users(found["self"])] == [node])
    sizes = [shape_of(rows)[a] for a in axes]
    if not alone or axes[-1] == rank - 1 or not all(statically_known_true(s >= 1) for s in sizes):
        return None  # torch has no bags of no members
    inputs = {"table": read.table, "indices": read.indices,
              **({} if weights is None else {"weights": weights})}
    attrs = {**read.attrs, "mode": mode, "weights": weights is not None,
             **table_attrs(read.table, rows, context)}

    def emit(build: Any, values: Mapping[str, Any]) -> tuple[Any, ...]:
        return (_emit(build, values, read, axes, mode, bool(found["keepdim"])),)

    return Candidate("embedding_bag", node, inputs, (node,), emit, attrs, owner_of((rows, node)),
                     table_use=TableUse(indices=read.use.indices))


def _weighted(node: fx.Node, context: Context) -> tuple[fx.Node, fx.Node | None]:
    """The rows, and the weights with an axis of size 1 at their end, if they are multiplied."""
    if node.target is not aten.mul.Tensor or not all(map(is_tensor, node.args)):
        return node, None
    for rows, weights in (node.args, node.args[::-1]):
        sizes, whole = shape_of(weights), shape_of(rows)
        kind = value_of(weights).dtype in (torch.bool, value_of(rows).dtype)
        if look_up(rows, context) and kind and len(sizes) == len(whole) and sizes[-1] == 1 \
                and all(map(equal, shape_of(node), whole)):
            return rows, weights
    return node, None


def _emit(build: Any, values: Mapping[str, Any], read: LookUp, axes: tuple[int, ...], mode: str,
          keep: bool) -> Any:
    """One bag for each place that stays; the axes that are summed over become its members."""
    table, weights, indices = values["table"], values.get("weights"), read.inside(build, values)
    if weights is not None:
        weights = build.call(aten.select.int, weights, -1, 0)
        weights = build.call(aten.expand.default, weights, [*build.shape(indices)])
        weights = build.call(aten.type_as.default, weights, table)
        weights = _in_bags(build, weights, axes)
    sizes = [s for a, s in enumerate(build.shape(indices)) if a not in axes]
    bags = build.call(embedding_bag.overload, table, _in_bags(build, indices, axes), None, "sum",
                      *([] if weights is None else [weights]))
    for axis in axes if mode == "mean" else ():
        bags = build.call(aten.div.Tensor, bags, build.size(indices, axis))
    if len(sizes) != 1:
        bags = build.call(aten.reshape.default, bags, [*sizes, build.size(table, 1)])
    for axis in axes if keep else ():
        bags = build.call(aten.unsqueeze.default, bags, axis)
    return bags


def _in_bags(build: Any, value: Any, axes: tuple[int, ...]) -> Any:
    """A value with the axes that stay as one, and those that are summed over as the other."""
    rank = len(build.shape(value))
    staying = [a for a in range(rank) if a not in axes]
    if staying + list(axes) != list(range(rank)):
        value = build.call(aten.permute.default, value, [*staying, *axes])
    if rank == 2 and len(axes) == 1:
        return value
    if len(staying) < rank - 1:
        value = build.call(aten.flatten.using_ints, value, len(staying), -1)
    if not staying:
        return build.call(aten.unsqueeze.default, value, 0)
    return value if len(staying) == 1 else build.call(
        aten.flatten.using_ints, value, 0, len(staying) - 1)


class _Pooled(nn.Module):
    """`pool(rows, *inputs)` of looked-up rows."""

    def __init__(self, pool: Callable[..., torch.Tensor], indexed: bool = False) -> None:
        super().__init__()
        self.table, self.pool, self.indexed = nn.Parameter(torch.randn(9, 4)), pool, indexed

    def forward(self, indices: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        rows = self.table[indices] if self.indexed else functional.embedding(indices, self.table)
        return self.pool(rows, indices, *rest)


def _indices(*shape: int) -> tuple[torch.Tensor]:
    sizes = shape or (2, 3)
    return (torch.arange(math.prod(sizes)).view(sizes) % 9,)


def _weights() -> tuple[torch.Tensor, torch.Tensor]:
    return (*_indices(), torch.rand(2, 3))


def _example(pool: Callable[..., torch.Tensor],
             inputs: Callable[[], tuple[Any, ...]] = _indices, indexed: bool = False) -> Example:
    return Example(lambda: _Pooled(pool, indexed), inputs)


pooled_embedding = Pattern(
    "pooled_embedding", "embedding_bag", tuple(MODES), _match,
    examples=(
        _example(lambda rows, ids: rows.sum(1)),
        _example(lambda rows, ids: rows.sum(-2, keepdim=True), lambda: _indices(2, 4, 3)),
        _example(lambda rows, ids: rows.sum(1), lambda: _indices(2, 4, 3)),
        _example(lambda rows, ids: rows.sum((0, 2)), lambda: _indices(2, 4, 3)),
        _example(lambda rows, ids: rows.sum((0, 1))),
        _example(lambda rows, ids: rows.mean(1)),
        _example(lambda rows, ids: rows.sum(1), lambda: (_indices()[0] - 9,), indexed=True),
        _example(lambda rows, ids, w: (rows * w.unsqueeze(-1)).sum(1), _weights),
        _example(lambda rows, ids, w: (w[..., None] * rows).sum(1), _weights),
        _example(lambda rows, ids: (rows * (ids != 0).unsqueeze(-1)).sum(1)
                 / (ids != 0).sum(1, keepdim=True).clamp(min=1)),
    ),
    near_misses=(
        _example(lambda rows, ids: rows.sum(-1)),
        _example(lambda rows, ids: rows.tanh().sum(1)),
        _example(lambda rows, ids: rows.sum(1) + rows[:, 0]),
        _example(lambda rows, ids: (rows * rows).sum(1)),
        _example(lambda rows, ids: rows.sum(1, dtype=torch.float64)),
        _example(lambda rows, ids: rows.var(1, correction=0)),
    ),
)
