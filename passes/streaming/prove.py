"""The proof of a step program: stepped past every wrap of its rings, beside the named reference.

The graph of references is stepped in float64, then the bound kernels in the model's own dtypes,
over the same random tokens: two rows of a stream whose clocks differ, one of which joins late.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import torch

from bincompile.config import Continual
from bincompile.errors import ProofError
from bincompile.ops import operator_of
from bincompile.passes.check_kernels import LIMITS, check_kernels
from bincompile.passes.graph import value_of
from bincompile.passes.streaming.analysis import Analysis, analyse
from bincompile.passes.streaming.compare import Comparison, Expected
from bincompile.passes.streaming.double import doubled, wide
from bincompile.passes.streaming.draw import Sequences, draw, finite_share
from bincompile.passes.streaming.reference import Reference, lengths_allowed
from bincompile.passes.streaming.span import Span
from bincompile.passes.streaming.stepper import HOMES, ROWS, Stepper, walk
from bincompile.program import Program
from bincompile.record import Evidence
from bincompile.runtime.executor import Executable
from bincompile.steps import StepProgram

SEED = 0
EXACT = 1e-9
ROUNDED = 1e-5  # of float32 steps
MARGIN = 4.0  # of what the model's own float32 arithmetic is away from float64
LEAST_FINITE = 0.5  # of what the reference gives
CHECKED = 8  # steps whose kernels are compared one by one, where signs are taken
REPORT = "report the model; compile it without continual= meanwhile"


def prove(steps: StepProgram, program: Program, continual: Continual,
          executable: Executable | None = None,
          notes: list[str] | None = None) -> tuple[Evidence, ...]:
    """Evidence that the steps equal what `steps.semantics` names.

    Args:
        steps: at level "steps" or a later one, which then holds that level among its stages.
        program: the whole-sequence program that it was made from.
        continual: what was asked for.
        executable: of `steps.program`, whose kernels are then stepped as well.
        notes: a list for what a reader should know, as that there was no time for all steps.

    Returns:
        Of the graph in float64, then of the kernels; `trials` are steps.

    Raises:
        ProofError: a value is further from the reference than its limit.
    """
    proof = _Proof.of(steps, program, continual)
    found = [proof.exact()]
    if notes is not None and proof.span.shortfall:
        notes.append(proof.span.shortfall)
    if executable is not None:
        found.append(proof.rounded(executable))
    return tuple(found)


@dataclasses.dataclass
class _Proof:
    """What both halves of a proof share."""

    steps: StepProgram
    program: Program
    analysis: Analysis
    span: Span
    sequences: Sequences
    expected: Expected
    window: int | None

    @classmethod
    def of(cls, steps: StepProgram, program: Program, continual: Continual) -> _Proof:
        analysis = analyse(program, continual)
        window = analysis.window if analysis.semantics == "window" else None
        reference = Reference.of(steps, program, analysis)
        span = Span.of(steps, program, window, reference.length)
        least = max(lengths_allowed(program, taken)[0] for taken in steps.inputs)
        sequences = draw(steps, program, len(HOMES),
                         reference.length or max(least, span.length), SEED)
        anew = functools.partial(_begun, steps, program, analysis) \
            if window is not None and continual.positions == "recycle" else None
        expected = Expected.of(reference, sequences, span, window, anew)
        if finite_share(expected.values) < LEAST_FINITE:
            sequences = sequences.positive()
            expected = Expected.of(reference, sequences, span, window, anew)
        return cls(steps, program, analysis, span, sequences, expected, window)

    def exact(self) -> Evidence:
        """The steps with references in float64."""
        start = time.perf_counter()
        function = doubled(self.steps.program.at("steps").graph_module)
        stepper = Stepper.of(self.steps, function, True, self.prepared(double=True))
        seen = Comparison(self.expected)
        for rows, clocks, values in walk(stepper, self.sequences, self.span.exact):
            seen.add(rows, clocks, values)
        _check_unused(stepper)
        self.check(seen, EXACT, "the steps in float64")
        return Evidence(seen.steps, SEED, "float64", seen.error, EXACT, _since(start))

    def rounded(self, executable: Executable) -> Evidence:
        """The steps with kernels, in the program's own dtypes."""
        start = time.perf_counter()
        stepper = Stepper.of(self.steps, executable, False, self.prepared(double=False))
        if _takes_signs(self.steps.program.at("steps")):
            return self.one_by_one(stepper, executable, start)
        seen = Comparison(self.expected, whole=False)
        for rows, clocks, values in walk(stepper, self.sequences, self.span.length):
            seen.add(rows, clocks, values)
        limit = _limit(self.program)
        if seen.error > limit:  # the model's own rounding may be as far off
            limit = max(limit, MARGIN * self.own_rounding())
        self.check(seen, limit, "the steps of the kernels")
        return Evidence(seen.steps, SEED, _dtype(self.program), seen.error, limit, _since(start))

    def one_by_one(self, stepper: Stepper, executable: Executable, start: float) -> Evidence:
        """Every kernel beside its operator's reference, on the values that it gets.

        A sign of nearly 0 may fall either way, after which streams differ for good.
        """
        lowered, chosen = self.steps.program, self.span.sampled(CHECKED)
        taken, errors = 0, [0.0]

        def function(*flat: Any) -> Sequence[Any]:
            nonlocal taken
            taken += 1
            return check_kernels(lowered, executable, flat, errors=errors) \
                if taken in chosen else executable(*flat)

        stepper.function = function
        for _ in walk(stepper, self.sequences, self.span.length):
            pass
        allowed = [call.operator.tolerance.rtol for call in executable.calls.values()]
        return Evidence(len(chosen), SEED, _dtype(self.program), max(errors),
                        max(_limit(self.program), *allowed), _since(start))

    def check(self, seen: Comparison, limit: float, what: str) -> None:
        """Raise unless what was seen is within a limit, and was not nothing."""
        if not seen.steps:
            raise ProofError(f"none of {self.span.length} steps has an answer to compare",
                             "at least one", "a model or window with fewer tokens")
        if not seen.error <= limit:
            output, step = seen.where or (0, 0)
            raise ProofError(
                f"output {output} of step {step}: {what} differ from {self.steps.semantics} by "
                f"{seen.error:.2g}", f"at most {limit:.0e}", REPORT)

    def prepared(self, double: bool) -> list[torch.Tensor]:
        """What follows from the static inputs, for each row of the stepper."""
        if self.steps.prepare is None:
            return []
        module = self.steps.prepare.graph_module
        function = doubled(module) if double else module
        given = map(wide, self.sequences.statics) if double else self.sequences.statics
        homes = torch.tensor([HOMES.index(row) if row in HOMES else 0 for row in range(ROWS)])
        with torch.no_grad():
            return [value[homes % len(value)] for value in function(*given)]

    def own_rounding(self) -> float:
        """How far the reference in the program's own dtypes is from float64."""
        reference = Reference.of(self.steps, self.program, self.analysis, double=False)
        own = Expected.of(reference, self.sequences, self.span, self.window)
        seen = Comparison(self.expected, whole=False)
        return seen.distance(own)


def _begun(steps: StepProgram, program: Program, analysis: Analysis, start: int) -> Reference:
    """The reference of sequences whose first token has an index."""
    return Reference.of(steps, program, analysis, start=start)


def _check_unused(stepper: Stepper) -> None:
    """Raise unless the row that no step was taken of holds what it held."""
    unused = next(row for row in range(ROWS) if row not in HOMES)
    for state, held in zip(stepper.steps.states, stepper.states, strict=True):
        if state.prepared is None and not bool((held[unused] == state.fill).all()):
            raise ProofError(f"a step of other rows writes to {state.name} of row {unused}",
                             "the rows of the step", REPORT)


def _takes_signs(program: Program) -> bool:
    operators = (operator_of(node.target) for node in program.graph.nodes)
    return any(found is not None and found.signs_of is not None for found in operators)


def _dtype(program: Program) -> str:
    """The coarsest float dtype that a program computes in."""
    dtypes = {value.dtype for node in program.graph.nodes
              if isinstance(value := value_of(node), torch.Tensor) and value.dtype in LIMITS}
    return str(max(dtypes, key=LIMITS.__getitem__, default=torch.float32)).removeprefix("torch.")


def _limit(program: Program) -> float:
    coarsest = getattr(torch, _dtype(program))
    return ROUNDED if coarsest is torch.float32 else LIMITS[coarsest]


def _since(start: float) -> float:
    return (time.perf_counter() - start) * 1e3
