"""What calling a continual layer runs: its forward, its forward_steps or its forward_step."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

from bincompile.errors import ConfigError

CALL_MODES = ("forward", "forward_steps", "forward_step")

_inside: contextvars.ContextVar[str | None] = contextvars.ContextVar("call_mode", default=None)


def read_mode(mode: object) -> str:
    """The name of a call mode, from its name or its number."""
    if isinstance(mode, str) and mode in CALL_MODES:
        return mode
    if isinstance(mode, int) and not isinstance(mode, bool) and 0 <= mode < len(CALL_MODES):
        return CALL_MODES[mode]
    raise ConfigError(f"call_mode={mode!r}",
                      " or ".join(map(repr, CALL_MODES)) + ", or its number 0, 1 or 2",
                      "the call_mode")


def mode_of(own: str) -> str:
    """The mode of the innermost `call_mode` block; outside of one, the layer's own."""
    return _inside.get() or own


@contextlib.contextmanager
def call_mode(mode: str | int) -> Iterator[None]:
    """Within the block, calling any continual layer runs this method of it.

    Blocks nest, and hold for their own thread or task only.

    Args:
        mode: "forward", "forward_steps" or "forward_step", or its number.

    Raises:
        ConfigError: any other mode.

    Source: `call_mode` of continual-inference.

    Example:
        >>> import torch
        >>> from bincompile.nn import SingleOutputMultiheadAttention
        >>> layer = SingleOutputMultiheadAttention(8, 2, sequence_len=1).eval()
        >>> with call_mode("forward_step"):
        ...     layer(torch.ones(3, 8)).shape
        torch.Size([3, 8])
    """
    token = _inside.set(read_mode(mode))
    try:
        yield
    finally:
        _inside.reset(token)
