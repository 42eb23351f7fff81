"""A step program that is wrong in any one way is not proven."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from stream_blocks import E, Encoder
from torch import fx

from bincompile.config import Continual
from bincompile.errors import ProofError
from bincompile.ops import OPERATORS
from bincompile.passes.capture import capture
from bincompile.passes.graph import aten, copy_module
from bincompile.passes.pipeline import EXACT, run
from bincompile.passes.streaming.build import to_steps
from bincompile.passes.streaming.prove import prove
from bincompile.program import Program
from bincompile.steps import StepProgram

W, ASKED = 5, Continual(window=5)
ATTENTION = OPERATORS["stream_attention"].overload


@pytest.fixture(scope="module")
def made() -> tuple[StepProgram, Program]:
    """A causal encoder of one layer and its steps."""
    torch.manual_seed(0)
    program = run(EXACT, capture(Encoder().eval(), (torch.randn(2, 9, E),), {}).program)
    return to_steps(program, ASKED), program


def changed(steps: StepProgram, change: Callable[[fx.Graph], None]) -> StepProgram:
    """The steps with their graph changed by hand."""
    module, _ = copy_module(steps.program.graph_module)
    change(module.graph)
    module.recompile()
    return dataclasses.replace(
        steps, program=dataclasses.replace(steps.program, graph_module=module))


def attention(graph: fx.Graph) -> fx.Node:
    (node,) = graph.find_nodes(op="call_function", target=ATTENTION)
    return node


def set_argument(name: str, value: object) -> Callable[[fx.Graph], None]:
    """A change of one argument of the attention."""
    def change(graph: fx.Graph) -> None:
        node = attention(graph)
        given = OPERATORS["stream_attention"].bind(node.args, dict(node.kwargs))
        node.args, node.kwargs = (), {**given, name: value}

    return change


def other_rows(graph: fx.Graph) -> None:
    node, rows = attention(graph), graph.find_nodes(op="placeholder")[1]
    with graph.inserting_before(node):
        turned = graph.call_function(aten.flip.default, (rows, [0]))
    node.replace_input_with(rows, turned)


def without_residual(graph: fx.Graph) -> None:
    node = graph.find_nodes(op="call_function", target=aten.add.Tensor)[0]
    node.replace_all_uses_with(node.args[1])


def counted_twice(graph: fx.Graph) -> None:
    """A state that a step which is taken again has moved already."""
    state = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_before(attention(graph)):
        graph.call_function(aten.mul_.Scalar, (state, 1.001))


def behind_the_clock(graph: fx.Graph) -> None:
    node, clock = attention(graph), graph.find_nodes(op="placeholder")[2]
    with graph.inserting_before(node):
        late = graph.call_function(aten.clamp.default, (clock, None, 2 * W))
    node.replace_input_with(clock, late)


WRONG = {"a narrower window": set_argument("window", W - 1),
         "a wider window": set_argument("window", W + 1), "all tokens": set_argument("window", 16),
         "another scale": set_argument("scale", 0.3), "a soft cap": set_argument("softcap", 30.0),
         "other rows": other_rows, "no residual": without_residual,
         "a state that moves": counted_twice, "wrong after two windows": behind_the_clock}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_wrong_steps_are_not_proven(
        change: Callable[[fx.Graph], None], made: tuple[StepProgram, Program]) -> None:
    steps, program = made
    with pytest.raises(ProofError, match="differ"):
        prove(changed(steps, change), program, ASKED)


@pytest.mark.parametrize("field", [{"delay": 1}, {"rate": 2, "first": 1}])
def test_wrong_times_of_answers_are_not_proven(
        field: dict[str, int], made: tuple[StepProgram, Program]) -> None:
    steps, program = made
    with pytest.raises(ProofError):
        prove(dataclasses.replace(steps, **field), program, ASKED)


def test_right_steps_are_proven_past_twice_the_window(made: tuple[StepProgram, Program]) -> None:
    evidence, = prove(*made, ASKED)
    assert evidence.passed and evidence.trials > 2 * W and evidence.max_error < 1e-14


def test_kernels_that_are_wrong_are_not_proven(made: tuple[StepProgram, Program]) -> None:
    steps, program = made
    module = steps.program.graph_module

    def executable(*flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (found,) = module(*flat)
        return (found * (1 + 1e-3 * (flat[2] > 2 * W).any()),)

    prove(steps, program, ASKED, module)
    with pytest.raises(ProofError, match="kernels"):
        prove(steps, program, ASKED, executable)
