"""Biases of float linears: added by the row program that follows, where one does.

torch's product writes the bias over its result first and adds to it, a pass over memory that a
kernel which reads the product anyway saves.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from bincompile.passes.fuse_ops import keeps_rows, step_of
from bincompile.passes.fuse_regions import run_time
from bincompile.passes.graph import Build, arguments, aten, is_tensor, value_of

Split = tuple[fx.Node, fx.Node]  # a product without its bias, and the addition of it


def split_biases(module: fx.GraphModule) -> list[Split]:
    """Take the bias out of every linear whose results only row operations read."""
    moving, split = run_time(module.graph), list[Split]()
    for node in list(module.graph.nodes):
        product = _without_bias(node) if node in moving and is_tensor(node) else None
        if product is None or value_of(node).dtype != torch.float32 \
                or value_of(node).ndim < 2 or not _feeds_rows(node):
            continue
        target, args, bias = product
        added = Build(module.graph, node.next, like=node).call(aten.add.Tensor, node, bias)
        node.replace_all_uses_with(added, delete_user_cb=lambda user, own=added: user is not own)
        node.target, node.args, node.kwargs = target, args, {}
        split.append((node, added))
    return split


def _without_bias(node: fx.Node) -> tuple[Any, tuple[Any, ...], fx.Node] | None:
    """The product alone, and the bias that is added to it; None where that is not what it is."""
    if node.target not in (aten.linear.default, aten.addmm.default):
        return None
    given = arguments(node)
    if node.target is aten.linear.default:
        bias = given["bias"]
        return None if bias is None else (node.target, (given["input"], given["weight"]), bias)
    plain = given["beta"] == 1 and given["alpha"] == 1 and value_of(given["self"]).ndim == 1
    return (aten.mm.default, (given["mat1"], given["mat2"]), given["self"]) if plain else None


def _feeds_rows(node: fx.Node) -> bool:
    """Whether row operations, and nothing else, read a node, views aside."""
    return bool(node.users) and all(
        _feeds_rows(user) if keeps_rows(user) else is_tensor(user) and step_of(user) is not None
        for user in node.users)


def join_biases(split: Collection[Split], fused: Collection[fx.Node]) -> None:
    """Put back those biases that no region has taken."""
    for product, added in split:
        if added not in fused:
            bias, plain = added.args[1], product.target is aten.linear.default
            product.args = (*product.args, bias) if plain else (bias, *product.args)
            product.target = aten.linear.default if plain else aten.addmm.default
            added.replace_all_uses_with(product)
            added.graph.erase_node(added)
