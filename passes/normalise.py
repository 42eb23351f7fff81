"""Normalise: the same meaning in one spelling.

Under `run_decompositions({})` copies and dropout in eval mode are `clone`; views may become
reshapes; casts to the dtype that a value already has do nothing. A softmax written out as
exp(x - max) / sum is the operator again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

from torch import fx

from bincompile.passes.graph import (
    SIZES,
    Build,
    arguments,
    aten,
    copy_module,
    finish,
    is_tensor,
    number,
    shape_of,
    value_of,
)
from bincompile.program import Program

IDENTITIES = (aten.clone.default, aten.contiguous.default, aten.alias.default,
              aten.detach.default, aten.lift_fresh.default, aten.lift_fresh_copy.default)
VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
# Operators that may give back the memory of what they read though their schema is silent.
QUIET_VIEWS = (*VIEWS, aten.einsum.default)
# What reads memory as it lies, so that a copy before it is no identity.
BY_MEMORY = (aten.view_as_complex.default, aten.view.dtype, aten.as_strided.default)
PERMUTES = (aten.transpose.int, aten.permute.default, aten.t.default, aten.mT.default)


def normalise(program: Program) -> Program:
    """The program in normal spelling."""
    module, _ = copy_module(program.graph_module)
    simplify(module)
    return program.next(finish(module), "normal")


def simplify(module: fx.GraphModule) -> None:
    """Apply every rule to every node once, in order; outputs have memory of their own."""
    for node in list(module.graph.nodes):
        for rule in RULES:
            kept = rule(module, node)
            if kept is not None:
                node.replace_all_uses_with(kept)
                break
    detach_outputs(module)


def _drop_identity(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    if node.target in IDENTITIES:
        return None if _strides_matter(node) else node.args[0]
    if node.target is aten.dropout.default and node.args[2] is False:
        return node.args[0]
    return None


def _strides_matter(node: fx.Node) -> bool:
    """Whether something that works on memory as it lies reads a copy, directly or as a view."""
    pending = list(node.users)
    while pending:
        user = pending.pop()
        if user.target in BY_MEMORY:
            return True
        if user.op == "call_function" and user.target not in SIZES and _aliases(user):
            pending += user.users
    return False


def _drop_assertion(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    if node.target is aten._assert_tensor_metadata.default:
        module.graph.erase_node(node)
    return None


def _drop_cast(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    casts = (aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.type_as.default)
    if node.target not in casts or not is_tensor(node.args[0]):
        return None
    before, after = value_of(node.args[0]), value_of(node)
    same = before.dtype == after.dtype and before.device == after.device
    return node.args[0] if same else None


def _type_as(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """A cast to the dtype of another tensor is a cast to a dtype."""
    if node.target is aten.type_as.default \
            and value_of(node.args[0]).device == value_of(node).device:
        node.target, node.args = aten._to_copy.default, node.args[:1]
        node.kwargs = {"dtype": value_of(node).dtype}
    return None


def _view_to_reshape(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    if node.target in VIEWS:
        node.target = aten.reshape.default
    return None


def _whole_softmax(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """exp(x - max(x, d)) / sum(exp, d) is softmax(x, d): both are nan on rows of -inf alone."""
    if node.target is not aten.div.Tensor or not all(map(is_tensor, node.args)):
        return None
    top, total = node.args
    if top.target is not aten.exp.default or total.target is not aten.sum.dim_IntList:
        return None
    sums, shifted = arguments(total), top.args[0]
    if sums["self"] is not top or len(sums["dim"]) != 1 or not sums["keepdim"]:
        return None
    if shifted.target is not aten.sub.Tensor or len(shifted.args) != 2:
        return None
    scores, greatest = shifted.args
    axis = sums["dim"][0] % len(shape_of(scores)) if is_tensor(scores) else None
    if axis is None or maximum_of(greatest) != (scores, axis):
        return None
    with module.graph.inserting_before(node):
        whole = module.graph.call_function(aten.softmax.int, (scores, axis))
    whole.meta = dict(node.meta)
    return whole


def _stable_softmax(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """softmax(x - max(x, d), d) is softmax(x, d), which takes the maximum off by itself."""
    if node.target not in (aten.softmax.int, aten._softmax.default):
        return None
    shifted = node.args[0]
    if shifted.target is not aten.sub.Tensor or len(shifted.args) != 2 or shifted.kwargs:
        return None
    axis = node.args[1] % len(shape_of(node))
    if maximum_of(shifted.args[1]) == (shifted.args[0], axis):
        node.args = (shifted.args[0], *node.args[1:])
    return None


def maximum_of(node: fx.Node) -> tuple[fx.Node, int] | None:
    """(x, d) where the node is the maximum of x along d, kept as an axis of size 1."""
    if not isinstance(node, fx.Node):
        return None
    if node.target is operator.getitem and node.args[1] == 0 \
            and node.args[0].target is aten.max.dim:
        node = node.args[0]
    if node.target not in (aten.amax.default, aten.max.dim):
        return None
    found = arguments(node)
    dims = found["dim"] if isinstance(found["dim"], list | tuple) else [found["dim"]]
    if not found["keepdim"] or len(dims) != 1:
        return None
    return found["self"], dims[0] % len(shape_of(found["self"]))


def _whole_einsum(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """An einsum of three or more tensors as products of two, in the order in which they stand."""
    if node.target is not aten.einsum.default or len(node.args[1]) < 3 or "." in node.args[0] \
            or "->" not in node.args[0]:
        return None
    inputs, output = node.args[0].replace(" ", "").split("->")
    (labels, *parts), (whole, *tensors) = inputs.split(","), node.args[1]
    build = Build(module.graph, node, like=node)
    for index, (part, tensor) in enumerate(zip(parts, tensors, strict=True), 1):
        last = index == len(parts)
        needed = set(output).union(*parts[index:])
        kept = output if last else "".join(
            dict.fromkeys(a for a in labels + part if a in needed))
        if set(part) <= set(labels) and sorted(kept) == sorted(labels):
            kept, whole = labels, build.call(aten.mul.Tensor, whole,
                                             _aligned(build, tensor, part, labels))
            if last and labels != output:
                whole = build.call(aten.permute.default, whole, [labels.index(a) for a in output])
        else:
            whole = build.call(aten.einsum.default, f"{labels},{part}->{kept}", [whole, tensor])
        labels = kept
    return whole


def _aligned(build: Build, tensor: fx.Node, part: str, labels: str) -> fx.Node:
    """A tensor with axes `part` so that it broadcasts over axes `labels`."""
    order = sorted(range(len(part)), key=lambda i: labels.index(part[i]))
    if order != sorted(order):
        tensor = build.call(aten.permute.default, tensor, order)
    for axis, label in enumerate(labels):
        if label not in part:
            tensor = build.call(aten.unsqueeze.default, tensor, axis)
    return tensor


def _undone_permute(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """A permutation of axes that undoes the one before it."""
    outer = _order(node)
    inner = _order(node.args[0]) if outer is not None else None
    if outer is None or inner is None or [inner[axis] for axis in outer] != sorted(inner):
        return None
    return node.args[0].args[0]


def _order(node: fx.Node) -> list[int] | None:
    """For an operator that permutes axes, the axis of its input that each axis comes from."""
    if not is_tensor(node) or node.target not in PERMUTES:
        return None
    rank = len(shape_of(node))
    if node.target is aten.permute.default:
        return [axis % rank for axis in node.args[1]]
    first, second = node.args[1:] if node.target is aten.transpose.int else (-2, -1)
    order = list(range(rank))
    if rank > 1:
        order[first], order[second] = order[second], order[first]
    return order


def _unit_factor(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """x * 1 and x / 1 are x, where dtype and shape stay."""
    if node.target not in (aten.mul.Tensor, aten.div.Tensor) or not is_tensor(node.args[0]) \
            or isinstance(node.args[1], fx.Node) or number(module, node.args[1]) != 1.0:
        return None
    return node.args[0] if value_of(node.args[0]).dtype == value_of(node).dtype else None


def detach_outputs(module: fx.GraphModule) -> None:
    """Copy outputs that would share memory with an input, a weight or another output."""
    output = module.graph.output_node()
    seen: set[fx.Node] = set()
    fresh = []
    for value in output.args[0]:
        root = value
        while isinstance(root, fx.Node) and _aliases(root):
            root = _viewed(root)
        shared = isinstance(root, fx.Node) and (
            root.op in ("placeholder", "get_attr") or root in seen)
        if shared and is_tensor(value):
            with module.graph.inserting_before(output):
                copied = module.graph.call_function(aten.clone.default, (value,))
            copied.meta = dict(value.meta)
            value = copied
        if isinstance(root, fx.Node):
            seen.add(root)
        fresh.append(value)
    output.args = (tuple(fresh),)


def _aliases(node: fx.Node) -> bool:
    """Whether the node may share memory with what it reads."""
    if node.target is operator.getitem:
        return _aliases(node.args[0])
    schema = getattr(node.target, "_schema", None)
    return node.target in QUIET_VIEWS or (
        schema is not None and any(r.alias_info is not None for r in schema.returns))


def _viewed(node: fx.Node) -> fx.Node:
    """What a node that may alias is a view of: the first tensor that it reads."""
    return node.all_input_nodes[0]


Rule = Callable[[fx.GraphModule, fx.Node], fx.Node | None]
RULES: tuple[Rule, ...] = (_drop_assertion, _drop_identity, _drop_cast, _type_as, _view_to_reshape,
                           _unit_factor, _undone_permute, _whole_softmax,
                           _stable_softmax, _whole_einsum)
