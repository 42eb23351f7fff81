"""Validate: a match is a guess; a float64 comparison of both forms decides.

The subgraph is cut between the inputs and outputs of the candidate, and run beside what would
stand in its place on random and adversarial inputs: zeros, +-1e4, equal rows, masks of -inf, a
fully masked row, axes of length 1. Identical subgraphs share one proof.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from bincompile.passes.graph import (
    Evaluate,
    between,
    is_sequence,
    is_tensor,
    run_nodes,
    shape_of,
    value_of,
)
from bincompile.passes.patterns import Candidate, TableUse
from bincompile.passes.sizes import Assignment, assignments, concrete
from bincompile.program import attribute
from bincompile.record import Evidence

LIMIT = 1e-9
SEEDS = (0, 1, 2)
FLOOR = 1e-3  # errors of smaller values are counted relative to this
# Values are drawn in float32, at a quarter of the time, and moved off it, so that rounding shows.
OFF_FLOAT32 = 1 + 2e-8
ROWS = 64  # rows of a table or weight in a proof: no row depends on how many there are
FACTORS = ("factor", "mix", "shift")  # roles that multiply scores: 1e4 there leaves no digits
ROW_ROLES = ("table", "row_scale", "weight", "weight_scale", "bias")

Values = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Trial:
    """One kind of input: what it makes of the random values, and its limit.

    Values of 1e4 make scores of 1e9, whose own rounding in float64 is 1e-7.
    """

    name: str
    change: Callable[[str, torch.Tensor], torch.Tensor]
    limit: float = LIMIT
    seed: int = 0


def _zeros(role: str, value: torch.Tensor) -> torch.Tensor:
    return value if value.dtype == torch.bool else torch.zeros_like(value)


def _huge(role: str, value: torch.Tensor) -> torch.Tensor:
    if role.startswith(FACTORS) or value.dtype == torch.bool:
        return value
    return torch.where(value >= 0, 1e4, -1e4).to(value.dtype)


def _equal_rows(role: str, value: torch.Tensor) -> torch.Tensor:
    if value.ndim < 2 or value.dtype == torch.bool:
        return value
    return value[..., :1, :].expand_as(value).clone()


def _same(role: str, value: torch.Tensor) -> torch.Tensor:
    return value


def _masked(role: str, value: torch.Tensor) -> torch.Tensor:
    """-inf on a third of an added mask and on the whole of its first row; the same with bools."""
    boolean = value.dtype == torch.bool
    if not (value.ndim and value.numel() and (boolean or role.startswith("bias"))):
        return value
    value = value.clone() if boolean else torch.where(value.abs() < 0.4, -math.inf, value)
    rows = value.view(-1, value.shape[-1])
    rows[:1] = False if boolean else -math.inf
    if boolean:
        rows[1:][-1:] = True
    return value


TRIALS = (*(Trial(f"random {seed}", _same, seed=seed) for seed in SEEDS), Trial("zeros", _zeros),
          Trial("1e4", _huge, 1e-4), Trial("equal rows", _equal_rows), Trial("masked", _masked))
OTHER_SIZES = (TRIALS[0], TRIALS[-1])  # after the first sizes at which the subgraph runs
DISTINCT = (2, 5, 3, 7, 4, 9, 6, 11)


def signature_of(candidate: Candidate, graph_module: fx.GraphModule) -> str:
    """A text that is equal for identical subgraphs."""
    inputs = {n: role for role, n in candidate.inputs.items()}
    nodes = between(candidate.outputs, set(inputs.keys()))
    names = {**{n: f"%{role}" for n, role in inputs.items()},
             **{n: f"%{i}" for i, n in enumerate(nodes)}}
    sizes: dict[str, str] = {}
    lines = [f"{role}: {_described(n, sizes)}" for role, n in candidate.inputs.items()]
    lines += [f"{role} is {candidate.inputs[role].target}" for role in candidate.fixed]
    for node in nodes:
        if node.op == "get_attr":
            stored = attribute(graph_module, node.target)
            content = stored.tolist() if stored.numel() <= 16 else f"stored {node.target}"
            lines.append(f"{names[node]} = {content}")
            continue
        shown = fx.node.map_arg((node.args, dict(node.kwargs)),
                                lambda n: names.get(n) or _described(n, sizes))
        lines.append(f"{names[node]} = {node.target}{shown}")
    return "\n".join([*lines, str([names[o] for o in candidate.outputs])])


def _described(node: fx.Node, sizes: dict[str, str]) -> str:
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        return _renamed(value, sizes)
    return f"{value.dtype}{[_renamed(s, sizes) for s in value.shape]}"


def _renamed(size: Any, sizes: dict[str, str]) -> str:
    if isinstance(size, torch.SymInt):
        hint = size.node.hint
        return sizes.setdefault(str(size.node.expr), f"s{len(sizes)}") + f"={hint}"
    return str(size)


def validate(candidate: Candidate, graph_module: fx.GraphModule) -> Evidence | str:
    """The evidence, or why there is none."""
    start = time.perf_counter()
    cut = _Cut.of(candidate, graph_module)
    error, tried, places = 0.0, 0, 0
    for numbers, spare in _sizes_to_try(cut):
        if (spare and places > 1) or not cut.possible(numbers):
            continue
        outcome = _try_all(cut, numbers, OTHER_SIZES if tried else TRIALS)
        if isinstance(outcome, str):
            return outcome
        error, tried = max(error, outcome[0]), tried + outcome[1]
        places += outcome[1] > 0
    if not tried:
        return "the subgraph could not be run on its own at any sizes"
    milliseconds = (time.perf_counter() - start) * 1e3
    return Evidence(tried, SEEDS[0], "float64", error, LIMIT, milliseconds)


def _sizes_to_try(cut: _Cut) -> Iterator[tuple[Assignment, bool]]:
    """Numbers for the symbols, sizes of 1 last, and whether others make them needless.

    Symbols that are equal in the example may be so by chance: once, all are different. Where the
    model wants more than small sizes, its own stand doubled.
    """
    *small, example = assignments([*cut.reads, *cut.nodes])
    apart = [] if len(set(example.values())) == len(example) else [
        dict(zip(example, itertools.cycle(DISTINCT), strict=False))]
    yield from ((numbers, False) for numbers in (*small[:-1], *apart, example, *small[-1:]))
    if small:
        yield {symbol: 2 * size for symbol, size in example.items()}, True


def _try_all(cut: _Cut, numbers: Assignment,
             trials: tuple[Trial, ...]) -> tuple[float, int] | str:
    """The largest error at one choice of sizes, and how many trials there were; or a reason."""
    sizes, drawn = cut.sizes(numbers), dict[int, dict[fx.Node, Any]]()
    error, tried = 0.0, 0
    for trial in trials:
        if trial.seed not in drawn:
            drawn[trial.seed] = cut.draw(numbers, trial.seed)
        try:
            outcome = cut.run(sizes, drawn[trial.seed], trial)
        except Exception as failed:  # a rewritten form that can't even be compared proves nothing
            return f"the comparison fails: {type(failed).__name__}: {failed}"
        if isinstance(outcome, str):
            return outcome
        if outcome is None and tried:
            return f"the model's own subgraph fails on inputs of kind '{trial.name}'"
        if outcome is None:
            break
        tried += 1
        error = max(error, outcome * LIMIT / trial.limit)
    return error, tried


@dataclasses.dataclass(frozen=True)
class _Cut:
    """A candidate's subgraph: its nodes, all that they read, and the stored values among that."""

    candidate: Candidate
    nodes: list[fx.Node]
    reads: set[fx.Node]
    stored: dict[fx.Node, torch.Tensor]

    @classmethod
    def of(cls, candidate: Candidate, graph_module: fx.GraphModule) -> _Cut:
        inputs = set(candidate.inputs.values())
        nodes = between(candidate.outputs, inputs)
        reads = inputs.union(*(n.all_input_nodes for n in nodes))
        fixed = {candidate.inputs[role] for role in candidate.fixed}
        stored = {n: attribute(graph_module, n.target)
                  for n in {*nodes, *fixed} if n.op == "get_attr"}
        return cls(candidate, [n for n in nodes if n.op == "call_function"], reads,
                   {n: t.double() if t.dtype.is_floating_point else t for n, t in stored.items()})

    def possible(self, numbers: Assignment) -> bool:
        """Whether nothing that the nodes read is empty at these sizes, unless it always is.

        Nor is one bag without an end: torch writes behind the maximum of such a one.
        """
        try:
            if self.candidate.table_use.ended and concrete(
                    shape_of(self.candidate.inputs["offsets"])[0], numbers) < 2:
                return False
            return all(concrete(size, numbers) > 0 for node in self.reads if is_tensor(node)
                       for size in shape_of(node) if not isinstance(size, int))
        except ZeroDivisionError:  # a remainder by a size that is 0 there
            return False

    def sizes(self, numbers: Assignment) -> dict[fx.Node, int]:
        """The sizes that the nodes read, as numbers."""
        return {n: concrete(value_of(n), numbers) for n in self.reads
                if not is_tensor(n) and not is_sequence(n)}

    def draw(self, numbers: Assignment, seed: int) -> dict[fx.Node, Any]:
        """A random value for every input; one for a node that has several roles."""
        generator = torch.Generator().manual_seed(seed)
        padding = self.candidate.attrs.get("padding_idx") or 0
        drawn: dict[fx.Node, Any] = {}
        for role, node in self.candidate.inputs.items():
            if node not in drawn:
                axis = self.candidate.table_use.shortened if role == "table" else 0
                drawn[node] = self.stored[node] if role in self.candidate.fixed else _draw(
                    role, value_of(node), numbers, generator, padding, axis)
        return drawn

    def run(self, sizes: Mapping[fx.Node, int], drawn: Mapping[fx.Node, Any],
            trial: Trial) -> float | str | None:
        """The error of one trial; None where the model itself can't run at these sizes."""
        values = self._changed(drawn, trial)
        env: dict[fx.Node, Any] = {**sizes, **self.stored}
        env.update((n, values[role]) for role, n in self.candidate.inputs.items())
        with torch.no_grad():
            try:
                run_nodes(self.nodes, env)
            except Exception:  # sizes that the model itself does not allow prove nothing
                return None
            try:
                found = self.candidate.emit(Evaluate(), values)
            except Exception as error:
                return f"the rewritten form fails where the model runs: {error}"
        expected = [env[o] for o in self.candidate.outputs]
        if self.candidate.attrs.get("overflows"):  # what the model can't compute proves nothing
            found = tuple(torch.where(e.isfinite(), f, e)
                          for e, f in zip(expected, found, strict=True))
        return _compare(expected, found, trial)

    def _changed(self, drawn: Mapping[fx.Node, Any], trial: Trial) -> Values:
        changed: dict[fx.Node, Any] = {}
        for role, node in self.candidate.inputs.items():
            if node not in changed:
                value = drawn[node]
                random = isinstance(value, torch.Tensor) and role not in self.candidate.fixed \
                    and (value.dtype.is_floating_point or value.dtype == torch.bool)
                changed[node] = trial.change(role, value) if random else value
        values = {role: changed[node] for role, node in self.candidate.inputs.items()}
        _fit_indices(values, self.candidate.table_use)
        return values


def _compare(expected: list[torch.Tensor], found: tuple[torch.Tensor, ...],
             trial: Trial) -> float | str:
    worst = 0.0
    for left, right in zip(expected, found, strict=True):
        if left.shape != right.shape:
            return f"shape {tuple(right.shape)} where the model gives {tuple(left.shape)}"
        error = difference(left, right)
        if error > trial.limit:
            return f"error {error:.2g} on inputs of kind '{trial.name}', allowed {trial.limit:.0e}"
        worst = max(worst, error)
    return worst


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    """Largest difference relative to the largest finite value; inf where nan or inf differ."""
    if left.numel() == 0:
        return 0.0
    if not left.dtype.is_floating_point:
        return 0.0 if torch.equal(left, right.to(left.dtype)) else math.inf
    left, right = left.detach().double(), right.detach().double()
    gap, scale = float((left - right).abs().max()), float(left.abs().max())
    if math.isfinite(gap) and math.isfinite(scale):
        return gap / max(FLOOR, scale)
    finite = left.isfinite()
    if not torch.equal(finite, right.isfinite()) or not torch.equal(
            left[~finite].nan_to_num(), right[~finite].nan_to_num()):
        return math.inf
    if not bool(finite.any()):
        return 0.0
    scale = max(FLOOR, float(left[finite].abs().max()))
    return float((left[finite] - right[finite]).abs().max()) / scale


def _draw(role: str, fake: Any, numbers: Assignment, generator: torch.Generator,
          padding: int, axis: int | None = 0) -> Any:
    if not isinstance(fake, torch.Tensor):
        return concrete(fake, numbers)
    shape = [concrete(s, numbers) for s in fake.shape]
    if role in ROW_ROLES and shape and axis is not None:
        shape[axis] = min(shape[axis], max(ROWS, 1 + padding))
    if fake.dtype == torch.bool:
        return torch.rand(shape, generator=generator) > 0.4
    if not fake.dtype.is_floating_point:
        return torch.randint(2**31, shape, generator=generator).to(fake.dtype)
    return torch.randn(shape, generator=generator).double() * OFF_FLOAT32


def _fit_indices(values: Values, use: TableUse) -> None:
    """Bring drawn indices into their table, its edges among them, and bags in order."""
    if "indices" not in values:
        return
    rows = values["table"].shape[use.axis]
    low, high = {"rows": (0, rows), "negative": (-rows, rows), "any": (-2, rows + 2)}[use.indices]
    indices = values["indices"] % (high - low) + low
    flat = indices.view(-1)
    flat[:1], flat[-1:] = 0, rows - 1
    if use.indices != "rows":
        flat[1:-1][:1], flat[1:-1][-1:] = low, high - 1
    values["indices"] = indices
    if "offsets" in values:
        count = flat.numel()
        offsets = torch.sort(values["offsets"] % (count + 1))[0]
        offsets[:1], offsets[1:][-1:] = 0, count
        values["offsets"] = offsets
