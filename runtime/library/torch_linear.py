"""Linear layers with 1-bit weights in torch alone, where no compiled kernel can be had.

The weight is unpacked eight signs at a time from a table of the 256 bytes, for some outputs at a
time, so that the float form of the whole weight is never there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bincompile.ops import bits, int8
from bincompile.ops.binary_bases_linear import combine
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
    used, row = _used(x, in_features, activation, activation_scale, shift)
    return finish(_products(used, weight, in_features, _wide(x)), row, weight_scale, bias, x.dtype)


def _bases_linear(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor,
                  bias: torch.Tensor | None, in_features: int, activation: str,
                  shift: torch.Tensor | None) -> torch.Tensor:
    used, row = _used(x, in_features, activation, None, shift)
    bases = weight.unflatten(-1, (weight_scale.shape[1], -1)).unbind(1)
    products = [_products(used, base, in_features, _wide(x)) for base in bases]
    return combine(products, row, weight_scale, bias, x.dtype)


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _used(x: torch.Tensor, in_features: int, activation: str,
          activation_scale: torch.Tensor | None, shift: torch.Tensor | None,
          ) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What is multiplied with the signs, in a dtype that loses nothing, and the rows' scales."""
    wide = x.to(_wide(x))
    if shift is not None:
        wide = wide + shift.to(wide.dtype)
    if activation == "float":
        return wide, None
    if activation == "int8":
        numbers, row = int8.quantised(wide)
        return numbers.to(torch.promote_types(wide.dtype, int8.exact(in_features))), row
    row = bits.row_scale(wide) if activation_scale is None else activation_scale.to(wide.dtype)
    return bits.sign(wide), row


def _products(used: torch.Tensor, weight: torch.Tensor, in_features: int,
              dtype: torch.dtype) -> torch.Tensor:
    """The sums with the signs of every output, some outputs at a time."""
    return torch.cat([used @ _unpacked(part, in_features).to(used.dtype).mT
                      for part in weight.split(max(1, CHUNK // in_features))], -1).to(dtype)


def _unpacked(packed: torch.Tensor, features: int) -> torch.Tensor:
    return torch.embedding(_SIGNS, packed.int()).flatten(-2)[:, :features]


def _bind(call: Call) -> Callable[..., Any]:
    return call.partial(FUNCTIONS[call.operator.name])


FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "binary_linear": _linear, "binary_bases_linear": _bases_linear}
KERNELS = tuple(Kernel("torch-byte-table", name, _supports, _bind, priority=10)
                for name in FUNCTIONS)
