"""Look-ups by torch's own kernels, without the operator's pass over the indices first.

Torch finds a bad index while it looks up; only then is the operator's check made, to name it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bincompile.ops import OPERATORS, bases, bits
from bincompile.ops.embedding import check_indices
from bincompile.runtime.kernels import Call, Kernel, host_reason


def _supports(call: Call) -> str | None:
    indices, table = call.value("indices"), call.value("table")
    if indices.dtype not in (torch.int32, torch.int64):
        return f"indices of dtype {indices.dtype}"
    if table.ndim != 2:
        return f"a table of rank {table.ndim}"
    return host_reason(call)


def binder(look_up: Callable[..., torch.Tensor]) -> Callable[[Call], Callable[..., Any]]:
    """Bind `look_up` (all arguments of the operator, in order) with its index errors named."""
    def bind(call: Call) -> Callable[..., Any]:
        names = call.operator.arguments
        table, indices = names.index("table"), names.index("indices")
        wrap = "wrap" in names and bool(call.value("wrap"))

        def checked(*arguments: Any) -> torch.Tensor:
            try:
                return look_up(*arguments)
            except (IndexError, RuntimeError):
                check_indices(arguments[indices], arguments[table].shape[0], wrap)
                raise

        return call.partial(checked)

    return bind


def float_rows(table: torch.Tensor, indices: torch.Tensor, wrap: bool) -> torch.Tensor:
    """Rows of a table; negative indices, which are rare, are looked for only where one is met.

    For 128 rows of 384 numbers torch's look-up takes a fifth of the time of its indexing.
    """
    try:
        return torch.embedding(table, indices)
    except IndexError:
        if not wrap:
            raise
    return torch.embedding(table, torch.where(indices < 0, indices + table.shape[0], indices))


_SIGNS = bits.unpack(torch.arange(256, dtype=torch.uint8).unsqueeze(-1), 8, torch.float32)


def binary_rows(indices: torch.Tensor, table: torch.Tensor, row_scale: torch.Tensor,
                embedding_dim: int) -> torch.Tensor:
    """Rows of signs, eight at a time from a table of the 256 bytes, times their scales."""
    count = bases.count_of(row_scale)
    packed = torch.embedding(table, indices).unflatten(-1, (count, -1))
    signs = torch.embedding(_SIGNS.to(row_scale.dtype), packed.int()).flatten(-2)
    scales = torch.embedding(row_scale.view(-1, count), indices)
    return bases.combine(signs[..., :embedding_dim], scales)


def binary_supports(call: Call) -> str | None:
    """Why these kernels can't read a packed table by its bytes, if they can't."""
    width = bits.packed_width(call.value("embedding_dim"))
    table, count = call.value("table"), bases.count_of(call.value("row_scale"))
    if table.dtype != torch.uint8 or table.ndim != 2 or table.shape[1] != count * width:
        return f"a packed table {table.dtype} that isn't of {count * width} columns"
    return _supports(call)


embedding = Kernel("torch-embedding", "embedding", _supports, binder(float_rows), 10)
embedding_bag = Kernel("torch-embedding-bag", "embedding_bag", _supports,
                       binder(OPERATORS["embedding_bag"].reference), 10)
binary_embedding = Kernel("torch-byte-table", "binary_embedding", binary_supports,
                          binder(binary_rows), 10)
