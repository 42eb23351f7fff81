"""Trails: the layout operators that scores went through, and how other tensors follow or return.

A trail is a list of moves. Each permutes axes, or regroups neighbouring axes as a reshape does; the
groups are kept, so that a tensor that broadcasts needs no more than the regrouped axes in full.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import CleanDiv, FloorDiv

from bincompile.passes.graph import aten, shape_of, value_of
from bincompile.passes.sizes import equal, product

Groups = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


@dataclasses.dataclass(frozen=True)
class Move:
    """A change of layout: axis i comes from axis `order[i]`, or `groups` of axes become others."""

    before: tuple[Any, ...]
    after: tuple[Any, ...]
    order: tuple[int, ...] | None = None
    groups: Groups = ()

    @property
    def inverse(self) -> Move:
        """The move back."""
        order = None if self.order is None else tuple(
            self.order.index(i) for i in range(len(self.order)))
        return Move(self.after, self.before, order, tuple((b, a) for a, b in self.groups))

    @property
    def idle(self) -> bool:
        """Whether it leaves every axis where it is."""
        if self.order is not None:
            return self.order == tuple(range(len(self.order)))
        return all(len(a) == len(b) == 1 for a, b in self.groups)

    def then(self, other: Move) -> Move | None:
        """Both moves as one; None if they are of different kinds."""
        if self.order is not None and other.order is not None:
            order = tuple(self.order[i] for i in other.order)
            return Move(self.before, other.after, order)
        if self.order is None and other.order is None:
            return regrouping(self.before, other.after)
        return None

    def labels(self, before: tuple[str | None, ...]) -> tuple[str | None, ...]:
        """What the axes are called afterwards; None for those that are mixed or new."""
        if self.order is not None:
            return tuple(before[i] for i in self.order)
        found: list[str | None] = [None] * len(self.after)
        for old, new in self.groups:
            if len(old) == len(new) == 1:
                found[new[0]] = before[old[0]]
        return tuple(found)


def permutation(before: tuple[Any, ...], order: Iterable[int]) -> Move:
    """The move of a permute."""
    order = tuple(i % len(before) for i in order)
    return Move(before, tuple(before[i] for i in order), order)


def regrouping(before: tuple[Any, ...], after: tuple[Any, ...]) -> Move:
    """The move of a reshape: the smallest groups of axes that hold the same elements."""
    groups, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        old, new = _next_group(before[i:], after[j:])
        groups.append((tuple(range(i, i + old)), tuple(range(j, j + new))))
        i, j = i + old, j + new
    return Move(before, after, None, tuple(groups))


def _next_group(before: tuple[Any, ...], after: tuple[Any, ...]) -> tuple[int, int]:
    if before and after and equal(before[0], after[0]):
        return 1, 1
    if before and equal(before[0], 1):
        return 1, 0
    if after and equal(after[0], 1):
        return 0, 1
    for total in range(3, len(before) + len(after)):
        for old in range(1, total):
            if old <= len(before) and total - old <= len(after) and equal(
                    product(before[:old]), product(after[:total - old])):
                return old, total - old
    return len(before), len(after)


def follow(build: Any, tensor: Any, moves: Iterable[Move], sizes: Sizes) -> Any:
    """A tensor after these moves; axes behind those of the moves are carried along."""
    for move in moves:
        tensor = _permuted(build, tensor, move) if move.order is not None else _regrouped(
            build, tensor, move, sizes)
    return tensor


def _permuted(build: Any, tensor: Any, move: Move) -> Any:
    order = [*(move.order or ()), *range(len(move.before), len(_shape(tensor)))]
    return tensor if order == sorted(order) else build.call(aten.permute.default, tensor, order)


def _regrouped(build: Any, tensor: Any, move: Move, sizes: Sizes) -> Any:
    shape = _shape(tensor)
    extra = range(len(move.before), len(shape))
    one = [isinstance(s, int) and s == 1 for s in shape]
    full = {i for old, new in move.groups if (len(old), len(new)) != (1, 1)
            and not all(one[i] for i in old) for i in old}
    if not full:
        return _with_ones(build, tensor, move)
    if any(one[i] for i in full):
        wanted = [sizes(move.before[i]) if i in full else -1 for i in range(len(move.before))]
        tensor = build.call(aten.expand.default, tensor, [*wanted, *(-1 for _ in extra)])
    after: list[Any] = []
    for old, new in move.groups:
        if len(old) == len(new) == 1:
            after.append(build.size(tensor, old[0]))
        else:
            after += [sizes(move.after[j]) if old and old[0] in full else 1 for j in new]
    after += [build.size(tensor, i) for i in extra]
    return build.call(aten.reshape.default, tensor, after)


def _with_ones(build: Any, tensor: Any, move: Move) -> Any:
    """Axes of size 1 dropped and added."""
    dropped = [i for old, new in move.groups if (len(old), len(new)) != (1, 1) for i in old]
    added = [j for old, new in move.groups if (len(old), len(new)) != (1, 1) for j in new]
    if dropped:
        tensor = build.call(aten.squeeze.dims, tensor, dropped)
    for j in added:
        tensor = build.call(aten.unsqueeze.default, tensor, j)
    return tensor


def _shape(tensor: Any) -> tuple[Any, ...]:
    return shape_of(tensor) if isinstance(tensor, fx.Node) else tuple(tensor.shape)


# Sizes: a symbolic size is written down from those of tensors at hand.

Plan = Mapping[sympy.Symbol, tuple[str, int | None, int, int]]


class Sizes:
    """Writes sizes through a build, from a plan: symbol -> (role, axis, factor, offset)."""

    def __init__(self, build: Any, values: Mapping[str, Any], plan: Plan) -> None:
        self.build, self.values, self.plan = build, values, plan

    def __call__(self, size: Any) -> Any:
        return size if isinstance(size, int) else self._write(size.node.expr)

    def _write(self, expression: sympy.Expr) -> Any:
        if expression.is_Integer:
            return int(expression)
        if expression.is_Symbol:
            role, axis, factor, offset = self.plan[expression]
            value = self.values[role]
            found = value if axis is None else self.build.size(value, axis)
            found = self._apply(operator.sub, found, offset) if offset else found
            return self._apply(operator.floordiv, found, factor) if factor != 1 else found
        parts = [self._write(a) for a in expression.args]
        total = parts[0]
        for part in parts[1:]:
            total = self._apply(_ARITHMETIC[type(expression)], total, part)
        return total

    def _apply(self, function: Any, left: Any, right: Any) -> Any:
        both = isinstance(left, int) and isinstance(right, int)
        return function(left, right) if both else self.build.call(function, left, right)


_ARITHMETIC = {sympy.Add: operator.add, sympy.Mul: operator.mul, FloorDiv: operator.floordiv,
               CleanDiv: operator.floordiv, sympy.Pow: operator.pow}


def plan_of(inputs: Mapping[str, fx.Node],
            moves: Iterable[Move]) -> tuple[Plan, dict[str, fx.Node]]:
    """How to write every size of these moves, and the nodes that are read for it beside `inputs`.

    Raises KeyError for a size that nothing in the graph tells.
    """
    wanted = [s.node.expr for m in moves for s in (*m.before, *m.after)
              if isinstance(s, torch.SymInt)]
    symbols = {s for expression in wanted for s in expression.free_symbols}
    plan: dict[sympy.Symbol, tuple[str, int | None, int, int]] = {}
    for role, node in inputs.items():
        value = value_of(node)
        for axis, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            _learn(plan, size, role, axis)
    extra: dict[str, fx.Node] = {}
    if symbols - set(plan):
        for node in next(iter(inputs.values())).graph.nodes:
            size = value_of(node)
            if isinstance(size, torch.SymInt) and size.node.expr in symbols - set(plan):
                extra[f"size_{node.name}"] = node
                _learn(plan, size, f"size_{node.name}", None)
    for expression in wanted:
        for part in sympy.preorder_traversal(expression):
            if not (part.is_Integer or type(part) in _ARITHMETIC or part in plan):
                raise KeyError(str(part))
    return plan, extra


def _learn(plan: dict[sympy.Symbol, tuple[str, int | None, int, int]], size: Any, role: str,
           axis: int | None) -> None:
    if not isinstance(size, torch.SymInt):
        return
    expression = size.node.expr
    if len(expression.free_symbols) != 1:
        return
    symbol = next(iter(expression.free_symbols))
    factor = expression.coeff(symbol)
    offset = expression - factor * symbol
    known = plan.get(symbol)
    if factor.is_Integer and factor > 0 and offset.is_Integer and (
            known is None or (known[2], known[3]) != (1, 0)):
        plan[symbol] = (role, axis, int(factor), int(offset))
