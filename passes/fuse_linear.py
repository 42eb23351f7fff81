"""Biases of float linears: added by the row program that follows, where one does.

torch's product writes the bias over its result first and adds to it, a pass over memory that a
kernel which reads the product anyway saves.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from bincompile.passes.fuse_ops import keeps_rows, step_of
from bincompile.passes.fuse_regions import run_time
from bincompile.passes.graph import Build, arguments, aten, is_tensor, value_of

Split = tuple[fx.Node, fx.Node]  # a linear without its bias, and the addition of it


def split_biases(module: fx.GraphModule) -> list[Split]:
    """Take the bias out of every linear whose results only row operations read."""
    moving, split = run_time(module.graph), list[Split]()
    for node in list(module.graph.nodes):
        if node.target is not aten.linear.default or node not in moving:
            continue
        given = arguments(node)
        if given["bias"] is None or value_of(node).dtype != torch.float32 \
                or value_of(node).ndim < 2 or not _feeds_rows(node):
            continue
        build = Build(module.graph, node.next, like=node)
        added = build.call(aten.add.Tensor, node, given["bias"])
        node.replace_all_uses_with(added, delete_user_cb=lambda user, own=added: user is not own)
        node.args, node.kwargs = (given["input"], given["weight"]), {}
        split.append((node, added))
    return split


def _feeds_rows(node: fx.Node) -> bool:
    """Whether row operations, and nothing else, read a node, views aside."""
    return bool(node.users) and all(
        _feeds_rows(user) if keeps_rows(user) else is_tensor(user) and step_of(user) is not None
        for user in node.users)


def join_biases(split: Collection[Split], fused: Collection[fx.Node]) -> None:
    """Put back those biases that no region has taken."""
    for linear, added in split:
        if added not in fused:
            linear.args = (*linear.args, added.args[1])
            added.replace_all_uses_with(linear)
            added.graph.erase_node(added)
