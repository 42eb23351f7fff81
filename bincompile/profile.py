"""Where the time of a call goes, by operator and by node."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from bincompile.program import Program, owner, target_name
from bincompile.report import table
from bincompile.runtime.executor import Executable
from bincompile.runtime.straight_line import straight_line

OTHER = "torch"  # what runs a node that is not ours


@dataclasses.dataclass(frozen=True)
class Timed:
    """One node of a program: what it calls, what runs it, in which module, and how long it takes.

    `microseconds` is the median over the repeated calls.
    """

    node: str
    operator: str
    kernel: str
    path: str
    microseconds: float


@dataclasses.dataclass(frozen=True)
class Profile:
    """The times of one call.

    Args:
        nodes: every node that each call computes, in the order of the program; views of planned
            memory are made once and are not among them.
        microseconds: the whole call, without the clock between the nodes.
        threads: how many threads torch had.

    Example:
        >>> import torch, bincompile as bc
        >>> x = torch.randn(2, 5, 16)
        >>> layer = torch.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
        >>> profile = bc.optimize(layer, (x,)).explain((x,), repeats=3)
        >>> profile.microseconds > 0, "attention" in profile.by_operator
        (True, True)
    """

    nodes: tuple[Timed, ...]
    microseconds: float
    threads: int

    @property
    def by_operator(self) -> dict[str, float]:
        """Microseconds of each operator, the largest first."""
        total: dict[str, float] = {}
        for timed in self.nodes:
            total[timed.operator] = total.get(timed.operator, 0.0) + timed.microseconds
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    def to_dict(self) -> dict[str, Any]:
        """The times as plain values, which JSON can hold."""
        return dataclasses.asdict(self) | {"by_operator": self.by_operator}

    def __str__(self) -> str:
        whole = sum(timed.microseconds for timed in self.nodes) or 1.0

        def cells(microseconds: float) -> tuple[str, str]:
            return f"{microseconds:.1f}", f"{microseconds / whole:.1%}"

        counts = {name: sum(timed.operator == name for timed in self.nodes)
                  for name in self.by_operator}
        operators = table(("operator", "calls", "us", "share"), [
            (name, str(counts[name]), *cells(spent)) for name, spent in self.by_operator.items()])
        nodes = table(("node", "operator", "kernel", "path", "us", "share"), [
            (t.node, t.operator, t.kernel, t.path, *cells(t.microseconds)) for t in self.nodes])
        return (f"{self.microseconds:.1f} us a call, {self.threads} threads\n\n"
                f"{operators}\n\n{nodes}")


def profile(program: Program, executable: Executable, flat: Sequence[Any],
            repeats: int) -> Profile:
    """The times of a call with these flat inputs: medians over so many calls, after two more."""
    spent: dict[str, list[float]] = {}
    clocked, _ = straight_line(program.graph_module, executable.calls, executable.bound,
                               lambda node, seconds: spent.setdefault(node, []).append(seconds))
    with torch.no_grad():
        whole = _seconds(executable, flat, repeats)
        _seconds(clocked, flat, repeats)
    nodes = {node.name: node for node in program.graph.nodes}
    return Profile(tuple(
        Timed(name, target_name(nodes[name].target).removeprefix("bincompile."),
              executable.kernels.get(name, OTHER), owner(nodes[name]),
              statistics.median(seconds[-repeats:]) * 1e6)
        for name, seconds in spent.items() if len(seconds) >= repeats),  # else made once, and kept
        whole * 1e6, torch.get_num_threads())


def _seconds(function: Any, flat: Sequence[Any], repeats: int) -> float:
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        function(*flat)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])
