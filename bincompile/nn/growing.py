"""Tensors that grow at their end: a step writes its tokens, and does not copy those before."""

from __future__ import annotations

import dataclasses
import threading

import torch
from torch.utils.weak import WeakTensorKeyDictionary

_SPARE = 32  # tokens of space that a room has at least


@dataclasses.dataclass
class _Room:
    """Storage (B, H, capacity, D) of a tensor and of what will follow it; `used` tokens are set."""

    storage: torch.Tensor
    used: int


_rooms = WeakTensorKeyDictionary()  # the room that a tensor, returned by `joined`, is a view of
_lock = threading.Lock()


def joined(past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """past (B, H, n, D) and new (B, H, t, D) as (B, H, n + t, D); neither changes.

    If past was made here and nothing else followed it yet, new is written behind it, and the result
    is a view of the same storage; past remains a valid tensor of n tokens. So a copy of a state can
    go its own way: the first that grows keeps the storage, the others get their own. Where a
    gradient may be asked for, the tensors are concatenated.

    Example:
        >>> past, new = torch.zeros(1, 1, 2, 1), torch.ones(1, 1, 1, 1)
        >>> with torch.no_grad():
        ...     first = joined(past, new)
        ...     second, other = joined(first, 2 * new), joined(first, 3 * new)
        >>> second.flatten().tolist(), other.flatten().tolist()
        ([0.0, 0.0, 1.0, 2.0], [0.0, 0.0, 1.0, 3.0])
        >>> second.data_ptr() == first.data_ptr(), other.data_ptr() == first.data_ptr()
        (True, False)
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or past.dtype != new.dtype:
        return torch.cat([past, new], 2)
    before, total = past.shape[2], past.shape[2] + new.shape[2]
    room = _claim(past, before, total)
    if room is None:
        room = _Room(past.new_empty(*past.shape[:2], total + max(total // 2, _SPARE),
                                    past.shape[3]), total)
        room.storage[:, :, :before] = past
    room.storage[:, :, before:total] = new
    grown = room.storage[:, :, :total]
    with _lock:
        _rooms[grown] = room
    return grown


def _claim(past: torch.Tensor, before: int, total: int) -> _Room | None:
    """The room of past if the tokens behind it are free; they are no longer after this."""
    with _lock:
        room = _rooms.get(past)
        if room is None or room.used != before or total > room.storage.shape[2] \
                or room.storage.is_inference() != torch.is_inference_mode_enabled():
            return None
        room.used = total
        return room
