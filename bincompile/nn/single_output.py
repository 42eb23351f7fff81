"""Continual attention that answers one query of the window."""

from __future__ import annotations

import torch

from bincompile.errors import ConfigError, InputError
from bincompile.nn import arguments, score_bias
from bincompile.nn.continual_attention import ContinualAttention
from bincompile.nn.ring import StreamState


class SingleOutputMultiheadAttention(ContinualAttention):
    """Multi-head attention that computes the output of one query of a sliding window.

    `forward` takes whole sequences as `nn.MultiheadAttention` does. `forward_step` takes one token
    of each stream and gives what `forward` gives on the last sequence_len tokens: keys and values
    are projected once, kept in rings, and attended with a safe softmax, so nothing is subtracted
    and no error adds up. Each stream of the batch has its own clock (see `clean_state`).

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
        query_index: place in the window of the query that is answered, -sequence_len up to
            sequence_len - 1; -1 is the newest.
        forward_returns_attn_mask: forward returns (output, weights), else the output alone.
        embed_dim_second: sequences are (N, E, T), or (T, E, N) without batch_first.
        single_output_forward: forward answers the query at query_index only, else all.
        partial_window: a step answers as soon as its query is there, from the tokens seen so far,
            and not only once sequence_len tokens were seen.

    Raises:
        ConfigError (a ValueError): an argument of the wrong kind, embed_dim % num_heads != 0, no
            sequence_len, or a query_index outside of the window.

    Source: Continual Transformers (arXiv:2201.06268); signature of continual-inference. No
    argument is ignored in a step.

    Example:
        >>> layer = SingleOutputMultiheadAttention(
        ...     embed_dim=16, num_heads=4, sequence_len=6, embed_dim_second=True).eval()
        >>> x = torch.rand(2, 16, 6)
        >>> output, weights = layer(x)
        >>> layer.forward_steps(x[:, :, :-1]) is None  # the window is not full yet
        True
        >>> last = layer.forward_step(x[:, :, -1])
        >>> torch.allclose(output[:, :, -1], last, atol=1e-6)
        True
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = True,
                 add_bias_kv: bool = False, add_zero_attn: bool = False, kdim: int | None = None,
                 vdim: int | None = None, batch_first: bool = True,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None,
                 sequence_len: int | None = None, query_index: int = -1,
                 forward_returns_attn_mask: bool = True, embed_dim_second: bool = False,
                 single_output_forward: bool = True, *, partial_window: bool = False) -> None:
        super().__init__(
            embed_dim=embed_dim, num_heads=num_heads, dropout=dropout, bias=bias,
            add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn, kdim=kdim, vdim=vdim,
            batch_first=batch_first, device=device, dtype=dtype, sequence_len=sequence_len,
            forward_returns_attn_mask=forward_returns_attn_mask,
            embed_dim_second=embed_dim_second, partial_window=partial_window)
        slots = self.sequence_len
        if (isinstance(query_index, bool) or not isinstance(query_index, int)
                or not -slots <= query_index < slots):
            raise ConfigError(f"{type(self).__name__}(query_index={query_index!r}, "
                              f"sequence_len={slots})", f"an int from {-slots} to {slots - 1}",
                              "the query_index argument")
        self.query_index = query_index
        self.single_output_forward = arguments.flag(
            type(self).__name__, "single_output_forward", single_output_forward)

    @property
    def delay(self) -> int:
        """Steps from a token to the step that answers its query; 0 for query_index -1."""
        return self.sequence_len - 1 - self.query_index % self.sequence_len

    def _query_slots(self) -> int:
        return self.delay + 1

    def _rows(self, length: int) -> slice:
        return self._one(length) if self.single_output_forward else slice(None)

    def _work(self, step: bool) -> tuple[int, int, int]:
        answered = 1 if step or self.single_output_forward else self.sequence_len
        return answered, 1 if step else self.sequence_len, answered

    def _window_rows(self) -> slice:
        return self._one(self.sequence_len)

    def _one(self, length: int) -> slice:
        if not -length <= self.query_index < length:
            raise InputError(f"a sequence of {length} queries with query_index="
                             f"{self.query_index}", "a sequence that has this query", "the query")
        index = self.query_index % length
        return slice(index, index + 1)

    def _answers(self, clock: torch.Tensor) -> torch.Tensor:
        before = self.delay if self.partial_window else self.sequence_len - 1
        return (clock > before)[:, None]

    def _mix(self, state: StreamState, bias: torch.Tensor | None,
             sinks: tuple[torch.Tensor, torch.Tensor] | None,
             before: torch.Tensor | None) -> torch.Tensor:
        slot = state.clock % state.query.shape[2]  # the oldest query of the ring
        query = state.query.gather(2, slot[:, None, None, None].expand(
            -1, self.num_heads, 1, self.head_dim))
        return score_bias.attend(query, state.key, state.value, bias, self._drop, sinks)[0]

    def _lay_out_step(self, y: torch.Tensor) -> torch.Tensor:
        return y[:, 0]

    def _lay_out_steps(self, steps: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(steps, 1).permute(self._layout.outward)
