"""Which loop does which step of a row program, and what is kept between loops.

A phase is one loop over the columns of a row: either plain ("rows"), or the outputs of a product
("linear"), whose later steps work on what is in registers. A step goes to the first phase in which
its arguments are there, unless it is wanted only later and can be done then as well.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from bincompile.runtime.schedules.rows_body import LOOK_UPS, PRODUCTS, SINKS, Name, Step


@dataclasses.dataclass
class Phase:
    """One loop over `width` columns; `linear` is the product that it begins with, if any."""

    width: int
    steps: list[Step]
    linear: Step | None = None

    @property
    def every(self) -> list[Step]:
        """Its steps, the product first."""
        return ([self.linear] if self.linear else []) + self.steps


@dataclasses.dataclass(frozen=True)
class Plan:
    """The phases in order, what they return, and where each value is made and read.

    Args:
        made: the phase of each value.
        read: the phases that read a value (or an input).
    """

    phases: tuple[Phase, ...]
    results: tuple[Name, ...]
    made: dict[Name, int]
    read: dict[Name, set[int]]

    @property
    def groups(self) -> list[list[int]]:
        """Phases that one loop over rows does together: products are alone."""
        return [list(members) for _, members in itertools.groupby(
            range(len(self.phases)),
            key=lambda place: -1 - place if self.phases[place].linear else self._run(place))]

    def _run(self, place: int) -> int:
        """The number of products before a phase: what stands between two runs together."""
        return sum(phase.linear is not None for phase in self.phases[:place])

    def is_kept(self, name: Name) -> bool:
        """Whether another phase than its own reads a value."""
        return bool(self.read.get(name, set()) - {self.made[name]})

    def is_local(self, name: Name) -> bool:
        """Whether all that read a value are in the loop over rows that makes it."""
        group = next(g for g in self.groups if self.made[name] in g)
        return self.read.get(name, set()) <= set(group)


def plan(steps: Sequence[Step], results: Sequence[Name], widths: Mapping[Name, int]) -> Plan:
    """Phases for these steps; `widths` has those of the inputs too."""
    phases: list[Phase] = []
    made: dict[Name, int] = {}
    sinks: set[Name] = set()
    for step in steps:
        ready = max((made[name] + (name in sinks) for name in step.reads if name in made),
                    default=0)
        if step.op in PRODUCTS:
            phases.append(Phase(step.width, [], step))
            made[step.target] = len(phases) - 1
            continue
        width = widths[step.reads[0]] if step.op in SINKS else step.width
        place = next((place for place in range(ready, len(phases))
                      if phases[place].width == width), len(phases))
        if place == len(phases):
            phases.append(Phase(width, []))
        phases[place].steps.append(step)
        made[step.target] = place
        if step.op in SINKS:
            sinks.add(step.target)
    _postpone(phases, made, widths, set(results))
    return Plan(tuple(phases), tuple(results), made, _readers(phases))


def _readers(phases: Sequence[Phase]) -> dict[Name, set[int]]:
    read: dict[Name, set[int]] = {}
    for place, phase in enumerate(phases):
        for name in itertools.chain.from_iterable(step.reads for step in phase.every):
            read.setdefault(name, set()).add(place)
    return read


def _postpone(phases: list[Phase], made: dict[Name, int], widths: Mapping[Name, int],
              results: set[Name]) -> None:
    """Move steps to the first phase that reads them, where nothing more has to be kept for it."""
    whole = {name for phase in phases if phase.linear for name in phase.linear.reads}
    for place in reversed(range(len(phases))):
        for step in reversed(list(phases[place].steps)):
            read = _readers(phases)
            wanted = min(read.get(step.target, {place}))
            if (step.op in (*SINKS, *LOOK_UPS) or step.target in {*results, *whole}
                    or wanted == place
                    or phases[wanted].width != step.width
                    or not all(widths[name] == 1 or _is_there(name, step, phases, made)
                               for name in step.reads)):
                continue
            phases[place].steps.remove(step)
            phases[wanted].steps.insert(0, step)
            made[step.target] = wanted


def _is_there(name: Name, step: Step, phases: Sequence[Phase], made: dict[Name, int]) -> bool:
    """Whether a value can be read in later phases without the step's own need for it."""
    if name not in made:
        return True
    others = [other for place, phase in enumerate(phases) if place != made[name]
              for other in phase.every if other is not step]
    return any(name in other.reads for other in others)
