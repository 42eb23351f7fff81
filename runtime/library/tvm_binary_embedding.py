"""Look-ups in tables of rows of 1-bit bases, compiled by TVM."""

from __future__ import annotations

import torch

from bincompile.ops import bases, bits
from bincompile.ops.embedding import check_indices
from bincompile.runtime.bound import Bound, Size
from bincompile.runtime.kernels import Call, Kernel, host_reason
from bincompile.runtime.tvm import Recipe, load, obstacle

WORTH_THREADS = 1 << 17  # numbers written, below which a second thread costs more than it brings
INDICES = {torch.int32: "int32", torch.int64: "int64"}


def _recipe(call: Call) -> Recipe:
    return Recipe("binary_embedding", {"columns": call.value("embedding_dim"),
                                       "bases": bases.count_of(call.value("row_scale")),
                                       "indices": INDICES[call.value("indices").dtype]})


def table_reason(call: Call) -> str | None:
    """Why compiled kernels can't read this call's table, if they can't."""
    table, scale = call.value("table"), call.value("row_scale")
    unknown = [n for n in ("table", "row_scale", "embedding_dim") if not call.is_stored(n)]
    if unknown:
        return f"the {unknown[0]} is known only at run time"
    if call.is_stored("indices") or call.value("indices").dtype not in INDICES:
        return "the indices are stored, or not int32 or int64"
    width = bases.count_of(scale) * bits.packed_width(call.value("embedding_dim"))
    if table.ndim != 2 or table.dtype != torch.uint8 or table.shape[1] != width or not width:
        return f"a packed table {table.dtype} of shape {tuple(table.shape)}"
    if scale.dtype != torch.float32:
        return f"row scales of {scale.dtype}"
    return host_reason(call)


def _supports(call: Call) -> str | None:
    return table_reason(call) or obstacle(_recipe(call), call.target)


def flat(indices: torch.Tensor) -> torch.Tensor:
    """One row of indices after the other, in one piece."""
    row = indices if indices.ndim == 1 else indices.reshape(-1)
    return row if row.is_contiguous() else row.contiguous()


def _bind(call: Call) -> Bound:
    from tvm_ffi import from_dlpack

    columns, scales = call.value("embedding_dim"), call.value("row_scale").detach()
    rows, count = call.value("table").shape[0], bases.count_of(scales)
    module = load(_recipe(call), call.target)
    serial, parallel = module["serial"], module["rows"]
    table = from_dlpack(call.value("table").detach().contiguous())
    scale = from_dlpack(scales.reshape(rows, count).contiguous())
    few = WORTH_THREADS // columns

    def shape(indices: torch.Tensor) -> tuple[Size, ...]:
        return (((*indices.shape, columns), torch.float32),)

    def look_up(indices: torch.Tensor, out: torch.Tensor) -> None:
        row = flat(indices)
        number = row.shape[0]
        result = out if out.ndim == 2 else out.view(number, columns)
        function = serial if number <= few or torch.get_num_threads() == 1 else parallel
        if function(row, table, scale, result):
            check_indices(indices, rows)

    return Bound(shape, look_up)


KERNEL = Kernel("tvm-bits", "binary_embedding", _supports, _bind, priority=20, recipe=_recipe)
