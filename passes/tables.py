"""Tables: what is stored and looked up in, who else reads it, and which indices may come."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from bincompile.passes.graph import SIZES, arguments, aten, is_tensor, shape_of, value_of
from bincompile.passes.patterns import Context, owner_of
from bincompile.program import attribute

VIEWS = (aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims,
         aten.expand.default, aten.permute.default, aten.transpose.int, aten.t.default,
         aten.mT.default, aten.flatten.using_ints, aten.unflatten.int)
PARTS = (aten.select.int, aten.slice.Tensor)
CASTS = (aten._to_copy.default, aten.to.dtype)
INDEX_DTYPES = (torch.int32, torch.int64)


def behind(node: fx.Node, passing: Sequence[Any] = (*VIEWS, *CASTS)) -> fx.Node:
    """The node that a value comes from, behind operators that only lay it out or cast it.

    `passing` are the targets that are passed, each to its first argument.
    """
    while node.op == "call_function" and node.target in passing:
        node = node.args[0]
    return node


def stored_behind(node: fx.Node, context: Context) -> tuple[fx.Node, ...]:
    """The stored tensors that a value is computed from; none if an input takes part in it."""
    if node in context.activations:
        return ()
    seen, pending = {node: None}, [node]
    while pending:
        for read in pending.pop().all_input_nodes:
            if read not in seen:
                seen[read] = None
                pending.append(read)
    return tuple(n for n in seen if n.op == "get_attr")


def is_table(node: Any, context: Context) -> bool:
    """Whether rows of this value are rows of a table: numbers that are stored, not indices."""
    if not is_tensor(node) or not len(shape_of(node)):
        return False
    value = value_of(node)
    return (value.dtype.is_floating_point or value.dtype.is_complex) \
        and bool(stored_behind(node, context))


def is_index(node: Any) -> bool:
    """Whether a value holds indices."""
    return is_tensor(node) and value_of(node).dtype in INDEX_DTYPES


def table_attrs(table: fx.Node, reader: fx.Node, context: Context) -> dict[str, Any]:
    """What a match says of its table: its stored name, and who reads the same tensor besides."""
    stored = stored_behind(table, context)
    if len(stored) != 1:
        return {"table": "", "shared": ()}
    others = (other for other in _readers(stored[0]) if other is not reader)
    return {"table": stored[0].target,
            "shared": tuple(dict.fromkeys(owner_of((n,)) or n.name for n in others))}


def _readers(stored: fx.Node) -> Iterator[fx.Node]:
    """What computes with a stored tensor, behind its views, parts and casts."""
    for user in stored.users:
        if user.target in (*VIEWS, *CASTS, *PARTS):
            yield from _readers(user)
        elif user.op == "call_function":
            yield user


def finite(table: fx.Node, context: Context) -> bool:
    """Whether all numbers behind a table are finite: 0 times any other is nan."""
    return all(bool(attribute(context.graph_module, n.target).isfinite().all())
               for n in stored_behind(table, context))


def wrapped(build: Any, indices: Any, rows: int) -> Any:
    """Indices with the negative ones counted from the end of a table."""
    shifted = build.call(aten.add.Tensor, indices, rows)
    return build.call(aten.where.self, build.call(aten.lt.Scalar, indices, 0), shifted, indices)


def never_negative(indices: Any, context: Context) -> bool:
    """Whether no index can be below 0, whatever the inputs are."""
    if not isinstance(indices, fx.Node):
        return isinstance(indices, int) and indices >= 0
    if not is_tensor(indices):
        return indices.target in SIZES
    if value_of(indices).dtype not in INDEX_DTYPES:
        return value_of(indices).dtype == torch.bool
    if indices.op == "get_attr":
        stored = attribute(context.graph_module, indices.target)
        return stored.numel() == 0 or bool(stored.min() >= 0)
    rule = _LOWEST.get(indices.target)
    return rule is not None and rule(arguments(indices), functools.partial(
        never_negative, context=context))


Rule = Callable[[Mapping[str, Any], Callable[[Any], bool]], bool]


def _all(*names: str) -> Rule:
    return lambda found, above: all(above(found[name]) for name in names)


def _always(found: Mapping[str, Any], above: Callable[[Any], bool]) -> bool:
    return True


def _from_start(found: Mapping[str, Any], above: Callable[[Any], bool]) -> bool:
    return above(found["start"]) and above(found.get("step", 1))


def _least(found: Mapping[str, Any], above: Callable[[Any], bool]) -> bool:
    return found["min"] is not None and above(found["min"])


def _each(found: Mapping[str, Any], above: Callable[[Any], bool]) -> bool:
    return all(map(above, found["tensors"]))


# When the values of an operator can't be below 0, by its arguments.
_LOWEST: dict[Any, Rule] = {
    **dict.fromkeys((*VIEWS, *CASTS, *PARTS, aten.repeat.default, aten.index.Tensor,
                     aten.index_select.default, aten.gather.default,
                     aten.amax.default, aten.amin.default, aten.cumsum.default, aten.flip.default,
                     aten.sum.default, aten.sum.dim_IntList), _all("self")),
    aten.add.Tensor: _all("self", "other", "alpha"),
    **dict.fromkeys((aten.mul.Tensor, aten.floor_divide.default,
                     aten.minimum.default, aten.where.self, aten.where.ScalarOther), _all(
                         "self", "other")),
    **dict.fromkeys((aten.remainder.Scalar, aten.remainder.Tensor), _all("other")),
    **dict.fromkeys((aten.arange.default, aten.argmax.default, aten.argmin.default,
                     aten.abs.default, aten.one_hot.default, aten.zeros.default,
                     aten.zeros_like.default, aten.ones.default, aten.ones_like.default,
                     aten.bucketize.Tensor, aten.searchsorted.Tensor), _always),
    **dict.fromkeys((aten.arange.start, aten.arange.start_step), _from_start),
    **dict.fromkeys((aten.clamp.default, aten.clamp_min.default), _least),
    **dict.fromkeys((aten.cat.default, aten.stack.default), _each),
}
