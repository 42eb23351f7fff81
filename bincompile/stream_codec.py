"""The streaming form of a saved model as JSON, and back, with nothing executed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from bincompile.codec import decode_graph, decode_value, encode_graph, encode_value
from bincompile.errors import ArtifactError
from bincompile.ops import operator_of
from bincompile.program import Program
from bincompile.record import Evidence
from bincompile.signature import InputSpec, Signature
from bincompile.steps import State, StepProgram, TimeInput
from bincompile.stream_form import StreamForm

_PLAIN = ("semantics", "receptive_field", "rate", "delay", "first", "limit")
Json = Any


def tensors_of(form: StreamForm) -> dict[str, dict[str, torch.Tensor]]:
    """The stored tensors of its programs: "steps" and, where there is one, "prepare"."""
    prepare = form.steps.prepare
    return {"steps": form.steps.program.tensors(),
            **({} if prepare is None else {"prepare": prepare.tensors()})}


def encode_form(form: StreamForm, stored: Mapping[str, Mapping[str, str]]) -> dict[str, Json]:
    """The form as JSON; `stored` maps, for each program, names of tensors to those in the file."""
    steps = form.steps
    return {
        **{name: getattr(steps, name) for name in _PLAIN},
        "nodes": encode_graph(steps.program, stored["steps"]),
        "prepare": None if steps.prepare is None else
        encode_graph(steps.prepare, stored["prepare"]),
        "kernels": dict(form.executable.kernels),
        "fingerprint": form.fingerprint,
        "inputs": [_encode_record(known) for known in steps.inputs],
        "states": [_encode_record(state) for state in steps.states],
        "answers": list(steps.answers), "statics": list(steps.statics),
        "windows": [list(window) for window in steps.windows], "notes": list(steps.notes),
        "evidence": [dataclasses.asdict(dataclasses.replace(found, milliseconds=0.0))
                     for found in steps.evidence],
    }


def decode_steps(document: Mapping[str, Json], tensors: Mapping[str, torch.Tensor],
                 signature: Signature) -> StepProgram:
    """The step program of a form that `encode_form` wrote.

    Args:
        document: the JSON.
        tensors: of the file.
        signature: of the whole model.

    Raises:
        ArtifactError: parts that do not fit each other.
    """
    prepare = None if document["prepare"] is None else _program(document["prepare"], tensors)
    steps = StepProgram(
        _program(document["nodes"], tensors),
        tuple(TimeInput(**_decode_record(fields, "token")) for fields in document["inputs"]),
        tuple(State(**_decode_record(fields, "shape")) for fields in document["states"]),
        tuple(document["answers"]), statics=tuple(document["statics"]), prepare=prepare,
        windows=tuple((str(path), window) for path, window in document["windows"]),
        evidence=tuple(Evidence(**found) for found in document["evidence"]),
        notes=tuple(map(str, document["notes"])),
        **{name: document[name] for name in _PLAIN})
    _check(steps, signature)
    return steps


def writes(program: Program) -> set[fx.Node]:
    """The nodes whose memory a program writes to."""
    return {value for node in program.graph.nodes
            if node.op == "call_function" and (operator := operator_of(node.target)) is not None
            for name, value in operator.bind(node.args, dict(node.kwargs)).items()
            if name in operator.mutated}


def _program(entries: Json, tensors: Mapping[str, torch.Tensor]) -> Program:
    """A program of flat inputs and a tuple of flat outputs."""
    module = decode_graph(entries, tensors)
    nodes = list(module.graph.nodes)
    if [n for n in nodes if n.op == "output"] != nodes[-1:]:
        raise _broken("a graph without one output at its end")
    inputs = tuple(InputSpec(n.name, n.meta["val"].dtype, n.meta["val"].shape)
                   for n in nodes if n.op == "placeholder" and n.meta["val"] is not None)
    return Program(module, Signature(
        inputs, pytree.tree_structure((tuple(range(len(inputs))), {})),
        pytree.tree_structure(tuple(range(len(nodes[-1].args[0]))))), "lowered")


def _check(steps: StepProgram, signature: Signature) -> None:
    """Raise unless the parts fit, and only states are written to."""
    places = [n for n in steps.program.graph.nodes if n.op == "placeholder"]
    behind = len(steps.inputs) + 2
    (output,) = (n for n in steps.program.graph.nodes if n.op == "output")
    positions = [*(known.position for known in steps.inputs), *steps.statics]
    if len(places) != behind + len(steps.states) or not steps.inputs \
            or len(output.args[0]) != len(steps.answers) \
            or len(steps.answers) != signature.out_spec.num_leaves:
        raise _broken(f"a step of {len(places)} inputs and {len(output.args[0])} outputs")
    if len(set(positions)) < len(positions) or not all(
            type(p) is int and 0 <= p < len(signature.inputs) for p in positions):
        raise _broken(f"inputs at {positions}")
    mine = {place for place, state in zip(places[behind:], steps.states, strict=True)
            if state.prepared is None}
    if writes(steps.program) - mine or (steps.prepare is not None and writes(steps.prepare)):
        raise _broken("a step that writes to what is no state")
    prepared = {state.prepared for state in steps.states} - {None}
    given = 0 if steps.prepare is None else len(list(steps.prepare.graph.nodes)[-1].args[0])
    if not all(type(index) is int and 0 <= index < given for index in prepared):
        raise _broken(f"prepared states {sorted(map(str, prepared))}")
    numbers = [steps.rate, steps.delay, steps.first, *(s.block for s in steps.states)]
    if not all(type(n) is int and n >= 0 for n in numbers) or steps.rate < 1:
        raise _broken(f"a rate of {steps.rate!r}")
    if any(s.grows is not None and not 0 <= s.grows < len(s.shape) for s in steps.states):
        raise _broken("a state that grows along no axis of it")


def _encode_record(record: TimeInput | State) -> dict[str, Json]:
    return {name: encode_value(list(value) if isinstance(value, tuple) else value)
            for name, value in dataclasses.asdict(record).items()}


def _decode_record(fields: Mapping[str, Json], sizes: str) -> dict[str, Any]:
    found = {str(name): decode_value(value) for name, value in fields.items()}
    if not isinstance(found["dtype"], torch.dtype) or not all(
            type(size) is int and size >= 0 for size in found[sizes]):
        raise _broken(f"{found.get('name')!r} of {found['dtype']} {found[sizes]}")
    return {**found, sizes: tuple(found[sizes])}


def _broken(found: str) -> ArtifactError:
    return ArtifactError(found, "the parts of one step program", "save the model again")
