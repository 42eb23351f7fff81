"""What the two continual attention layers share: the state of a stream, its steps, its calls."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import nn

from bincompile.errors import InputError, InputTypeError
from bincompile.nn import arguments, flops, ring, score_bias
from bincompile.nn.calling import mode_of, read_mode
from bincompile.nn.ring import StreamState, Token
from bincompile.nn.sequence_attention import SequenceAttention


class ContinualAttention(SequenceAttention, abc.ABC):
    """Multi-head attention over a sequence, or over a sliding window, one token at a time.

    The memory of the stream is in buffers that no state dict holds (see `get_state`). The layers
    built on it say which queries of the window are answered.
    """

    def __init__(self, *, partial_window: bool, **options: Any) -> None:
        arguments.flag(type(self).__name__, "partial_window", partial_window)
        super().__init__(**options)
        self.partial_window = partial_window
        self._call_mode = "forward"
        for field in StreamState._fields:
            self.register_buffer(_buffer(field), None, persistent=False)

    @abc.abstractmethod
    def _query_slots(self) -> int:
        """How many queries a stream remembers."""

    @abc.abstractmethod
    def _work(self, step: bool) -> tuple[int, int, int]:
        """Queries projected, keys projected and queries answered by a step, or by forward."""

    @abc.abstractmethod
    def _window_rows(self) -> slice:
        """Which queries of the window a step answers."""

    @abc.abstractmethod
    def _answers(self, clock: torch.Tensor) -> torch.Tensor:
        """(N, rows) bool: which rows of the window have an answer after `clock` tokens."""

    @abc.abstractmethod
    def _mix(self, state: StreamState, bias: torch.Tensor | None,
             sinks: tuple[torch.Tensor, torch.Tensor] | None,
             before: torch.Tensor | None) -> torch.Tensor:
        """(N, H, rows, D): the values mixed for each answered row, in window order.

        `before` is the clock before a step that wrote the rings in place, without a mask on pairs;
        else None.
        """

    @abc.abstractmethod
    def _lay_out_step(self, y: torch.Tensor) -> torch.Tensor:
        """(N, rows, E) as a step gives it."""

    @abc.abstractmethod
    def _lay_out_steps(self, steps: list[torch.Tensor]) -> torch.Tensor:
        """The results of several steps as one tensor."""

    @property
    def receptive_field(self) -> int:
        """The number of tokens that a step's output depends on: sequence_len."""
        return self.sequence_len

    @property
    def call_mode(self) -> str:
        """What calling the layer runs; set it to a name of `CALL_MODES` or its number."""
        return self._call_mode

    @call_mode.setter
    def call_mode(self, mode: str | int) -> None:
        """Set what calling the layer runs."""
        self._call_mode = read_mode(mode)

    def flops(self, include_muls: bool = True, include_adds: bool = False,
              include_exps: bool = False) -> int:
        """Operations for each sample of what `call_mode` runs: a window, or one step of it.

        A retroactive step is counted as if the window were attended anew, which bounds it.
        """
        step = mode_of(self._call_mode) != "forward"
        counts = flops.count(self, *self._work(step), self.sequence_len)
        return sum(n for n, wanted in zip(counts, (include_muls, include_adds, include_exps),
                                          strict=True) if wanted)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run what `call_mode` says, with the layer's hooks."""
        mode = mode_of(self._call_mode)
        if mode == "forward":
            return super().__call__(*args, **kwargs)
        # nn.Module runs the hooks around `self.forward`: give it this layer with another forward
        view: Any = object.__new__(_with_forward(type(self), mode))
        object.__setattr__(view, "__dict__", self.__dict__)
        return view(*args, **kwargs)

    def step(self, state: StreamState, query: torch.Tensor, key: torch.Tensor | None = None,
             value: torch.Tensor | None = None, *, attn_mask: torch.Tensor | None = None,
             key_padding_mask: torch.Tensor | None = None) -> tuple[torch.Tensor, StreamState]:
        """One token as a function of the state: nothing is written, so it can be exported.

        Args:
            state: from `initial_state` or the step before.
            query: (N, embed_dim); key, value, attn_mask and key_padding_mask as in `forward_step`.

        Returns:
            What `forward_step` gives, with NaN where a row has no answer yet, and the next state.

        Raises:
            InputError: a wrong shape, of an input or of the state.
            InputTypeError: a wrong dtype.

        Example:
            >>> from bincompile.nn import SingleOutputMultiheadAttention
            >>> layer = SingleOutputMultiheadAttention(8, 2, sequence_len=2).eval()
            >>> state = layer.initial_state(3)
            >>> for _ in range(2):
            ...     y, state = layer.step(state, torch.ones(3, 8))
            >>> y.shape, state.clock.tolist()
            (torch.Size([3, 8]), [2, 2, 2])
        """
        token, bias = self._read_step(query, key, value, attn_mask, key_padding_mask)
        state = self._check_state(state)
        ring.check_token(state, token)
        state = ring.push(state, token, in_place=False)
        return self._answer(state, bias, self._answers(state.clock)), state

    def forward_step(self, query: torch.Tensor, key: torch.Tensor | None = None,
                     value: torch.Tensor | None = None, update_state: bool = True, *,
                     attn_mask: torch.Tensor | None = None,
                     key_padding_mask: torch.Tensor | None = None) -> torch.Tensor | None:
        """Take one token of each stream, and attend within the last sequence_len tokens.

        Args:
            query: (N, embed_dim), whatever the layout of sequences.
            key: (N, kdim); defaults to query.
            value: (N, vdim); defaults to query.
            update_state: False computes the same output and leaves the stream as it was.
            attn_mask: as `forward` on the window takes it, its last dimension the sequence_len
                places of the window from oldest to newest.
            key_padding_mask: (N,), bool (True: this token is ignored as a key, for as long as it
                is in the window) or float (added to its scores).

        Returns:
            The output, or None until a stream of the batch has an answer. Streams that were
            cleared alone hold NaN until they have one again.

        Raises:
            InputError: a wrong shape, or another batch size than the stream's.
            InputTypeError: a wrong dtype.

        In training mode gradients flow through the whole window: the state keeps the graph, until
        `layer.set_state(layer.get_state())` cuts it. In eval mode they flow through this token
        only. With no gradient recorded a step writes O(N E) numbers, and copies no window.
        """
        token, bias = self._read_step(query, key, value, attn_mask, key_padding_mask)
        before = self._state_for(token)
        y, state = self._advance(before, token, bias, update_state and ring.writable(before, token))
        if update_state:
            self._keep(state)
        return y

    def forward_steps(self, query: torch.Tensor, key: torch.Tensor | None = None,
                      value: torch.Tensor | None = None, update_state: bool = True, *,
                      attn_mask: torch.Tensor | None = None,
                      key_padding_mask: torch.Tensor | None = None) -> torch.Tensor | None:
        """Take several tokens of each stream: the same as one `forward_step` after another.

        Args:
            query: (N, T, embed_dim), in the layout of the layer.
            key: (N, T, kdim) in the same layout; defaults to query.
            value: (N, T, vdim) in the same layout; defaults to query.
            update_state: False leaves the stream as it was.
            attn_mask: as in `forward_step`; it serves every step.
            key_padding_mask: (N, T).

        Returns:
            The outputs of those steps that gave one, stacked along time; None if no step did.

        Raises:
            InputError: a wrong shape, or another batch size than the stream's.
            InputTypeError: a wrong dtype. The stream is then as it was before the call.
        """
        key, value = query if key is None else key, query if value is None else value
        sequences = self._read_sequences(query, key, value)
        batch, steps = sequences[0].shape[:2]
        if sequences[1].shape[1] != steps:
            raise InputError(f"{steps} queries and {sequences[1].shape[1]} keys in forward_steps",
                             "one key and one value with each query", "the query or the key")
        if key_padding_mask is not None:
            key_padding_mask = score_bias.of_keys(key_padding_mask, (batch, steps),
                                                  sequences[0].dtype)
        outputs: list[torch.Tensor] = []
        state = None
        for t in range(steps):
            q, k, v = (x[:, t] for x in sequences)
            if sequences[0] is sequences[2]:
                k = v = q  # one projection instead of three
            token, bias = self._read_step(q, k, v, attn_mask, None if key_padding_mask is None
                                          else key_padding_mask[:, t])
            if state is None:
                state = self._state_for(token)
                state = ring.copy(state) if ring.writable(state, token) else state
            y, state = self._advance(state, token, bias, ring.writable(state, token))
            if y is not None:
                outputs.append(y)
        if update_state and state is not None:
            self._keep(state)
        return self._lay_out_steps(outputs) if outputs else None

    def warm_up(self, step_shape: Sequence[int]) -> None:
        """Fill the window with zero tokens, so that the next step gives an output.

        Until sequence_len tokens more have passed, outputs attend to these zeros too.

        Args:
            step_shape: (N, embed_dim), the shape of a step's query.

        Raises:
            InputError: a wrong shape.
        """
        if len(step_shape) != 2 or step_shape[1] != self.embed_dim:
            raise InputError(f"step_shape {tuple(step_shape)}", f"(N, {self.embed_dim})",
                             "the step_shape")
        like = self.out_proj.weight
        query, key, value = (like.new_zeros(step_shape[0], n)
                             for n in (self.embed_dim, self.kdim, self.vdim))
        for _ in range(self.sequence_len - 1):
            self.forward_step(query, key, value)

    def initial_state(self, batch_size: int) -> StreamState:
        """The state before the first token of `batch_size` streams, for `step`."""
        arguments.size(type(self).__name__, "batch_size", batch_size)
        return self._empty(batch_size, self.out_proj.weight.detach())

    def get_state(self) -> StreamState | None:
        """A copy of the stream's memory, cut from autograd; None before the first token."""
        state = self._state
        return None if state is None else ring.copy(state)

    def set_state(self, state: StreamState | None) -> None:
        """Go on from a state that `get_state` or `step` gave, here or on another layer.

        Args:
            state: copied; None is a stream that has not begun.

        Raises:
            InputError: a tensor of another shape than this layer's sizes ask for.
            InputTypeError: not a state, or a wrong dtype.
        """
        self._keep(None if state is None else ring.copy(self._check_state(state)))

    def clean_state(self, rows: Sequence[int] | torch.Tensor | None = None) -> None:
        """Forget the stream; with `rows`, only these samples of the batch.

        Args:
            rows: indices into the batch, or an (N,) bool tensor.

        Raises:
            InputError: an index outside of the batch, or rows of a stream that has not begun.
        """
        state = self._state
        if rows is None:
            return self._keep(None)
        if state is None:
            raise InputError("clean_state(rows) before the first token", "rows of a running stream",
                             "the rows argument")
        self._keep(ring.reset(state, ring.chosen(state, rows)))

    @classmethod
    def build_from(cls, module: nn.MultiheadAttention, sequence_len: int,
                   **options: Any) -> Self:
        """A continual layer with a copy of the parameters and the mode of a plain one.

        Args:
            module: copied, not changed.
            sequence_len: tokens in the window.
            options: of this class; batch_first and dropout are the module's unless given.

        Raises:
            ConfigError: an option of the wrong kind.
            InputTypeError: a module that is not an `nn.MultiheadAttention`.

        Example:
            >>> import bincompile as bc
            >>> plain = nn.MultiheadAttention(16, 4, batch_first=True)
            >>> bc.nn.SingleOutputMultiheadAttention.build_from(plain, 8).receptive_field
            8
        """
        if not isinstance(module, nn.MultiheadAttention):
            raise InputTypeError(f"build_from of {type(module).__name__}",
                                 "an nn.MultiheadAttention", "the module")
        given = {"dropout": module.dropout, "batch_first": module.batch_first, **options}
        layer = cls(embed_dim=module.embed_dim, num_heads=module.num_heads,
                    bias=module.in_proj_bias is not None, add_bias_kv=module.bias_k is not None,
                    add_zero_attn=module.add_zero_attn, kdim=module.kdim, vdim=module.vdim,
                    device=module.out_proj.weight.device, dtype=module.out_proj.weight.dtype,
                    sequence_len=sequence_len, **given)
        layer.load_state_dict(module.state_dict())
        return layer.train(module.training)

    @property
    def _state(self) -> StreamState | None:
        return None if self.ring_clock is None else StreamState(
            *(getattr(self, _buffer(field)) for field in StreamState._fields))

    def _keep(self, state: StreamState | None) -> None:
        for i, field in enumerate(StreamState._fields):
            x = None if state is None else state[i]
            if x is not None and x.requires_grad and not self.training:
                x = x.detach()
            if x is not getattr(self, _buffer(field)):
                setattr(self, _buffer(field), x)

    def _empty(self, batch: int, like: torch.Tensor) -> StreamState:
        return ring.empty(batch, self.num_heads, self._query_slots(), self.sequence_len,
                          self.head_dim, like)

    def _state_for(self, token: Token) -> StreamState:
        state = self._state
        if state is None:
            return self._empty(token.key.shape[0], token.key.detach())
        ring.check_token(state, token)
        return state

    def _check_state(self, state: object) -> StreamState:
        return ring.check(type(self).__name__, state, self.num_heads, self._query_slots(),
                          self.sequence_len, self.head_dim)

    def _read_step(self, query: torch.Tensor, key: torch.Tensor | None,
                   value: torch.Tensor | None, attn_mask: torch.Tensor | None,
                   key_padding_mask: torch.Tensor | None) -> tuple[Token, torch.Tensor | None]:
        """The projected token, and attn_mask (N or 1, H or 1, rows or 1, S) as what is added."""
        key, value = query if key is None else key, query if value is None else value
        for name, x, features in (("query", query, self.embed_dim), ("key", key, self.kdim),
                                  ("value", value, self.vdim)):
            self._check_tensor(name, x, 2)
            if x.shape[1] != features or x.shape[0] != query.shape[0]:
                raise InputError(f"{name} of shape {tuple(x.shape)} in a step",
                                 f"(N, {features}), with the N of the query", f"the {name}")
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim))
                   for x in self._project(query, key, value))
        batch, dtype = query.shape[0], q.dtype
        padding = None if key_padding_mask is None else score_bias.of_keys(
            key_padding_mask, (batch,), dtype)
        if attn_mask is None:
            return Token(q, k, v, padding), None
        bias = score_bias.of_queries(attn_mask, batch, self.num_heads, self.sequence_len,
                                     self.sequence_len, dtype)
        one = bias.shape[2] == 1
        return Token(q, k, v, padding), bias if one else bias[:, :, self._window_rows()]

    def _advance(self, state: StreamState, token: Token, bias: torch.Tensor | None,
                 in_place: bool) -> tuple[torch.Tensor | None, StreamState]:
        before = state.clock if in_place and bias is None else None
        state = ring.push(state, token, in_place)
        answers = self._answers(state.clock)
        if not answers.any():
            return None, state
        return self._answer(state, bias, None if answers.all() else answers, before), state

    def _answer(self, state: StreamState, bias: torch.Tensor | None,
                answers: torch.Tensor | None, before: torch.Tensor | None = None) -> torch.Tensor:
        """The output of a step; where `answers` is given, NaN where it is not set."""
        parts = [None if state.padding is None else state.padding[:, None, None]]
        if bias is not None or self.partial_window:
            place = ring.positions(state.clock, self.sequence_len)
            if bias is not None:
                bias = ring.to_slots(bias, place, 3)
                parts.append(bias if bias.shape[2] == 1 else ring.to_slots(bias, place, 2))
            if self.partial_window:
                unseen = place < self.sequence_len - state.clock[:, None]
                parts.append(score_bias.additive("unseen", unseen, state.key.dtype)[:, None, None])
        y = self._merge(self._mix(state, score_bias.add(*parts), self._sinks(), before))
        return self._lay_out_step(y if answers is None else torch.where(
            answers[..., None], y, math.nan))


@functools.cache
def _with_forward(layer: type[ContinualAttention], mode: str) -> type[ContinualAttention]:
    return type(layer.__name__, (layer,), {"forward": getattr(layer, mode),
                                           "__call__": nn.Module.__call__})


def _buffer(field: str) -> str:
    """The name of the buffer that holds a field of the state."""
    return f"ring_{field}"
