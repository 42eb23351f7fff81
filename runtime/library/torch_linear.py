"""Linear layers with 1-bit weights in torch alone, where no compiled kernel can be had.

The weight is unpacked eight signs at a time from a table of the 256 bytes, for some outputs at a
time, so that the float form of the whole weight is never there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bincompile.ops import bits
from bincompile.ops.binary_linear import finish
from bincompile.runtime.kernels import Call, Kernel, host_reason

CHUNK = 1 << 20  # signs that are unpacked at a time
_SIGNS = bits.unpack(torch.arange(256, dtype=torch.uint8).unsqueeze(-1), 8, torch.float32)


def _supports(call: Call) -> str | None:
    if not call.is_stored("in_features") or not call.is_stored("activation"):
        return "the number of inputs or the kind of activations is known only at run time"
    if not call.value("in_features"):
        return "a layer without inputs"
    return host_reason(call)


def _linear(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor,
            bias: torch.Tensor | None, in_features: int, activation: str,
            activation_scale: torch.Tensor | None, shift: torch.Tensor | None) -> torch.Tensor:
    wide, row = x.to(torch.promote_types(x.dtype, torch.float32)), None
    if shift is not None:
        wide = wide + shift.to(wide.dtype)
    if activation == "binary":
        row = bits.row_scale(wide) if activation_scale is None else activation_scale.to(wide.dtype)
        wide = bits.sign(wide)
    products = [wide @ _unpacked(part, in_features).to(wide.dtype).mT
                for part in weight.split(max(1, CHUNK // in_features))]
    return finish(torch.cat(products, -1), row, weight_scale, bias, x.dtype)


def _unpacked(packed: torch.Tensor, features: int) -> torch.Tensor:
    return torch.embedding(_SIGNS, packed.int()).flatten(-2)[:, :features]


def _bind(call: Call) -> Callable[..., Any]:
    return call.partial(_linear)


KERNEL = Kernel("torch-byte-table", "binary_linear", _supports, _bind, priority=10)
