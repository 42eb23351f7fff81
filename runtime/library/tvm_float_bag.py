"""Maxima of bags of float rows, compiled by TVM: torch's own kernel goes number by number.

Sums and means stay torch's: they are as fast as memory is.
"""

from __future__ import annotations

from typing import Any

import torch

from bincompile.ops.binary_embedding_bag import check_bounds
from bincompile.runtime.bound import Bound
from bincompile.runtime.kernels import Call, Kernel, host_reason
from bincompile.runtime.library.tvm_binary_bag import bag_reason, layout, runner
from bincompile.runtime.library.tvm_binary_embedding import INDICES
from bincompile.runtime.tvm import Recipe, load, obstacle


def _recipe(call: Call) -> Recipe:
    return Recipe("float_maximum", layout(call, call.value("table").shape[1]))


def _supports(call: Call) -> str | None:
    table = call.value("table")
    if not call.is_stored("table") or call.is_stored("indices"):
        return "the table is known only at run time, or the indices before"
    if call.value("mode") != "max":
        return "no maximum"
    if table.dtype != torch.float32 or table.ndim != 2 or not table.shape[1]:
        return f"a table {table.dtype} of shape {tuple(table.shape)}"
    if not table.is_contiguous():
        return "a table that is not in one piece"
    if call.value("indices").dtype not in INDICES:
        return f"indices of dtype {call.value('indices').dtype}"
    return bag_reason(call) or host_reason(call) or obstacle(_recipe(call), call.target)


def _bind(call: Call) -> Bound:
    operator, whole = call.operator, call.partial(call.operator.overload)
    arguments = call.partial(lambda *values: dict(zip(operator.arguments, values, strict=True)))
    table = call.value("table")

    def refuse(*values: Any) -> None:
        given = arguments(*values)
        if given["offsets"] is not None:
            check_bounds(given["offsets"].tolist(), given["indices"].shape[0])
        operator.check(**given)

    bags = runner(call, load(_recipe(call), call.target), table.shape[1], (table,), refuse)

    def reduce(*given: Any) -> None:
        values = arguments(*given[:-1])
        if values["offsets"] is None and not values["indices"].numel():
            given[-1].copy_(whole(*given[:-1]))  # torch refuses bags of length 0
        else:
            bags.into(*given)

    return Bound(bags.shape, reduce)


KERNEL = Kernel("tvm-maximum", "embedding_bag", _supports, _bind, 20, _recipe)
