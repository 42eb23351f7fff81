"""Factors: a number that multiplies a value behind its views goes before them, into its rows.

Every element is multiplied alike, wherever it stands, so that the results are the same bits. A
query that is scaled after its heads were split is then scaled by the kernel that makes it.
"""

from __future__ import annotations

import torch
from torch import fx

from bincompile.passes.axes import LAYOUTS
from bincompile.passes.fuse_ops import step_of
from bincompile.passes.graph import Build, aten, is_tensor, value_of

FACTORS = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)


def raise_factors(module: fx.GraphModule) -> None:
    """Multiply row operations by numbers at once where only views stand between."""
    for node in list(module.graph.nodes):
        if node.target not in FACTORS or isinstance(node.args[1], fx.Node) \
                or not is_tensor(node.args[0]):
            continue
        source, first = node.args[0], node
        while source.target in LAYOUTS and len(source.users) == 1:
            source, first = source.args[0], source
        if first is node or len(source.users) != 1 or step_of(source) is None \
                or value_of(source).dtype != torch.float32:
            continue
        build = Build(module.graph, source.next, like=node)
        scaled = build.call(node.target, source, *node.args[1:], **node.kwargs)
        first.replace_input_with(source, scaled)
        node.replace_all_uses_with(node.args[0])
        module.graph.erase_node(node)
