"""Graphs of dynamo as models: their weights stored in them, their sizes read from their inputs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim

from bincompile.errors import CaptureError
from bincompile.ops import operator_of
from bincompile.passes.examples import run_recorded
from bincompile.passes.graph import copy_module, finish
from bincompile.program import Program, attribute

MOST_COMPARED = 4096  # elements of a weight whose values are compared at each call
_FOLDERS = ("_modules", "_parameters", "_buffers")


class GraphModel(nn.Module):
    """A graph of dynamo as a model of those inputs that are neither weights nor sizes.

    Args:
        graph_module: what dynamo traced.
        inputs: the values of one call of it.
        numbers: which inputs are tensors that stand for numbers of Python; see `numbers_of`.

    Raises:
        CaptureError: the graph is not one of plain tensors on the CPU.
    """

    def __init__(self, graph_module: fx.GraphModule, inputs: Sequence[Any],
                 numbers: frozenset[int] = frozenset()) -> None:
        super().__init__()
        places = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
        _check_kinds(places, inputs)
        self.graph, self._numbers = graph_module, numbers
        self.weights: dict[int, str] = {}
        self.sizes: dict[int, tuple[int, int]] = {}
        for index, (place, value) in enumerate(zip(places, inputs, strict=True)):
            if index not in numbers and _is_weight(place, value):
                self.weights[index] = self._keep(path_of(place), index, value)
        axes = {str(size): (index, axis) for index, place in enumerate(places)
                if index not in self.weights for axis, size in _dynamic(place)}
        for index, place in enumerate(places):
            found = axes.get(str(place.meta.get("example_value")))
            if isinstance(inputs[index], int) and found is not None:
                self.sizes[index] = found
        self.remaining = tuple(i for i in range(len(places))
                               if i not in self.weights and i not in self.sizes)
        self.parameter_names = {name for i, name in self.weights.items()
                                if isinstance(inputs[i], nn.Parameter)}
        self.dynamic_shapes = {"given": tuple(
            {axis: Dim.AUTO for axis, _ in _dynamic(places[i]) if inputs[i].shape[axis] > 1}
            if isinstance(inputs[i], torch.Tensor) and i not in numbers else None
            for i in self.remaining)}
        self.eval()

    def given(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """Of the inputs of the graph those that this model takes."""
        return tuple(inputs[i].item() if i in self._numbers else inputs[i]
                     for i in self.remaining)

    def forward(self, *given: Any) -> Any:
        """What the graph gives; node by node, so that each keeps its record of the user's code."""
        inputs: dict[int, Any] = dict(zip(self.remaining, given, strict=True))
        inputs |= {i: attribute(self, name) for i, name in self.weights.items()}
        inputs |= {i: inputs[at].shape[axis] for i, (at, axis) in self.sizes.items()}
        return run_recorded(self.graph, *(inputs[i] for i in sorted(inputs)))

    def _keep(self, path: str, index: int, value: torch.Tensor) -> str:
        """Store a weight under its own name, or another if that is taken; returns the name."""
        for name in (path, f"weight{index}"):
            owner, parts = self, name.split(".")
            for part in parts[:-1]:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = getattr(owner, part)
                if type(owner) is not nn.Module:
                    break
            else:
                if parts[-1] and not hasattr(owner, parts[-1]):
                    owner.register_buffer(parts[-1], value.detach())
                    return name
        raise CaptureError(f"no name for the weight {path}", "weights with names of their own",
                           "report the model")


def numbers_of(graph_module: fx.GraphModule) -> frozenset[int]:
    """Which inputs of a graph are tensors that stand for floats; dynamo knows while it compiles."""
    places = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
    return frozenset(
        i for i, place in enumerate(places)
        if getattr(place.meta.get("grapharg"), "pass_arg_as_tensor", False)
        and place.meta["example_value"].dtype == torch.float64
        and not place.meta["example_value"].ndim)


def _check_kinds(places: Sequence[fx.Node], inputs: Sequence[Any]) -> None:
    for place, value in zip(places, inputs, strict=True):
        if not isinstance(value, torch.Tensor):
            continue
        if value.is_nested or value.layout is not torch.strided or value.is_quantized \
                or type(value) not in (torch.Tensor, nn.Parameter, nn.Buffer):
            raise CaptureError(f"{place.name} is a {type(value).__name__} of layout {value.layout}",
                               "plain dense tensors", "the inputs of the compiled function")
        if value.device.type != "cpu":
            raise CaptureError(f"{place.name} is on {value.device}", "tensors on the CPU",
                               "the device of the model and its inputs")


def _is_weight(place: fx.Node, value: Any) -> bool:
    """Whether an input is a parameter, or a tensor that dynamo found stored in a module."""
    marked = (place.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type")
    return isinstance(value, nn.Parameter) or (isinstance(value, torch.Tensor)
                                               and marked is not None)


def _dynamic(place: fx.Node) -> Iterator[tuple[int, Any]]:
    """The axes of an input that dynamo lets vary, and their sizes."""
    value = place.meta.get("example_value")
    if isinstance(value, torch.Tensor):
        sizes: list[Any] = list(value.shape)
        yield from ((a, size) for a, size in enumerate(sizes) if isinstance(size, torch.SymInt))


def path_of(place: fx.Node) -> str:
    """The dotted name of a weight in the user's model, from where dynamo found it.

    Example:
        >>> path_in("L['self']._modules['layer']._modules['0']._parameters['weight']")
        'layer.0.weight'
    """
    source = getattr(place, "_dynamo_source", None)
    return path_in(source.name) if source is not None else place.name


def path_in(source: str) -> str:
    """The dotted name in the text of a source, without the variable that it starts from."""
    parts = re.findall(r"\['([^']*)'\]|\.(\w+)|\[(\d+)\]", source)
    names = [a or b or c for a, b, c in parts]
    return ".".join(n.replace(".", "_") for n in names[1:] if n not in _FOLDERS)


class Weights:
    """Which weights a compiled graph takes at each call, and which it holds as they were.

    Args:
        model: the graph as a model.
        inputs: the values that it was compiled with.
        lifted: names of the weights that it takes at each call.
        held: the others, as they were compiled.
    """

    def __init__(self, model: GraphModel, inputs: Sequence[Any], lifted: Sequence[str]) -> None:
        places = {name: index for index, name in model.weights.items()}
        self.model = model
        self._lifted = tuple(places[name] for name in lifted)
        self._held = {i: inputs[i].detach().clone() for i, name in model.weights.items()
                      if name not in lifted}
        self._seen = {i: _identity(inputs[i]) for i in self._held}

    def taken(self, inputs: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        """The weights of a call that the compiled graph takes."""
        return tuple(inputs[i] for i in self._lifted)

    def agree(self, inputs: Sequence[Any]) -> bool:
        """Whether the weights that the compiled graph holds have the values of this call's."""
        for index, kept in self._held.items():
            value, identity = inputs[index], _identity(inputs[index])
            if value.numel() > MOST_COMPARED and identity == self._seen[index]:
                continue
            if value.shape != kept.shape or value.dtype != kept.dtype \
                    or not torch.equal(value, kept):
                return False
            self._seen[index] = identity
        return True


def _identity(value: torch.Tensor) -> tuple[int, int]:
    """What changes when a tensor is another one, or is written to."""
    return value.data_ptr(), -1 if value.is_inference() else value._version


def lift(program: Program, model: GraphModel) -> tuple[Program, tuple[str, ...]]:
    """The program with weights as its last inputs where only their memory matters; their names.

    Buffers and single numbers stay, as copies: their values may have decided what was recognised.
    So do weights that are packed to bits.
    """
    kept, lifted = dict[str, torch.Tensor](), list[str]()
    for node in program.graph.nodes:
        if node.op == "get_attr":
            tensor = attribute(program.graph_module, node.target)
            if node.target in model.parameter_names and tensor.numel() > 1 and not _packed(node):
                lifted.append(node.target)
            else:
                kept[node.target] = tensor.clone()
    module, copies = copy_module(program.graph_module, kept)
    last = [n for n in module.graph.nodes if n.op == "placeholder"][-1]
    for node, copy in copies.items():
        if node.op == "get_attr" and node.target in lifted:
            with module.graph.inserting_after(last):
                last = module.graph.placeholder(f"weight_{lifted.index(node.target)}")
            last.meta = dict(copy.meta)
            copy.replace_all_uses_with(last)
            module.graph.erase_node(copy)
    return program.next(finish(module), program.level), tuple(lifted)


def _packed(node: fx.Node) -> bool:
    """Whether a stored tensor reaches an operator on bits without an input on the way."""
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            operator = operator_of(user.target) if user.op == "call_function" else None
            if operator is not None and operator.name.startswith("binary"):
                return True
            if user not in seen and all(n in seen or n.op == "get_attr"
                                        for n in user.all_input_nodes):
                seen.add(user)
                pending.append(user)
    return False
