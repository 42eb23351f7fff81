"""Binary linear layers with bitorch-engine's formulas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from bincompile.ops.fake_bitorch_linear import fake_bitorch_linear
from bincompile.passes.graph import aten, shape_of
from bincompile.passes.patterns import Candidate, Context, Example, Pattern, owner_of
from bincompile.passes.patterns.binary import packed_linear

Values = Mapping[str, Any]


def _match(node: fx.Node, context: Context) -> Candidate | None:
    found = fake_bitorch_linear.bind(node.args, dict(node.kwargs))
    if any(found[role] in context.activations for role in ("weight", "scale_a", "scale_w")):
        return None
    outputs, features = shape_of(found["weight"])

    def emit(build: Any, values: Values) -> tuple[Any, ...]:
        # One scale for the layer, as the engine has it: (a * w) is rounded, then its product
        # with the sum, so the scale of the activations is 1.
        ones = build.call(aten.new_ones.default, values["scale_a"], [1], dtype=torch.float32)
        scale = build.call(aten.mul.Tensor, build.call(
            aten.mul.Tensor, ones, build.call(aten.reshape.default, values["scale_a"], [1])),
            build.call(aten.reshape.default, values["scale_w"], [1]))
        return (packed_linear(build, values["x"], values["weight"], scale, None, features,
                              "binary", ones, values["shift"]),)

    attrs = {"in_features": features, "out_features": outputs, "activation": "binary"}
    return Candidate("linear", node, found, (node,), emit, attrs, owner_of((node,)))


class _Layer(nn.Module):
    """The engine's linear layer; with `computed`, its weight comes from the input."""

    def __init__(self, features: int = 24, computed: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10, features))
        self.bias_a = nn.Parameter(torch.randn(features))
        self.scale_a, self.computed = nn.Parameter(torch.tensor(1.3)), computed
        self.register_buffer("scale_w", torch.tensor(0.2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight * x.sum() if self.computed else self.weight
        return fake_bitorch_linear.overload(x, weight, self.scale_a, self.scale_w, self.bias_a)


def _rows() -> tuple[torch.Tensor]:
    return (torch.randn(3, 5, 24),)


bitorch_layer = Pattern(
    "bitorch_layer", "linear", (fake_bitorch_linear.overload,), _match,
    examples=(Example(_Layer, _rows), Example(lambda: _Layer(7), lambda: (torch.randn(4, 7),))),
    near_misses=(Example(lambda: _Layer(computed=True), _rows),
                 Example(lambda: nn.Linear(24, 10), _rows)),
    stage="packed",
)
