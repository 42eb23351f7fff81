"""Narrow: functions of single numbers run on tokens without axes of size 1 behind their features.

A convolution has its channels before time, and time is of size 1 in a step: what follows it is
written on rows of features again, which is what row programs are made of.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from bincompile.passes.graph import Build, arguments, aten, is_tensor, shape_of
from bincompile.passes.streaming.builder import StepBuilder
from bincompile.passes.streaming.kinds import expression
from bincompile.passes.streaming.rules.pointwise import MANY, UNARY, overloads

POINTWISE = frozenset(overloads((*UNARY, *MANY)))
NORMS = (aten._native_batch_norm_legit_no_training.default, aten.batch_norm.default)


def narrow(build: StepBuilder) -> None:
    """Rewrite the step graph in place."""
    for node in list(build.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in NORMS:
            _normed(node, build)
        elif node.target is aten.glu.default or (node.target in POINTWISE and is_tensor(node)):
            _on_features(node, build)


def _dropped(shape: tuple[Any, ...]) -> list[int]:
    """The axes of size 1 that are left out, where the last one is such."""
    if len(shape) < 2 or not _is_one(shape[-1]):
        return []
    return [i for i, size in enumerate(shape) if i and _is_one(size)]


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _without(arg: fx.Node, rank: int, dropped: list[int], new: Build,
             build: StepBuilder) -> fx.Node | None:
    """An argument without these axes of the result; None where they are of other sizes."""
    shape, missing = shape_of(arg), rank - len(shape_of(arg))
    if missing < 0 or any(not _is_one(shape[i - missing]) for i in dropped if i >= missing):
        return None
    kept = [shape[i - missing] for i in range(missing, rank) if i not in dropped]
    sizes = _arguments(kept, build)
    return None if sizes is None else new.call(aten.reshape.default, arg, sizes)


def _arguments(sizes: Any, build: StepBuilder) -> list[Any] | None:
    """Sizes as arguments: numbers, and the number of rows."""
    rows = expression(build.row_count)
    if any(not isinstance(s, int) and expression(s) != rows for s in sizes):
        return None
    return [s if isinstance(s, int) else build.count for s in sizes]


def _on_features(node: fx.Node, build: StepBuilder) -> None:
    shape, given = shape_of(node), dict(node.kwargs)
    dropped, args = _dropped(shape), list(node.args)
    wanted = _arguments(shape, build)
    if not dropped or wanted is None or any(is_tensor(v) for v in given.values()):
        return
    if node.target is aten.glu.default:
        axis = arguments(node)["dim"] % len(shape)
        if axis in dropped:
            return
    new = Build(build.graph, node, like=node)
    new.mode = build.mode
    tensors = {a: _without(a, len(shape), dropped, new, build) for a in args if is_tensor(a)}
    if None in tensors.values():
        return
    if node.target is aten.glu.default:
        made = _gated(tensors[args[0]], axis - sum(i < axis for i in dropped), new)
    else:
        made = new.call(node.target, *(tensors.get(a, a) if isinstance(a, fx.Node) else a
                                       for a in args), **given)
    node.replace_all_uses_with(new.call(aten.reshape.default, made, wanted))
    build.graph.erase_node(node)


def _gated(x: fx.Node | None, axis: int, new: Build) -> fx.Node:
    """One half times the sigmoid of the other, in operators that row programs have."""
    assert x is not None
    half = shape_of(x)[axis] // 2
    first, second = (new.call(aten.slice.Tensor, x, axis, start, start + half)
                     for start in (0, half))
    return new.call(aten.mul.Tensor, first, new.call(aten.sigmoid.default, second))


def _normed(node: fx.Node, build: StepBuilder) -> None:
    """A batch norm with stored statistics as what it does to every number."""
    given, several = arguments(node), not is_tensor(node)
    x = given["input"]
    dropped, wanted = _dropped(shape_of(x)), _arguments(shape_of(x), build)
    read = [n for n in node.users if n.target is operator.getitem] if several else [node]
    if given.get("training") or wanted is None or (several and (
            len(read) != len(node.users) or any(n.args[1] != 0 and n.users for n in read))):
        return
    if 1 in dropped or len(shape_of(x)) - len(dropped) != 2:
        return
    new = Build(build.graph, node, like=node)
    new.mode = build.mode
    made = _without(x, len(shape_of(x)), dropped, new, build)
    if made is None:
        return
    scale = new.call(aten.rsqrt.default, new.call(aten.add.Tensor, given["running_var"],
                                                  given["eps"]))
    if given["weight"] is not None:
        scale = new.call(aten.mul.Tensor, scale, given["weight"])
    made = new.call(aten.mul.Tensor, new.call(aten.sub.Tensor, made, given["running_mean"]), scale)
    if given["bias"] is not None:
        made = new.call(aten.add.Tensor, made, given["bias"])
    made = new.call(aten.reshape.default, made, wanted)
    for user in read:
        if user is node or user.args[1] == 0:
            user.replace_all_uses_with(made)
        if user is not node:
            build.graph.erase_node(user)
    build.graph.erase_node(node)
