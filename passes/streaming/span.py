"""How far a proof steps: past every wrap of every ring, as far as its cost allows."""

from __future__ import annotations

import dataclasses

from bincompile.ops import OPERATORS
from bincompile.passes.graph import aten, value_of
from bincompile.passes.streaming.reference import lengths_allowed
from bincompile.program import Program
from bincompile.steps import StepProgram

SPARE = 8  # steps behind the last wrap
SECONDS = {"float64": 20.0, "kernels": 40.0, "reference": 20.0}  # estimated, of each part
NODE_SECONDS = 2e-5
BYTES_PER_SECOND = 4e9  # of weights that a step reads
FLOPS_PER_SECOND = 1e10
LEAST = 40  # steps, whatever they cost, beside those in which every ring wraps
# A step reads a few of their rows.
TABLES = (aten.embedding.default, OPERATORS["embedding"].overload,
          OPERATORS["binary_embedding"].overload)
BOUNDS = (aten.lt.Scalar, aten.le.Scalar, aten.gt.Scalar, aten.ge.Scalar, aten.sub.Tensor,
          aten.add.Tensor, aten.triu.default, aten.tril.default)
FARTHEST = 4096  # of such numbers
SAMPLES = 24  # answers that are compared where each needs a run of its own


@dataclasses.dataclass(frozen=True)
class Span:
    """Steps of a proof.

    Args:
        length: that the kernels take.
        exact: that the graph takes in float64.
        wanted: more than twice the sum of all windows.
        samples: answers that are compared where each needs a run of the reference of its own.
        marks: steps next to which something happens for the first time.
    """

    length: int
    exact: int
    wanted: int
    samples: int
    marks: tuple[int, ...]

    @classmethod
    def of(cls, steps: StepProgram, program: Program, window: int | None,
           fixed: int | None = None) -> Span:
        """The span of these steps.

        Args:
            steps: what is proven.
            program: the whole-sequence program.
            window: that of window semantics, else None.
            fixed: the number of tokens that the program can run on, where there is just one.
        """
        wanted, weights = _wanted(steps, program), _weight_bytes(program)
        nodes = len(steps.program.at("steps").graph.nodes)
        most = _most(steps, program, fixed) if window is None else steps.limit
        rows, flops = 2, weights / 4 * 2
        each = {"float64": nodes * NODE_SECONDS + 2 * weights / BYTES_PER_SECOND,
                "kernels": nodes * NODE_SECONDS / 2 + weights / BYTES_PER_SECOND,
                "reference": 1e-6 + rows * flops / FLOPS_PER_SECOND}
        least = _every_wrap(steps)
        allowed = {part: max(least, int(SECONDS[part] / cost)) for part, cost in each.items()}
        length = min(wanted, allowed["kernels"],
                     wanted if window is not None else allowed["reference"])
        length = length if most is None else min(length, most)
        per_sample = each["reference"] * (window or length)
        samples = max(SAMPLES, int(SECONDS["reference"] / per_sample))
        return cls(length, min(length, allowed["float64"]), wanted, samples, _marks(steps, length))

    def sampled(self, count: int) -> list[int]:
        """So many steps: the first and the last, those at marks, and others evenly between."""
        if self.length <= count:
            return list(range(self.length))
        near = [0, 1, self.length - 1, *(m + by for by in (0, -1, 1) for m in self.marks)]
        even = [round(i * (self.length - 1) / count) for i in range(count)]
        chosen = dict.fromkeys(s for s in (*near, *even) if 0 <= s < self.length)
        return sorted(list(chosen)[:count])

    @property
    def shortfall(self) -> str:
        """What a reader should know of a proof that is shorter than it ought to be; or nothing."""
        fewest = min(self.length, self.exact)
        return "" if fewest >= self.wanted else (
            f"proof: {self.exact:,} steps in float64 and {self.length:,} of the kernels, of "
            f"{self.wanted:,} that pass twice over all windows together")


def _wanted(steps: StepProgram, program: Program) -> int:
    windows = sum(window for _, window in steps.windows if window is not None)
    grown = max((s.shape[s.grows] * s.block for s in steps.states if s.grows is not None),
                default=0)
    hidden = 2 * _largest_bound(program) if any(w is None for _, w in steps.windows) else 0
    ticks = max(2 * windows, grown, hidden) * steps.rate
    least = max(ticks, 2 * (steps.receptive_field or 0), LEAST // 2)
    return least + steps.first + steps.delay + SPARE * steps.rate


def _every_wrap(steps: StepProgram) -> int:
    """Steps that a proof takes whatever they cost: every ring wraps twice."""
    widest = max((window for _, window in steps.windows if window is not None), default=0)
    return max(LEAST, steps.first + steps.delay + (2 * widest + SPARE) * steps.rate)


def _largest_bound(program: Program) -> int:
    """The largest number that a mask compares places with: a band that is not seen before it."""
    return max((abs(arg) for node in program.graph.nodes if node.target in BOUNDS
                for arg in node.args if isinstance(arg, int) and abs(arg) <= FARTHEST), default=0)


def _most(steps: StepProgram, program: Program, fixed: int | None) -> int | None:
    """The most steps that one run of the whole-sequence program covers."""
    found = [lengths_allowed(program, taken)[1] for taken in steps.inputs]
    return min((n for n in (*found, steps.limit, fixed) if n is not None), default=None)


def _weight_bytes(program: Program) -> int:
    """Bytes of float weights that are multiplied with tokens."""
    values = (value_of(n) for n in program.graph.find_nodes(op="get_attr")
              if any(u.target not in TABLES for u in n.users))
    return sum(v.numel() * 4 for v in values if v.is_floating_point())


def _marks(steps: StepProgram, length: int) -> tuple[int, ...]:
    """Where answers begin, where each ring is full for the first and for the second time."""
    windows = sorted({window for _, window in steps.windows if window is not None})
    total = sum(window for _, window in steps.windows if window is not None)
    places = [steps.first, *(times * w for times in (1, 2) for w in windows), total,
              steps.receptive_field or 0]
    return tuple(dict.fromkeys(p for p in places if 0 <= p < length))
