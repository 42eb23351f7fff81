"""A program made callable: every operator bound to a kernel, everything else called as it is."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx

from bincompile.config import Target
from bincompile.errors import KernelError
from bincompile.ops import operator_of
from bincompile.program import Program, attribute
from bincompile.runtime.kernels import Call, Dynamic, choose, explain


@dataclasses.dataclass(frozen=True)
class Executable:
    """A function of a program's flat inputs to the tuple of its flat outputs.

    It keeps no state between calls, so threads may share it. Its results carry no gradient.

    Args:
        kernels: for each node that holds one of our operators, the kernel that runs it.
        calls: the same nodes' calls.
        bound: the same nodes' kernels, as functions of the calls' run-time arguments.
        function: the code itself.
    """

    kernels: Mapping[str, str]
    calls: Mapping[str, Call]
    bound: Mapping[str, Callable[..., Any]]
    function: Callable[..., tuple[Any, ...]]

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.function(*inputs)
        return self.function(*inputs)

    def explain(self) -> dict[str, list[tuple[str, str]]]:
        """For each node every kernel with "chosen", "accepts", or its reason against the call."""
        return {node: [(kernel, "chosen" if kernel == self.kernels[node] else
                        "accepts" if verdict == "chosen" else verdict)
                       for kernel, verdict in explain(call)]
                for node, call in self.calls.items()}


def bind(program: Program, target: Target, choices: Mapping[str, str] | None = None) -> Executable:
    """Choose and bind a kernel for every operator of ours; the program itself is not changed.

    Args:
        program: a program at any level.
        target: the machine to run on.
        choices: node name -> kernel name, for nodes where the first that accepts isn't wanted.

    Raises:
        KernelError: `choices` names a node or a kernel that does not exist.
    """
    calls = {node.name: call for node in program.graph.nodes
             if (call := call_of(program, node, target)) is not None}
    wanted = dict(choices or {})
    if unknown := sorted(set(wanted) - set(calls)):
        raise KernelError(f"a kernel for the node {unknown[0]!r}",
                          f"nodes that hold an operator of bincompile: {', '.join(calls)}",
                          "the choices")
    chosen = {name: choose(call, wanted.get(name)) for name, call in calls.items()}
    bound = {name: chosen[name].bind(call) for name, call in calls.items()}
    return Executable({name: kernel.name for name, kernel in chosen.items()}, calls, bound,
                      _compile(program, calls, bound))


def call_of(program: Program, node: fx.Node, target: Target) -> Call | None:
    """The call that a node makes of one of our operators, or None if it makes none."""
    operator = operator_of(node.target) if node.op == "call_function" else None
    if operator is None:
        return None

    def known(value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return value
        if value.op == "get_attr":
            return attribute(program.graph_module, value.target)
        return Dynamic(value.meta["val"])

    def each(value: Any) -> Any:
        return list(map(known, value)) if isinstance(value, list | tuple) else known(value)

    bound = operator.bind(node.args, dict(node.kwargs))
    return Call(operator, {name: each(value) for name, value in bound.items()}, target)


def _compile(program: Program, calls: Mapping[str, Call],
             bound: Mapping[str, Callable[..., Any]]) -> Callable[..., tuple[Any, ...]]:
    """The program's graph with bound kernels in it, as one Python function."""
    graph, copies = fx.Graph(), {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            copies[node] = graph.create_node("get_attr", node.target, name=node.name)
        elif node.name in calls:
            call = calls[node.name]
            arguments = call.operator.bind(node.args, dict(node.kwargs))
            copies[node] = graph.create_node(
                "call_function", _named(bound[node.name], node.name),
                tuple(map(copies.__getitem__, call.run_time(arguments))), name=node.name)
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.eliminate_dead_code(lambda node: node.op != "get_attr")
    stored = _flatten_attributes(graph, program.graph_module)
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, "<bincompile program>", "exec"), scope)
    return functools.partial(scope["forward"], stored)


def _flatten_attributes(graph: fx.Graph, owner: torch.nn.Module) -> SimpleNamespace:
    """What the graph still reads, as plain attributes: much cheaper than those of a module."""
    stored: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            path, node.target = node.target, node.target.replace(".", "__")
            stored[node.target] = attribute(owner, path)
    return SimpleNamespace(**stored)


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function under a name of its own, by which the generated code can call it."""
    function.__name__ = function.__qualname__ = f"run_{name}"
    return function
