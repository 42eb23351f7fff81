"""Spelling: values that an input only gives its sizes to are made from sizes alone."""

from __future__ import annotations

from typing import Any

from torch import fx

from bincompile.passes.graph import SIZES, Build, arguments, aten, copy_module, finish, value_of
from bincompile.program import Program

FILLS = {aten.zeros_like.default: 0, aten.ones_like.default: 1, aten.new_zeros.default: 0,
         aten.new_ones.default: 1, aten.empty_like.default: 0, aten.new_empty.default: 0,
         aten.full_like.default: None, aten.new_full.default: None}


def spelled(program: Program) -> Program:
    """The program with `full` and `constant_pad_nd` in place of what means them; names stay."""
    if not any(node.target in _RESPELLED for node in program.graph.nodes):
        return program
    module, _ = copy_module(program.graph_module)
    for node in list(module.graph.nodes):
        respell = _RESPELLED.get(node.target)
        new = None if respell is None else respell(Build(module.graph, node, like=node), node)
        if new is not None:
            node.replace_all_uses_with(new)
            name = node.name
            module.graph.erase_node(node)
            new._rename(name)
    return program.next(finish(module), program.level)


def _filled(build: Build, node: fx.Node) -> fx.Node | None:
    given, fill, value = arguments(node), FILLS[node.target], value_of(node)
    fill = given["fill_value"] if fill is None else fill
    if not _is_number(fill):
        return None
    sizes = given["size"] if "size" in given else list(build.shape(node.args[0]))
    return build.call(aten.full.default, sizes, fill, dtype=value.dtype, device=value.device)


def _padded(build: Build, node: fx.Node) -> fx.Node | None:
    given = arguments(node)
    if given["mode"] != "constant":
        return None
    return build.call(aten.constant_pad_nd.default, given["self"], given["pad"],
                      given["value"] or 0.0)


_RESPELLED = {**dict.fromkeys(FILLS, _filled), aten.pad.default: _padded}


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float)


def needed(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that an output depends on by more than their sizes."""
    found: set[fx.Node] = set()
    pending = [graph.output_node()]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += [] if node.target in SIZES else node.all_input_nodes
    return found
