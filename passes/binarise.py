"""Binarise: float weights become bits. Lossy, only on request, only as far as the guard allows.

A weight W becomes sign(W) times its mean |W| of each row, which is the closest such matrix
(XNOR-Net, arXiv:1603.05279), or a sum of several such matrices, fitted by least squares
(arXiv:1802.00150). Layers that share a weight share its bits; one of them that stays
float keeps the float weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator

from torch import fx

from bincompile.config import Binary
from bincompile.ops.binary_attention import binary_attention
from bincompile.ops.binary_bases_linear import binary_bases_linear
from bincompile.ops.binary_embedding import binary_embedding
from bincompile.ops.binary_embedding_bag import binary_embedding_bag
from bincompile.ops.binary_linear import binary_linear
from bincompile.ops.embedding import embedding
from bincompile.ops.embedding_bag import embedding_bag
from bincompile.ops.fit_bases import fit_bases
from bincompile.ops.pack_signs import pack_signs
from bincompile.passes.binarise_attention import (
    asked,
    attention_refusals,
    binary_reason,
    emit_attention,
)
from bincompile.passes.graph import Build, aten, copy_module, finish, shape_of, value_of
from bincompile.passes.matching import stored_sources
from bincompile.passes.patterns import Context, owner_of
from bincompile.passes.tables import wrapped
from bincompile.program import Program, target_name
from bincompile.record import Rewrite, origin


@dataclasses.dataclass(frozen=True)
class Site:
    """A layer that can be made binary: the node that reads its float weight, or an attention."""

    node: str
    path: str
    operator: str
    bytes: int


def sites(program: Program, binary: Binary) -> list[Site]:
    """The layers that `binary` asks for, in the order in which they run."""
    context = Context.of(program)
    found = [Site(node.name, path, operator, sum(n.meta["val"].nbytes for n in sources))
             for node, operator, weight in _weights(program, binary)
             if weight not in context.activations and (sources := stored_sources([weight], context))
             and binary.covers(path := owner_of((node,)))]
    found += [Site(node.name, path, binary_attention.name, 0)
              for node, path in asked(program, binary) if binary_reason(node) is None]
    order = {node.name: place for place, node in enumerate(program.graph.nodes)}
    return sorted(found, key=lambda site: order[site.node])


def _weights(program: Program, binary: Binary) -> Iterator[tuple[fx.Node, str, fx.Node]]:
    for node in program.graph.nodes:
        if binary.linear and node.target is aten.linear.default \
                and len(shape_of(node.args[1])) == 2:
            yield node, binary_linear.name, node.args[1]
        elif binary.embedding and node.target in TABLES:
            table = value_of(node.args[0])
            if table.dtype.is_floating_point and table.shape[1] > binary.bases:  # else no smaller
                yield node, TABLES[node.target], node.args[0]


TABLES = {embedding.overload: binary_embedding.name,
          embedding_bag.overload: binary_embedding_bag.name}


def binarise(program: Program, binary: Binary, chosen: Collection[Site]) -> Program:
    """The program with the chosen layers binary."""
    module, copies = copy_module(program.graph_module)
    originals, rewrites = {n.name: n for n in program.graph.nodes}, list(program.rewrites)
    replaced, packed = set(), dict[fx.Node | None, tuple[fx.Node, fx.Node]]()
    for site in chosen:
        node = copies[originals[site.node]]
        weight = _weight(node, site)
        if weight is not None and weight not in packed:  # before the first of all that read it
            packed[weight] = _packed(Build(module.graph, weight.next, like=node), weight,
                                     binary.bases)
        build = Build(module.graph, node, like=node)
        result = EMIT[site.operator](build, node, *packed.get(weight, ()), binary)
        node.replace_all_uses_with(result)
        copies[originals[site.node]] = result
        replaced.add(site.node)
        rewrites.append(Rewrite(target_name(result.target).removeprefix("bincompile."), site.path,
                                "lossy", bytes_before=site.bytes, node=result.name,
                                replaces=origin(site.node, program.rewrites)))
    kept = tuple(r for r in rewrites if r.node not in replaced)
    return program.next(finish(module), "binary", rewrites=kept, refusals=(
        *program.refusals, *attention_refusals(program, binary)))


def _weight(node: fx.Node, site: Site) -> fx.Node | None:
    """The float weight that a layer reads, if it has one."""
    place = {binary_linear.name: 1, binary_attention.name: None}.get(site.operator, 0)
    return None if place is None else node.args[place]


def _packed(build: Build, weight: fx.Node, bases: int) -> tuple[fx.Node, fx.Node]:
    """The signs of a weight and their scales: the mean of magnitudes, or of several bases."""
    if bases > 1:
        both = build.call(fit_bases.overload, weight, bases)
        return build.item(both, 0), build.item(both, 1)
    return (build.call(pack_signs.overload, weight),
            build.call(aten.mean.dim, build.call(aten.abs.default, weight), [1]))


ACTIVATIONS = {"w1a1": "binary", "w1a8": "int8", "w1a32": "float"}


def _linear(build: Build, node: fx.Node, signs: fx.Node, scale: fx.Node,
            binary: Binary) -> fx.Node:
    x, weight, bias = (*node.args, None)[:3]
    activation, features = ACTIVATIONS[binary.precision], shape_of(weight)[1]
    if binary.bases > 1:
        return build.call(binary_bases_linear.overload, x, signs, scale, bias, features,
                          activation, None)
    return build.call(binary_linear.overload, x, signs, scale, bias, features, activation, None,
                      None)


def _embedding(build: Build, node: fx.Node, signs: fx.Node, scale: fx.Node,
               binary: Binary) -> fx.Node:
    found = embedding.bind(node.args, dict(node.kwargs))
    rows, columns = shape_of(found["table"])
    indices = found["indices"]
    if found["wrap"]:
        indices = wrapped(build, indices, rows)
    return build.call(binary_embedding.overload, indices, signs, scale, columns)


def _bag(build: Build, node: fx.Node, signs: fx.Node, scale: fx.Node, binary: Binary) -> fx.Node:
    found = embedding_bag.bind(node.args, dict(node.kwargs))
    return build.call(binary_embedding_bag.overload, signs, found["indices"], found["offsets"],
                      scale, shape_of(found["table"])[1], found["mode"], found["weights"],
                      found["include_last_offset"], found["padding_idx"])


EMIT: dict[str, Callable[..., fx.Node]] = {
    binary_linear.name: _linear, binary_embedding.name: _embedding,
    binary_embedding_bag.name: _bag, binary_attention.name: emit_attention}
