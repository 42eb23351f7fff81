"""Linear layers with 1-bit weights and float activations, compiled by TVM: tables of sums."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bincompile.runtime.kernels import Call, Kernel
from bincompile.runtime.panels import fold_signs, linear_reason, pack_weight, pad, runner
from bincompile.runtime.schedules.common import WORD
from bincompile.runtime.schedules.w1a32_linear import BLOCK
from bincompile.runtime.tvm import Recipe, load, obstacle

WORTH_THREADS = 1 << 21
TABLES = {"avx512-vpopcntdq": 16, "avx2": 8}  # sums that fit in one register


def _recipe(call: Call) -> Recipe:
    return Recipe("w1a32_linear", {
        "features": call.value("in_features"), "outputs": call.value("weight").shape[0],
        "bias": call.value("bias") is not None, "shift": call.value("shift") is not None,
        "table": TABLES[call.target.isa]})


def _supports(call: Call) -> str | None:
    if call.value("activation") != "float":
        return "the activations are not float"
    if call.target.isa not in TABLES:
        return f"it needs one of {', '.join(TABLES)}; the target is {call.target}"
    return linear_reason(call) or obstacle(_recipe(call), call.target)


def _bind(call: Call) -> Callable[[torch.Tensor], torch.Tensor]:
    features, outputs = call.value("in_features"), call.value("weight").shape[0]
    packed = pack_weight(call.value("weight"), features)
    stored = [packed if TABLES[call.target.isa] == 16 else fold_signs(packed)]
    stored += [pad(call.value(name), outputs) for name in ("weight_scale", "bias")
               if call.value(name) is not None]
    if call.value("shift") is not None:
        stored.append(pad(call.value("shift"), features, WORD))
    return runner(load(_recipe(call), call.target), stored, features, outputs, BLOCK,
                  WORTH_THREADS)


KERNEL = Kernel("tvm-w1a32", "binary_linear", _supports, _bind, priority=20, recipe=_recipe)
