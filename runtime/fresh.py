"""Fresh memory for results; what a large one was in is used again once nothing holds it.

A large result is otherwise memory that the process has not touched yet, and its pages cost more
than writing it: a look-up of 25 MB took 10.3 ms into new pages of 4 KiB, 1.5 ms into large pages,
and 0.5 ms into memory that was there. So Linux is asked for large pages, and some blocks are kept.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import sys
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

LARGE = 4 * 2**20  # bytes
KEPT_BLOCKS, KEPT_BYTES = 4, 256 * 2**20  # of memory that nothing holds
_PAGE = 2 * 2**20
_CPU = torch.device("cpu")


def fresh(size: tuple[int, ...], dtype: torch.dtype,
          strides: tuple[int, ...] | None = None) -> torch.Tensor:
    """A tensor on the processor, not filled; contiguous where no strides are given.

    Example:
        >>> fresh((2, 3), torch.float32).stride()
        (3, 1)
    """
    if math.prod(size) * dtype.itemsize >= LARGE:
        return large(size, strides or contiguous(size), dtype=dtype)
    if strides is None:
        return torch.empty(size, dtype=dtype, device=_CPU)
    return torch.empty_strided(size, strides, dtype=dtype, device=_CPU)


def contiguous(size: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    strides, step = list[int](), 1
    for count in reversed(size):
        strides.append(step)
        step *= max(count, 1)
    return tuple(reversed(strides))


def large(size: tuple[int, ...], strides: tuple[int, ...], *, dtype: torch.dtype,
          device: torch.device = _CPU) -> torch.Tensor:
    """`torch.empty_strided`; the memory goes back to `_free` with the last tensor that has it."""
    last = sum((count - 1) * step for count, step in zip(size, strides, strict=True))
    length = -(-(last + 1) * dtype.itemsize // _PAGE) * _PAGE
    block = _taken(length)
    lease = _lease(length).from_address(block.data_ptr())
    lease.block = block
    memory = torch.frombuffer(lease, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=dtype, device=device).set_(memory, 0, size, strides)


_free: deque[torch.Tensor] = deque()  # appending and popping are atomic: threads share it


def _taken(length: int) -> torch.Tensor:
    """A block of so many bytes: one that is free, or a new one."""
    for _ in range(len(_free)):
        try:
            block = _free.popleft()
        except IndexError:  # another thread took the last one
            break
        if block.numel() == length:
            return block
        _free.append(block)
    block = torch.empty(length, dtype=torch.uint8, device=_CPU)
    if _advise is not None:
        start = -(-block.data_ptr() // _PAGE) * _PAGE
        end = (block.data_ptr() + length) // _PAGE * _PAGE
        if end > start:
            _advise(start, end - start, mmap.MADV_HUGEPAGE)  # advice: a refusal changes nothing
    return block


def _give_back(lease: Any) -> None:
    """Keep the block of a tensor that is gone; the oldest go where there are too many."""
    if lease.block.numel() <= KEPT_BYTES // 2:
        _free.append(lease.block)
    while len(_free) > KEPT_BLOCKS or sum(block.numel() for block in tuple(_free)) > KEPT_BYTES:
        try:
            _free.popleft()
        except IndexError:  # another thread took the last one
            break


@functools.cache
def _lease(length: int) -> Any:
    """A type whose object a tensor's storage holds while it lives: so many bytes of a block."""
    return type("Lease", (ctypes.c_char * length,), {"__del__": _give_back})


def _find_advise() -> Callable[..., Any] | None:
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    found = ctypes.CDLL(None).madvise
    found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return found


_advise = _find_advise()
