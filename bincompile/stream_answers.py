"""What a step answers: the flat results of the step program as the model would return them."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from bincompile.signature import Signature
from bincompile.steps import StepProgram

_SOMETIMES_VIEWS = ("getitem", "type_as.default", "dropout.default")  # whose schema says no


@dataclasses.dataclass(frozen=True)
class Answer:
    """One flat output of a step.

    Args:
        time: its axis of time; None where it has none.
        single: whether that axis has one token and is left out.
        rows: the axis of the rows in what is answered; None where rows have none.
        held: whether it may be memory of the stream or of the caller's token.
    """

    time: int | None
    single: bool
    rows: int | None
    held: bool

    def of(self, output: torch.Tensor) -> torch.Tensor:
        """The output without time, in memory that is the caller's."""
        found = output.squeeze(self.time) if self.single and self.time is not None else output
        return found.clone() if self.held else found

    def stacked(self, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """The answers of several steps: time is where the model has it, else behind the rows."""
        if self.time is not None:
            unite = torch.cat if self.single else torch.stack
            return unite([torch.unsqueeze(o, self.time) if self.single else o for o in outputs],
                         self.time)
        return torch.stack(list(outputs), 0 if self.rows is None else self.rows + 1)

    def blank(self, output: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """The answer with NaN, or 0 in whole numbers, in the rows that are not valid."""
        if self.rows is None:
            return output
        shape = [1] * output.ndim
        shape[self.rows] = -1
        empty = float("nan") if output.dtype.is_floating_point or output.dtype.is_complex else 0
        return output.masked_fill(~valid.view(shape), empty)


@dataclasses.dataclass(frozen=True)
class Answers:
    """All flat outputs of a step program, and the structure that the model returns.

    Args:
        each: one for each flat output; None for one that is no tensor.
        signature: of the model.
    """

    each: tuple[Answer | None, ...]
    signature: Signature

    @classmethod
    def of(cls, steps: StepProgram, signature: Signature) -> Answers:
        """What can be known of them before a step."""
        places = [n for n in steps.program.graph.nodes if n.op == "placeholder"]
        rows = places[len(steps.inputs)].meta["val"].shape[0]
        (results,) = steps.program.graph.output_node().args
        return cls(tuple(_answer(node, time, rows) for node, time in
                         zip(results, steps.answers, strict=True)), signature)

    @property
    def drop(self) -> tuple[int | None, ...]:
        """The axis of each output that its answer lacks."""
        return tuple(answer.time if answer is not None and answer.single else None
                     for answer in self.each)

    @functools.cached_property
    def result(self) -> Callable[[Sequence[Any]], Any]:
        """From flat answers to the structure that the model returns."""
        if self.signature.out_spec.is_leaf():
            return operator.itemgetter(0)
        return self.signature.unflatten

    def parts(self, outputs: Sequence[Any]) -> list[Any]:
        """The flat answers of a step."""
        return [output if answer is None else answer.of(output)
                for answer, output in zip(self.each, outputs, strict=True)]

    def blanked(self, parts: Sequence[Any], valid: torch.Tensor) -> list[Any]:
        """Flat answers with nothing in the rows that are not valid."""
        return [part if answer is None else answer.blank(part, valid)
                for answer, part in zip(self.each, parts, strict=True)]

    def stacked(self, steps: Sequence[Sequence[Any]]) -> list[Any]:
        """The flat answers of several steps as one."""
        return [parts[-1] if answer is None else answer.stacked(parts)
                for answer, parts in zip(self.each, zip(*steps, strict=True), strict=True)]


def _answer(node: Any, time: int | None, rows: Any) -> Answer | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    shape = getattr(value, "shape", None)
    if shape is None:
        return None
    single = time is not None and str(shape[time]) == "1"
    left = [str(size) for axis, size in enumerate(shape) if not (single and axis == time)]
    return Answer(time, single, left.index(str(rows)) if str(rows) in left else None,
                  _is_held(node))


def _is_held(node: fx.Node) -> bool:
    """Whether a result is an input, a stored tensor, or may be a view of one."""
    while node.op == "call_function":
        returns = getattr(getattr(node.target, "_schema", None), "returns", ())
        if not any(r.alias_info is not None for r in returns) \
                and getattr(node.target, "__name__", "") not in _SOMETIMES_VIEWS:
            return False
        node = node.all_input_nodes[0]
    return True
