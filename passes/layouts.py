"""Layouts: results in memory as the model lays them out, so that what the caller does next works.

A rewrite keeps values, not strides; `.view` and `.is_contiguous` of a result see the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from bincompile.passes.graph import Build, aten, copy_module, finish
from bincompile.program import Program


def lay_out(program: Program, expected: Sequence[Any], found: Sequence[Any]) -> Program:
    """The program with those results copied whose axes lie in another order than expected.

    Args:
        program: a program.
        expected: the model's flat results on some inputs.
        found: the program's results on them.
    """
    orders = {index: order for index, (left, right) in enumerate(zip(expected, found, strict=True))
              if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor)
              and (order := _other_order(left, right)) is not None}
    if not orders:
        return program
    module, _ = copy_module(program.graph_module)
    output = next(n for n in module.graph.nodes if n.op == "output")
    results = list(output.args[0])
    for index, order in orders.items():
        results[index] = _copied(Build(module.graph, output, like=results[index]),
                                 results[index], order)
    output.args = (tuple(results),)
    return program.next(finish(module), program.level)


def _other_order(expected: torch.Tensor, found: torch.Tensor) -> tuple[int, ...] | None:
    """The order of the expected tensor's axes in memory, if the found one's is another."""
    wide = [axis for axis, size in enumerate(expected.shape) if size != 1]
    if all(expected.stride(axis) == found.stride(axis) for axis in wide) or not expected.numel():
        return None
    strides: tuple[int, ...] = expected.stride()
    order = tuple(sorted(range(expected.ndim), key=lambda axis: (-strides[axis], axis)))
    return order if expected.permute(order).is_contiguous() else None


def _copied(build: Build, node: fx.Node, order: tuple[int, ...]) -> fx.Node:
    if order == tuple(range(len(order))):
        return build.call(aten.clone.default, node, memory_format=torch.contiguous_format)
    inner = build.call(aten.permute.default, node, list(order))
    copied = build.call(aten.clone.default, inner, memory_format=torch.contiguous_format)
    return build.call(aten.permute.default, copied, [order.index(a) for a in range(len(order))])
