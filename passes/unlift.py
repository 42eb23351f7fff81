"""Unlift: the graph of an ExportedProgram with its parameters as nodes, and what it may not do."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from bincompile.errors import CaptureError
from bincompile.passes.graph import arguments, drop_unread
from bincompile.program import source_line, target_name

WRAPPER = "model"  # name of the user's model inside the module that is exported


def unlift(exported: ExportedProgram) -> tuple[fx.GraphModule, list[Any]]:
    """The graph with parameters as get_attr nodes, and the fake values of its inputs."""
    signature, tensors = exported.graph_signature, {}
    inputs = {spec.arg.name: spec for spec in signature.input_specs}
    changed = [str(s.target or s.arg.name).removeprefix(f"{WRAPPER}.")
               for s in signature.output_specs if s.kind is not OutputKind.USER_OUTPUT]
    if changed:
        raise _changes(exported, changed)
    graph, copies, values = fx.Graph(), {}, []
    for node in exported.graph.nodes:
        spec = inputs.get(node.name) if node.op == "placeholder" else None
        if spec is not None and spec.kind is not InputKind.USER_INPUT:
            if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER,
                                 InputKind.CONSTANT_TENSOR):
                raise CaptureError(f"an input of kind {spec.kind.name}: {node.name}",
                                   "tensors only", "the model's forward")
            name = spec.target.removeprefix(f"{WRAPPER}.")
            tensors[name] = _stored(exported, spec.target)
            copies[node] = graph.get_attr(name)
            copies[node].meta = dict(node.meta)
            continue
        if node.op == "output":
            copies[node] = graph.output(fx.node.map_arg(tuple(node.args[0]), copies.get))
            continue
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        copies[node].meta["nn_module_stack"] = _own_stack(node)
        if node.op == "placeholder":
            values.append(node.meta["val"])
    module = fx.GraphModule(tensors, graph)
    drop_unread(module.graph)
    _refuse_random(module.graph)
    module.recompile()
    return module, values


def _changes(exported: ExportedProgram, changed: list[str]) -> CaptureError:
    found = f"the forward changes {', '.join(changed)} in place"
    allowed = "a forward that changes neither its inputs nor its buffers"
    if any("embedding_renorm" in target_name(n.target) for n in exported.graph.nodes):
        return CaptureError(f"{found}: max_norm= renormalises rows at every call", allowed,
                            "renormalise the table once and set max_norm=None")
    return CaptureError(found, allowed, "return the new value instead of writing it")


def _refuse_random(graph: fx.Graph) -> None:
    """Raise if a node draws random numbers: no two calls of the model would agree."""
    for node in graph.nodes:
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded not in tags:
            continue
        found = arguments(node)
        idle = (found.get(name) for name in ("train", "training", "dropout_p", "dropout"))
        if not any(value is not None and not value for value in idle):
            where = source_line(node) or "the forward"
            raise CaptureError(f"{target_name(node.target)} draws random numbers at {where}",
                               "a forward that gives the same results for the same inputs",
                               "F.dropout(..., training=self.training), or pass the numbers in")


def _own_stack(node: fx.Node) -> dict[str, tuple[str, Any]]:
    """The module stack with paths as the user's model names them."""
    found = {}
    for key, (path, *rest) in (node.meta.get("nn_module_stack") or {}).items():
        path = re.sub(r"^[LG]\['\w+'\]\.?", "", path)
        path = path.removeprefix(WRAPPER).removeprefix(".") if path != WRAPPER else ""
        if not path.startswith("_empty_nn_module_stack"):
            found[key] = (path, *rest)
    return found


def _stored(exported: ExportedProgram, target: str) -> torch.Tensor:
    found = exported.state_dict.get(target)
    tensor = exported.constants[target] if found is None else found
    return tensor.detach()
