"""Linear layers with bases of 1-bit weights and int8 activations, compiled by TVM."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from bincompile.runtime.bound import Bound
from bincompile.runtime.chosen_sums import (
    bound,
    pack_bytes,
    pack_fives,
    scales_of,
)
from bincompile.runtime.kernels import Call, Kernel
from bincompile.runtime.panels import linear_reason, pad
from bincompile.runtime.schedules import w1a8_dot, w1a8_linear
from bincompile.runtime.schedules.common import WORD
from bincompile.runtime.tvm import Recipe, load, obstacle

WORTH_THREADS = 1 << 22


class Form(NamedTuple):
    """How an instruction set does it: a schedule, its parameters, its blocks and its packing."""

    schedule: str
    parameters: dict[str, int]
    block: int
    pack: Callable[[torch.Tensor, int, int], torch.Tensor]


FORMS = {
    "avx512-vpopcntdq": Form("w1a8_linear", {}, w1a8_linear.BLOCK, pack_fives),
    "avx2": Form("w1a8_dot", {"registers": 256}, w1a8_dot.BLOCK, pack_bytes),
    "x86-64": Form("w1a8_dot", {"registers": 128}, w1a8_dot.BLOCK, pack_bytes),
}


def _recipe(call: Call) -> Recipe:
    form = FORMS[call.target.isa]
    return Recipe(form.schedule, {
        "features": call.value("in_features"), "outputs": call.value("weight").shape[0],
        "bases": scales_of(call).shape[1], "bias": call.value("bias") is not None,
        "shift": call.value("shift") is not None, **form.parameters})


def _supports(call: Call) -> str | None:
    if call.value("activation") != "int8":
        return "the activations are not int8"
    if call.target.isa not in FORMS:
        return f"it needs one of {', '.join(FORMS)}; the target is {call.target}"
    return linear_reason(call) or obstacle(_recipe(call), call.target)


def _bind(call: Call) -> Bound:
    features, outputs = call.value("in_features"), call.value("weight").shape[0]
    form, scales = FORMS[call.target.isa], scales_of(call)
    packed = form.pack(call.value("weight").detach(), scales.shape[1], features)
    padded = packed.numel() // (packed.shape[0] * packed.shape[2])  # outputs: of a base, of a word
    stored = [packed, torch.stack([pad(base.detach(), outputs, padded) for base in scales.mT])]
    if call.value("bias") is not None:
        stored.append(pad(call.value("bias").detach(), outputs, padded))
    if call.value("shift") is not None:
        stored.append(pad(call.value("shift").detach(), features, WORD))
    return bound(load(_recipe(call), call.target), stored, features, outputs, form.block,
                 WORTH_THREADS)


KERNELS = tuple(Kernel("tvm-w1a8", operator, _supports, _bind, priority=20, recipe=_recipe)
                for operator in ("binary_linear", "binary_bases_linear"))
