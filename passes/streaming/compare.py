"""What a stream has to answer, and how far it is from that."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bincompile.passes.streaming.draw import Sequences
from bincompile.passes.streaming.reference import Reference, arranged, lengths_allowed
from bincompile.passes.streaming.span import Span
from bincompile.passes.validate import FLOOR


@dataclasses.dataclass(frozen=True)
class Expected:
    """The reference's answers, each with its rows first and, where it has one, time second.

    Args:
        reference: that gave them.
        timed: for each flat output that has time under banded semantics (rows, index, ...); None
            for others.
        sampled: for each step that was computed by itself, all flat outputs; an empty one where
            all have time.
    """

    reference: Reference
    timed: tuple[torch.Tensor | None, ...]
    sampled: dict[int, tuple[torch.Tensor, ...]]

    @classmethod
    def of(cls, reference: Reference, sequences: Sequences, span: Span, window: int | None,
           anew: Callable[[int], Reference] | None = None) -> Expected:
        """All answers that are compared.

        Args:
            reference: that gives them.
            sequences: of which.
            span: the steps.
            window: that of window semantics, else None.
            anew: where positions begin anew, the reference of windows that begin at an index.
        """
        steps = reference.steps
        if window is not None:
            chosen = [s for s in span.sampled(span.samples) if steps.valid(s)]
            return cls(reference, (None,) * len(steps.answers),
                       _of_windows(reference, anew, sequences, chosen, window))
        shortest = max(lengths_allowed(reference.program, t)[0] for t in steps.inputs)
        timed: list[torch.Tensor | None] = [None] * len(steps.answers)
        if any(axis is not None for axis in steps.answers):
            timed = [v if axis is not None and not final else None for v, axis, final in zip(
                reference(sequences), steps.answers, reference.final, strict=True)]
        sampled = dict[int, tuple[torch.Tensor, ...]]()
        if any(value is None for value in timed):
            for step in span.sampled(span.samples):
                if steps.valid(step) and step + 1 >= shortest and reference.length in (
                        None, step + 1):
                    sampled[step] = tuple(reference(sequences.until(step + 1)))
        return cls(reference, tuple(timed), sampled)

    @property
    def values(self) -> list[torch.Tensor]:
        """All of them."""
        return [*(v for v in self.timed if v is not None),
                *(v for found in self.sampled.values() for v in found)]

    def at(self, output: int, rows: list[int], clock: int, extent: int = 1,
           ) -> torch.Tensor | None:
        """One flat output of these rows at one step, for so many indices up to the newest.

        None if it is not compared there.
        """
        steps, timed = self.reference.steps, self.timed[output]
        if timed is None:
            found = self.sampled.get(clock)
            return None if found is None or (steps.answers[output] is not None \
                and not found[output].shape[1]) else found[output][rows]
        index = (clock - steps.delay) // steps.rate
        if index >= timed.shape[1] or index - extent < -1:
            return None
        return timed[rows, index] if extent == 1 else timed[rows, index - extent + 1:index + 1]


def _of_windows(reference: Reference, anew: Callable[[int], Reference] | None,
                sequences: Sequences, chosen: list[int], window: int,
                ) -> dict[int, tuple[torch.Tensor, ...]]:
    """All outputs on the last tokens up to each step; on all so far where those are fewer."""
    found = dict[int, tuple[torch.Tensor, ...]]()
    rows = torch.arange(len(sequences.owners))
    full = [step for step in chosen if step >= window - 1]
    for step in chosen:
        if step < window - 1:
            found[step] = tuple(reference(sequences.until(step + 1)))
    for steps in [[step] for step in full] if anew is not None else [full]:
        given = reference if anew is None else anew(steps[0] - window + 1)
        ends = torch.tensor(steps, dtype=torch.int64).repeat_interleave(len(rows))
        every = given(sequences.windows(rows.repeat(len(steps)), ends, window))
        for place, step in enumerate(steps):
            part = slice(place * len(rows), (place + 1) * len(rows))
            found[step] = tuple(value[part] for value in every)
    return found


class Comparison:
    """The largest difference so far, relative to the reference's largest value.

    Args:
        expected: what the answers have to be.
        whole: whether whole numbers are compared too: rounding may change the largest of two.
    """

    def __init__(self, expected: Expected, whole: bool = True) -> None:
        self.expected, self.whole, self.steps = expected, whole, 0
        self.scales = [_scale(values) for values in self._columns()]
        self.gaps = [0.0] * len(self.scales)
        self.where: tuple[int, int] | None = None  # the output and the step of the largest

    def _columns(self) -> list[list[torch.Tensor]]:
        timed, sampled = self.expected.timed, self.expected.sampled.values()
        return [[t] if t is not None else [found[index] for found in sampled]
                for index, t in enumerate(timed)]

    @property
    def error(self) -> float:
        """The largest relative difference of all outputs."""
        return max((gap / scale for gap, scale in zip(self.gaps, self.scales, strict=True)),
                   default=0.0)

    def add(self, rows: list[int], clocks: list[int], values: Sequence[Any]) -> None:
        """The flat outputs of one step of these rows at these clocks."""
        reference = self.expected.reference
        steps, compared = reference.steps, False
        found = [arranged(torch.as_tensor(value), axes, len(rows))
                 for value, axes in zip(values, reference.axes, strict=True)]
        for place, (row, clock) in enumerate(zip(rows, clocks, strict=True)):
            if not steps.valid(clock):
                continue
            for output, value in enumerate(found):
                extent = 1 if steps.answers[output] is None else value.shape[1]
                wanted = self.expected.at(output, [row], clock, extent)
                if wanted is not None:
                    compared = True
                    self._compare(output, clock, value[place:place + 1], wanted)
        self.steps += compared

    def distance(self, other: Expected) -> float:
        """The largest relative difference between these answers and another reference's."""
        for output, wanted in enumerate(self._columns()):
            found = Comparison(other)._columns()[output]
            for left, right in zip(found, wanted, strict=True):
                self.gaps[output] = max(self.gaps[output], _gap(left, right, self.whole))
        return self.error

    def _compare(self, output: int, clock: int, found: torch.Tensor,
                 wanted: torch.Tensor) -> None:
        steps = self.expected.reference.steps
        if steps.answers[output] is not None:
            if self.expected.timed[output] is not None:
                found = found.squeeze(1) if found.shape[1] == 1 else found
            elif found.shape[1] == 1:
                wanted = wanted[:, -1:]
        gap = _gap(found, wanted, self.whole)
        if gap > self.gaps[output]:
            self.gaps[output], self.where = gap, (output, clock)


def _scale(values: Sequence[torch.Tensor]) -> float:
    largest = FLOOR
    for value in values:
        if value.is_floating_point() and value.numel():
            largest = max(largest, float(torch.where(value.isfinite(), value, 0.0).abs().max()))
    return largest


def _gap(found: torch.Tensor, wanted: torch.Tensor, whole: bool) -> float:
    """The largest difference; inf where shapes, whole numbers or places of nan and inf differ."""
    if found.shape != wanted.shape:
        return math.inf
    if found.numel() == 0:
        return 0.0
    if not wanted.is_floating_point() and not wanted.is_complex():
        return 0.0 if not whole or torch.equal(found.to(wanted.dtype), wanted) else math.inf
    gap = float((found.to(wanted.dtype) - wanted).abs().max())
    if math.isfinite(gap):
        return gap
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    finite = found.isfinite() & wanted.isfinite()
    if not bool((same | finite).all()):
        return math.inf
    return float(torch.where(finite, found - wanted, 0.0).abs().max())
