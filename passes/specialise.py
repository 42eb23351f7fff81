"""Specialise: a mask that sizes alone settle becomes an attribute, which fused kernels run faster.

A mask that keeps every key is left out, and one that is causal from the top left, and hides with
-inf or the least number of its dtype, becomes `causal=True`. Both are proven like a match: the
subgraph with the mask beside the operator without it, in float64 and at several sizes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from bincompile.ops import operator_of
from bincompile.ops.attention import attention
from bincompile.passes.graph import copy_module, finish, is_tensor, shape_of, value_of
from bincompile.passes.mask_graph import MaskGraph
from bincompile.passes.masks import Kept, Mask, verdict
from bincompile.passes.patterns import Candidate, Context, owner_of
from bincompile.passes.sizes import equal, symbols
from bincompile.passes.validate import signature_of, validate
from bincompile.program import Program
from bincompile.record import Evidence

MASKS = ("bias", "mask", "late_bias")
CAUSAL = Kept(after=0)

Arguments = dict[str, Any]


def specialise(program: Program) -> Program:
    """The program with masks that follow from sizes alone as attributes of their attention."""
    context, shared = Context.of(program), dict[str, Evidence | str]()
    changed: dict[fx.Node, Arguments] = {}
    told = Counter[str]()
    for node in program.graph.nodes:
        if operator_of(node.target) is not attention:
            continue
        before = attention.bind(node.args, dict(node.kwargs))
        after, what = _settled(before, context)
        if not what or not _proven(node, after, context, shared):
            continue
        changed[node] = after
        told[what] += 1
    if not changed:
        return program
    module, copies = copy_module(program.graph_module)
    for node, after in changed.items():
        _rewrite(copies[node], fx.node.map_arg(after, copies.__getitem__))
    notes = tuple(f"{count} attention{'s' * (count > 1)}: {what}" for what, count in told.items())
    return program.next(finish(module), "canonical", notes=(*program.notes, *notes))


def _settled(given: Arguments, context: Context) -> tuple[Arguments, str]:
    """The arguments without the masks that sizes settle, and what was done; empty if nothing."""
    kept = {name: _kept(name, given, context) for name in MASKS if given[name] is not None}
    idle = [name for name, found in kept.items() if found == Kept()]
    past = [name for name, found in kept.items() if found is not None
            and dataclasses.replace(found, corner=None) == CAUSAL and found.causal]
    if len(idle) + len(past) < len(kept):
        past = []  # a bias stays, and with it the kernel that reads one
    if not idle and not past:
        return given, ""
    after = {**given, **dict.fromkeys((*idle, *past)), "causal": given["causal"] or bool(past)}
    if after["mask"] is None:
        after["fill"] = None
    return after, ("a causal mask became an attribute" if past
                   else "a mask that keeps every key is left out")


def _kept(name: str, given: Arguments, context: Context) -> Kept | None:
    """What a mask keeps, if sizes settle it and what it hides has no weight at all."""
    node, query, key = given[name], given["query"], given["key"]
    rank = len(shape_of(query))
    lead = shape_of(query)[:-2]
    sizes = shape_of(node)
    if rank < 2 or len(sizes) > rank or not all(
            equal(s, 1) or equal(s, lead[axis - len(sizes) + rank])
            for axis, s in enumerate(sizes[:-2])):
        return None
    mask = Mask(node, (rank, rank - 2, rank - 1), (shape_of(query)[-2], shape_of(key)[-2]))
    graph = MaskGraph.of(node, context)
    if graph is None or graph.inputs:
        return None
    least = torch.finfo(value_of(query).dtype).min
    if mask.boolean:
        hides = given["fill"] is None or given["fill"] <= least
    else:
        values = graph.at(symbols([*graph.sources, *mask.tokens]))(unread)
        hides = values is not None and bool(((values == 0) | (values <= least)).all())
    return verdict(mask, context) if hides else None


def unread(dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    """A value for an input whose values don't matter."""
    return torch.zeros(shape, dtype=dtype)


def _proven(node: fx.Node, after: Arguments, context: Context,
            shared: dict[str, Evidence | str]) -> bool:
    outputs = tuple(n for n in node.users if is_tensor(n) and n.users)
    inputs = {name: arg for name, arg in after.items() if isinstance(arg, fx.Node)}

    def emit(build: Any, values: Mapping[str, Any]) -> tuple[Any, ...]:
        args, kwargs = _call({**after, **values})
        pair = build.call(attention.overload, *args, **kwargs)
        return tuple(build.item(pair, n.args[1]) for n in outputs)

    candidate = Candidate("attention", node, inputs, outputs, emit, {}, owner_of((node,)))
    text = f"{signature_of(candidate, context.graph_module)}\n{dict(_plain(after))}"
    if text not in shared:
        shared[text] = validate(candidate, context.graph_module)
    return isinstance(shared[text], Evidence)


def _plain(given: Arguments) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in given.items() if not isinstance(value, fx.Node))


def _call(given: Arguments) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments as graphs hold them: defaults are left out."""
    schema = attention.overload._schema.arguments
    args = tuple(given[a.name] for a in schema if not a.has_default_value())
    return args, {a.name: given[a.name] for a in schema
                  if a.has_default_value() and given[a.name] != a.default_value}


def _rewrite(node: fx.Node, after: Arguments) -> None:
    node.args, node.kwargs = _call(after)
