"""What is binary already: our layers, and stored weights that are +-a in each row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from bincompile.ops.binary_embedding import binary_embedding
from bincompile.ops.binary_linear import binary_linear
from bincompile.ops.embedding import embedding
from bincompile.ops.fake_binary_linear import fake_binary_linear
from bincompile.ops.pack_signs import pack_signs
from bincompile.passes.graph import aten, is_tensor, shape_of, value_of
from bincompile.passes.patterns import Candidate, Context, Example, Pattern, TableUse, owner_of
from bincompile.passes.tables import wrapped
from bincompile.program import attribute

Values = Mapping[str, Any]


def packed_linear(build: Any, x: Any, weight: Any, scale: Any, bias: Any, features: int,
                  activation: str, activation_scale: Any = None, shift: Any = None) -> Any:
    """A binary linear with the signs of a weight; the packing is folded when it is lowered."""
    packed = build.call(pack_signs.overload, weight)
    return build.call(binary_linear.overload, x, packed, scale, bias, features, activation,
                      activation_scale, shift)


def _match_layer(node: fx.Node, context: Context) -> Candidate | None:
    found = fake_binary_linear.bind(node.args, dict(node.kwargs))
    if found["weight"] in context.activations:
        return None
    roles = {role: found[role] for role in ("x", "weight_scale", "bias", "activation_scale",
                                            "shift") if found[role] is not None}
    weight = _stored(found["weight"], context)
    features = shape_of(found["weight"])[1]

    def emit(build: Any, values: Values) -> tuple[Any, ...]:
        stored = values["weight"]
        return (packed_linear(build, values["x"], stored, values["weight_scale"],
                              values.get("bias"), features, found["activation"],
                              values.get("activation_scale"), values.get("shift")),)

    attrs = {"in_features": features, "out_features": weight.shape[0],
             "activation": found["activation"]}
    return Candidate("linear", node, {**roles, "weight": found["weight"]}, (node,), emit, attrs,
                     owner_of((node,)))


def _match_linear(node: fx.Node, context: Context) -> Candidate | None:
    x, weight, bias = (*node.args, None)[:3]
    stored = _row_signs(weight, context)
    if stored is None or x not in context.activations:
        return None
    inputs = {"x": x, "weight": weight, **({} if bias is None else {"bias": bias})}

    def emit(build: Any, values: Values) -> tuple[Any, ...]:
        return (packed_linear(build, values["x"], values["weight"],
                              row_values(build, values["weight"]), values.get("bias"),
                              stored.shape[1], "float"),)

    attrs = {"in_features": stored.shape[1], "out_features": stored.shape[0],
             "activation": "float"}
    return Candidate("linear", node, inputs, (node,), emit, attrs, owner_of((node,)),
                     fixed=("weight",))


def _match_embedding(node: fx.Node, context: Context) -> Candidate | None:
    found = embedding.bind(node.args, dict(node.kwargs))
    table, wrap = found["table"], found["wrap"]
    stored = _row_signs(table, context)
    if stored is None:
        return None

    def emit(build: Any, values: Values) -> tuple[Any, ...]:
        packed = build.call(pack_signs.overload, values["table"])
        indices = wrapped(build, values["indices"], stored.shape[0]) if wrap else values["indices"]
        return (build.call(binary_embedding.overload, indices, packed,
                           row_values(build, values["table"]), stored.shape[1]),)

    attrs = {"num_embeddings": stored.shape[0], "embedding_dim": stored.shape[1]}
    return Candidate("embedding", node, {"table": table, "indices": found["indices"]}, (node,),
                     emit, attrs, owner_of((node,)), fixed=("table",),
                     table_use=TableUse(indices="negative" if wrap else "rows"))


def row_values(build: Any, weight: Any) -> Any:
    """The magnitude a of each row of a weight whose rows are +-a."""
    return build.call(aten.amax.default, build.call(aten.abs.default, weight), [1])


def _stored(node: fx.Node, context: Context) -> torch.Tensor:
    """The stored tensor behind a node, or its fake value where it is computed from one."""
    return attribute(context.graph_module, node.target) if node.op == "get_attr" else value_of(node)


def _row_signs(node: Any, context: Context) -> torch.Tensor | None:
    """The stored weight if each of its rows is +-a, with a of its own and 0 only as a whole."""
    if not is_tensor(node) or node.op != "get_attr":
        return None
    weight = attribute(context.graph_module, node.target)
    if weight.ndim != 2 or weight.shape[1] < 2 or not weight.dtype.is_floating_point:
        return None
    for rows in (weight[:4], weight):  # most weights are told apart by their first rows
        size = rows.abs()
        if not bool((size == size[:, :1]).all()) or not bool(size.isfinite().all()):
            return None
    return weight


class _Layer(nn.Module):
    """A linear layer on float masters whose forward is one operator."""

    def __init__(self, activation: str = "binary", shift: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10, 24))
        self.bias = nn.Parameter(torch.randn(10)) if bias else None
        self.shift = nn.Parameter(torch.randn(24)) if shift else None
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fake_binary_linear.overload(x, self.weight, self.weight.abs().mean(1), self.bias,
                                           self.activation, None, self.shift)


class _Indexed(nn.Module):
    """A look-up by indexing: negative indices count from the end."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 16))

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return self.table[indices]


def _signed(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        weight = next(layer.parameters())
        weight.copy_(torch.where(weight >= 0, 1.0, -1.0) * weight.abs().mean(1, keepdim=True))
    return layer


def _rows() -> tuple[torch.Tensor]:
    return (torch.randn(3, 5, 24),)


binary_layer = Pattern(
    "binary_layer", "linear", (fake_binary_linear.overload,), _match_layer,
    examples=(Example(_Layer, _rows), Example(lambda: _Layer("float", bias=False), _rows),
              Example(lambda: _Layer(shift=True), _rows)),
    near_misses=(Example(lambda: nn.Linear(24, 10), _rows),),
    stage="packed",
)
signed_linear = Pattern(
    "signed_linear", "linear", (aten.linear.default,), _match_linear,
    examples=(Example(lambda: _signed(nn.Linear(24, 10)), _rows),
              Example(lambda: _signed(nn.Linear(24, 10, bias=False)), _rows)),
    near_misses=(Example(lambda: nn.Linear(24, 10), _rows),),
    stage="packed",
)
signed_embedding = Pattern(
    "signed_embedding", "embedding", (embedding.overload,), _match_embedding,
    examples=(Example(lambda: _signed(nn.Embedding(9, 16)), lambda: (torch.tensor([[1, 8]]),)),
              Example(lambda: _signed(_Indexed()), lambda: (torch.tensor([[1, -8]]),))),
    near_misses=(Example(lambda: nn.Embedding(9, 16), lambda: (torch.tensor([[1, 8]]),)),),
    stage="packed",
)
