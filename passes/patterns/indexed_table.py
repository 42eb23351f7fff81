"""Look-ups that are spelled as indexing: table[ids], index_select, gather, take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from bincompile.passes.graph import aten
from bincompile.passes.look_ups import look_up
from bincompile.passes.patterns import Candidate, Context, Example, Pattern, owner_of
from bincompile.passes.tables import is_index, is_table, table_attrs
from bincompile.program import source_line
from bincompile.record import Refusal


def _match(node: fx.Node, context: Context) -> Candidate | Refusal | None:
    found = look_up(node, context)
    if found is None:
        return _declined(node, context)
    return Candidate("embedding", node, {"table": found.table, "indices": found.indices}, (node,),
                     found.emit, {**found.attrs, **table_attrs(found.table, node, context)},
                     owner_of((node,)), table_use=found.use)


def _declined(node: fx.Node, context: Context) -> Refusal | None:
    """A table that several tensors index at once; anything else is not a look-up at all."""
    if node.target is not aten.index.Tensor or not is_table(node.args[0], context):
        return None
    given = [i for i in node.args[1] if i is not None]
    if len(given) < 2 or not all(map(is_index, given)):
        return None
    return Refusal("embedding", owner_of((node,)),
                   f"the table is indexed by {len(given)} tensors at once", node.name,
                   source_line(node))


class _Read(nn.Module):
    """`read(table, *inputs)` of a stored table."""

    def __init__(self, read: Callable[..., torch.Tensor], *sizes: int) -> None:
        super().__init__()
        self.table, self.read = nn.Parameter(torch.randn(sizes or (9, 4))), read

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.read(self.table, *inputs)


class _Relative(nn.Module):
    """A table of biases by relative place, as window attention has it."""

    offsets: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 2))
        place = torch.arange(5)
        self.register_buffer("offsets", place[:, None] - place[None] + 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.table[self.offsets.view(-1)].view(5, 5, 2).permute(2, 0, 1)
        return x + bias


def _indices() -> tuple[torch.Tensor]:
    return (torch.tensor([[1, 5, 0], [3, 3, 8]]),)


def _negative() -> tuple[torch.Tensor]:
    return (torch.tensor([[-1, 5, 0], [3, -9, 8]]),)


def _flat() -> tuple[torch.Tensor]:
    return (torch.tensor([1, 5, 0, 8]),)


def _tokens() -> tuple[torch.Tensor]:
    return (torch.randn(2, 5, 4),)


def _spread(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.gather(table, 0, ids.unsqueeze(-1).expand(-1, table.shape[1]))


def _batched(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    rows = table.unsqueeze(0).expand(ids.shape[0], -1, -1)
    return rows.gather(1, ids.unsqueeze(-1).repeat(1, 1, table.shape[1]))


def _positions(table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x + table[torch.arange(x.shape[1])]


def _example(read: Callable[..., torch.Tensor], inputs: Callable[[], tuple[Any, ...]],
             *sizes: int) -> Example:
    return Example(lambda: _Read(read, *sizes), inputs)


indexed_table = Pattern(
    "indexed_table", "embedding",
    (aten.index.Tensor, aten.index_select.default, aten.take.default, aten.gather.default,
     aten.take_along_dim.default), _match,
    examples=(
        _example(lambda table, ids: table[ids], _negative),
        _example(lambda table, ids: table[ids], _negative, 9),
        _example(lambda table, ids: table[ids], _negative, 9, 2, 3),
        _example(lambda table, ids: table[:, ids], _negative, 3, 9),
        _example(lambda table, ids: table[:, ids], _negative, 2, 9, 5),
        _example(lambda table, ids: table[ids.clamp(min=0) % 9].tanh(), _indices),
        _example(_positions, _tokens),
        _example(lambda table, ids: torch.index_select(table, 0, ids), _flat),
        _example(lambda table, ids: torch.index_select(table, 1, ids), _flat, 4, 9),
        _example(lambda table, ids: torch.take(table, ids), _negative, 9),
        _example(_spread, _flat),
        _example(lambda table, ids: torch.gather(table, 0, ids), _flat, 9),
        _example(_batched, _indices),
        _example(lambda table, ids: torch.take_along_dim(table, ids[:, None], 0), _flat),
        Example(_Relative, lambda: (torch.randn(3, 2, 5, 5),)),
    ),
    near_misses=(
        _example(lambda table, ids, x: table.sum() + x[ids], lambda: (*_flat(), torch.randn(9, 4))),
        _example(lambda table, ids: table[3] + ids.unsqueeze(-1), _indices),
        _example(lambda table, x: table[:x.shape[1]] + x, _tokens),
        _example(lambda table, ids: table[ids, ids % 4], _indices),
        _example(lambda table, ids: torch.gather(table, 0, ids % 2), _indices, 2, 3),
        _example(lambda table, ids: torch.gather(table, 1, ids.expand(9, -1) % 2)[:, :1],
                 lambda: (torch.tensor([[1, 0, 1]]),), 9, 4),
        _example(lambda table, ids: table.int()[ids].float(), _indices),
    ),
)
