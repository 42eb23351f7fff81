"""bitorch-engine's preparation of a binary linear layer, and its state dicts."""

from __future__ import annotations

from typing import Any

import torch

from bincompile.ops import bits

LEVELS = 127.0
ONLY_THERE = ("bias_a", "scale_a", "scale_w", "qweight")  # keys that our own layers don't have


def prepare_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The engine's 8-bit weight, as floats, and its scale.

    scale = mean |W|, before W is centred; c = W - mean(W); the weight is c * (127 / m), rounded
    and clamped to +-127, and sign(c) where that is 0. m is the largest c (not |c|), as in the
    engine; only where no c is positive, so that the engine raises or gives nan, it is the largest
    |c|, and a weight that is constant gives zeros, which stand for +1.

    Args:
        weight: (N, K), any float dtype; the arithmetic is in float32.

    Example:
        >>> prepare_weight(torch.tensor([[-10.0, -1.0, 1.0, 2.0]]))
        (tensor([[-127.,   32.,   95.,  127.]]), tensor(3.5000))
    """
    wide = weight.detach().float()
    scale = torch.linalg.vector_norm(wide, 1) / wide.numel()
    centred = wide - wide.mean()
    largest = centred.amax()
    if largest <= 0:
        largest = centred.abs().amax()
    if largest == 0:
        return torch.zeros_like(wide), scale
    eighth = (centred * (LEVELS / largest)).round().clamp(-LEVELS, LEVELS)
    return torch.where(eighth == 0, centred.sign(), eighth), scale


def read_weight(state: dict[str, Any], prefix: str, shape: torch.Size,
                dtype: torch.dtype) -> list[str]:
    """Replace packed or 8-bit weights in a state dict by float ones; returns what was wrong.

    `qweight` is uint8 bits (least significant first) or int8 of one number each.
    """
    stored = state.get(prefix + "weight")
    if isinstance(stored, torch.Tensor) and not stored.dtype.is_floating_point:
        stored = state[prefix + "weight"] = stored.to(dtype)
    packed = state.pop(prefix + "qweight", None)
    if packed is None:
        return []
    rows, width = shape[0], bits.packed_width(shape[1])
    wanted = {torch.uint8: rows * width, torch.int8: shape.numel()}
    if wanted.get(packed.dtype) != packed.numel():
        return [f"{prefix}qweight is {packed.dtype} {tuple(packed.shape)}; allowed is uint8 "
                f"({rows}, {width}) or int8 {tuple(shape)}: check in_features and out_features"]
    signs = (bits.unpack(packed.reshape(rows, width), shape[1], dtype)
             if packed.dtype == torch.uint8 else bits.sign(packed.reshape(shape).to(dtype)))
    if stored is None:
        state[prefix + "weight"] = signs
    elif stored.shape == shape and not torch.equal(bits.sign(stored), signs.to(stored.device)):
        return [f"{prefix}qweight holds other signs than {prefix}weight (the engine packs once and "
                "does not follow the weight): leave out the one that you don't mean"]
    return []


def unread_keys(state: dict[str, Any], prefix: str) -> list[str]:
    """What to say of the engine's keys where the layer has no place for them."""
    found = [prefix + name for name in ONLY_THERE if prefix + name in state]
    if not found:
        return []
    return [f"{', '.join(found)}: bitorch-engine's; a layer with compat='bitorch' reads them"]
