"""Floating-point operations of linears, convolutions and attention: two for each product.

What is done to single values (norms, activations, softmax) is not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bincompile.ops import attention as attention  # registers the operators that are counted
from bincompile.ops import stream_attention as stream_attention
from bincompile.steps import StepProgram


def of_call(call: Callable[[], Any]) -> int:
    """The operations of what this runs.

    Example:
        >>> of_call(lambda: torch.nn.Linear(8, 4)(torch.zeros(3, 8)))
        192
    """
    ops = torch.ops.bincompile
    own = {ops.attention: _attention, ops.stream_attention: _stream_attention}
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator that is not counted
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), \
                FlopCounterMode(display=False, custom_mapping=own) as counter:
            call()
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    return counter.get_total_flops()


def of_step(steps: StepProgram | None, clock: int = 0) -> int:
    """The operations of one step of one row; rings count as if they were full."""
    assert steps is not None, "compiled without continual="
    graph = steps.program.at("steps").graph_module
    tokens = [_token(known.token, known.time_axis, known.batched, known.dtype)
              for known in steps.inputs]
    flat = [*tokens, torch.zeros(1, dtype=torch.int64), torch.tensor([clock]), *steps.empty(1)]
    return of_call(lambda: graph(*flat))


def _token(shape: tuple[int, ...], axis: int, batched: bool, dtype: torch.dtype) -> torch.Tensor:
    sizes = [*([1] if batched else []), *shape]
    sizes.insert(axis, 1)
    return torch.zeros(sizes, dtype=dtype)


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """(..., M, D), (..., N, D) and (..., N, E)."""
    return 2 * torch.Size(query[:-1]).numel() * key[-2] * (query[-1] + value[-1])


def _stream_attention(query: Any, key: Any, value: Any, keys: Any, values: Any, rows: Any,
                      clock: Any, scale: float, window: int | None = None, *_: Any,
                      **__: Any) -> int:
    """(M, H, D), (M, G, D) and (M, G, E) over the window, or all slots of the ring."""
    seen = values[2] if window is None else window
    return 2 * query[0] * query[1] * seen * (query[2] + value[2])
