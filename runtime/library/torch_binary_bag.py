"""Bags of 1-bit rows, some bags at a time, so that the rows of all never stand side by side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from bincompile.ops.binary_embedding_bag import MAJORITY, check_bags, reduce_rows, vote
from bincompile.runtime.kernels import Call, Kernel
from bincompile.runtime.library.torch_embedding import binary_rows, binary_supports, binder

NUMBERS = 1 << 18  # floats of unpacked rows at a time, where a bag allows it


def _blocks(indices: torch.Tensor, offsets: torch.Tensor | None, last: bool,
            rows: int) -> Iterator[tuple[slice, slice]]:
    """Bags, and the indices that they hold, in runs of at most `rows` indices, or of one bag."""
    if offsets is None:
        step = max(1, rows // max(1, indices.shape[1]))
        for start in range(0, indices.shape[0], step):
            yield slice(start, start + step), slice(start, start + step)
        return
    bounds = offsets.tolist() + ([] if last else [indices.shape[0]])
    start = 0
    for end in range(1, len(bounds)):
        if end + 1 == len(bounds) or bounds[end + 1] - bounds[start] > rows:
            yield slice(start, end), slice(bounds[start], bounds[end])
            start = end


def _bags(table: torch.Tensor, indices: torch.Tensor, offsets: torch.Tensor | None,
          row_scale: torch.Tensor, embedding_dim: int, mode: str = "mean",
          weights: torch.Tensor | None = None, include_last_offset: bool = False,
          padding_idx: int | None = None, tie: float = 1.0) -> torch.Tensor:
    check_bags(indices, offsets, weights, mode, include_last_offset)
    reduction, parts = "mean" if mode == MAJORITY else mode, []
    for bags, places in _blocks(indices, offsets, include_last_offset, NUMBERS // embedding_dim):
        block = indices[places]
        starts = None if offsets is None else offsets[bags] - offsets[bags.start]
        rows = binary_rows(block.reshape(-1), table, row_scale, embedding_dim)
        parts.append(reduce_rows(rows, block, starts, reduction,
                                 None if weights is None else weights[places], False, padding_idx))
    out = torch.cat(parts) if parts else row_scale.new_empty(0, embedding_dim)
    return vote(out, tie) if mode == MAJORITY else out


def _supports(call: Call) -> str | None:
    offsets: Any = call.value("offsets")
    if offsets is not None and offsets.dtype not in (torch.int32, torch.int64):
        return f"offsets of dtype {offsets.dtype}"
    return binary_supports(call)


KERNEL = Kernel("torch-blocks", "binary_embedding_bag", _supports, binder(_bags), 10)
