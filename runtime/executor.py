"""A program made callable: every operator bound to a kernel, everything else called as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from bincompile.config import Target
from bincompile.errors import KernelError
from bincompile.ops import operator_of
from bincompile.program import Program, attribute
from bincompile.runtime.buffers import Memory
from bincompile.runtime.forms import restorer
from bincompile.runtime.kernels import Call, Dynamic, choose, explain
from bincompile.runtime.straight_line import observed, straight_line
from bincompile.runtime.tvm import prepare
from bincompile.stages import settled

_set_grad_enabled = torch._C._set_grad_enabled


@dataclasses.dataclass(frozen=True)
class Executable:
    """A function of a program's flat inputs to the tuple of its flat outputs.

    Threads may share it. Its results carry no gradient.

    Args:
        kernels: for each node that holds one of our operators, the kernel that runs it.
        calls: the same nodes' calls.
        bound: the same nodes' kernels, as functions of the calls' run-time arguments.
        function: the code itself.
        memory: where its results inside lie.
        observed: makes the same code with every call left to a function; see `observed`.
    """

    kernels: Mapping[str, str]
    calls: Mapping[str, Call]
    bound: Mapping[str, Callable[..., Any]]
    function: Callable[..., tuple[Any, ...]]
    memory: Memory
    observed: Callable[[], Callable[..., tuple[Any, ...]]]

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        if not torch.is_grad_enabled():
            return self.function(*inputs)
        _set_grad_enabled(False)  # an eighth of the time of `with torch.no_grad()`
        try:
            return self.function(*inputs)
        finally:
            _set_grad_enabled(True)

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
    prepare((make(call) for name, call in calls.items() if (make := chosen[name].recipe)), target)
    bound = {name: chosen[name].bind(call) for name, call in calls.items()}
    function, memory = straight_line(program.graph_module, calls, bound)
    return Executable({name: kernel.name for name, kernel in chosen.items()}, calls, bound,
                      function, memory, observed(program.graph_module, calls, bound))


def settle(program: Program, executable: Executable) -> tuple[Program, Executable]:
    """The same, with nothing kept for reading only; what was given must not be used again.

    Earlier stages hold the model's weights weakly, and a weight that kernels hold in their own
    layout is made again from it when it is asked for.
    """
    kept = settled(program, restorer)
    nodes = {node.name: node for node in kept.graph.nodes}
    calls = _Calls(kept, {name: nodes[name] for name in executable.calls},
                   {name: call.target for name, call in executable.calls.items()})
    return kept, dataclasses.replace(executable, calls=calls)


class _Calls(Mapping[str, Call]):
    """The calls of a program's nodes, each made when it is asked for."""

    def __init__(self, program: Program, nodes: Mapping[str, fx.Node],
                 targets: Mapping[str, Target]) -> None:
        self._program, self._nodes, self._targets = program, nodes, targets

    def __getitem__(self, name: str) -> Call:
        call = call_of(self._program, self._nodes[name], self._targets[name])
        assert call is not None
        return call

    def __iter__(self) -> Iterator[str]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)


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
