"""A program as one straight-line Python function, with nothing looked up while it runs."""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from bincompile.program import attribute
from bincompile.runtime.bound import Bound
from bincompile.runtime.buffers import Memory, recorded
from bincompile.runtime.hoisting import constant_nodes
from bincompile.runtime.kernels import Call
from bincompile.runtime.lifetimes import lifetimes, planned

FILE = "<bincompile program>"  # the file that the written functions say they are from
_ATEN = torch.ops.aten
# Methods of a tensor do the same as these operators, without the search for an overload.
_METHODS = {_ATEN.view.default: "view", _ATEN.reshape.default: "reshape",
            _ATEN.transpose.int: "transpose", _ATEN.permute.default: "permute",
            _ATEN.unsqueeze.default: "unsqueeze", _ATEN.expand.default: "expand",
            _ATEN.sym_size.int: "size"}


def straight_line(module: fx.GraphModule, calls: Mapping[str, Call],
                  bound: Mapping[str, Callable[..., Any]],
                  clock: Callable[[str, float], None] | None = None,
                  ) -> tuple[Callable[..., tuple[Any, ...]], Memory]:
    """The function of the flat inputs to the flat outputs, and its planned memory.

    At sizes of inputs that are new, every kernel makes its own results, and their sizes are kept
    as the layout for the next calls.

    Args:
        module: the graph and its stored tensors.
        calls: the calls of our operators, by node.
        bound: their kernels.
        clock: called with each node's name and seconds, if it is given.
    """
    places = planned(module.graph, bound)
    memory = Memory(lifetimes(module.graph, places))
    writer = _Writer(module, calls, bound, places, memory)
    writer.clocked = clock is not None
    writer.scope |= {"clock": clock, "now": time.perf_counter}
    source = writer.planned() if places else writer.unplanned("again")
    exec(compile(source, FILE, "exec"), writer.scope)
    return writer.scope["again"], memory


def observed(module: fx.GraphModule, calls: Mapping[str, Call],
             bound: Mapping[str, Callable[..., Any]]) -> Callable[[], Callable[..., Any]]:
    """What makes the function of `each` and the flat inputs that runs every node by `each`.

    `each(node, function, args, kwargs)` gives the node's value; of our operators `args` are the
    run-time values that the kernel takes.
    """
    writer = _Writer(module, calls, bound, {}, Memory(()))
    source, scope = writer.observed(), writer.scope

    def make() -> Callable[..., Any]:
        if "observed" not in scope:
            exec(compile(source, FILE, "exec"), scope)
        return scope["observed"]

    return make


class _Writer:
    """Writes the function's text; values that have no text are in the scope that it runs in."""

    def __init__(self, module: fx.GraphModule, calls: Mapping[str, Call],
                 bound: Mapping[str, Callable[..., Any]], places: Mapping[fx.Node, int],
                 memory: Memory) -> None:
        self.module, self.calls, self.bound, self.places = module, calls, bound, places
        self.memory, self.clocked = memory, False
        self.scope: dict[str, Any] = {
            "layouts": memory.layouts, "keep": memory.keep, "take": memory.take,
            "give": memory.give, "forget": memory.forget,
            "stubborn": memory.stubborn, "recorded": recorded, "cpu": torch.device("cpu")}
        self.names = {node: f"v{index}" for index, node in enumerate(module.graph.nodes)}
        self.inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
        self.last = {source: node for node in module.graph.nodes
                     for source in node.all_input_nodes}
        self.inside = [f"b{i}" for i, life in enumerate(memory.lifetimes) if life is not None]
        self.constant = constant_nodes(module.graph, places, self.kept_inside())

    def kept_inside(self) -> dict[fx.Node, tuple[bool, ...]]:
        """Of each planned node, which of its results lie in an arena."""
        lives, found = iter(self.memory.lifetimes), {}
        for node, count in self.places.items():
            found[node] = tuple(next(lives) is not None for _ in range(count))
        return found

    def unplanned(self, name: str) -> str:
        """The function that plans no result."""
        return self.function(name, [*self.body(self.plain), *self.result()])

    def observed(self) -> str:
        """The function that leaves every call to `each`."""
        lines = []
        for node in self.module.graph.nodes:
            if node.op not in ("placeholder", "get_attr", "output"):
                name, (function, args, kwargs) = self.names[node], self.parts(node)
                lines.append(f"{name} = each({node.name!r}, {function}, {args}, {kwargs})")
        given = ", ".join(("each", *map(self.names.__getitem__, self.inputs)))
        return "".join([f"def observed({given}):\n",
                        *(f"    {line}\n" for line in [*lines, *self.result()])])

    def parts(self, node: fx.Node) -> tuple[str, str, str]:
        """The text of what a node calls, of its arguments and of its named arguments."""
        if node.name in self.bound:
            kernel = self.held(self.bound[node.name], f"k_{self.names[node]}")
            return kernel, f"({self.values(node)})", "{}"
        target: Any = node.target
        if node.op == "call_method":
            target = getattr(torch.Tensor, node.target)
        elif node.op == "call_module":
            target = attribute(self.module, node.target)
        function = self.held(target, f"f_{self.names[node]}")
        return function, self.text(node.args), self.text(dict(node.kwargs))

    def planned(self) -> str:
        """The functions for sizes that are new and for sizes that are known, and their parts."""
        return self.unplanned("plain") + self.first() + self.prepare() + self.again()

    def first(self) -> str:
        """The function for sizes that are new."""
        return self.function("first", [
            f"key, sizes = {self.key()}, []", "if key in stubborn:",
            f"    return plain({self.given()})", *self.body(self.record),
            "keep(key, sizes)", *self.result()])

    def prepare(self) -> str:
        """The function from the inputs and the buffers to all that stays the same."""
        lines = [f"{self.names[node]} = {self.buffer(node)}" for node in self.places
                 if all(self.kept_inside()[node])]
        for node in self.constant:
            value = self.buffer(node.args[0], node.args[1]) \
                if node.target is operator.getitem and node.args[0] in self.places \
                else self.called(node)
            lines.append(f"{self.names[node]} = {value}")
        names = "".join(f"{self.names[node]}, " for node in self.constant)
        return self.function("prepare", [*lines, f"return ({names})"], self.inside)

    def buffer(self, node: fx.Node, index: int | None = None) -> str:
        """The buffer of a planned result, or of all results of a node."""
        start = sum(count for _, count in self.before(node))
        kernel = self.bound[node.name]
        assert isinstance(kernel, Bound)
        if index is not None or not kernel.several:
            return f"b{start + (index or 0)}"
        return f"({''.join(f'b{start + i}, ' for i in range(self.places[node]))})"

    def again(self) -> str:
        """The function for sizes whose layout is known."""
        inside = self.inside
        given = [f"b{i}" for i, life in enumerate(self.memory.lifetimes) if life is None]
        lines = [f"layout = layouts.get({self.key()})",
                 "if layout is None:", f"    return first({self.given()})"]
        if given:
            sizes = "".join(f"({b}_make, {b}_size, {b}_strides, {b}_dtype), " for b in given)
            lines.append(f"{sizes}= layout.given")
        lines += [f"{b} = {b}_make({b}_size, {b}_strides, dtype={b}_dtype, device=cpu)"
                  for b in given]
        body = [*self.body(self.place, self.constant), *self.result()]
        if inside:
            names = (*inside, *(self.names[node] for node in self.constant))
            body = ["arena = take()", "try:", "    views = arena.views(layout)",
                    "    if views is None:",
                    f"        views = arena.lay(layout, prepare, {self.given()})",
                    "    if views is None:",
                    f"        forget({self.key()})",
                    f"        return plain({self.given()})",
                    f"    {''.join(f'{name}, ' for name in names)}= views",
                    *(f"    {line}" for line in body), "finally:", "    give(arena)"]
        return self.function("again", [*lines, *body])

    def given(self) -> str:
        """The flat inputs, as arguments."""
        return ", ".join(map(self.names.__getitem__, self.inputs))

    def function(self, name: str, lines: list[str], more: Sequence[str] = ()) -> str:
        """The text of one function of the flat inputs, and of `more`."""
        given = ", ".join((*map(self.names.__getitem__, self.inputs), *more))
        return "".join([f"def {name}({given}):\n", *(f"    {line}\n" for line in lines)])

    def key(self) -> str:
        """The sizes of the inputs that may vary, each once."""
        seen: dict[str, str] = {}
        for node in self.inputs:
            for axis, size in enumerate(getattr(node.meta.get("val"), "shape", ())):
                if not isinstance(size, int):
                    seen.setdefault(str(size), f"{self.names[node]}.size({axis})")
        return f"({''.join(f'{text}, ' for text in seen.values())})"

    def body(self, kernel: Callable[[fx.Node], str],
             known: Collection[fx.Node] = ()) -> list[str]:
        """The lines between the inputs and the result; `kernel` writes those of our kernels."""
        lines, known = [], set(known)
        for node in self.module.graph.nodes:
            if node.op in ("placeholder", "get_attr", "output") or node in known:
                continue
            lines.append(kernel(node) if node.name in self.bound
                         else f"{self.names[node]} = {self.called(node)}")
            done = [source for source in node.all_input_nodes
                    if self.last[source] is node and source.op != "get_attr"]
            unread = [node] if node not in self.last else []
            if done or unread:
                lines[-1] += "; del " + ", ".join(self.names[n] for n in (*done, *unread))
            if self.clocked:
                lines[-1] = f"start = now(); {lines[-1]}; clock({node.name!r}, now() - start)"
        return lines

    def result(self) -> list[str]:
        """The line that returns the flat outputs."""
        (output,) = (n for n in self.module.graph.nodes if n.op == "output")
        return [f"return {self.text(tuple(output.args[0]))}"]

    def called(self, node: fx.Node) -> str:
        """The call of a node that is not ours."""
        if node.op == "call_method" or (node.target in _METHODS and not node.kwargs):
            method = node.target if node.op == "call_method" else _METHODS[node.target]
            rest = self.listed(node.args[1:], node.kwargs)
            return f"{self.text(node.args[0])}.{method}({rest})"
        target = node.target if node.op == "call_function" else attribute(self.module, node.target)
        function = self.held(target, f"f_{self.names[node]}")
        return f"{function}({self.listed(node.args, node.kwargs)})"

    def listed(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """The text between the brackets of a call."""
        named = [f"**{self.text(dict(kwargs))}"] if kwargs else []
        return ", ".join([*map(self.text, args), *named])

    def values(self, node: fx.Node) -> str:
        """The run-time values that the kernel of a node takes."""
        call = self.calls[node.name]
        arguments = call.operator.bind(node.args, dict(node.kwargs))
        return "".join(f"{self.text(v)}, " for v in call.run_time(arguments))

    def plain(self, node: fx.Node) -> str:
        """A kernel that makes its own results."""
        kernel = self.held(self.bound[node.name], f"k_{self.names[node]}")
        return f"{self.names[node]} = {kernel}({self.values(node)})"

    def record(self, node: fx.Node) -> str:
        """The same, and the sizes of its results are kept."""
        if node not in self.places:
            return self.plain(node)
        kernel = self.held(self.bound[node.name], f"k_{self.names[node]}")
        return f"{self.names[node]} = recorded(sizes, {kernel}, {self.values(node)})"

    def place(self, node: fx.Node) -> str:
        """A kernel that writes into the memory of the layout."""
        if node not in self.places:
            return self.plain(node)
        start = sum(count for n, count in self.before(node))
        results = "".join(f"b{start + i}, " for i in range(self.places[node]))
        kernel = self.bound[node.name]
        assert isinstance(kernel, Bound)
        into = self.held(kernel.into, f"i_{self.names[node]}")
        name = f"({results})" if kernel.several else f"b{start}"
        return f"{into}({self.values(node)}{results}); {self.names[node]} = {name}"

    def before(self, node: fx.Node) -> list[tuple[fx.Node, int]]:
        """The planned nodes before this one."""
        nodes = list(self.places)
        return [(n, self.places[n]) for n in nodes[:nodes.index(node)]]

    def text(self, value: Any) -> str:
        """Python text of an argument; what has none gets a name in the scope."""
        if isinstance(value, fx.Node):
            if value.op == "get_attr":
                return self.held(attribute(self.module, value.target), f"w_{self.names[value]}")
            return self.names[value]
        if isinstance(value, tuple | list):
            inside = "".join(f"{self.text(v)}, " for v in value)
            return f"[{inside}]" if isinstance(value, list) else f"({inside})"
        if isinstance(value, slice):
            return f"slice({self.text((value.start, value.stop, value.step))[1:-1]})"
        if isinstance(value, dict):
            return f"{{{''.join(f'{k!r}: {self.text(v)}, ' for k, v in value.items())}}}"
        if value is None or type(value) in (bool, int, str) \
                or (type(value) is float and math.isfinite(value)):
            return repr(value)
        return self.held(value, f"c{len(self.scope)}")

    def held(self, value: Any, name: str) -> str:
        """A name in the scope for a value."""
        self.scope[name] = value
        return name
