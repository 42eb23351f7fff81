"""Tensors in one piece, as compiled kernels read and write them."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def whole(x: torch.Tensor) -> torch.Tensor:
    """The tensor in one piece; a call of `contiguous` in each step would count as work of torch."""
    return x if x.is_contiguous() else x.contiguous()


def put_back(states: Sequence[torch.Tensor], pieces: Sequence[torch.Tensor]) -> None:
    """Give states what was written to the pieces that stood for them."""
    for state, piece in zip(states, pieces, strict=True):
        if state is not piece:
            state.copy_(piece)
