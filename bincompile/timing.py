"""Times that can be compared: every candidate in every round, medians over the rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def medians(candidates: Mapping[str, Callable[[], Any]], *, rounds: int = 15,
            seconds: float = 0.02) -> dict[str, float]:
    """Median time of one call of each candidate, in milliseconds.

    A round calls every candidate in turn, each about `seconds` long, so that a change of the
    machine's speed meets all of them.

    Example:
        >>> sorted(medians({"sum": lambda: sum(range(9)), "pass": lambda: None}, seconds=1e-4))
        ['pass', 'sum']
    """
    repeats = {name: max(1, int(seconds / _once(call))) for name, call in candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: 1e3 * statistics.median(found) for name, found in times.items()}


def _once(call: Callable[[], Any]) -> float:
    call()
    start = time.perf_counter()
    call()
    return max(time.perf_counter() - start, 1e-7)
