"""Products of matrices: with stored weights, and of the features of each token."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

from torch import fx

from bincompile.ops.binary_bases_linear import binary_bases_linear
from bincompile.ops.binary_linear import binary_linear
from bincompile.ops.fake_binary_linear import fake_binary_linear
from bincompile.ops.fake_bitorch_linear import fake_bitorch_linear
from bincompile.passes.graph import aten, is_tensor, value_of
from bincompile.passes.streaming import placing
from bincompile.passes.streaming.builder import StepBuilder
from bincompile.passes.streaming.facts import Facts, settled
from bincompile.passes.streaming.kinds import (
    BATCH,
    TIME,
    Axes,
    Axis,
    Indexed,
    Kind,
    Refused,
    Still,
    plain,
)
from bincompile.passes.streaming.regroup import is_plain
from bincompile.passes.streaming.rule import Rule

SUMS_TIME = "sums over time"


def operand(build: StepBuilder, arg: Any, node: fx.Node) -> Any:
    """A factor of a product: stored ones are read whole, whatever their sizes are."""
    if is_tensor(arg) and isinstance(build.kind(arg), Still):
        return placing.still(build, arg, build.kind(node))
    return build.read(arg, build.kind(node), build.extent(node))


def emit(node: fx.Node, build: StepBuilder) -> fx.Node:
    """The same call on the step's factors."""
    def read(arg: fx.Node) -> Any:
        return operand(build, arg, node)

    return build.call(node.target, *fx.node.map_arg(node.args, read),
                      **fx.node.map_arg(dict(node.kwargs), read))


def _with_features(node: fx.Node, facts: Facts) -> Kind | None:
    """Features of every token times a stored weight: (..., in) becomes (..., out)."""
    kind = settled(facts.kind(node.args[0]))
    weights = [a for a in node.all_input_nodes if a is not node.args[0]]
    if not all(isinstance(facts.kind(w), Still) for w in weights):
        raise Refused("multiplies with a weight that changes with time")
    if isinstance(kind, Still):
        return None
    if not is_plain(kind.axes[-1]):
        raise Refused(SUMS_TIME, by_window=True)
    found: Kind = kind.with_axes((*kind.axes[:-1], plain(facts.shape(node)[-1])))
    return found


def _axes_of(node: fx.Node, facts: Facts) -> Axes:
    return settled(facts.kind(node)).axes


def _product(left: fx.Node, right: fx.Node, facts: Facts) -> Kind:
    """matmul: (..., m, k) and (..., k, n), or vectors."""
    axes = [_axes_of(left, facts), _axes_of(right, facts)]
    inner = axes[0][-1], axes[1][-2 if len(axes[1]) > 1 else -1]
    if not all(map(is_plain, inner)):
        raise Refused(SUMS_TIME, by_window=True)
    lead = [axes[0][:-2], axes[1][:-2]]
    rows = axes[0][-2:-1]
    columns = axes[1][-1:] if len(axes[1]) > 1 else ()
    joined = _lead(left, right, lead, (rows, columns), facts)
    found: Kind = joined.with_axes((*joined.axes, *rows, *columns))
    return found


def _lead(left: fx.Node, right: fx.Node, lead: Sequence[Axes],
          own: Sequence[Axes], facts: Facts) -> Any:
    """The leading axes of a product, of the kind of the whole."""
    kinds = [settled(facts.kind(n)) for n in (left, right)]
    if any(isinstance(k, Indexed) and k.time_axis is not None
           and k.time_axis >= len(k.axes) - 2 for k in kinds):
        raise Refused("multiplies matrices of positions")
    time = [any(a.role == TIME for axis in axes for a in axis) for axes in (*lead, *own)]
    if sum((time[0] or time[1], time[2], time[3])) > 1:
        raise Refused("joins every token with every other outside attention", by_window=True)
    batch = [any(a.role == BATCH for axis in axes for a in axis) for axes in (*lead, *own)]
    if sum((batch[0] or batch[1], batch[2], batch[3])) > 1:
        raise Refused("joins rows of the batch")
    return facts.join([k.with_axes(axes) for k, axes in zip(kinds, lead, strict=True)])


def _matmul(node: fx.Node, facts: Facts) -> Kind:
    return _product(node.args[0], node.args[1], facts)


def _added(node: fx.Node, facts: Facts) -> Kind:
    """addmm, baddbmm: a product, and what is added to it."""
    added, left, right = node.args[:3]
    found = _product(left, right, facts)
    return facts.join([settled(facts.kind(added)), found])


def _einsum(node: fx.Node, facts: Facts) -> Kind:
    """Any product by letters: time may not be summed, nor meet itself."""
    inputs, output = letters(node)
    axes = _by_letter(node, inputs, facts)
    for letter, axis in axes.items():
        if letter not in output and not is_plain(axis):
            raise Refused(SUMS_TIME if any(a.role == TIME for a in axis)
                          else "sums over the rows of the batch", by_window=True)
    kinds = [settled(facts.kind(n)) for n in node.args[1]]
    aligned = [k.with_axes(tuple(axes[c] if c in part else () for c in output))
               for k, part in zip(kinds, inputs, strict=True)]
    found: Kind = facts.join(aligned)
    return found


def letters(node: fx.Node) -> tuple[list[str], str]:
    """The letters of each operand of an einsum and of its result, without dots."""
    equation, operands = node.args[0].replace(" ", ""), node.args[1]
    inputs, _, output = equation.partition("->")
    parts = inputs.split(",")
    if "->" not in equation:
        single = sorted(c for c in set(inputs) - set(",.") if inputs.count(c) == 1)
        output = ("..." if "." in inputs else "") + "".join(single)
    free = [c for c in string.ascii_letters if c not in equation]
    ranks = [value_of(t).ndim for t in operands]
    counts = [rank - len(part) + 3 if "..." in part else 0
              for rank, part in zip(ranks, parts, strict=True)]
    dots = "".join(free[:max(counts)])
    parts = [part.replace("...", dots[len(dots) - count:])
             for part, count in zip(parts, counts, strict=True)]
    return parts, output.replace("...", dots)


def _by_letter(node: fx.Node, inputs: list[str], facts: Facts) -> dict[str, Axis]:
    """What each letter's axis holds; time and the batch have one letter each."""
    axes: dict[str, Axis] = {}
    for part, tensor in zip(inputs, node.args[1], strict=True):
        if len(set(part)) < len(part):
            raise Refused("takes a diagonal")
        for letter, axis in zip(part, _axes_of(tensor, facts), strict=True):
            known = axes.get(letter, ())
            if known and axis and is_plain(known) != is_plain(axis):
                raise Refused("joins an axis of time or of the batch with one that is not",
                              by_window=True)
            axes[letter] = known or axis
    for role, what in ((TIME, "joins every token with every other outside attention"),
                       (BATCH, "joins rows of the batch")):
        if sum(any(a.role == role for a in axis) for axis in axes.values()) > 1:
            raise Refused(what, by_window=role == TIME)
    return axes


def _emit_einsum(node: fx.Node, build: StepBuilder) -> fx.Node:
    """The same products; what goes by index has its rows under the letter of the batch."""
    inputs, output = letters(node)
    kind, parts, operands = build.kind(node), [], []
    batch = None if kind.batch_axis is None else output[kind.batch_axis]
    time = None if kind.time_axis is None else output[kind.time_axis]
    for part, tensor in zip(inputs, node.args[1], strict=True):
        own = build.kind(tensor)
        if isinstance(own, Indexed):
            merged = kind.batch_axis is not None and len(kind.axes[kind.batch_axis]) > 1
            if build.extent(node) > 1 or time is None or merged or (batch or " ") in part:
                raise Refused("multiplies matrices of positions")
            operands.append(placing.by_index(build, tensor, kind))
            part = part if batch is None else part.replace(time, batch)
        else:
            operands.append(operand(build, tensor, node))
        parts.append(part)
    return build.call(aten.einsum.default, f"{','.join(parts)}->{output}", operands)


features = Rule((aten.linear.default, binary_linear.overload, binary_bases_linear.overload,
                 fake_binary_linear.overload, fake_bitorch_linear.overload),
                _with_features, emit)
matmul = Rule((aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default,
               aten.dot.default, aten.vdot.default), _matmul, emit)
added = Rule((aten.addmm.default, aten.baddbmm.default, aten.addmv.default), _added, emit)
einsum = Rule((aten.einsum.default,), _einsum, _emit_einsum)
