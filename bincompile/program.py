"""A program: a graph over flat tensors at one level of the pipeline, and how it came to be.

A program is immutable; passes make new ones. Every program runs eagerly and prints.
"""

from __future__ import annotations

import dataclasses
import operator
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

import bincompile
from bincompile.record import Match, Refusal, Rewrite
from bincompile.signature import Signature, TensorMeta

_FRAME = re.compile(r'File "(.*)", line (\d+), in .*\n(?! *File ")(.*)')
# Frames in these folders are not the user's.
_LIBRARIES = (os.path.join(os.path.dirname(torch.__file__), ""),
              *(os.path.join(folder, part, "") for folder in bincompile.__path__
                for part in ("nn", "passes")))

LEVELS = ("captured", "normal", "matched", "validated", "canonical", "packed", "binary", "steps",
          "fused", "lowered")


@dataclasses.dataclass(frozen=True)
class Program:
    """A graph at one level.

    Args:
        graph_module: placeholders are the flat inputs, get_attr nodes the stored tensors, and the
            output a tuple of the flat outputs.
        signature: how calls become flat inputs, and flat outputs the result.
        level: one of `LEVELS`.
        matches: subgraphs that were recognised.
        refusals: candidates that were declined.
        rewrites: changes that were made.
        notes: other decisions a reader should know of.
        choices: what was chosen by measurement, by node: "kernel (why)", or "float (why)" for a
            layer that was not made binary.
        parent: the program of the stage before.

    Example:
        >>> import torch, bincompile as bc
        >>> compiled = bc.optimize(torch.nn.Linear(4, 2).eval(), (torch.ones(3, 4),))
        >>> print(compiled.program.at("captured"))  # doctest: +ELLIPSIS
        program at level captured
        ...
    """

    graph_module: fx.GraphModule
    signature: Signature
    level: str = "captured"
    matches: tuple[Match, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    rewrites: tuple[Rewrite, ...] = ()
    notes: tuple[str, ...] = ()
    choices: Mapping[str, str] = dataclasses.field(default_factory=dict)
    parent: Program | None = None

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(f"level {self.level!r} is not one of {LEVELS}")

    @property
    def graph(self) -> fx.Graph:
        """The graph itself."""
        return self.graph_module.graph

    @property
    def lossy(self) -> bool:
        """Whether any rewrite changed the precision."""
        return any(r.kind == "lossy" for r in self.rewrites)

    @property
    def stages(self) -> tuple[Program, ...]:
        """Every program from the captured one to this one."""
        return ((*self.parent.stages, self) if self.parent else (self,))

    def at(self, level: str) -> Program:
        """The last stage at this level, e.g. `at("normal")`."""
        for stage in reversed(self.stages):
            if stage.level == level:
                return stage
        raise KeyError(f"no stage at level {level!r}; there are {[s.level for s in self.stages]}")

    def next(self, graph_module: fx.GraphModule, level: str, **changes: Any) -> Program:
        """The program of the next stage; records in `changes` replace the ones so far."""
        return dataclasses.replace(self, graph_module=graph_module, level=level, parent=self,
                                   **changes)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The stored tensors that the graph reads, by name."""
        return {n.target: attribute(self.graph_module, n.target)
                for n in self.graph.nodes if n.op == "get_attr"}

    @property
    def exported(self) -> torch.export.ExportedProgram:
        """This stage as an ExportedProgram over flat inputs, with symbolic sizes kept."""
        values = [n.meta["val"] for n in self.graph.nodes if n.op == "placeholder"]
        examples = tuple(_example(v) for v in values)
        dims = tuple({i: torch.export.Dim.AUTO for i, s in enumerate(v.shape)
                      if not isinstance(s, int)} if hasattr(v, "shape") else None
                     for v in values)
        whole = fx.GraphModule({n.target: attribute(self.graph_module, n.target)
                                for n in self.graph.nodes if n.op in ("get_attr", "call_module")},
                               copied(self.graph))
        return torch.export.export(whole, examples, dynamic_shapes=dims)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        flat = self.signature.flatten(args, kwargs)
        return self.signature.unflatten(self.graph_module(*flat))

    def to_dot(self) -> str:
        """The graph as DOT text for Graphviz: modules are clusters, rewritten nodes coloured.

        Example:
            >>> import torch, bincompile as bc
            >>> compiled = bc.optimize(torch.nn.Linear(4, 2).eval(), (torch.ones(3, 4),))
            >>> print(compiled.program.to_dot().splitlines()[0])
            digraph "Linear, lowered" {
        """
        from bincompile.views.dot import to_dot
        from bincompile.views.graph import GraphView
        from bincompile.views.marks import marks

        view, placed = GraphView.of(self), {n.name for n in self.graph.nodes}
        rewritten = any(r.node in placed for r in self.rewrites)
        found = marks(self.matches, self.rewrites, self.refusals, view)
        return to_dot(view, found, "after" if rewritten else "before")

    def _repr_html_(self) -> str:
        from bincompile.views.notebook import program_cell

        return program_cell(self)

    def __str__(self) -> str:
        lines = [f"program at level {self.level}"]
        lines += (f"  {line}" for line in _lines(self.graph))
        return "\n".join(lines)


def copied(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph, with the records of its nodes."""
    copy, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        copies[node] = copy.node_copy(node, copies.__getitem__)
    return copy


def attribute(module: torch.nn.Module, path: str) -> Any:
    """The attribute at a dotted path."""
    return operator.attrgetter(path)(module)


def owner(node: fx.Node) -> str:
    """Module path of the module that a node was traced in; empty for the root."""
    paths = module_paths(node)
    return paths[-1] if paths else ""


def module_paths(node: fx.Node) -> tuple[str, ...]:
    """Module paths that a node was traced in, outermost first."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    return tuple(path for path, *_ in stack if path)


def source_line(node: fx.Node) -> str:
    """The user's source line that made a node, as `file:line: text`; empty if not known.

    It is the innermost one that is neither torch's nor ours, e.g. where the user calls nn.Softmax.
    """
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [f for f in frames if not f[0].startswith(_LIBRARIES)]
    if not (own or frames):
        return ""
    file, line, text = (own or frames)[-1]
    return f"{file}:{line}: {text.strip()}"


def _example(value: Any) -> Any:
    if not isinstance(value, torch.Tensor | TensorMeta):
        return value
    sizes = [s if isinstance(s, int) else 2 if isinstance(s, str) else s.node.hint
             for s in value.shape]
    return torch.zeros(sizes, dtype=value.dtype)


def _lines(graph: fx.Graph) -> Iterator[str]:
    for node in graph.nodes:
        if node.op == "get_attr":
            continue
        value, path = describe(node.meta.get("val")), owner(node)
        if node.op == "output":
            yield call_text(node)
        elif node.op == "placeholder":
            yield f"input {node.name}: {value}"
        else:
            yield f"{node.name}: {value} = {call_text(node)}" + (f"  # {path}" if path else "")
            yield from (f"    {line}" for arg in node.args if _is_text(arg)
                        for line in arg.splitlines())


def call_text(node: fx.Node) -> str:
    """What a node calls with which arguments, e.g. `aten.softmax.int(div, -1)`."""
    if node.op == "output":
        return f"return {_show(node.args[0])}"
    if node.op == "placeholder":
        return "input"
    inside = ", ".join([*map(_show, node.args),
                        *(f"{k}={_show(v)}" for k, v in node.kwargs.items())])
    return f"{target_name(node.target)}({inside})"


def target_name(target: Any) -> str:
    """The short name of what a node calls, e.g. `aten.matmul` or `bincompile.attention`."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return getattr(target, "__name__", str(target))


def describe(value: Any) -> str:
    """Dtype and shape of a fake value, e.g. `float32[s0, 16, 64]`."""
    if isinstance(value, torch.Tensor | TensorMeta):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(describe, value))})"
    if isinstance(value, torch.SymInt | str):  # a size, or one in a loaded program
        return "size"
    return type(value).__name__ if not isinstance(value, int | float) else str(value)


def _is_text(arg: Any) -> bool:
    """Whether an argument has several lines, which are shown below the call."""
    return isinstance(arg, str) and "\n" in arg


def _show(arg: Any) -> str:
    if _is_text(arg):
        return f"<{len(arg.splitlines())} lines>"
    if isinstance(arg, fx.Node):
        return arg.target if arg.op == "get_attr" else arg.name
    if isinstance(arg, tuple | list):
        inside = ", ".join(map(_show, arg))
        return f"[{inside}]" if isinstance(arg, list) else f"({inside})"
    return repr(arg)
