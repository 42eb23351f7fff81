"""Pointwise steps behind views: computed where their values still are rows.

A convolution of one token is a product whose result is given an axis of time behind its channels;
what acts on every element alike then acts on the rows before, and its own result is viewed.
"""

from __future__ import annotations

import torch
from torch import fx

from bincompile.ops.row_ops import ROW_OPS
from bincompile.passes.axes import REGROUPS
from bincompile.passes.fuse_ops import Step, fixed, step_of
from bincompile.passes.graph import Build, aten, is_tensor, shape_of, value_of
from bincompile.passes.sizes import equal, product


def raise_pointwise(module: fx.GraphModule) -> None:
    """Let a step with one input be computed before the views that took its rows apart."""
    for node in list(module.graph.nodes):
        source = _source(node) if _is_pointwise(node) else None
        if source is None:
            continue
        build = Build(module.graph, node, like=node)
        made = build.call(node.target, source, *node.args[1:], **node.kwargs)
        viewed = build.call(aten.reshape.default, made, list(build.shape(node.args[0])))
        node.replace_all_uses_with(viewed)
        module.graph.erase_node(node)


def _is_pointwise(node: fx.Node) -> bool:
    """Whether each element of a node follows from the same one of its only input."""
    step = step_of(node) if is_tensor(node) else None
    return step is not None and node.all_input_nodes == [node.args[0]] and \
        _acts_alike(step) and value_of(node).dtype == torch.float32


def _acts_alike(step: Step) -> bool:
    """Whether a step is pointwise, and those inside of it are."""
    return ROW_OPS[step.op].form == "pointwise" and all(
        _acts_alike(arg) for arg in step.args if isinstance(arg, Step))


def _source(node: fx.Node) -> fx.Node | None:
    """The rows that views before a node take apart: their last axis is longer than the node's."""
    source = node.args[0]
    while source.target in REGROUPS and is_tensor(source.args[0]) and equal(
            product(shape_of(source)), product(shape_of(source.args[0]))):
        source = source.args[0]
    rows = shape_of(source)
    if source is node.args[0] or len(rows) < 2 or value_of(source).dtype != torch.float32:
        return None
    width = fixed(rows[-1])
    return source if width is not None and width > (fixed(shape_of(node)[-1]) or 0) else None
