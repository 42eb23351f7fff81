"""A graph as a plain function in float64: what both sides of a proof run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from bincompile.op import Operator
from bincompile.ops import operator_of
from bincompile.passes.graph import CHECKED, FLOATS, in_double, value_of
from bincompile.program import attribute

Function = Callable[..., Any]
# An operator's float64 form, given its arguments by place and by name.
References = Mapping[str, Function]
NEARLY_ZERO = 1e-12  # of the largest value of its row


def wide(value: Any) -> Any:
    """A tensor with float dtypes raised to float64; anything else as it is."""
    return value.double() if getattr(value, "dtype", None) in FLOATS else value


def doubled(graph_module: fx.GraphModule, references: References | None = None,
            double: bool = True) -> fx.GraphModule:
    """The same graph with stored tensors, casts and creations in float64.

    Operators of ours are called as their references, so that a call costs what its torch
    operators cost.

    Args:
        graph_module: at any level whose operators have references.
        references: what stands for which node, by its name.
        double: whether it is; else all dtypes stay.
    """
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    stored: dict[str, Any] = {}
    for node in graph_module.graph.nodes:
        copy = graph.node_copy(node, copies.__getitem__)
        copies[node] = copy
        if node.op == "get_attr":
            tensor = attribute(graph_module, node.target)
            stored[node.target] = wide(tensor) if double else tensor
        elif node.op == "call_function":
            copy.target = _target(node, (references or {}).get(node.name), double)
            copies[node] = _widened(copy, node, copies) if double else copy
    made = fx.GraphModule(stored, graph)
    made.requires_grad_(False)
    return made


def _target(node: fx.Node, reference: Function | None, double: bool) -> Any:
    """What is called in place of a node's own target."""
    operator = operator_of(node.target)
    if operator is None:
        return CHECKED.get(node.target, node.target) if reference is None \
            else _named(reference, node.name)
    function = operator.reference if reference is None else reference
    if double and operator.signs_of is not None:
        function = _with_sure_signs(operator, function)
    return _named(function, operator.name if reference is None else node.name)


def _with_sure_signs(operator: Operator, function: Function) -> Function:
    """The function, for which what rounding alone keeps from 0 is 0.

    Sums that are 0 in one order are 1e-18 in another, and the sign of that is no difference.
    """
    signs_of = operator.signs_of
    assert signs_of is not None

    def call(*args: Any, **kwargs: Any) -> Any:
        taken = {id(tensor) for tensor in signs_of(operator.bind(args, kwargs))}
        return function(*(_sure(a) if id(a) in taken else a for a in args),
                        **{k: _sure(a) if id(a) in taken else a for k, a in kwargs.items()})

    return call


def _sure(tensor: torch.Tensor) -> torch.Tensor:
    """0 where a value is nearly that beside the others of its row."""
    if not tensor.is_floating_point() or not tensor.numel() or not tensor.ndim:
        return tensor
    scale = tensor.abs().amax(-1, keepdim=True)
    return tensor.masked_fill(tensor.abs() <= NEARLY_ZERO * scale, 0.0)


def _widened(copy: fx.Node, node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """The copy of a call made wide; what its users read."""
    copy.args = _double(copy.args)
    copy.kwargs = {name: _double(value) for name, value in copy.kwargs.items()}
    if getattr(value_of(node), "dtype", None) not in FLOATS \
            or any(_is_float(value_of(n)) for n in node.all_input_nodes):
        return copy
    if isinstance(copy.target, torch._ops.OpOverload):
        _from_integers(copy, node, copies)
    return copy.graph.call_function(wide, (copy,))


def _from_integers(copy: fx.Node, node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> None:
    """A float that follows from no float is made in torch's default dtype unless this is said."""
    names = [a.name for a in getattr(getattr(node.target, "_schema", None), "arguments", ())]
    if "dtype" in names[len(copy.args):]:
        copy.kwargs = {**copy.kwargs, "dtype": torch.float64}
    elif "dtype" not in names:
        counted = [n for n in node.all_input_nodes if isinstance(value_of(n), torch.Tensor)
                   and value_of(n).dtype is not torch.bool]
        with copy.graph.inserting_before(copy):
            for number in counted:
                copy.replace_input_with(
                    copies[number],
                    copy.graph.call_function(torch.Tensor.double, (copies[number],)))


def _double(arg: Any) -> Any:
    """An argument with float and complex dtypes raised to those of 64 bits."""
    return torch.complex128 if arg is torch.complex64 else in_double(arg)


def _is_float(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_is_float, value))
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _named(function: Function, name: str) -> Function:
    """The function under a name that written code can call it by."""
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    call.__name__ = call.__qualname__ = f"reference_of_{name}"
    return call
