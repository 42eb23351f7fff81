"""Which stored tensors a kernel holds in a layout of its own, and how to have them back from there.

A kernel that copies a weight into its layout says so here. What else holds the weight can then let
go of it, and have it made again on the rare occasions that it is asked for: to save the model, or
to run the reference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.utils.weak import WeakIdKeyDictionary

_restorers: WeakIdKeyDictionary = WeakIdKeyDictionary()  # stored tensor -> how to make it again


def restorable(tensor: torch.Tensor, restore: Callable[..., torch.Tensor], *form: object) -> None:
    """Say that `restore(*form)` gives this tensor, bit for bit; it must not hold the tensor itself.

    Example:
        >>> stored = torch.tensor([1, 2])
        >>> restorable(stored, torch.neg, -stored)
        >>> restorer(stored)()
        tensor([1, 2])
    """
    _restorers[tensor] = functools.partial(restore, *form)


def restorer(tensor: torch.Tensor) -> Callable[[], torch.Tensor] | None:
    """How to make a tensor again; None where no kernel holds it, or not exactly."""
    found = _restorers.get(tensor)
    return found if found is not None and torch.equal(found(), tensor) else None
