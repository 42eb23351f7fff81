"""Multi-head attention over whole sequences, in the four layouts of continual-inference."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from bincompile.errors import ConfigError, InputError, InputTypeError
from bincompile.nn import arguments, score_bias


class Layout(NamedTuple):
    """How sequences are laid out, and how to permute them to (N, T, features) and back."""

    axes: str
    inward: tuple[int, int, int]
    outward: tuple[int, int, int]
    time: int


_LAYOUTS = {  # by (batch_first, embed_dim_second)
    (True, False): Layout("(N, T, E)", (0, 1, 2), (0, 1, 2), 1),
    (True, True): Layout("(N, E, T)", (0, 2, 1), (0, 2, 1), 2),
    (False, False): Layout("(T, N, E)", (1, 0, 2), (1, 0, 2), 0),
    (False, True): Layout("(T, E, N)", (2, 0, 1), (1, 2, 0), 0),
}
_FLAGS = ("bias", "add_bias_kv", "add_zero_attn", "batch_first", "forward_returns_attn_mask",
          "embed_dim_second")


class SequenceAttention(nn.MultiheadAttention):
    """The forward of the continual layers; parameters and state dict of `nn.MultiheadAttention`."""

    def __init__(self, sequence_len: int | None, *, forward_returns_attn_mask: bool,
                 embed_dim_second: bool, **options: Any) -> None:
        name = type(self).__name__
        options["dtype"] = arguments.float_dtype(name, options["dtype"])
        flags = {**options, "forward_returns_attn_mask": forward_returns_attn_mask,
                 "embed_dim_second": embed_dim_second}
        for flag in _FLAGS:
            arguments.flag(name, flag, flags[flag])
        for size in ("embed_dim", "num_heads", "kdim", "vdim"):
            if options[size] is not None or size in ("embed_dim", "num_heads"):
                arguments.size(name, size, options[size])
        if options["embed_dim"] % options["num_heads"]:
            raise ConfigError(f"{name}(embed_dim={options['embed_dim']}, "
                              f"num_heads={options['num_heads']})",
                              "an embed_dim that is a multiple of num_heads",
                              "the embed_dim or the num_heads argument")
        arguments.probability(name, "dropout", options["dropout"])
        sequence_len = arguments.size(name, "sequence_len", sequence_len)
        super().__init__(**options)
        self.sequence_len = sequence_len
        self.forward_returns_attn_mask = forward_returns_attn_mask
        self.embed_dim_second = embed_dim_second

    def _rows(self, length: int) -> slice:
        """Which queries of a sequence are answered: all, unless a layer says otherwise."""
        return slice(None)

    @property
    def _layout(self) -> Layout:
        return _LAYOUTS[self.batch_first, self.embed_dim_second]

    @property
    def _drop(self) -> float:
        return self.dropout if self.training else 0.0

    def forward(self, query: torch.Tensor, key: torch.Tensor | None = None,
                value: torch.Tensor | None = None, key_padding_mask: torch.Tensor | None = None,
                need_weights: bool = True, attn_mask: torch.Tensor | None = None,
                average_attn_weights: bool = True, is_causal: bool = False) -> Any:
        """Attention over whole sequences, as `nn.MultiheadAttention` computes it.

        Args:
            query: (N, L, embed_dim), in the layout that `batch_first` and `embed_dim_second` say.
            key: (N, S, kdim) in the same layout; defaults to query.
            value: (N, S, vdim) in the same layout; defaults to query.
            key_padding_mask: (N, S), bool (True: ignore this key) or float (added to the scores).
            need_weights: return the attention weights as well.
            attn_mask: (L, S) or (N * num_heads, L, S), bool (True: ignore) or float (added). L may
                be 1 for all queries.
            average_attn_weights: weights as a mean over the heads.
            is_causal: query i sees keys 0 to i only, beside what the masks say.

        Returns:
            The output in the layout of the query, and the weights (N, L, keys) or, not averaged,
            (N, num_heads, L, keys), or None without need_weights; only the output if the layer has
            forward_returns_attn_mask=False. `keys` counts bias_kv and zero_attn too. The output of
            a query that sees no key is out_proj's bias, and its weights are 0.

        Raises:
            InputError: a wrong shape.
            InputTypeError: a wrong dtype.
        """
        key, value = query if key is None else key, query if value is None else value
        sequences = self._read_sequences(query, key, value)
        batch, length = sequences[0].shape[:2]
        keys = sequences[1].shape[1]
        rows = self._rows(length)
        mask = None if attn_mask is None else score_bias.of_queries(
            attn_mask, batch, self.num_heads, length, keys, sequences[0].dtype)
        past = score_bias.of_past(length, keys, sequences[0])[None, None] if is_causal else None
        bias = score_bias.add(
            *(m if m is None or m.shape[2] == 1 else m[:, :, rows] for m in (mask, past)),
            None if key_padding_mask is None else score_bias.of_keys(
                key_padding_mask, (batch, keys), sequences[0].dtype)[:, None, None])
        if rows != slice(None):
            sequences = (sequences[0][:, rows], *sequences[1:])
        mixed, weights = self._attend_sequences(
            sequences, bias, need_weights and self.forward_returns_attn_mask)
        output = self._merge(mixed).permute(self._layout.outward)
        if not self.forward_returns_attn_mask:
            return output
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        return output, weights

    def _attend_sequences(self, sequences: tuple[torch.Tensor, ...], bias: torch.Tensor | None,
                          need_weights: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = (self._split(x) for x in self._project(*sequences))
        sinks = self._sinks()
        if sinks is not None:
            key, value = (torch.cat([x, s.expand(x.shape[0], -1, -1, -1)], 2)
                          for x, s in zip((key, value), sinks, strict=True))
            bias = bias if bias is None else F.pad(bias, (0, sinks[0].shape[2]))
        if need_weights:
            return score_bias.attend(query, key, value, bias, self._drop)
        return score_bias.attend_fused(query, key, value, bias, self._drop), None

    def _read_sequences(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The three as (N, T, features), checked; one tensor where they are one."""
        layout = self._layout
        for name, x, features in (("query", query, self.embed_dim), ("key", key, self.kdim),
                                  ("value", value, self.vdim)):
            self._check_tensor(name, x, 3)
            if x.permute(layout.inward).shape[2] != features:
                raise InputError(f"{name} of shape {tuple(x.shape)}",
                                 f"{layout.axes} with E = {features}", f"the {name}")
        inward = query.permute(layout.inward)
        if key is query and value is query:
            return inward, inward, inward
        wide = inward, key.permute(layout.inward), value.permute(layout.inward)
        if not wide[0].shape[0] == wide[1].shape[0] == wide[2].shape[0] or (
                wide[1].shape[1] != wide[2].shape[1]):
            raise InputError(f"query {tuple(query.shape)}, key {tuple(key.shape)} and value "
                             f"{tuple(value.shape)}", f"{layout.axes} with one N, and as many "
                             "values as keys", "the key or the value")
        return wide

    def _check_tensor(self, name: str, x: object, rank: int) -> None:
        weight = self.out_proj.weight
        if not isinstance(x, torch.Tensor) or not x.dtype.is_floating_point or (
                x.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type)):
            found = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise InputTypeError(f"{name} of {found}",
                                 f"a tensor of {weight.dtype}, as the parameters",
                                 f"the {name}, or the layer's dtype")
        if x.ndim != rank:
            shape = self._layout.axes if rank == 3 else "(N, E)"
            raise InputError(f"{name} of shape {tuple(x.shape)}", shape, f"the {name}")

    def _project(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                 ) -> tuple[torch.Tensor, ...]:
        """(..., features) each to (..., embed_dim)."""
        if query is key and query is value and self.in_proj_weight is not None:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        weights = ((self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
                   if self.in_proj_weight is None else self.in_proj_weight.chunk(3))
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(map(F.linear, (query, key, value), weights, biases))

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        """(N, L, embed_dim) to (N, H, L, D)."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _merge(self, mixed: torch.Tensor) -> torch.Tensor:
        """(N, H, L, D) to the output (N, L, embed_dim)."""
        return F.linear(mixed.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)

    def _sinks(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The keys and values (1, H, X, D) of add_bias_kv and add_zero_attn, if any."""
        shape = (1, 1, self.embed_dim)
        pairs = []
        if self.bias_k is not None and self.bias_v is not None:
            pairs.append((self.bias_k.reshape(shape), self.bias_v.reshape(shape)))
        if self.add_zero_attn:
            pairs.append((self.out_proj.weight.new_zeros(shape),) * 2)
        if not pairs:
            return None
        key, value = (self._split(torch.cat(side, 1)) for side in zip(*pairs, strict=True))
        return key, value
