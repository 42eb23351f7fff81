"""Linear layers with 1-bit weights and activations, compiled by TVM: xnor and popcount."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bincompile.runtime.kernels import Call, Kernel
from bincompile.runtime.panels import linear_reason, pad, runner, shared_panels
from bincompile.runtime.schedules.common import WORD
from bincompile.runtime.schedules.w1a1_linear import BLOCK
from bincompile.runtime.tvm import Recipe, load, obstacle

WORTH_THREADS = 1 << 23


def _recipe(call: Call) -> Recipe:
    return Recipe("w1a1_linear", {
        "features": call.value("in_features"), "outputs": call.value("weight").shape[0],
        "bias": call.value("bias") is not None, "shift": call.value("shift") is not None,
        "row_scale": call.value("activation_scale") is None})


def _supports(call: Call) -> str | None:
    scale = call.value("activation_scale")
    if call.value("activation") != "binary":
        return "the activations are not binary"
    if scale is not None and scale.numel() != 1:
        return "an activation scale that is not one number"
    return linear_reason(call) or obstacle(_recipe(call), call.target)


def _bind(call: Call) -> Callable[[torch.Tensor], torch.Tensor]:
    features, outputs = call.value("in_features"), call.value("weight").shape[0]
    stored = [shared_panels(call.value("weight"), features)]
    stored += [pad(call.value(name), outputs) for name in ("weight_scale", "bias")
               if call.value(name) is not None]
    if call.value("shift") is not None:
        stored.append(pad(call.value("shift"), features, WORD))
    if call.value("activation_scale") is not None:
        stored.append(call.value("activation_scale").reshape(1).float())
    return runner(load(_recipe(call), call.target), stored, features, outputs, BLOCK,
                  WORTH_THREADS)


KERNEL = Kernel("tvm-w1a1", "binary_linear", _supports, _bind, priority=20, recipe=_recipe)
