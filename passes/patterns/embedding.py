"""Look-ups of table rows."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import fx, nn

from bincompile.ops.embedding import embedding as embedding_operator
from bincompile.ops.embedding_bag import MODES
from bincompile.ops.embedding_bag import embedding_bag as bag_operator
from bincompile.passes.graph import arguments, aten, shape_of, users
from bincompile.passes.patterns import Candidate, Context, Example, Pattern, TableUse, owner_of
from bincompile.passes.tables import table_attrs
from bincompile.program import source_line
from bincompile.record import Refusal


def _match_embedding(node: fx.Node, context: Context) -> Candidate:
    found = arguments(node)
    rows, columns = shape_of(found["weight"])
    padding = found["padding_idx"]
    attrs = {"num_embeddings": rows, "embedding_dim": columns,
             "padding_idx": None if padding is None or padding < 0 else padding,
             **table_attrs(found["weight"], node, context)}

    def emit(build: Any, values: Any) -> tuple[Any, ...]:
        return (build.call(embedding_operator.overload, values["table"], values["indices"]),)

    return Candidate("embedding", node, {"table": found["weight"], "indices": found["indices"]},
                     (node,), emit, attrs, owner_of((node,)))


def _match_bag(node: fx.Node, context: Context) -> Candidate | Refusal:
    found = arguments(node)
    padding = found.get("padding_idx")
    padding = None if padding is None or padding < 0 else padding
    reads = list(users(node))
    first = next((n for n in reads if n.args[1] == 0), None)
    if first is None or len(reads) > 1:
        return Refusal("embedding_bag", owner_of((node,)),
                       "more than the bags themselves is read", node.name, source_line(node))
    mode = MODES[found["mode"]]
    inputs = {"table": found["weight"], "indices": found["indices"], "offsets": found["offsets"]}
    if found["per_sample_weights"] is not None:
        inputs["weights"] = found["per_sample_weights"]
    last = bool(found["include_last_offset"])

    def emit(build: Any, values: Any) -> tuple[Any, ...]:
        return (build.call(bag_operator.overload, values["table"], values["indices"],
                           values["offsets"], mode, values.get("weights"), last, padding),)

    rows, columns = shape_of(found["weight"])
    attrs = {"num_embeddings": rows, "embedding_dim": columns, "mode": mode,
             "padding_idx": padding, "weights": "weights" in inputs,
             **table_attrs(found["weight"], node, context)}
    return Candidate("embedding_bag", node, inputs, (first,), emit, attrs, owner_of((node,)),
                     table_use=TableUse(ended=last))


class _Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 4))

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(indices, self.table)


class _Soft(nn.Module):
    """A soft look-up: every row takes part."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x, -1) @ self.table


def _indices() -> tuple[torch.Tensor]:
    return (torch.tensor([[1, 5, 0], [3, 3, 8]]),)


embedding = Pattern(
    "embedding", "embedding", (aten.embedding.default,), _match_embedding,
    examples=(Example(lambda: nn.Embedding(9, 4, padding_idx=3), _indices),
              Example(_Functional, _indices)),
    near_misses=(Example(_Soft, lambda: (torch.randn(2, 9),)),),
)
embedding_bag = Pattern(
    "embedding_bag", "embedding_bag",
    (aten.embedding_bag.padding_idx, aten.embedding_bag.default,
     aten._embedding_bag.default, aten._embedding_bag_forward_only.default), _match_bag,
    examples=tuple(
        [Example(partial(nn.EmbeddingBag, 9, 4, mode=mode), _indices) for mode in MODES]
        + [Example(lambda: nn.EmbeddingBag(9, 4, mode="sum", padding_idx=3), _indices)]),
    near_misses=(Example(_Soft, lambda: (torch.randn(2, 9),)),),
)
