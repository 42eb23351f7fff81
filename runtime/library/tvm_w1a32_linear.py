"""Linear layers with bases of 1-bit weights and float activations, by TVM: tables of sums."""

from __future__ import annotations

import torch

from bincompile.runtime.bound import Bound
from bincompile.runtime.chosen_sums import bound, pack_words, scales_of
from bincompile.runtime.kernels import Call, Kernel
from bincompile.runtime.panels import fold_signs, linear_reason, pad
from bincompile.runtime.schedules import w1a32_linear
from bincompile.runtime.schedules.common import PANEL, WORD, ceil_div
from bincompile.runtime.tvm import Recipe, load, obstacle

WORTH_THREADS = 1 << 21
TABLES = {"avx512-vpopcntdq": 32, "avx2": 8, "x86-64": 4}  # sums that fit in one register


def _recipe(call: Call) -> Recipe:
    return Recipe("w1a32_linear", {
        "features": call.value("in_features"), "outputs": call.value("weight").shape[0],
        "bases": scales_of(call).shape[1], "bias": call.value("bias") is not None,
        "shift": call.value("shift") is not None, "table": TABLES[call.target.isa]})


def _supports(call: Call) -> str | None:
    if call.value("activation") != "float":
        return "the activations are not float"
    if call.target.isa not in TABLES:
        return f"it needs one of {', '.join(TABLES)}; the target is {call.target}"
    return linear_reason(call) or obstacle(_recipe(call), call.target)


def _bind(call: Call) -> Bound:
    features, outputs = call.value("in_features"), call.value("weight").shape[0]
    scales, padded = scales_of(call), ceil_div(outputs, PANEL) * PANEL
    table, weight = TABLES[call.target.isa], call.value("weight").detach()
    packed = pack_words(weight, scales.shape[1], features, w1a32_linear.TABLES[table].inputs)
    stored = [fold_signs(packed) if table == 8 else packed,
              torch.stack([pad(base, outputs, padded) for base in scales.mT])]
    if call.value("bias") is not None:
        stored.append(pad(call.value("bias").detach(), outputs, padded))
    if call.value("shift") is not None:
        stored.append(pad(call.value("shift").detach(), features, WORD))
    return bound(load(_recipe(call), call.target), stored, features, outputs,
                 w1a32_linear.BLOCK, WORTH_THREADS)


KERNELS = tuple(Kernel("tvm-w1a32", operator, _supports, _bind, priority=20, recipe=_recipe)
                for operator in ("binary_linear", "binary_bases_linear"))
