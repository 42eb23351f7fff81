"""Fresh memory for results; large ones ask Linux for large pages before they are written.

A large result is often memory that the process has not touched yet, and its pages of 4 KiB cost
more than writing it: a look-up of 25 MB took 10.3 ms without the advice, 1.5 ms with it, and 0.5 ms
into memory that was there.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections.abc import Callable
from typing import Any

import torch

LARGE = 4 * 2**20  # bytes
_PAGE = 2 * 2**20
_CPU = torch.device("cpu")


def fresh(size: tuple[int, ...], dtype: torch.dtype,
          strides: tuple[int, ...] | None = None) -> torch.Tensor:
    """A tensor on the processor, not filled; contiguous where no strides are given.

    Example:
        >>> fresh((2, 3), torch.float32).stride()
        (3, 1)
    """
    if strides is None and math.prod(size) * dtype.itemsize < LARGE:
        return torch.empty(size, dtype=dtype, device=_CPU)
    make = large if math.prod(size) * dtype.itemsize >= LARGE else torch.empty_strided
    return make(size, strides or contiguous(size), dtype=dtype, device=_CPU)


def contiguous(size: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    strides, step = list[int](), 1
    for count in reversed(size):
        strides.append(step)
        step *= max(count, 1)
    return tuple(reversed(strides))


def large(size: tuple[int, ...], strides: tuple[int, ...], *, dtype: torch.dtype,
          device: torch.device) -> torch.Tensor:
    """`torch.empty_strided`, with the advice."""
    made = torch.empty_strided(size, strides, dtype=dtype, device=device)
    if _advise is not None:
        start = -(-made.data_ptr() // _PAGE) * _PAGE
        end = (made.data_ptr() + made.untyped_storage().nbytes()) // _PAGE * _PAGE
        if end > start:
            _advise(start, end - start, mmap.MADV_HUGEPAGE)  # advice: a refusal changes nothing
    return made


def _find_advise() -> Callable[..., Any] | None:
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    found = ctypes.CDLL(None).madvise
    found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return found


_advise = _find_advise()
