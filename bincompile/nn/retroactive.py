"""Continual attention that updates the answers of the whole window at each step."""

from __future__ import annotations

import torch

from bincompile.nn import ring, score_bias
from bincompile.nn.continual_attention import ContinualAttention
from bincompile.nn.ring import StreamState
from bincompile.nn.two_stacks import TwoStacks


class RetroactiveMultiheadAttention(ContinualAttention):
    """Multi-head attention over a sliding window, every output of which each step updates.

    `forward` takes whole sequences as `nn.MultiheadAttention` does. `forward_step` takes one token
    of each stream and gives what `forward` gives on the last sequence_len tokens, all their
    outputs: queries, keys and values are projected once and kept in rings. Nothing is ever
    subtracted, so no error adds up and no score overflows. Each stream of the batch has its own
    clock (see `clean_state`).

    A window of S >= 256 tokens is also kept as sums, in S^1.5 E numbers a stream, which a token
    extends in S^1.5 E instead of S^2 E operations (the output projection, S E^2, comes on top);
    once in S steps they are begun anew, in S^2 E. This holds where all streams of the batch have
    one clock, no gradient is recorded, no attn_mask is given, and S has a divisor near its root;
    else the window is attended anew from the rings.

    Args:
        embed_dim: features of queries and of the output.
        num_heads: a divisor of embed_dim.
        dropout: probability of dropping an attention weight, in training only.
        bias: give the projections a bias.
        add_bias_kv: a learned key and value that every query sees too.
        add_zero_attn: a key and value of zeros that every query sees too.
        kdim: features of keys; embed_dim by default.
        vdim: features of values; embed_dim by default.
        batch_first: sequences are (N, T, E), else (T, N, E).
        device: where the parameters are made.
        dtype: float dtype of the parameters.
        sequence_len: tokens in the window.
        forward_returns_attn_mask: forward returns (output, weights), else the output alone.
        embed_dim_second: sequences are (N, E, T), or (T, E, N) without batch_first.
        partial_window: a step answers from the first token on: the places of the window that are
            not filled yet hold NaN.

    Raises:
        ConfigError (a ValueError): an argument of the wrong kind, embed_dim % num_heads != 0, or
            no sequence_len.

    Source: Continual Transformers (arXiv:2201.06268); signature of continual-inference. Unlike
    there, a step subtracts nothing and exponentiates no score before its maximum is taken off:
    the sums are a queue of two stacks, merged as in arXiv:1805.02867.

    Example:
        >>> layer = RetroactiveMultiheadAttention(
        ...     embed_dim=16, num_heads=4, sequence_len=6, batch_first=True).eval()
        >>> x = torch.rand(2, 6, 16)
        >>> output, weights = layer(x)
        >>> layer.forward_steps(x[:, :-1]) is None  # the window is not full yet
        True
        >>> torch.allclose(output, layer.forward_step(x[:, -1]), atol=1e-6)
        True
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = True,
                 add_bias_kv: bool = False, add_zero_attn: bool = False, kdim: int | None = None,
                 vdim: int | None = None, batch_first: bool = False,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None,
                 sequence_len: int | None = None, forward_returns_attn_mask: bool = True,
                 embed_dim_second: bool = False, *, partial_window: bool = False) -> None:
        super().__init__(
            embed_dim=embed_dim, num_heads=num_heads, dropout=dropout, bias=bias,
            add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn, kdim=kdim, vdim=vdim,
            batch_first=batch_first, device=device, dtype=dtype, sequence_len=sequence_len,
            forward_returns_attn_mask=forward_returns_attn_mask,
            embed_dim_second=embed_dim_second, partial_window=partial_window)
        self._stacks = TwoStacks()

    @property
    def delay(self) -> int:
        """Steps from a token to the last that answers its query: sequence_len - 1."""
        return self.sequence_len - 1

    def _keep(self, state: StreamState | None) -> None:
        if state is None:
            self._stacks = TwoStacks()  # a stream that has ended leaves no sums behind
        super()._keep(state)

    def _query_slots(self) -> int:
        return self.sequence_len

    def _work(self, step: bool) -> tuple[int, int, int]:
        new = 1 if step else self.sequence_len
        return new, new, self.sequence_len

    def _window_rows(self) -> slice:
        return slice(None)

    def _answers(self, clock: torch.Tensor) -> torch.Tensor:
        slots = self.sequence_len
        if not self.partial_window:
            return (clock >= slots)[:, None].expand(-1, slots)
        return torch.arange(slots, device=clock.device) >= slots - clock[:, None]

    def _mix(self, state: StreamState, bias: torch.Tensor | None,
             sinks: tuple[torch.Tensor, torch.Tensor] | None,
             before: torch.Tensor | None) -> torch.Tensor:
        if before is not None and not self._drop and self._stacks.fits(before, state):
            mixed = self._stacks.answer(before, state, bias, sinks)
        else:
            mixed, _ = score_bias.attend(state.query, state.key, state.value, bias, self._drop,
                                         sinks)
        order = ring.window_order(state.clock, self.sequence_len)
        return mixed.gather(2, order[:, None, :, None].expand(mixed.shape))

    def _lay_out_step(self, y: torch.Tensor) -> torch.Tensor:
        return y.permute(self._layout.outward)

    def _lay_out_steps(self, steps: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(steps, self._layout.time)
