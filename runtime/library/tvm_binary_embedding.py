"""Look-ups in tables of 1-bit rows, compiled by TVM."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bincompile.ops import bits
from bincompile.ops.embedding import check_indices
from bincompile.runtime.kernels import Call, Kernel, host_reason
from bincompile.runtime.tvm import Recipe, load, obstacle

WORTH_THREADS = 1 << 17  # numbers written, below which a second thread costs more than it brings
INDICES = {torch.int32: "int32", torch.int64: "int64"}


def _recipe(call: Call) -> Recipe:
    return Recipe("binary_embedding", {"columns": call.value("embedding_dim"),
                                       "indices": INDICES[call.value("indices").dtype]})


def _supports(call: Call) -> str | None:
    table, scale = call.value("table"), call.value("row_scale")
    unknown = [n for n in ("table", "row_scale", "embedding_dim") if not call.is_stored(n)]
    if unknown:
        return f"the {unknown[0]} is known only at run time"
    if call.is_stored("indices") or call.value("indices").dtype not in INDICES:
        return "the indices are stored, or not int32 or int64"
    if scale.ndim != 1:
        return f"rows of {scale.shape[1]} bases"
    if table.shape[1] != bits.packed_width(call.value("embedding_dim")) or not table.shape[1]:
        return f"a packed table of {table.shape[1]} bytes a row"
    if scale.dtype != torch.float32:
        return f"row scales of {scale.dtype}"
    return host_reason(call) or obstacle(_recipe(call), call.target)


def _bind(call: Call) -> Callable[[torch.Tensor], torch.Tensor]:
    from tvm_ffi import from_dlpack

    columns, rows = call.value("embedding_dim"), call.value("table").shape[0]
    module = load(_recipe(call), call.target)
    serial, parallel = module["serial"], module["rows"]
    table, scale = (from_dlpack(call.value(name).detach().contiguous())
                    for name in ("table", "row_scale"))
    few = WORTH_THREADS // columns

    def look_up(indices: torch.Tensor) -> torch.Tensor:
        flat = indices if indices.ndim == 1 else indices.reshape(-1)
        if not flat.is_contiguous():
            flat = flat.contiguous()
        count = flat.shape[0]
        out = torch.empty(count, columns)
        function = serial if count <= few or torch.get_num_threads() == 1 else parallel
        if function(flat, table, scale, out):
            check_indices(indices, rows)
        return out if indices.ndim == 1 else out.view(*indices.shape, columns)

    return look_up


KERNEL = Kernel("tvm-bits", "binary_embedding", _supports, _bind, priority=20)
