"""A bound kernel that writes into tensors it is given, so that memory can be planned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bincompile.runtime.fresh import fresh

# Sizes and dtype of one result and, where its memory is in another order of axes, its strides.
Size = (tuple[tuple[int, ...], torch.dtype]
        | tuple[tuple[int, ...], torch.dtype, tuple[int, ...]])


class Bound:
    """A kernel bound to a call, with its results apart from the memory that they are in.

    It can be called like a plain function of the run-time values; it makes fresh results then.

    Args:
        shape: of the run-time values, the size and dtype of each result. It reads the values'
            sizes and dtypes, never what they hold.
        into: writes the results: called with the run-time values, then one tensor for each
            result, of those sizes and strides (contiguous where none are given). It has to write
            all of each and to keep none of them; the tensors never overlap the values.
        several: whether the operator returns a tuple or a list, not a single tensor.

    Example:
        >>> def shape(x):
        ...     return ((tuple(x.shape), x.dtype),)
        >>> double = Bound(shape, lambda x, out: torch.mul(x, 2, out=out))
        >>> double(torch.tensor([1.0, 2.0]))
        tensor([2., 4.])
    """

    __slots__ = ("into", "several", "shape")

    def __init__(self, shape: Callable[..., tuple[Size, ...]], into: Callable[..., Any], *,
                 several: bool = False) -> None:
        self.shape, self.into, self.several = shape, into, several

    def __call__(self, *values: Any) -> Any:
        results = self.fresh(*values)
        self.into(*values, *results)
        return results if self.several else results[0]

    def fresh(self, *values: Any) -> tuple[torch.Tensor, ...]:
        """Tensors that `into` may write the results of these values to."""
        return tuple(fresh(*size) for size in self.shape(*values))
