"""The making of the step program from the analysis of time."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from bincompile.config import Continual
from bincompile.passes.graph import value_of
from bincompile.passes.streaming.analysis import Analysis, analyse, error_of
from bincompile.passes.streaming.builder import StepBuilder
from bincompile.passes.streaming.facts import Facts
from bincompile.passes.streaming.kinds import (
    Kind,
    Pairwise,
    Refused,
    Stepped,
    Still,
    Windowed,
    expression,
    parts_of,
)
from bincompile.passes.streaming.narrow import narrow
from bincompile.passes.streaming.prepare import prepare
from bincompile.passes.streaming.rule import ALL
from bincompile.passes.streaming.tidy import tidy
from bincompile.program import Program
from bincompile.signature import InputSpec, Signature
from bincompile.steps import StepProgram


def to_steps(program: Program, continual: Continual) -> StepProgram:
    """The model as a program that takes one token at a time.

    Args:
        program: the model over whole sequences, after its rewrites.
        continual: window, semantics and axis of time.

    Raises:
        ContinualError: the model can't run one step at a time and give the same values; the
            message has the node, the user's line, the reason and what to change.

    Source: Continual Inference (arXiv:2201.06268, arXiv:2204.03418).
    """
    return _Steps(program, analyse(program, continual)).program()


class _Steps:
    """One step program in the making."""

    def __init__(self, model: Program, analysis: Analysis) -> None:
        self.model, self.analysis, self.facts = model, analysis, analysis.facts
        self.build = StepBuilder(self.facts, analysis.asked)

    def program(self) -> StepProgram:
        """The whole step program."""
        for node in self.facts.program.graph.nodes:
            if node in self.analysis.asked and node in self.analysis.chosen and not all(
                    isinstance(k, Still | Pairwise) for k in parts_of(self.facts.kind(node))):
                self._emit(node)
        results, answers = self._outputs()
        build, facts = self.build, self.facts
        build.answer(results)
        narrow(build)
        tidy(build)
        graph_module = build.finished()
        program = self.model.next(graph_module, "steps", signature=_signature(graph_module))
        once = prepare(facts, build.frontier) if build.frontier else None
        kinds = [facts.kind(n) for n in self._results()]
        moving = [k for k in kinds if not isinstance(k, Still)]
        delay = max((k.delay for k in moving if isinstance(k, Stepped)), default=0)
        return StepProgram(
            program, facts.inputs.steps, _kept(graph_module, build), answers,
            semantics=semantics_of(facts),
            windows=tuple(facts.windows), receptive_field=_reach(moving, facts),
            rate=next((k.rate for k in moving if isinstance(k, Stepped)), 1), delay=delay,
            first=max((_first(k, facts, delay) for k in moving), default=0),
            limit=min(build.limits, default=None), statics=facts.inputs.statics,
            prepare=None if once is None else Program(once, _signature(once), "steps"),
            notes=tuple(facts.notes))

    def _results(self) -> list[fx.Node]:
        return list(self.facts.program.graph.output_node().args[0])

    def _emit(self, node: fx.Node) -> None:
        self.build.at(node)
        try:
            made = self.analysis.chosen[node].emit(node, self.build)
        except Refused as refused:
            raise error_of(node, refused) from refused
        except RuntimeError as error:  # torch's own, of sizes that don't go together
            reason = str(error).partition("\n")[0]
            raise error_of(node, Refused(f"can't take one token: {reason}")) from error
        kind = self.facts.kind(node)
        held = tuple(map(value_of, made)) if isinstance(made, tuple) else value_of(made)
        for part, value in zip(parts_of(kind), held if isinstance(kind, tuple) else (held,),
                               strict=False):
            self._check(node, part, value)
        self.build.emitted(node, made)

    def _check(self, node: fx.Node, kind: Kind, value: Any) -> None:
        """Raise where a step node has other sizes than its axes say."""
        wanted = self.build.shape(kind.axes, self.build.extent(node))
        if self.build.is_fixed:
            raise error_of(node, Refused("is defined for one number of rows alone"))
        fits = [*map(expression, wanted)] == [*map(expression, value.shape)]
        if not fits and not isinstance(kind, Still):
            raise error_of(node, Refused(f"would be of shape {tuple(value.shape)} in a step, "
                                         f"where {tuple(wanted)} follows from the model"))

    def _outputs(self) -> tuple[list[fx.Node], tuple[int | None, ...]]:
        """The outputs, delayed to the last of them, and their axes of time."""
        kinds = [self.facts.kind(n) for n in self._results()]
        delay = max((k.delay for k in kinds if isinstance(k, Stepped)), default=0)
        found, answers = [], []
        for node, kind in zip(self._results(), kinds, strict=True):
            self.build.at(node)
            try:
                found.append(self._output(node, kind, delay))
            except Refused as refused:
                raise error_of(node, refused) from refused
            answers.append(kind.time_axis)
        return found, tuple(answers)

    def _output(self, node: fx.Node, kind: Any, delay: int) -> fx.Node:
        build = self.build
        if isinstance(kind, Stepped):
            like = dataclasses.replace(kind, delay=delay)
            whole = self.facts.continual.outputs == ALL and kind.time_axis is not None
            if whole and self.facts.window is None:
                raise Refused("is asked for at all tokens of a window, and none was given",
                              "Continual(window=), or outputs='last'")
            return build.read(node, like, self.facts.window or 1 if whole else 1)
        return build.read(node, kind, build.extent(node))


def semantics_of(facts: Facts) -> str:
    """What the steps equal, as the report says it."""
    if facts.semantics == "window":
        return f"window({facts.window})"
    seen = [tokens for _, tokens in facts.windows] or [facts.window]
    known = [tokens for tokens in seen if tokens is not None]
    held = str(max(known)) if len(known) == len(seen) else "unbounded"
    return f"banded({held})" + (", truncates" if facts.truncates else "")


def _reach(kinds: list[Any], facts: Facts) -> int | None:
    reaches: list[int | None] = [facts.window if isinstance(k, Windowed) else k.reach
                                 for k in kinds]
    known = [reach for reach in reaches if reach is not None]
    return None if len(known) < len(reaches) else max(known, default=1)


def _first(kind: Any, facts: Facts, delay: int) -> int:
    """The first step whose answer is valid, where outputs wait for that delay."""
    if isinstance(kind, Windowed):
        return facts.first(kind)
    found: int = max(kind.first, kind.delay) + delay - kind.delay
    whole = facts.continual.outputs == ALL and kind.time_axis is not None
    return found + ((facts.window or 1) - 1) * kind.rate if whole else found


def _kept(graph_module: fx.GraphModule, build: StepBuilder) -> tuple[Any, ...]:
    """The states in the order of their placeholders."""
    by_name = {s.name: s for s in build.states}
    return tuple(by_name[n.name] for n in graph_module.graph.find_nodes(op="placeholder")
                 if n.name in by_name)


def _signature(graph_module: fx.GraphModule) -> Signature:
    """The calling convention of the step program: its flat inputs, a tuple of its outputs."""
    inputs = tuple(InputSpec(n.name, n.meta["val"].dtype, tuple(
        s if isinstance(s, int) else str(s) for s in n.meta["val"].shape))
        for n in graph_module.graph.find_nodes(op="placeholder"))
    (results,) = graph_module.graph.output_node().args
    return Signature(inputs, pytree.tree_structure((tuple(range(len(inputs))), {})),
                     pytree.tree_structure(tuple(range(len(results)))),
                     tuple(spec.name for spec in inputs))
