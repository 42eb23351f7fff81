"""Attention that is binary already: it stays the operator that it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from bincompile.ops.binary_attention import binary_attention
from bincompile.passes.graph import is_tensor, shape_of
from bincompile.passes.patterns import Candidate, Context, Example, Pattern, owner_of

Values = Mapping[str, Any]
SHOWN = ("scale", "causal", "probabilities", "values")


def _match(node: fx.Node, context: Context) -> Candidate | None:
    found = binary_attention.bind(node.args, dict(node.kwargs))
    outputs = tuple(n for n in node.graph.nodes if n in node.users)

    def emit(build: Any, values: Values) -> tuple[Any, ...]:
        both = build.call(binary_attention.overload, *{**found, **values}.values())
        return tuple(build.item(both, int(n.args[1])) for n in outputs)

    attrs = {"heads": shape_of(found["query"])[1], **{k: found[k] for k in SHOWN}}
    roles = {role: value for role, value in found.items() if is_tensor(value)}
    return Candidate("attention", node, roles, outputs, emit, attrs, owner_of((node,)))


class _Attention(nn.Module):
    """Binary attention of a sequence to itself."""

    def __init__(self, probabilities: str = "float", values: str = "float",
                 need_weights: bool = False) -> None:
        super().__init__()
        self.threshold = (nn.Parameter(torch.tensor([0.3, 0.6]))
                          if probabilities == "binary" else None)
        self.fixed = {"causal": True, "probabilities": probabilities, "values": values,
                      "need_weights": need_weights}

    def forward(self, x: torch.Tensor, kept: torch.Tensor) -> Any:
        out, weights = binary_attention.overload(
            x, x + 0.1, 2 * x, None, kept, None, self.threshold, 1 / math.sqrt(x.shape[-1]),
            **self.fixed)
        return (out, weights) if self.fixed["need_weights"] else out


class _Float(nn.Module):
    def forward(self, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, kept)


def _inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(3, 2, 5, 8), torch.rand(3, 1, 5, 5) > 0.3


binary_attention_layer = Pattern(
    "binary_attention_layer", "attention", (binary_attention.overload,), _match,
    examples=(Example(_Attention, _inputs), Example(lambda: _Attention("int8", "binary"), _inputs),
              Example(lambda: _Attention("binary", need_weights=True), _inputs)),
    near_misses=(Example(_Float, _inputs),),
    stage="packed",
)
