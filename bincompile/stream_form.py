"""A step program bound to kernels: what all streams of one compiled model share."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from bincompile.config import Target
from bincompile.errors import InputError, InputTypeError
from bincompile.program import Program, attribute, target_name
from bincompile.runtime.executor import Executable, bind, settle
from bincompile.signature import InputSpec, Signature
from bincompile.steps import StepProgram
from bincompile.stream_answers import Answers
from bincompile.stream_call import TokenCall
from bincompile.stream_rows import StreamRows


@dataclasses.dataclass(frozen=True, eq=False)
class StreamForm:
    """A step program, its kernels, and how its calls look.

    Args:
        steps: the step program, lowered.
        signature: of the whole model.
        executable: its kernels.
        prepare: the kernels of what follows from inputs that do not change; None without such.
        fingerprint: digest of the graph, the states and the stored tensors: a saved stream fits
            only where it is the same.
        target: the machine of the kernels.
    """

    steps: StepProgram
    signature: Signature
    executable: Executable
    prepare: Executable | None
    fingerprint: str
    target: Target

    @classmethod
    def bound(cls, steps: StepProgram, signature: Signature, target: Target, fingerprint: str,
              kernels: Mapping[str, str] | None = None) -> StreamForm:
        """A lowered step program with kernels for a machine.

        Args:
            steps: lowered.
            signature: of the whole model.
            target: the machine.
            fingerprint: of `fingerprint_of` before it was lowered.
            kernels: those of some nodes, where the first that accepts isn't wanted.
        """
        prepare = None if steps.prepare is None else bind(steps.prepare, target)
        return cls(steps, signature, bind(steps.program, target, kernels), prepare, fingerprint,
                   target)

    def settled(self) -> StreamForm:
        """The same, with nothing kept for reading only; this one must not be used again."""
        program, executable = settle(self.steps.program, self.executable)
        steps, prepare = dataclasses.replace(self.steps, program=program), self.prepare
        if steps.prepare is not None and prepare is not None:
            program, prepare = settle(steps.prepare, prepare)
            steps = dataclasses.replace(steps, prepare=program)
        return dataclasses.replace(self, steps=steps, executable=executable, prepare=prepare)

    @property
    def programs(self) -> list[tuple[Program, Executable]]:
        """Its programs with their kernels."""
        found = [(self.steps.program, self.executable)]
        if self.steps.prepare is not None and self.prepare is not None:
            found.append((self.steps.prepare, self.prepare))
        return found

    @functools.cached_property
    def call(self) -> TokenCall:
        """How a step is called: by the names that the model has."""
        return TokenCall(tuple(
            dataclasses.replace(known, name=self.signature.inputs[known.position].name)
            for known in self.steps.inputs))

    @functools.cached_property
    def answers(self) -> Answers:
        """What a step answers."""
        return Answers.of(self.steps, self.signature)

    @property
    def batched(self) -> bool:
        """Whether the model has an axis for rows."""
        return any(known.batched for known in self.steps.inputs)

    @property
    def statics(self) -> tuple[InputSpec, ...]:
        """The inputs of the model that do not change with time."""
        return tuple(self.signature.inputs[position] for position in self.steps.statics)

    def rows(self, count: int, statics: Mapping[str, Any]) -> StreamRows:
        """So many new rows.

        Raises:
            InputError: a number of rows, or an input that is missing, not known or of a wrong size.
            InputTypeError: an input of a wrong type.
        """
        if type(count) is not int or count < 0 or (count != 1 and not self.batched):
            raise InputError(f"a stream of {count!r} rows",
                             "a number from 0 up" if self.batched else
                             "1: the inputs of this model have no axis for a batch",
                             "batch_size=, or count= of join()")
        return StreamRows.fresh(self.steps, count, self._prepared(count, statics))

    def _prepared(self, count: int, statics: Mapping[str, Any]) -> Sequence[torch.Tensor]:
        """What follows from inputs that do not change."""
        names = [spec.name for spec in self.statics]
        told = ", ".join(map(str, self.statics)) or "no inputs beside the number of rows"
        if unknown := sorted(set(statics) - set(names)):
            raise InputTypeError(f"an input {unknown[0]!r} of a stream", told, "the call")
        if self.prepare is None:
            return ()
        self._check_statics(count, [(spec, statics[spec.name]) for spec in self.statics
                                    if spec.name in statics])
        values = []
        for spec, is_read in zip(self.statics, self._read, strict=True):
            if is_read and spec.name not in statics and spec.dtype is not None:
                raise InputTypeError(f"a stream without {spec.name}", told,
                                     f"stream({spec.name}=...): it does not change with time")
            value = statics.get(spec.name, self._stand_in(spec, count))
            values.append(value.detach() if isinstance(value, torch.Tensor) else value)
        with torch.inference_mode(False):
            found = self.prepare(*values)
        if wrong := [tensor for tensor in found if tensor.shape[0] != count]:
            raise InputError(f"inputs of a stream for {wrong[0].shape[0]} rows", f"{count} rows",
                             "the batch of the inputs that do not change with time")
        return found

    @functools.cached_property
    def _read(self) -> list[bool]:
        """Of each of those inputs whether anything follows from it."""
        assert self.steps.prepare is not None
        return [bool(node.users) for node in self.steps.prepare.graph.nodes
                if node.op == "placeholder"]

    def _stand_in(self, spec: InputSpec, count: int) -> Any:
        """A value of an input that nothing follows from; a constant as it was captured."""
        if spec.dtype is None:
            return spec.constant
        sizes = [size if isinstance(size, int) else count if size == self._batch_symbol else 1
                 for size in spec.shape]
        return torch.zeros(sizes, dtype=spec.dtype)

    def _check_statics(self, count: int, given: Sequence[tuple[InputSpec, Any]]) -> None:
        """Raise unless these inputs are of the captured dtypes and sizes, the batch of `count`."""
        specs, values = tuple(spec for spec, _ in given), [value for _, value in given]
        dataclasses.replace(self.signature, inputs=specs, conditions=()).check(values)
        batch = self._batch_symbol
        for spec, value in given:
            for axis, size in enumerate(spec.shape if batch is not None else ()):
                if size == batch and value.shape[axis] != count:
                    raise InputError(f"{spec.name} with size {value.shape[axis]} in dimension "
                                     f"{axis}", f"{count}: one for each row", spec.name)
            if isinstance(value, torch.Tensor) and bool(torch.isnan(value).any()):
                raise InputError(f"{spec.name} has values that are NaN", "numbers",
                                 f"the input {spec.name}")

    @property
    def _batch_symbol(self) -> int | str | None:
        """The size of the batch in the model's signature, where it is a symbol."""
        for known in self.steps.inputs:
            shape = self.signature.inputs[known.position].shape
            axis = 1 if known.time_axis == 0 else 0
            if known.batched and isinstance(shape[axis], str):
                return shape[axis]
        return None


def fingerprint_of(steps: StepProgram) -> str:
    """Digest of what a step computes and remembers, the same in every process.

    Args:
        steps: before it is lowered, so that machines with other kernels agree.
    """
    found = hashlib.sha256()
    programs = [steps.program] if steps.prepare is None else [steps.program, steps.prepare]
    for program in programs:
        for text in _texts(program):
            found.update(text.encode() + b"\n")
        for tensor in _stored(program):
            found.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
            found.update(_bytes(tensor))
    for state in steps.states:
        found.update(f"{state.name} {state.dtype} {state.grows} {state.prepared} "
                     f"{() if state.prepared is not None else state.shape}\n".encode())
    found.update(f"{steps.semantics} {steps.rate} {steps.delay} {steps.first}".encode())
    return found.hexdigest()


def _texts(program: Program) -> Iterable[str]:
    """The graph as text, its nodes by number."""
    numbers = {node: f"%{index}" for index, node in enumerate(program.graph.nodes)}
    for node in program.graph.nodes:
        if node.op == "get_attr" or node.op == "placeholder":
            yield node.op
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _Named(numbers[n]))
            yield f"{node.op} {target_name(node.target)} {args} {kwargs}"


class _Named:
    """Stands for a node in a text."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


def _stored(program: Program) -> Iterable[torch.Tensor]:
    """The stored tensors in the order of the graph."""
    for node in program.graph.nodes:
        if node.op == "get_attr":
            value = attribute(program.graph_module, node.target)
            if isinstance(value, torch.Tensor):
                yield value


def _bytes(tensor: torch.Tensor) -> Any:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else b""
