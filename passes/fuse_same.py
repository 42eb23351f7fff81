"""Equal values, computed once: layers of a step often make the same angles from the same index."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import fx

from bincompile.passes.fuse_ops import step_of
from bincompile.program import attribute

SMALL = 1 << 14  # bytes of stored tensors that are compared


def share(module: fx.GraphModule) -> None:
    """Let equal small stored tensors, and equal calls of torch's operators, be one node.

    What row programs and operators of ours read stays apart: kernels lay out each in its own way.
    """
    known: dict[Hashable, fx.Node] = {}
    for node in list(module.graph.nodes):
        key = _stored(module, node) if node.op == "get_attr" else _called(node)
        if key is None:
            continue
        first = known.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            module.graph.erase_node(node)


def _stored(module: fx.GraphModule, node: fx.Node) -> Hashable | None:
    value = attribute(module, node.target)
    if not isinstance(value, torch.Tensor) or isinstance(value, torch.nn.Parameter) \
            or value.nbytes > SMALL or value.layout is not torch.strided \
            or not all(_is_aten(user) and step_of(user) is None for user in node.users):
        return None
    flat = value.detach().cpu().contiguous().view(-1)
    return "stored", value.dtype, tuple(value.shape), value.stride(), str(value.device), \
        bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""


def _is_aten(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) \
        and node.target.namespace == "aten"


def _called(node: fx.Node) -> Hashable | None:
    """What tells a call from others; None where two of them are not to be one."""
    target = node.target
    if not _is_aten(node) or target._schema.is_mutable \
            or torch.Tag.nondeterministic_seeded in target.tags \
            or any(user.op == "output" for user in node.users):  # has memory of its own
        return None
    key = (str(target), _frozen(node.args), _frozen(dict(node.kwargs)))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _frozen(arg: Any) -> Hashable:
    """An argument as a key: 1, 1.0 and True are apart, and so are 0.0 and -0.0."""
    if isinstance(arg, tuple | list):
        return tuple(map(_frozen, arg))
    if isinstance(arg, dict):
        return tuple((name, _frozen(value)) for name, value in sorted(arg.items()))
    return arg if isinstance(arg, fx.Node) else (type(arg), repr(arg))
