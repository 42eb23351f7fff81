"""What in a program is the same in each call at the same sizes: sizes, and views of planned memory.

A buffer is at the same place in each call that uses the same arena, so that its views are made once
with it, and not one by one in each call.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch import fx

_ATEN = torch.ops.aten
_NUMBERS = (operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod,
            operator.neg)
# Views of any memory, and such as are views only of memory in one piece.
_VIEWS = (_ATEN.view.default, _ATEN.transpose.int, _ATEN.permute.default, _ATEN.unsqueeze.default,
          _ATEN.squeeze.dim, _ATEN.select.int, _ATEN.slice.Tensor, _ATEN.expand.default)
_WHOLE = (_ATEN.view.default, _ATEN.reshape.default)


def constant_nodes(graph: fx.Graph, places: Mapping[fx.Node, int],
                   inside: Mapping[fx.Node, tuple[bool, ...]]) -> list[fx.Node]:
    """The nodes, in order, that need not be computed again at the same sizes.

    Args:
        graph: the program.
        places: the nodes whose results are planned.
        inside: of those, which results lie in an arena.
    """
    numbers, views, whole = set[fx.Node](), set[fx.Node](), set[fx.Node]()
    for node in places:
        if all(inside[node]):
            views.add(node)
            whole.add(node)
    found = []
    for node in graph.nodes:
        sources = node.all_input_nodes
        if node.op != "call_function" or node in places or node.kwargs or not sources:
            continue
        first, others = sources[0], sources[1:]
        if (node.target is _ATEN.sym_size.int and first.op == "placeholder") or (
                node.target in _NUMBERS and numbers.issuperset(sources)):
            numbers.add(node)
        elif node.target is operator.getitem and first in places:
            if not inside[first][node.args[1]]:
                continue
            views.add(node)
            whole.add(node)
        elif first is node.args[0] and numbers.issuperset(others) and (
                (node.target in _VIEWS and first in views)
                or (node.target in _WHOLE and first in whole)):
            views.add(node)
            if node.target in _WHOLE and first in whole:
                whole.add(node)
        else:
            continue
        found.append(node)
    return found if views else []
