"""Memory of the results inside a program: planned once for each tuple of input sizes, and reused.

A result lives from the step that writes it to the last step that reads it or a view of it. Results
that never live at the same time share memory: the largest are placed first, each at the lowest
place that is free while it lives. What the caller gets is always memory of its own.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from bincompile.runtime.bound import Bound, Size
from bincompile.runtime.fresh import LARGE, contiguous, fresh, large

ALIGNMENT = 64  # bytes: a cache line, and the widest vector
MOST_LAYOUTS = 32  # tuples of sizes whose layout is kept
MOST_ARENAS = 8  # pieces of memory that are kept for the next calls

Lifetime = tuple[int, int] | None  # first and last step; None for what the caller gets


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Where results lie at certain sizes.

    Args:
        places: offset, size, strides and dtype of each result inside, in the order of the program.
        given: of each result that the caller gets, the function that makes it, size, strides and
            dtype.
        nbytes: memory that the results inside need together.
    """

    places: tuple[tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype], ...]
    given: tuple[tuple[Callable[..., torch.Tensor], tuple[int, ...], tuple[int, ...],
                       torch.dtype], ...]
    nbytes: int

    @classmethod
    def of(cls, sizes: Sequence[Size], lifetimes: Sequence[Lifetime]) -> Layout:
        """The layout of results of these sizes.

        Example:
            >>> sizes = [((4, 8), torch.float32)] * 3
            >>> layout = Layout.of(sizes, [(0, 1), (1, 2), (2, 3)])
            >>> [offset for offset, *_ in layout.places], layout.nbytes
            ([0, 128, 0], 256)
        """
        inside = [(size, life) for size, life in zip(sizes, lifetimes, strict=True)
                  if life is not None]
        offsets, total = _placed([_nbytes(size) for size, _ in inside],
                                 [life for _, life in inside])
        places = tuple((offset, size[0], _strides(size), size[1])
                       for offset, (size, _) in zip(offsets, inside, strict=True))
        given = tuple((large if _nbytes(size) >= LARGE else torch.empty_strided,
                       size[0], _strides(size), size[1])
                      for size, life in zip(sizes, lifetimes, strict=True) if life is None)
        return cls(places, given, total)


def _placed(sizes: Sequence[int], lifetimes: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
    """Offsets at which nothing overlaps that lives at the same time, and the end of all."""
    offsets, done = [0] * len(sizes), list[int]()
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        first, last = lifetimes[index]
        taken = sorted((offsets[i], offsets[i] + sizes[i]) for i in done
                       if lifetimes[i][0] <= last and first <= lifetimes[i][1])
        place = 0
        for start, end in taken:
            if place + sizes[index] <= start:
                break
            place = max(place, end)
        offsets[index] = place
        done.append(index)
    return offsets, max((o + s for o, s in zip(offsets, sizes, strict=True)), default=0)


def _strides(size: Size) -> tuple[int, ...]:
    return size[2] if len(size) == 3 else contiguous(size[0])


def _nbytes(size: Size) -> int:
    shape, dtype = size[:2]
    return -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT


class Arena:
    """One piece of memory, used by one call at a time, and its tensors by layout."""

    __slots__ = ("_memory", "_views")

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._views: dict[Layout, tuple[Any, ...]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return self._memory.nbytes

    def views(self, layout: Layout) -> tuple[Any, ...] | None:
        """What `lay` gave for a layout; its tensors overlap those of every other layout."""
        return self._views.get(layout)

    def lay(self, layout: Layout, prepare: Callable[..., tuple[Any, ...]],
            *inputs: Any) -> tuple[Any, ...] | None:
        """The tensors of a layout, and behind them what `prepare(*inputs, *tensors)` gives.

        None if one of those is memory of its own, and not a view that stays right.
        """
        # a tensor that is made under inference_mode could not be written to outside of it
        with torch.inference_mode(False), torch.no_grad():
            if self._memory.nbytes < layout.nbytes or len(self._views) == MOST_LAYOUTS:
                self._views.clear()
            if self._memory.nbytes < layout.nbytes:
                self._memory = fresh((layout.nbytes,), torch.uint8)
            tensors = tuple(self._view(*place) for place in layout.places)
            more = prepare(*inputs, *tensors)
        if not all(map(self._holds, more)):
            return None
        self._views[layout] = (*tensors, *more)
        return self._views[layout]

    def _holds(self, value: Any) -> bool:
        return not isinstance(value, torch.Tensor) or not value.numel() or (
            value.untyped_storage().data_ptr() == self._memory.untyped_storage().data_ptr())

    def _view(self, offset: int, shape: tuple[int, ...], strides: tuple[int, ...],
              dtype: torch.dtype) -> torch.Tensor:
        used = math.prod(shape) * dtype.itemsize
        if not used:
            return torch.empty_strided(shape, strides, dtype=dtype, device="cpu")
        return self._memory[offset:offset + used].view(dtype).as_strided(shape, strides)


class Memory:
    """The layouts of a program, and the arenas that its calls take and give back.

    Threads may share it. It keeps at most `MOST_LAYOUTS` layouts and `MOST_ARENAS` arenas.

    Args:
        lifetimes: of each result that is planned, in the order of the program.
    """

    def __init__(self, lifetimes: Sequence[Lifetime]) -> None:
        self.lifetimes = tuple(lifetimes)
        self.layouts: dict[Hashable, Layout] = {}
        self.stubborn: set[Hashable] = set()  # sizes at which a view was none; nothing is planned
        self._free: list[Arena] = []
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of the arenas that no call uses at the moment."""
        return sum(arena.nbytes for arena in list(self._free))

    def keep(self, key: Hashable, sizes: Sequence[Size]) -> None:
        """Keep the layout for these sizes of inputs; the oldest one goes if there are too many."""
        layout = Layout.of(sizes, self.lifetimes)
        with self._lock:
            if key not in self.layouts and len(self.layouts) >= MOST_LAYOUTS:
                del self.layouts[next(iter(self.layouts))]
            self.layouts[key] = layout

    def forget(self, key: Hashable) -> None:
        """Plan nothing at these sizes from now on."""
        with self._lock:
            self.layouts.pop(key, None)
            if len(self.stubborn) < MOST_LAYOUTS:
                self.stubborn.add(key)

    def take(self) -> Arena:
        """An arena that no other call uses."""
        try:
            return self._free.pop()
        except IndexError:
            return Arena()

    def give(self, arena: Arena) -> None:
        """Give an arena back."""
        if len(self._free) < MOST_ARENAS:
            self._free.append(arena)

    def release(self) -> None:
        """Free the arenas that no call uses at the moment."""
        self._free.clear()


def recorded(sizes: list[Size], bound: Bound, *values: Any) -> Any:
    """What a kernel gives in fresh memory; the sizes of its results go to the list."""
    sizes.extend((tuple(size), *rest) for size, *rest in bound.shape(*values))
    return bound(*values)
