"""Choose by measurement: what is meant to be faster is timed against what it replaces.

A kernel is timed against the others that accept its call, a lossy layer against the float one, at
the values of the example; see `bincompile.runtime.timings`. A choice is a text, `"kernel"` or
`"kernel (why)"`, under the name of the node; `"float"` is that of a layer that was not made binary.
The reason stands in the choice, so that the same choices give the same report.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from bincompile.config import Binary, Target
from bincompile.errors import KernelError
from bincompile.ops import operator_of
from bincompile.passes.binarise import Site, binarise
from bincompile.passes.lower import lower
from bincompile.program import Program
from bincompile.record import Refusal, parsed, spelled
from bincompile.runtime import timings
from bincompile.runtime.executor import Executable, call_of
from bincompile.runtime.kernels import REFERENCE, Call, choose, kernels_of

FLOAT = "float"  # the choice of a layer that stays as it is
BINARY = "binary"
# Operators whose definition computes what they do in floats as a model would have written it; that
# of the others only says what the bits mean.
IN_FLOATS = frozenset({"attention", "embedding", "embedding_bag"})
FUSED = "fused_rows"


def kernel_names(choices: Mapping[str, str]) -> dict[str, str]:
    """Of these choices those of kernels, without their reasons."""
    names = {node: parsed(choice)[0] for node, choice in choices.items()}
    return {node: name for node, name in names.items() if name != FLOAT}


def explained(choices: Mapping[str, str]) -> dict[str, str]:
    """Of these choices those of kernels that have a reason."""
    return {node: choice for node, choice in choices.items()
            if parsed(choice)[1] and parsed(choice)[0] != FLOAT}


def noted(program: Program, choices: Mapping[str, str]) -> Program:
    """The program with these choices, of which those with a reason are in its notes."""
    reasons = {node: parsed(choice) for node, choice in choices.items()}
    notes = tuple(f"{node}: the kernel {name}, {reason}"
                  for node, (name, reason) in sorted(reasons.items()) if reason and name != FLOAT)
    return dataclasses.replace(program, notes=(*program.notes, *notes),
                               choices={**program.choices, **choices})


def measured_kernels(program: Program, executable: Executable,
                     flat: Sequence[Any]) -> dict[str, str]:
    """For nodes where another kernel than the bound one is faster, that kernel and why.

    Args:
        program: a lowered program.
        executable: its kernels, bound.
        flat: the flat inputs of a call.
    """
    if not timings.enabled():
        return {}
    numbers = _numbers(program, flat)
    rivals = {node: (timings.question(call, numbers), found)
              for node, call in executable.calls.items() if not timings.is_small(call, numbers)
              and len(found := _rivals(call)) > 1 and executable.kernels[node] in found}
    if any(not timings.known(*asked) for asked in rivals.values()):
        with torch.no_grad():
            _Kernels(program.graph_module, executable, rivals).run(*flat)
    chosen = {}
    for node, asked in rivals.items():
        first, times = executable.kernels[node], timings.table(*asked, dict)
        best = timings.faster(times, first)
        if best != first:
            chosen[node] = spelled(best, f"{times[best]:.3g} ms against {times[first]:.3g} ms "
                                         f"of {first}")
    return chosen


def _numbers(program: Program, flat: Sequence[Any]) -> timings.Numbers:
    """The sizes of these inputs, by the symbols of the program's signature."""
    return {size: value.shape[axis]
            for spec, value in zip(program.signature.inputs, flat, strict=False)
            for axis, size in enumerate(spec.shape) if isinstance(size, str)}


def _rivals(call: Call) -> list[str]:
    """The kernels worth timing for a call."""
    found = [k.name for k in kernels_of(call.operator.name) if k.supports(call) is None]
    if call.operator.name not in IN_FLOATS and not (call.operator.name == FUSED
                                                    and len(found) == 2):
        return [name for name in found if name != REFERENCE]
    return found


class _Kernels(fx.Interpreter):
    """Runs a program by its bound kernels, and times each call of which the table knows nothing."""

    def __init__(self, module: fx.GraphModule, executable: Executable,
                 rivals: Mapping[str, tuple[str, Sequence[str]]]) -> None:
        super().__init__(module)
        self.executable, self.rivals = executable, rivals

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node."""
        if n.name not in self.executable.bound:
            return super().run_node(n)
        call, first = self.executable.calls[n.name], self.executable.bound[n.name]
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        values = call.run_time(call.operator.bind(args, kwargs))
        if n.name in self.rivals:
            question, names = self.rivals[n.name]

            def measure() -> timings.Times:
                by_name = {k.name: k for k in kernels_of(call.operator.name)}
                bound = {name: first if name == self.executable.kernels[n.name]
                         else by_name[name].bind(call) for name in names}
                return timings.interleaved({name: _called(f, values) for name, f in bound.items()})

            timings.table(question, names, measure)
        return first(*values)


def _called(function: Callable[..., Any], values: Iterable[Any]) -> Callable[[], Any]:
    return lambda: function(*values)


def measured_sites(program: Program, binary: Binary, found: Sequence[Site], flat: Sequence[Any],
                   target: Target) -> dict[str, str]:
    """The layers that are slower binary than they are, by node, with the choice to keep them.

    Args:
        program: a program whose layers are not binary yet.
        binary: what they are to become.
        found: the layers.
        flat: the flat inputs of a call.
        target: the machine.
    """
    if not timings.enabled():
        return {}
    nodes, numbers = {n.name: n for n in program.graph.nodes}, _numbers(program, flat)
    questions = {site: _site_question(nodes[site.node], numbers, binary, target)
                 for site in found if not _is_small(nodes[site.node], numbers)}
    if any(not timings.known(question, (BINARY, FLOAT)) for question in questions.values()):
        with torch.no_grad():
            _Sites(program, binary, questions, target).run(*flat)
    chosen = {}
    for site, question in questions.items():
        times = timings.table(question, (BINARY, FLOAT), dict)
        if timings.faster(times, BINARY) == FLOAT:
            chosen[site.node] = spelled(FLOAT, f"{times[BINARY]:.3g} ms against "
                                               f"{times[FLOAT]:.3g} ms")
    return chosen


def _site_question(node: fx.Node, numbers: timings.Numbers, binary: Binary,
                   target: Target) -> str:
    """What the speed of a layer, binary and float, depends on."""
    def shown(value: Any) -> Any:
        found = value.meta.get("val") if isinstance(value, fx.Node) else value
        if isinstance(found, torch.Tensor):
            return timings.shape_class(found, numbers)
        return repr(found)

    arguments = [shown(arg) for arg in (*node.args, *node.kwargs.values())]
    form = dataclasses.replace(binary, layers="*", keep=())
    return f"{node.target} {arguments} as {form} on {timings.context(target)}"


def _is_small(node: fx.Node, numbers: timings.Numbers) -> bool:
    values = (n.meta.get("val") for n in node.all_input_nodes)
    return sum(math.prod(timings.sizes(v, numbers)) for v in values
               if isinstance(v, torch.Tensor)) < timings.SMALLEST


class _Sites(fx.Interpreter):
    """Runs a program, and times each layer of which the table knows nothing, float and binary."""

    def __init__(self, program: Program, binary: Binary, questions: Mapping[Site, str],
                 target: Target) -> None:
        super().__init__(program.graph_module)
        self.program, self.binary, self.target = program, binary, target
        self.sites = {site.node: (site, question) for site, question in questions.items()}

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node."""
        if n.name in self.sites:
            site, question = self.sites[n.name]
            timings.table(question, (BINARY, FLOAT), lambda: timings.interleaved(
                {BINARY: self._binary(site), FLOAT: self._float(n)}))
        return super().run_node(n)

    def _float(self, node: fx.Node) -> Callable[[], Any]:
        """The layer as it is, by the kernel that it would have."""
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        call = call_of(self.program, node, self.target)
        if call is None:
            return lambda: node.target(*args, **kwargs)
        return _called(choose(call).bind(call),
                       call.run_time(call.operator.bind(tuple(args), dict(kwargs))))

    def _binary(self, site: Site) -> Callable[[], Any]:
        """The layer as a kernel, on values that are computed from those of the program so far."""
        rewritten = lower(binarise(self.program, self.binary, [site]))
        (record,) = (r for r in rewritten.rewrites if r.kind == "lossy")
        node = next(n for n in rewritten.graph.nodes if n.name == record.node)
        call = call_of(rewritten, node, self.target)
        assert call is not None, f"{operator_of(node.target)} is no operator of ours"
        known = {n.name: value for n, value in self.env.items()}

        def value(arg: Any) -> Any:
            if isinstance(arg, list | tuple):
                return type(arg)(map(value, arg))
            if not isinstance(arg, fx.Node):
                return arg
            if arg.op == "get_attr":
                return fx.Interpreter(rewritten.graph_module).fetch_attr(arg.target)
            if arg.name not in known:
                known[arg.name] = arg.target(*map(value, arg.args),
                                             **{k: value(v) for k, v in arg.kwargs.items()})
            return known[arg.name]

        arguments = call.operator.bind(tuple(map(value, node.args)),
                                       {k: value(v) for k, v in node.kwargs.items()})
        return _called(choose(call).bind(call), call.run_time(arguments))


def replayed(found: Sequence[Site], choices: Mapping[str, str]) -> dict[str, str]:
    """The choices of layers that stay float, of those given.

    Raises:
        KernelError: one of a node that is no layer that was asked for.
    """
    kept = {node: choice for node, choice in choices.items() if parsed(choice)[0] == FLOAT}
    if unknown := sorted(set(kept) - {site.node for site in found}):
        raise KernelError(f"the choice {kept[unknown[0]]!r} for the node {unknown[0]!r}",
                          "layers that binary= asks for: "
                          f"{', '.join(site.node for site in found) or 'none'}", "the choices")
    return kept


def refusals(found: Sequence[Site], kept: Mapping[str, str]) -> tuple[Refusal, ...]:
    """What the report says of layers that stay float for their speed."""
    def why(choice: str) -> str:
        _, reason = parsed(choice)
        if not reason:
            return "kept as it is by the choices that were given"
        return f"slower than what it replaces: {reason} (choices={{}} makes it binary)"

    return tuple(Refusal(site.operator, site.path, why(kept[site.node]), site.node)
                 for site in found if site.node in kept)
