"""Multi-head attention with the interface of torchscale and Zeta."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import fx, nn

from bincompile.errors import ConfigError, InputError, InputTypeError
from bincompile.nn import arguments, masked_scores
from bincompile.nn.growing import joined
from bincompile.nn.multiway import MultiwayNetwork, ways
from bincompile.nn.xpos import XPOS

_OPTIONS: Mapping[str, Any] = {"multiway": False, "layernorm_eps": 1e-5, "xpos_rel_pos": False,
                               "xpos_scale_base": 512}
_STATE = ("prev_key", "prev_value")


class MultiheadAttention(nn.Module):
    """Multi-head attention, batch first, with decoding from a state.

    Args:
        args: options for the whole model: an object with attributes, or a mapping, that holds any
            of multiway, layernorm_eps, xpos_rel_pos and xpos_scale_base; others in it belong to
            other layers. None or `...`: all at their defaults. A keyword below goes first.
        embed_dim: features of queries, keys, values and results.
        num_heads: a divisor of embed_dim.
        dropout: probability of dropping an attention weight, in training only.
        self_attention: queries, keys and values are one sequence.
        encoder_decoder_attention: keys and values are those of an encoder; a state holds them
            from its first call on. At most one of the two; with neither, keys are anyone's.
        subln: a LayerNorm before the last projection; in self-attention only.
        multiway: give every projection a sibling for the tokens behind `split_position`
            (`bincompile.nn.multiway`). Default False.
        layernorm_eps: of that LayerNorm. Default 1e-5.
        xpos_rel_pos: turn queries and keys by their positions; in self-attention only.
            Default False.
        xpos_scale_base: tokens over which its scale acts once. Default 512.
        device: where the parameters are made.
        dtype: float dtype of the parameters.

    Raises:
        ConfigError (a ValueError): an argument of the wrong kind, embed_dim % num_heads != 0, or
            an odd embed_dim / num_heads with xpos.

    Source: the MultiheadAttention of torchscale 0.3 and Zeta, whose state dicts load;
    Foundation Transformers (subln, arXiv:2210.06423); xpos (arXiv:2212.10554).

    Example:
        >>> layer = MultiheadAttention(..., embed_dim=8, num_heads=2, self_attention=True).eval()
        >>> x = torch.randn(3, 5, 8)
        >>> attn, attn_weights = layer(x, x, x, is_causal=True)
        >>> attn.shape, attn_weights.shape
        (torch.Size([3, 5, 8]), torch.Size([2, 3, 5, 5]))
        >>> state = {}  # the same in chunks
        >>> chunks = [layer(c, c, c, state, is_causal=True)[0] for c in x.split(2, 1)]
        >>> torch.allclose(torch.cat(chunks, 1), attn, atol=1e-6)
        True
    """

    def __init__(self, args: Any = None, embed_dim: int | None = None,
                 num_heads: int | None = None, dropout: float = 0.0,
                 self_attention: bool = False, encoder_decoder_attention: bool = False,
                 subln: bool = False, *, multiway: bool | None = None,
                 layernorm_eps: float | None = None, xpos_rel_pos: bool | None = None,
                 xpos_scale_base: float | None = None, device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__()
        name = type(self).__name__
        options = _read_options(name, args, {
            "multiway": multiway, "layernorm_eps": layernorm_eps, "xpos_rel_pos": xpos_rel_pos,
            "xpos_scale_base": xpos_scale_base})
        self.embed_dim = arguments.size(name, "embed_dim", embed_dim)
        self.num_heads = arguments.size(name, "num_heads", num_heads)
        self.self_attention = arguments.flag(name, "self_attention", self_attention)
        self.encoder_decoder_attention = arguments.flag(
            name, "encoder_decoder_attention", encoder_decoder_attention)
        self._check_combination()
        self.head_dim = self.embed_dim // self.num_heads
        self.scaling = self.head_dim**-0.5
        place: dict[str, Any] = {"device": device, "dtype": arguments.float_dtype(name, dtype)}

        def either_way(module: nn.Module) -> nn.Module:
            return MultiwayNetwork(module) if options["multiway"] else module

        def projection() -> nn.Module:
            return either_way(nn.Linear(self.embed_dim, self.embed_dim, **place))

        self.k_proj, self.v_proj = projection(), projection()
        self.q_proj, self.out_proj = projection(), projection()
        self.inner_attn_ln = (
            either_way(nn.LayerNorm(self.embed_dim, options["layernorm_eps"], **place))
            if arguments.flag(name, "subln", subln) and self_attention else None)
        self.dropout_module = nn.Dropout(arguments.probability(name, "dropout", dropout))
        self.xpos = (XPOS(self.head_dim, options["xpos_scale_base"]).to(device)
                     if options["xpos_rel_pos"] and self_attention else None)
        self.reset_parameters()

    def _check_combination(self) -> None:
        name = type(self).__name__
        if self.self_attention and self.encoder_decoder_attention:
            raise ConfigError(f"{name}(self_attention=True, encoder_decoder_attention=True)",
                              "at most one of the two", "one of the two arguments")
        if self.embed_dim % self.num_heads:
            raise ConfigError(f"{name}(embed_dim={self.embed_dim}, num_heads={self.num_heads})",
                              "an embed_dim that is a multiple of num_heads",
                              "the embed_dim or the num_heads argument")

    def reset_parameters(self) -> None:
        """Draw all parameters anew, of both ways if multiway; the constructor has done so.

        Weights are Xavier uniform, with gain 1 / sqrt(2) for query, key and value; the bias of the
        last projection is 0, the others are those of `nn.Linear`.
        """
        inner: list[Any] = [*ways(self.k_proj), *ways(self.v_proj), *ways(self.q_proj)]
        outer: list[Any] = [*ways(self.out_proj)]
        norms: list[Any] = [] if self.inner_attn_ln is None else [*ways(self.inner_attn_ln)]
        for way in inner:
            nn.init.xavier_uniform_(way.weight, gain=1 / math.sqrt(2))
        for way in outer:
            nn.init.xavier_uniform_(way.weight)
            nn.init.zeros_(way.bias)
        for way in inner:
            nn.init.uniform_(way.bias, -self.embed_dim**-0.5, self.embed_dim**-0.5)
        for way in norms:
            way.reset_parameters()

    def forward(self, query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None,
                incremental_state: MutableMapping[str, Any] | None = None,
                key_padding_mask: torch.Tensor | None = None,
                attn_mask: torch.Tensor | None = None, rel_pos: torch.Tensor | None = None,
                is_first_step: bool = False, *, is_causal: bool = False,
                need_weights: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from query (B, T, embed_dim) to key and value (B, S, embed_dim).

        Args:
            query: tokens that ask.
            key: tokens that are asked. None only in encoder-decoder attention whose state holds
                the encoder's keys already.
            value: what they answer; as many as keys. None where key may be.
            incremental_state: a dict that a call extends: prev_key and prev_value (B, H, n,
                embed_dim / H) of all n tokens so far, before xpos. In encoder-decoder attention
                they are the encoder's, projected once; key and value are not read again. A call
                that fails leaves it as it was. Without gradients a step writes behind the tokens
                of the one before it and copies none. S below counts its tokens too.
            key_padding_mask: (B, S), bool, integer or float; a key where it is not 0 is dropped.
            attn_mask: bool, True drops a key (as in `nn.MultiheadAttention`), or float, added to
                the scores, where -inf drops. (T, S), (B, T, S), (B * H, T, S) or (B, H, T, S),
                with 1 for any of B, H and T. Added values are taken as they are: -1e9 for all
                keys of a query weighs them all alike.
            rel_pos: float, added to the scores. (T, S), (H, T, S), (B * H, T, S) or (B, H, T, S),
                with 1 for any of B, H and T.
            is_first_step: this call has the first tokens; the state must be empty.
            is_causal: a query sees keys up to its own position only; as many new keys as queries.
            need_weights: without, the second result is None and no weights are stored.

        Returns:
            attn (B, T, embed_dim) and attn_weights (H, B, T, S) before dropout. A query that sees
            no key has weights of zero, and zeros go into the last layers.

        Raises:
            InputError (a ValueError): a wrong shape, or a state that does not fit.
            InputTypeError (a TypeError): an input, mask or state of a wrong type.
        """
        if is_causal and self.encoder_decoder_attention:
            raise InputError("is_causal in encoder-decoder attention", "is_causal=False: the keys "
                             "of an encoder have positions of their own", "the is_causal argument")
        past = self._read_state(incremental_state, query, is_first_step)
        held = past[0].shape[2] if past and self.encoder_decoder_attention else None
        together = is_causal or self.xpos is not None
        _check_inputs(query, key, value, self.embed_dim, held, together)
        queries = self._heads(self.q_proj(query))
        keys, values = self._keys_and_values(key, value, past)
        turned = keys
        if self.xpos is not None:
            turned = self.xpos(keys, downscale=True)
            queries = self.xpos(queries, keys.shape[2] - queries.shape[2])
        mixed, weights = masked_scores.attend(
            queries, turned, values, key_padding_mask, attn_mask, rel_pos, self.scaling,
            is_causal, need_weights, self.dropout_module.p if self.training else 0.0)
        mixed = mixed.transpose(1, 2).flatten(2)
        if self.inner_attn_ln is not None:
            mixed = self.inner_attn_ln(mixed)
        attn = self.out_proj(mixed)
        if incremental_state is not None:
            incremental_state.update(zip(_STATE, (keys, values), strict=True))
        return attn, weights.transpose(0, 1) if need_weights else None

    def reorder_incremental_state(self, incremental_state: MutableMapping[str, Any],
                                  new_order: torch.Tensor) -> None:
        """Give row i of the batch the state of row new_order[i], as beam search needs.

        Args:
            incremental_state: changed in place; an empty one stays so.
            new_order: int64 (new batch,).

        Example:
            >>> layer, state = MultiheadAttention(embed_dim=4, num_heads=1), {}
            >>> attn = layer(*[torch.randn(2, 3, 4)] * 3, state)
            >>> layer.reorder_incremental_state(state, torch.tensor([1, 1, 0]))
            >>> state["prev_key"].shape
            torch.Size([3, 1, 3, 4])
        """
        for name in _STATE:
            if incremental_state.get(name) is not None:
                incremental_state[name] = incremental_state[name].index_select(0, new_order)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, embed_dim) to (B, H, T, head_dim)."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _keys_and_values(self, key: torch.Tensor | None, value: torch.Tensor | None,
                         past: tuple[torch.Tensor, torch.Tensor] | None,
                         ) -> tuple[torch.Tensor, torch.Tensor]:
        if past is not None and self.encoder_decoder_attention:
            return past
        new = self._heads(self.k_proj(key)), self._heads(self.v_proj(value))
        if past is None:
            return new
        return joined(past[0], new[0]), joined(past[1], new[1])

    def _read_state(self, state: MutableMapping[str, Any] | None, query: torch.Tensor,
                    is_first_step: bool) -> tuple[Any, Any] | None:
        if state is None:
            return None
        if not isinstance(state, MutableMapping):
            raise InputTypeError(f"incremental_state of {type(state).__name__}", "None or a dict",
                                 "the incremental_state")
        past = tuple(state.get(name) for name in _STATE)
        if past == (None, None):
            return None
        shapes = [tuple(p.shape) if isinstance(p, torch.Tensor) else type(p).__name__ for p in past]
        wanted = (query.shape[0], self.num_heads, *shapes[0][2:3], self.head_dim)
        if shapes != [wanted, wanted]:
            raise InputError(f"prev_key of {shapes[0]} and prev_value of {shapes[1]}",
                             f"both ({query.shape[0]}, {self.num_heads}, tokens, {self.head_dim}) "
                             "or neither", "the incremental_state, or the batch of query")
        if is_first_step:
            raise InputError(f"is_first_step with a state of {shapes[0][2]} tokens",
                             "an empty state", "is_first_step=False, or incremental_state={}")
        return past[0], past[1]

    def extra_repr(self) -> str:
        """The sizes, and the options that are set."""
        options = ("self_attention", "encoder_decoder_attention")
        return ", ".join([f"embed_dim={self.embed_dim}, num_heads={self.num_heads}",
                          *(f"{name}=True" for name in options if getattr(self, name))])


@fx.wrap
def _check_inputs(query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None,
                  features: int, held: int | None, together: bool) -> None:
    """`held`: keys of an encoder in the state; `together`: queries and keys at equal positions."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x is None and held is not None and name != "query":
            continue
        if not isinstance(x, torch.Tensor) or not x.dtype.is_floating_point:
            found = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise InputTypeError(f"{name} of {found}", "a float tensor", f"the {name}")
        if x.ndim != 3 or x.shape[2] != features or x.shape[0] != query.shape[0]:
            raise InputError(f"{name} of shape {tuple(x.shape)}",
                             f"(batch, tokens, {features}), all with the batch of query",
                             f"the {name}")
    lengths = [None if x is None else x.shape[1] for x in (key, value)]
    wanted = query.shape[1] if together else lengths[0] if held is None else held
    if any(n is not None and n != wanted for n in lengths):
        raise InputError(f"key and value of {lengths[0]} and {lengths[1]} tokens",
                         f"{wanted} tokens each" + (
                             ", as query: xpos and is_causal compare positions" if together else
                             ", as in the state" if held is not None else ": as many as keys"),
                         "the key or the value")


def _read_options(layer: str, args: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options: as given, else as in args, else the defaults."""
    if args is None or args is ...:
        found: Mapping[str, Any] = {}
    elif isinstance(args, Mapping):
        found = args
    else:
        found = {name: getattr(args, name) for name in _OPTIONS if hasattr(args, name)}
        if not found:
            raise ConfigError(f"{layer}(args={args!r})", "None, or an object or mapping with "
                              + ", ".join(_OPTIONS), "the args argument, which comes first; sizes "
                              "can be given by name")
    options = {name: next((v for v in (given[name], found.get(name)) if v is not None), default)
               for name, default in _OPTIONS.items()}
    for name in ("multiway", "xpos_rel_pos"):
        arguments.flag(layer, name, options[name])
    eps = options["layernorm_eps"]
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps < math.inf:
        raise ConfigError(f"{layer}(layernorm_eps={eps!r})", "a number of at least 0",
                          "the layernorm_eps argument")
    return options
