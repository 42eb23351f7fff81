"""Multi-head attention whose four projections are binary."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from bincompile.errors import ConfigError, InputError, InputTypeError
from bincompile.nn import arguments
from bincompile.nn.binary_linear import BinaryLinear
from bincompile.ops.binary_attention import PROBABILITIES, VALUES, binary_attention

_MASK_SHAPES = "(B, S), (B, 1, S), (B, L, S) or (B, H, L, S), with 1 for any of B, H and L"

_DROPPED = -1e9  # the score of a dropped key in bitorch-engine
_AXES_TO_ADD = {2: (slice(None), None, None), 3: (slice(None), None), 4: ()}  # to (B, H, L, S)


class BMHA(nn.Module):
    """Multi-head attention with `BinaryLinear` projections, and scores of floats or of bits.

    Args:
        input_dim: features of the input and of the output.
        hidden_dim: features of queries, keys and values, all heads together.
        num_heads: a divisor of hidden_dim.
        dtype: float dtype of the parameters.
        dropout: probability of dropping an attention weight, in training only.
        attention: "float", or "binary": query and key of each head are sign(x) * mean |x| of
            their row, so a score is s(q) s(k) (D - 2 popcount) / sqrt(D).
        probabilities: with binary attention, of e = exp(score - largest score of the row):
            "float", e / sum(e), which is softmax; "int8", c / sum(c) with c = round(127 e);
            "uint8", for binary values: what each value's signs are multiplied by is rounded to
            8 bits, which is the fastest form (see `ops/binary_attention.py`);
            "binary", c / sum(c) with c = 1 where e >= a learned threshold of the head, else 0
            (at first 0.5; the largest score is always kept).
        values: with binary attention, "float", or "binary": sign(v) * mean |v| of each row.
        bias: give the projections a bias.
        compat: "bitorch": the engine's projections (see `BinaryLinear`) and its attention. Masks
            of any dtype then drop keys where they are 0, with a score of -1e9, so that a query
            without keys attends to all alike; the weights that it returns are those after
            dropout. Unlike the engine's, a mask (B, S) is one of samples also where B == H.
        device: where the parameters are made.

    Raises:
        ConfigError (a ValueError): an argument of the wrong kind, or hidden_dim % num_heads != 0.

    Gradients of binary attention are straight-through, see `ops/binary_attention.py`.

    Source: Attention Is All You Need (arXiv:1706.03762); projections of XNOR-Net
    (arXiv:1603.05279); 1-bit queries and keys of BinaryAttention (arXiv:2603.09582), {0, 1}
    probabilities of BiT (arXiv:2205.13016), here relative to the row's largest. Parameter names
    follow bitorch_engine's BMHA.

    Example:
        >>> layer = BMHA(input_dim=8, hidden_dim=16, num_heads=4).eval()
        >>> output, weights = layer(torch.ones(2, 5, 8), mask=torch.ones(2, 5).bool())
        >>> output.shape, weights.shape
        (torch.Size([2, 5, 8]), torch.Size([2, 4, 5, 5]))
    """

    def __init__(self, input_dim: int, hidden_dim: int, num_heads: int,
                 dtype: torch.dtype = torch.float32, *, dropout: float = 0.1,
                 attention: str = "float", probabilities: str = "float", values: str = "float",
                 bias: bool = False, compat: str | None = None,
                 device: torch.device | str | None = None) -> None:
        super().__init__()
        name = type(self).__name__
        self.compat = arguments.compat(name, compat)
        self.attention = arguments.choice(name, "attention", attention, ("float", "binary"))
        self.probabilities = arguments.choice(name, "probabilities", probabilities, PROBABILITIES)
        self.values = arguments.choice(name, "values", values, VALUES)
        if compat is not None:
            arguments.without(name, "compat='bitorch'", attention=(attention, "float"),
                              bias=(bias, False))
        _check_forms(name, attention, probabilities, values)
        self.input_dim = arguments.size(name, "input_dim", input_dim)
        self.hidden_dim = arguments.size(name, "hidden_dim", hidden_dim)
        self.num_heads = arguments.size(name, "num_heads", num_heads)
        if hidden_dim % num_heads:
            raise ConfigError(f"{name}(hidden_dim={hidden_dim}, num_heads={num_heads})",
                              "a hidden_dim that is a multiple of num_heads",
                              "the hidden_dim or the num_heads argument")
        self.head_dim = hidden_dim // num_heads
        self.dtype = arguments.float_dtype(name, dtype)

        def projection(inputs: int, outputs: int) -> BinaryLinear:
            return BinaryLinear(inputs, outputs, arguments.flag(name, "bias", bias),
                                compat=compat, device=device, dtype=self.dtype)

        self.q_linear = projection(input_dim, hidden_dim)
        self.v_linear = projection(input_dim, hidden_dim)
        self.k_linear = projection(input_dim, hidden_dim)
        self.dropout = nn.Dropout(arguments.probability(name, "dropout", dropout))
        self.out = projection(hidden_dim, input_dim)
        self.threshold = (nn.Parameter(torch.full((num_heads,), 0.5, device=device,
                                                  dtype=self.dtype))
                          if probabilities == "binary" else None)

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None, *,
                key: torch.Tensor | None = None, value: torch.Tensor | None = None,
                causal: bool = False, need_weights: bool = True,
                ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from hidden_states (B, L, input_dim) to key and value (B, S, input_dim).

        Args:
            hidden_states: the queries; also the keys and values where those are not given.
            mask: its dtype says what it means. Bool or integer: keep where not 0. Float: added
                to the scores, -inf drops; a float mask of zeros and ones is therefore added too.
                Shapes: (B, S) says which keys of sample b are kept; (B, 1, S) the same;
                (B, L, S) which keys each query sees; (B, H, L, S) one mask for each head. A size
                of 1 in place of B, H or L serves all.
            key: defaults to hidden_states.
            value: defaults to key.
            causal: query i sees keys 0 to i only.
            need_weights: return the attention weights as well.

        Returns:
            Output (B, L, input_dim), and the weights (B, H, L, S) before dropout, or None without
            need_weights. A query that sees no key has weights of zero. With compat="bitorch"
            the weights are after dropout, and those of such a query all alike.

        Raises:
            InputError: a wrong shape.
            InputTypeError: an input or a mask of a wrong dtype.
        """
        key = hidden_states if key is None else key
        value = key if value is None else value
        _check_inputs(hidden_states, key, value, self.input_dim)
        query, key, value = (self._heads(project(x)) for project, x in (
            (self.q_linear, hidden_states), (self.k_linear, key), (self.v_linear, value)))
        if self.compat == "bitorch":
            mixed, weights = self._attend_as_engine(query, key, value, mask, causal)
        else:
            bias, keep = self._read_mask(mask, query, key)
            if self.attention == "binary":
                mixed, weights = self._attend_binary(query, key, value, bias, keep, causal,
                                                     need_weights)
            elif need_weights:
                mixed, weights = self._attend(query, key, value, bias, keep, causal)
            else:
                mixed, weights = self._attend_fused(query, key, value, bias, keep, causal), None
        return self.out(mixed.transpose(1, 2).flatten(2)), weights if need_weights else None

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, hidden_dim) to (B, H, L, head_dim)."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _read_mask(self, mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor,
                   ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The mask as (bias to add, keep), both (B, H, L, S) with ones, or None."""
        if mask is None:
            return None, None
        wide = self._widened(mask, query, key)
        if not mask.dtype.is_floating_point:
            return None, wide != 0
        keep = wide != -math.inf
        return torch.where(keep, wide, 0.0).to(query.dtype), keep

    def _widened(self, mask: torch.Tensor, query: torch.Tensor,
                 key: torch.Tensor) -> torch.Tensor:
        """The mask as (B, H, L, S) with ones."""
        if mask.dtype.is_complex:
            raise InputTypeError(f"mask of dtype {mask.dtype}",
                                 "bool or integer (keep where not 0), or float (added)", "the mask")
        sizes = (*query.shape[:3], key.shape[2])
        wide = mask[_AXES_TO_ADD[mask.ndim]] if mask.ndim in _AXES_TO_ADD else None
        if wide is None or wide.shape[3] != sizes[3] or any(
                n != size and n != 1 for n, size in zip(wide.shape[:3], sizes[:3], strict=True)):
            raise InputError(f"mask of shape {tuple(mask.shape)}", f"{_MASK_SHAPES}; here "
                             f"(B, H, L, S) = {tuple(map(str, sizes))}", "the mask")
        return wide

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                bias: torch.Tensor | None, keep: torch.Tensor | None, causal: bool,
                ) -> tuple[torch.Tensor, torch.Tensor]:
        scores = (query * self.head_dim**-0.5) @ key.mT
        if bias is not None:
            scores = scores + bias
        past = _past(query, key) if causal else None
        if past is not None:
            scores = scores.masked_fill(~past, -math.inf)
        if keep is None:
            weights = torch.softmax(scores, -1)
            return self.dropout(weights) @ value, weights
        sees = (keep if past is None else keep & past).any(-1, keepdim=True)
        # a query that sees nothing is left unmasked here, or its softmax and gradient were NaN
        weights = torch.softmax(scores.masked_fill(~keep & sees, -math.inf), -1)
        mixed = self.dropout(weights) @ value
        return mixed.masked_fill(~sees, 0.0), weights.masked_fill(~sees, 0.0)

    def _attend_fused(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                      bias: torch.Tensor | None, keep: torch.Tensor | None, causal: bool,
                      ) -> torch.Tensor:
        mask = keep
        if keep is not None and causal:
            mask = keep & _past(query, key)
        if mask is not None and bias is not None:
            mask = torch.where(mask, bias, -math.inf)
        return F.scaled_dot_product_attention(
            query, key, value, mask, self.dropout.p if self.training else 0.0,
            is_causal=causal and mask is None)

    def _attend_binary(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                       bias: torch.Tensor | None, keep: torch.Tensor | None, causal: bool,
                       need_weights: bool) -> tuple[torch.Tensor, torch.Tensor]:
        drop = None
        if self.training and self.dropout.p:
            drop = self.dropout(query.new_ones(*query.shape[:3], key.shape[2]))
        return binary_attention.overload(
            query, key, value, bias, keep, drop, self.threshold, self.head_dim**-0.5, causal,
            self.probabilities, self.values, need_weights)

    def _attend_as_engine(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                          mask: torch.Tensor | None, causal: bool,
                          ) -> tuple[torch.Tensor, torch.Tensor]:
        scores = (query @ key.mT) / math.sqrt(self.head_dim)
        if scores.dtype == torch.float16:  # which has no -1e9
            scores = scores.float()
        if mask is not None:
            scores = scores.masked_fill(self._widened(mask, query, key) == 0, _DROPPED)
        if causal:
            scores = scores.masked_fill(~_past(query, key), _DROPPED)
        weights = self.dropout(torch.softmax(scores, -1).to(value.dtype))
        return weights @ value, weights

    def extra_repr(self) -> str:
        """The sizes, and every option that is not at its default."""
        parts = [f"{name}={getattr(self, name)}" for name in ("input_dim", "hidden_dim",
                                                              "num_heads")]
        defaults = {"attention": "float", "probabilities": "float", "values": "float",
                    "compat": None}
        return ", ".join(parts + [f"{name}={getattr(self, name)!r}" for name, usual in
                                  defaults.items() if getattr(self, name) != usual])


def _check_forms(name: str, attention: str, probabilities: str, values: str) -> None:
    if attention == "float":
        arguments.without(name, "attention='float'", values=(values, "float"),
                          probabilities=(probabilities, "float"))
    if probabilities == "uint8" and values != "binary":
        raise ConfigError(f"{name}(probabilities='uint8', values={values!r})",
                          "values='binary', whose scales it rounds too",
                          "the probabilities or the values argument")


def _check_inputs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                  features: int) -> None:
    batch, keys = query.shape[0], key.shape[1:2]
    for name, x, length in (("hidden_states", query, query.shape[1:2]), ("key", key, keys),
                            ("value", value, keys)):
        if x.ndim != 3 or x.shape[2] != features or x.shape[0] != batch or x.shape[1:2] != length:
            raise InputError(f"{name} of shape {tuple(x.shape)}",
                             f"(batch, tokens, {features}); key and value have the batch of "
                             "hidden_states and as many tokens as each other", f"the {name}")


def _past(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """(L, S) bool: key j is not later than query i."""
    return torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
