"""Convolutions of every feature by itself over the last tokens of a stream, compiled by TVM."""

from __future__ import annotations

from typing import Any

import torch

from bincompile.ops.ticks import check_clock
from bincompile.runtime.bound import Bound
from bincompile.runtime.kernels import Call, Kernel, host_reason
from bincompile.runtime.tvm import Recipe, load, obstacle
from bincompile.runtime.whole import put_back, whole


def _recipe(call: Call) -> Recipe:
    return Recipe("stream_depthwise", {"bias": call.value("bias") is not None})


def _supports(call: Call) -> str | None:
    if not (call.is_stored("weight") and call.is_stored("bias")):
        return "the weights are known only at run time"
    stored = [name for name in ("token", "ring", "rows", "clock") if call.is_stored(name)]
    if stored:
        return f"{stored[0]} is stored"
    used = [call.value(name) for name in ("token", "ring", "weight", "bias")]
    if any(v is not None and v.dtype != torch.float32 for v in used):
        return "another dtype than float32"
    if not used[0].shape[1]:
        return "tokens without features"
    return host_reason(call) or obstacle(_recipe(call), call.target)


def _bind(call: Call) -> Bound:
    from tvm_ffi import from_dlpack

    function = load(_recipe(call), call.target)["depthwise"]
    timing = (call.value("rate"), call.value("delay"))
    stored = [from_dlpack(call.value(name).detach().contiguous()) for name in ("weight", "bias")
              if call.value(name) is not None]
    numbers = (float(call.value("fill")), call.value("apart"), call.value("back"))

    def shape(token: torch.Tensor, *given: torch.Tensor) -> Any:
        return ((tuple(token.shape), torch.float32),)

    def step(token: torch.Tensor, ring: torch.Tensor, rows: torch.Tensor, clock: torch.Tensor,
             out: torch.Tensor) -> None:
        piece = whole(ring)
        failed = function(token.contiguous(), piece, rows.contiguous(), clock.contiguous(),
                          *timing, *stored, out, *numbers)
        put_back([ring], [piece])
        if failed:
            check_clock(rows, clock)

    return Bound(shape, step)


KERNEL = Kernel("tvm-stream", "stream_depthwise", _supports, _bind, priority=20, recipe=_recipe)
