"""What the compiled linear kernels share: which calls they take, and the packed layout.

A panel holds 64 outputs: 4 vectors of 16 words, each word 32 bits of one output, bit 1 where the
weight is negative. Padding bits, columns and outputs are 0.
"""

from __future__ import annotations

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from bincompile.runtime.forms import restorable
from bincompile.runtime.kernels import Call, host_reason
from bincompile.runtime.schedules.common import LANE, PANEL, VECTORS, WORD, ceil_div

INPUTS = (torch.float32, torch.float16, torch.bfloat16)


def linear_reason(call: Call) -> str | None:
    """Why the compiled linear kernels can't run this call, if they can't."""
    unknown = next((name for name in call.operator.arguments
                    if name != "x" and not call.is_stored(name)), None)
    if unknown:
        return f"the {unknown} is known only at run time"
    if call.is_stored("x"):
        return "the input is a stored tensor"
    if call.value("x").dtype not in INPUTS:
        return f"an input of {call.value('x').dtype}"
    if 0 in (call.value("in_features"), call.value("weight").shape[0]):
        return "a layer without inputs or outputs"
    return host_reason(call)


def pack_weight(weight: torch.Tensor, features: int) -> torch.Tensor:
    """uint8 (outputs, ceil(features/8)), bit 1 where positive, as uint32 (panels, words, 4, 16).

    Example:
        >>> packed = pack_weight(torch.tensor([[1]], dtype=torch.uint8), 3)
        >>> packed.shape, packed.view(torch.int32)[0, 0, 0, 0].item()
        (torch.Size([1, 1, 4, 16]), 6)
    """
    outputs, panels = weight.shape[0], ceil_div(weight.shape[0], PANEL)
    words = ceil_div(features, WORD)
    negative = torch.zeros(panels * PANEL, words * WORD // 8, dtype=torch.uint8)
    negative[:outputs, :weight.shape[1]] = ~weight
    if features % 8:
        negative[:, weight.shape[1] - 1] &= (1 << features % 8) - 1
    blocks = negative.view(torch.int32).view(panels, VECTORS, LANE, words)
    return blocks.permute(0, 3, 1, 2).contiguous().view(torch.uint32)


_packed = WeakTensorKeyDictionary()


def shared_panels(weight: torch.Tensor, features: int) -> torch.Tensor:
    """What `pack_weight` gives, made once for each tensor while that tensor lives."""
    known = _packed.get(weight)
    if known is None or known[0] != features:
        known = _packed[weight] = (features, pack_weight(weight, features))
        restorable(weight, unpack_weight, known[1], weight.shape[0], features)
    return known[1]


def unpack_weight(panels: torch.Tensor, outputs: int, features: int) -> torch.Tensor:
    """The inverse of `pack_weight`.

    Example:
        >>> unpack_weight(pack_weight(torch.tensor([[5]], dtype=torch.uint8), 3), 1, 3).tolist()
        [[5]]
    """
    words = panels.view(torch.int32).permute(0, 2, 3, 1).contiguous()
    signs = ~words.view(torch.uint8).view(-1, words.shape[-1] * 4)[:outputs, :ceil_div(features, 8)]
    if features % 8:
        signs[:, -1] &= (1 << features % 8) - 1
    return signs


def fold_signs(packed: torch.Tensor) -> torch.Tensor:
    """The layout for tables of eight sums: the fourth bit turns the lower three."""
    quads = packed.view(torch.uint8)
    sign = quads & 0x88
    return (quads ^ (sign >> 1) ^ (sign >> 2) ^ (sign >> 3)).view(torch.uint32)


def pad(values: torch.Tensor, size: int, multiple: int = PANEL) -> torch.Tensor:
    """`size` float32 numbers (one number stands for all), then zeros up to a multiple."""
    padded = torch.zeros(ceil_div(size, multiple) * multiple)
    padded[:size] = values
    return padded
