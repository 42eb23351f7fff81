"""Binarise: float weights become bits. Lossy, only on request, only as far as the guard allows.

A weight W becomes sign(W) times its mean |W| of each row, which is the closest such matrix
(XNOR-Net, arXiv:1603.05279).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any

from torch import fx

from bincompile.config import Binary
from bincompile.ops.binary_embedding import binary_embedding
from bincompile.ops.binary_linear import binary_linear
from bincompile.ops.embedding import embedding
from bincompile.ops.pack_signs import pack_signs
from bincompile.passes.graph import Build, aten, copy_module, finish, shape_of
from bincompile.passes.matching import stored_sources
from bincompile.passes.patterns import Context, owner_of
from bincompile.passes.patterns.binary import packed_linear
from bincompile.program import Program, target_name
from bincompile.record import Rewrite, origin


@dataclasses.dataclass(frozen=True)
class Site:
    """A layer that can be made binary: the node that reads its float weight."""

    node: str
    path: str
    operator: str
    bytes: int


def sites(program: Program, binary: Binary) -> list[Site]:
    """The layers that `binary` asks for, in the order in which they run."""
    context = Context.of(program)
    return [Site(node.name, path, operator, sum(n.meta["val"].nbytes for n in sources))
            for node, operator, weight in _weights(program, binary)
            if weight not in context.activations and (sources := stored_sources([weight], context))
            and binary.covers(path := owner_of((node,)))]


def _weights(program: Program, binary: Binary) -> Iterator[tuple[fx.Node, str, fx.Node]]:
    for node in program.graph.nodes:
        if binary.linear and node.target is aten.linear.default \
                and len(shape_of(node.args[1])) == 2:
            yield node, binary_linear.name, node.args[1]
        elif binary.embedding and node.target is embedding.overload:
            yield node, binary_embedding.name, node.args[0]


def binarise(program: Program, binary: Binary, chosen: Collection[Site]) -> Program:
    """The program with the chosen layers binary."""
    module, copies = copy_module(program.graph_module)
    originals, rewrites = {n.name: n for n in program.graph.nodes}, list(program.rewrites)
    replaced = set()
    for site in chosen:
        node = copies[originals[site.node]]
        build = Build(module.graph, node, like=node)
        result = (_linear if site.operator == binary_linear.name else _embedding)(
            build, node, binary)
        node.replace_all_uses_with(result)
        copies[originals[site.node]] = result
        replaced.add(site.node)
        rewrites.append(Rewrite(target_name(result.target).removeprefix("bincompile."), site.path,
                                "lossy", bytes_before=site.bytes, node=result.name,
                                replaces=origin(site.node, program.rewrites)))
    kept = tuple(r for r in rewrites if r.node not in replaced)
    return program.next(finish(module), "binary", rewrites=kept)


def _linear(build: Build, node: fx.Node, binary: Binary) -> fx.Node:
    x, weight, bias = (*node.args, None)[:3]
    activation = "binary" if binary.precision == "w1a1" else "float"
    return packed_linear(build, x, weight, _row_means(build, weight), bias,
                         shape_of(weight)[1], activation)


def _embedding(build: Build, node: fx.Node, binary: Binary) -> fx.Node:
    table, indices = node.args
    packed = build.call(pack_signs.overload, table)
    return build.call(binary_embedding.overload, indices, packed, _row_means(build, table),
                      shape_of(table)[1])


def _row_means(build: Build, weight: Any) -> fx.Node:
    return build.call(aten.mean.dim, build.call(aten.abs.default, weight), [1])
