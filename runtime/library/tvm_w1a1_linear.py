"""Linear layers with 1-bit weights and activations, compiled by TVM: xnor and popcount."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bincompile.runtime.bound import Bound, Size
from bincompile.runtime.kernels import Call, Kernel
from bincompile.runtime.panels import linear_reason, pad, shared_panels
from bincompile.runtime.schedules.common import PANEL, ceil_div
from bincompile.runtime.schedules.w1a1_linear import BLOCK
from bincompile.runtime.tvm import Recipe, load, obstacle

WORTH_THREADS = 1 << 23  # products below which a second thread costs more than it brings


def _recipe(call: Call) -> Recipe:
    return Recipe("w1a1_linear", {
        "features": call.value("in_features"), "outputs": call.value("weight").shape[0],
        "bias": call.value("bias") is not None, "shift": call.value("shift") is not None,
        "row_scale": call.value("activation_scale") is None,
        "rank": max(call.value("x").ndim - 1, 1)})


def _supports(call: Call) -> str | None:
    scale = call.value("activation_scale")
    if call.value("activation") != "binary":
        return "the activations are not binary"
    if scale is not None and scale.numel() != 1:
        return "an activation scale that is not one number"
    return linear_reason(call) or obstacle(_recipe(call), call.target)


def _stored(call: Call) -> list[torch.Tensor]:
    """What the compiled functions take after the input."""
    features, outputs = call.value("in_features"), call.value("weight").shape[0]
    stored = [shared_panels(call.value("weight"), features)]
    stored += [pad(call.value(name), outputs) for name in ("weight_scale", "bias")
               if call.value(name) is not None]
    if call.value("activation_scale") is not None:
        stored.append(call.value("activation_scale").reshape(1).float())
    if call.value("shift") is not None:
        stored.append(call.value("shift").float().contiguous())
    return stored


def _bind(call: Call) -> Bound:
    from tvm_ffi import from_dlpack

    features, outputs = call.value("in_features"), call.value("weight").shape[0]
    run = _chooser(load(_recipe(call), call.target), features, outputs)
    stored = [from_dlpack(tensor.detach()) for tensor in _stored(call)]

    def shape(x: torch.Tensor) -> tuple[Size, ...]:
        return (((*x.shape[:-1], outputs), x.dtype),)

    def into(x: torch.Tensor, out: torch.Tensor) -> None:
        rows = x.numel() // features
        if not rows:
            return
        if x.dtype is not torch.float32:
            whole = torch.empty(out.shape)
            into(x.float(), whole)
            out.copy_(whole)
            return
        if x.ndim == 1:
            x, out = x.unsqueeze(0), out.unsqueeze(0)
        run(rows, x if x.is_contiguous() else x.contiguous(), *stored, out)

    return Bound(shape, into)


def _chooser(module: Any, features: int, outputs: int) -> Callable[..., None]:
    """The compiled function that suits so many rows and the threads that there are."""
    serial, by_rows, by_panels = (module[mode] for mode in ("serial", "rows", "panels"))
    few, panels = WORTH_THREADS // (features * outputs), ceil_div(outputs, PANEL)

    def run(rows: int, *arguments: Any) -> None:
        threads = torch.get_num_threads() if rows > few else 1
        if threads == 1:
            serial(BLOCK, *arguments)
        elif rows >= threads * BLOCK * (4 if panels >= 2 * threads else 1):
            by_rows(BLOCK, *arguments)
        else:
            by_panels(BLOCK, *arguments)

    return run


KERNEL = Kernel("tvm-w1a1", "binary_linear", _supports, _bind, priority=20, recipe=_recipe)
