"""Which results of a program can lie in planned memory, and from which step to which they live."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from bincompile.runtime.bound import Bound
from bincompile.runtime.buffers import Lifetime

# A size that is known only when the program runs, as torch names it.
_UNKNOWN = re.compile(r"\bu\d+\b")


def planned(graph: fx.Graph, bound: Mapping[str, Any]) -> dict[fx.Node, int]:
    """The nodes whose results have sizes that follow from those of the inputs, and how many each.

    Args:
        graph: nodes with values in their meta.
        bound: the kernel of each node that has one, by name.
    """
    found: dict[fx.Node, int] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(bound.get(node.name), Bound) and value is not None \
                and not any(map(_unknown, (node, *node.all_input_nodes))):
            found[node] = len(value) if isinstance(value, tuple | list) else 1
    return found


def _unknown(node: fx.Node) -> bool:
    return any(_UNKNOWN.search(str(size)) for size in sizes_of(node.meta.get("val")))


def sizes_of(value: Any) -> Iterator[Any]:
    """All sizes in a node's value: those of its tensors, or the value itself where it is one."""
    if isinstance(value, tuple | list):
        for part in value:
            yield from sizes_of(part)
    elif hasattr(value, "shape"):
        yield from value.shape
    elif isinstance(value, torch.SymInt | str):
        yield value


def lifetimes(graph: fx.Graph, places: Mapping[fx.Node, int]) -> list[Lifetime]:
    """For each planned result, the step that writes it and the last that may read its memory.

    None for a result whose memory may be part of what the caller gets.

    Args:
        graph: the program; a node's step is its place in it.
        places: the nodes that `planned` found.
    """
    firsts: list[int] = []
    lasts: list[int | None] = []
    inside: dict[fx.Node, Sequence[int]] = {}  # the results whose memory a value may share
    for step, node in enumerate(graph.nodes):
        read = {index for source in node.all_input_nodes for index in inside[source]}
        for index in read:
            lasts[index] = None if node.op == "output" or lasts[index] is None else step
        if node in places:
            inside[node] = range(len(firsts), len(firsts) + places[node])
            firsts += [step] * places[node]
            lasts += [step] * places[node]
        elif node.target is operator.getitem and node.args[0] in places:
            inside[node] = (inside[node.args[0]][node.args[1]],)
        else:
            inside[node] = tuple(read) if _may_share(node.target) else ()
    return [None if last is None else (first, last)
            for first, last in zip(firsts, lasts, strict=True)]


def _may_share(target: Any) -> bool:
    """Whether the result of a call may be a view of what it is given."""
    if target in _FRESH:
        return False
    if not isinstance(target, torch._ops.OpOverload) or target.namespace == "bincompile":
        return True
    composite = target.has_kernel_for_dispatch_key(
        torch._C.DispatchKey.CompositeImplicitAutograd)
    return composite or any(r.alias_info is not None for r in target._schema.returns)


_ATEN = torch.ops.aten
_FRESH = (_ATEN.linear.default, _ATEN.softmax.int, _ATEN.layer_norm.default,
          _ATEN.scaled_dot_product_attention.default)  # composite, and never views
