"""From a program of whole sequences to the form that streams run: rewritten, bound and proven."""

from __future__ import annotations

import dataclasses
import logging

from bincompile.config import Continual, Target
from bincompile.errors import ContinualError
from bincompile.passes.pipeline import LOWER, run
from bincompile.passes.streaming.build import to_steps
from bincompile.passes.streaming.prove import prove
from bincompile.program import Program
from bincompile.record import Refusal
from bincompile.steps import StepProgram
from bincompile.stream_form import StreamForm, fingerprint_of

log = logging.getLogger(__name__)


def lowered(steps: StepProgram) -> StepProgram:
    """The step program with its rows fused and what is known computed."""
    prepare = None if steps.prepare is None else run(LOWER, _alone(steps.prepare))
    return dataclasses.replace(steps, program=run(LOWER, _alone(steps.program)), prepare=prepare)


def stream_form(program: Program, continual: Continual, target: Target) -> StreamForm:
    """The streaming form of a program.

    Args:
        program: of whole sequences, after all rewrites and before it is lowered.
        continual: what the steps are to equal.
        target: the machine to run on.

    Raises:
        ContinualError: the model can't run one step at a time; the message has node and reason.
        ProofError: the steps disagree with the model.
    """
    steps = to_steps(program, continual)
    form = StreamForm.bound(lowered(steps), program.signature, target, fingerprint_of(steps))
    notes = list(form.steps.notes)
    evidence = prove(form.steps, program, continual, form.executable, notes)
    log.info("streams: %s, %s", steps.semantics, evidence)
    return dataclasses.replace(form, steps=dataclasses.replace(
        form.steps, evidence=evidence, notes=tuple(notes)))


def verdict(program: Program, continual: Continual) -> tuple[StepProgram | None, list[Refusal]]:
    """The step program, not proven, or why there is none."""
    try:
        return to_steps(program, continual), []
    except ContinualError as error:
        reason = f"{error.found}; allowed: {error.allowed}; change: {error.change}"
        return None, [Refusal("stream", "", " ".join(reason.split()), "")]


def _alone(program: Program) -> Program:
    """The program without the stages before it, which the whole model's program has."""
    return dataclasses.replace(program, parent=None)
