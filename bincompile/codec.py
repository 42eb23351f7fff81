"""Programs as JSON: graphs, calling conventions and records, and back, with nothing executed."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from bincompile.conditions import is_condition, names
from bincompile.errors import ArtifactError
from bincompile.opset import FUNCTIONS, NAMES
from bincompile.program import Program
from bincompile.record import Evidence, Match, Refusal, Rewrite
from bincompile.signature import InputSpec, Result, Signature, TensorMeta

_CONSTANTS: dict[str, tuple[type, tuple[Any, ...]]] = {
    "dtype": (torch.dtype, (
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int8,
        torch.int16, torch.int32, torch.int64, torch.bool)),
    "memory_format": (torch.memory_format, (
        torch.contiguous_format, torch.preserve_format, torch.channels_last)),
    "layout": (torch.layout, (torch.strided,)),
}
Json = Any


def encode(program: Program, stored: Mapping[str, str]) -> dict[str, Json]:
    """The program as JSON; `stored` maps names of tensors to their names in the file."""
    return {
        "nodes": encode_graph(program, stored),
        "signature": _encode_signature(program.signature),
        "records": {
            "matches": [_encode_match(m) for m in program.matches],
            "refusals": [dataclasses.asdict(r) for r in program.refusals],
            "rewrites": [dataclasses.asdict(r) for r in program.rewrites],
            "notes": list(program.notes),
            "choices": dict(program.choices),
        },
    }


def decode(document: Mapping[str, Json], tensors: Mapping[str, torch.Tensor]) -> Program:
    """The program of a document that `encode` wrote."""
    module = decode_graph(document["nodes"], tensors)
    signature = _decode_signature(document["signature"])
    _check_ends(list(module.graph.nodes), signature)
    return Program(module, signature, "lowered", **_decode_records(document["records"]))


def encode_graph(program: Program, stored: Mapping[str, str]) -> list[Json]:
    """The graph alone."""
    return [_encode_node(node, stored) for node in program.graph.nodes]


def decode_graph(entries: Json, tensors: Mapping[str, torch.Tensor]) -> fx.GraphModule:
    """The graph that `encode_graph` wrote."""
    graph, nodes = fx.Graph(), dict[str, fx.Node]()
    read: dict[str, torch.Tensor] = {}
    for entry in entries:
        name = entry["name"]
        if not isinstance(name, str) or not name.isidentifier() or name in nodes:
            raise ArtifactError(f"a node named {name!r}", "distinct names", "save the model again")
        nodes[name] = _decode_node(graph, entry, nodes, tensors, read)
        if nodes[name].name != name:
            raise ArtifactError(f"a node named {name!r}", "a name that Python does not reserve",
                                "save the model again")
    graph.lint()
    return fx.GraphModule(read, graph)


def encode_value(value: Any) -> Json:
    """A number, text, list, dtype or None."""
    return _encode_arg(value)


def decode_value(value: Json) -> Any:
    """The value that `encode_value` wrote."""
    return _decode_arg(value, {})


def _check_ends(nodes: list[fx.Node], signature: Signature) -> None:
    """One placeholder for each input, and one output, at the end, with every result."""
    results = [n for n in nodes if n.op == "output"]
    inputs = [n for n in nodes if n.op == "placeholder"]
    if len(inputs) != len(signature.inputs) or results != nodes[-1:] \
            or len(results[0].args[0]) != signature.out_spec.num_leaves:
        raise ArtifactError(f"a graph of {len(inputs)} inputs and {len(results)} outputs",
                            f"{len(signature.inputs)} inputs and one output of "
                            f"{signature.out_spec.num_leaves} results", "save the model again")


def _encode_node(node: fx.Node, stored: Mapping[str, str]) -> dict[str, Json]:
    entry: dict[str, Json] = {"name": node.name, "op": node.op}
    if node.op == "get_attr":
        return {**entry, "target": node.target, "tensor": stored[node.target]}
    entry["value"] = _encode_meta(node.meta.get("val"))
    if node.meta.get("nn_module_stack"):
        entry["path"] = list(node.meta["nn_module_stack"].values())[-1][0]
    if node.op == "output":
        return {**entry, "args": _encode_arg(node.args[0])}
    if node.op == "placeholder":
        return entry
    if node.op != "call_function" or node.target not in NAMES:
        raise ArtifactError(f"a program that calls {node.target}",
                            "the operators of bincompile.opset",
                            "ask for the operator to be added, or keep that part out of the model")
    return {**entry, "target": NAMES[node.target], "args": _encode_arg(list(node.args)),
            "kwargs": {k: _encode_arg(v) for k, v in node.kwargs.items()}}


def _decode_node(graph: fx.Graph, entry: Mapping[str, Json], nodes: dict[str, fx.Node],
                 tensors: Mapping[str, torch.Tensor], read: dict[str, torch.Tensor]) -> fx.Node:
    kind, name = entry["op"], entry["name"]
    if kind == "get_attr":
        node = graph.create_node("get_attr", _checked_path(entry["target"]), name=name)
        read[node.target] = tensors[entry["tensor"]]
        node.meta["val"] = read[node.target]
        return node
    if kind == "placeholder":
        node = graph.create_node("placeholder", name, name=name)
    elif kind == "output":
        results = _decode_arg(entry["args"], nodes)
        node = graph.create_node("output", "output", (results,), name=name)
    elif kind == "call_function" and entry["target"] in FUNCTIONS:
        node = graph.create_node(
            "call_function", FUNCTIONS[entry["target"]], tuple(_decode_arg(entry["args"], nodes)),
            {str(k): _decode_arg(v, nodes) for k, v in entry["kwargs"].items()}, name=name)
    else:
        raise ArtifactError(f"a node that does {kind} {entry.get('target')}",
                            "the operators of bincompile.opset", "use the version that wrote it")
    node.meta["val"] = _decode_meta(entry["value"])
    if "path" in entry:
        node.meta["nn_module_stack"] = {name: (str(entry["path"]), "")}
    return node


def _checked_path(path: Any) -> str:
    if not isinstance(path, str) or not all(
            p.replace("_", "a").isalnum() and not p.startswith("__") for p in path.split(".")):
        raise ArtifactError(f"a tensor at {path!r}", "a dotted path", "save the model again")
    return path


def _encode_arg(arg: Any) -> Json:
    if arg is None or isinstance(arg, bool | int | str):
        return arg
    if isinstance(arg, float):
        return arg if math.isfinite(arg) else {"float": str(arg)}
    if isinstance(arg, fx.Node):
        return {"node": arg.name}
    if isinstance(arg, tuple):
        return {"tuple": [_encode_arg(a) for a in arg]}
    if isinstance(arg, list):
        return [_encode_arg(a) for a in arg]
    if isinstance(arg, torch.device):
        return {"device": arg.type}
    for name, (kind, values) in _CONSTANTS.items():
        if isinstance(arg, kind) and arg in values:
            return {name: str(arg)}
    raise ArtifactError(f"an argument {arg!r} of type {type(arg).__name__}",
                        "numbers, strings, lists, dtypes and nodes", "the model's forward")


def _decode_arg(arg: Json, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(arg, list):
        return [_decode_arg(a, nodes) for a in arg]
    if not isinstance(arg, dict):
        return arg
    (kind, value), = arg.items()
    if kind == "node":
        return nodes[value]
    if kind == "tuple":
        return tuple(_decode_arg(a, nodes) for a in value)
    if kind == "float":
        return float(value)
    if kind == "device":
        return torch.device("cpu" if value == "cpu" else "cuda")
    return {str(v): v for v in _CONSTANTS[kind][1]}[value]


def _encode_meta(value: Any) -> Json:
    if isinstance(value, torch.Tensor | TensorMeta):
        return {"dtype": str(value.dtype),
                "shape": [s if isinstance(s, int) else str(s) for s in value.shape]}
    if isinstance(value, tuple | list):
        return [_encode_meta(v) for v in value]
    return None if value is None else {"number": str(value)}


def _decode_meta(value: Json) -> Any:
    if isinstance(value, list):
        return tuple(_decode_meta(v) for v in value)
    if isinstance(value, dict) and "dtype" in value:
        return TensorMeta(_decode_arg({"dtype": value["dtype"]}, {}), tuple(value["shape"]))
    return None if value is None else value["number"]


def _encode_signature(signature: Signature) -> Json:
    return {
        "inputs": [{"name": i.name, "shape": list(i.shape), "constant": _encode_arg(i.constant),
                    "dtype": None if i.dtype is None else str(i.dtype)} for i in signature.inputs],
        "in_spec": _encode_tree(signature.in_spec),
        "out_spec": _encode_tree(signature.out_spec),
        "names": list(signature.names),
        "defaults": {k: v for k, v in signature.defaults.items()
                     if v is None or isinstance(v, bool | int | str)},
        "ranges": {k: list(v) for k, v in signature.ranges.items()},
        "conditions": list(signature.conditions),
    }


def _decode_signature(document: Json) -> Signature:
    inputs = tuple(
        InputSpec(i["name"], None if i["dtype"] is None else _decode_arg({"dtype": i["dtype"]}, {}),
                  tuple(i["shape"]), _decode_arg(i["constant"], {})) for i in document["inputs"])
    conditions = tuple(document["conditions"])
    sizes = {size for spec in inputs for size in spec.shape if isinstance(size, str)}
    if not all(is_condition(text) and names(text) <= sizes for text in conditions):
        raise ArtifactError("a condition on sizes that is no comparison of the inputs' sizes",
                            "comparisons of sums, products and remainders", "save the model again")
    return Signature(inputs, pytree.tree_structure(_decode_tree(document["in_spec"])),
                     pytree.tree_structure(_decode_tree(document["out_spec"])),
                     tuple(document["names"]), dict(document["defaults"]),
                     {k: tuple(v) for k, v in document["ranges"].items()}, conditions)


def _encode_tree(spec: pytree.TreeSpec) -> Json:
    if spec.is_leaf():
        return "leaf"
    children = [_encode_tree(child) for child in spec.children()]
    if spec.type in (tuple, list):
        return {spec.type.__name__: children}
    keys = spec.context if isinstance(spec.context, list | tuple) else None
    if keys is None or len(keys) != len(children) or not all(isinstance(k, str) for k in keys):
        found = getattr(spec.type, "__name__", spec.type)
        raise ArtifactError(f"inputs or results of type {found}",
                            "tensors in tuples, lists, dicts and dataclass-like results",
                            "what the model takes and returns")
    kind = "dict" if spec.type in (dict, OrderedDict) else "result"
    return {kind: [[key, child] for key, child in zip(keys, children, strict=True)]}


_CONTAINERS: dict[str, Callable[[Any], Any]] = {"tuple": tuple, "list": list}
_MAPPINGS: dict[str, Callable[[Any], Any]] = {"dict": dict, "result": Result}


def _decode_tree(document: Json) -> Any:
    """A container of zeros with the structure; a class of its own comes back as a `Result`."""
    if document == "leaf":
        return 0
    (kind, children), = document.items()
    if kind in _CONTAINERS:
        return _CONTAINERS[kind](_decode_tree(child) for child in children)
    return _MAPPINGS[kind]((key, _decode_tree(child)) for key, child in children)


def _encode_match(match: Match) -> dict[str, Json]:
    """A match without the time of its proof, which is not the same in two compilations."""
    evidence = match.evidence and dataclasses.replace(match.evidence, milliseconds=0.0)
    return dataclasses.asdict(
        dataclasses.replace(match, attrs=_plain_attrs(match), evidence=evidence))


def _plain_attrs(match: Match) -> dict[str, Json]:
    return {k: v if v is None or isinstance(v, bool | int | float | str) else str(v)
            for k, v in match.attrs.items()}


def _decode_records(document: Json) -> dict[str, Any]:
    def match(fields: Json) -> Match:
        evidence = fields["evidence"]
        return Match(**{**fields, "nodes": tuple(map(str, fields.get("nodes", ()))),
                        "evidence": None if evidence is None else Evidence(**evidence)})

    return {"matches": tuple(map(match, document["matches"])),
            "refusals": tuple(Refusal(**r) for r in document["refusals"]),
            "rewrites": tuple(Rewrite(**r) for r in document["rewrites"]),
            "notes": tuple(map(str, document["notes"])),
            "choices": {str(n): str(c) for n, c in dict(document.get("choices", {})).items()}}


