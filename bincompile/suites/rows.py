"""What suites are made of: cases, which measure rows of times that can be compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch

from bincompile.timing import medians

OURS, EAGER, INDUCTOR, HALF, INT8 = "bincompile", "float32", "torch.compile", "bf16", "int8"
KERNEL, PEAK, COPY, PRODUCTS, READ = "kernel", "peak", "copy", "bare products", "read"
LIMITS = (PEAK, COPY, PRODUCTS, READ)  # of the machine
NOT_PEERS = (KERNEL, *LIMITS)  # a part of ours, and what no one is faster than

Row = dict[str, Any]
Candidates = Mapping[str, Callable[[], Any]]
NONE: Mapping[str, float] = {}


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to measure, which costs nothing until it is measured.

    Args:
        name: what `--only` filters by.
        measure: makes the models, and gives its rows.
    """

    name: str
    measure: Callable[[], Iterator[Row]]


def timed(case: str, candidates: Candidates, values: Mapping[str, float] = NONE) -> Row:
    """The row of a case whose candidates include `OURS`; `values` are figures that are no times."""
    return row(case, times_of(candidates), values=values)


def times_of(candidates: Candidates) -> dict[str, float]:
    """Median milliseconds of each candidate, in the same rounds."""
    with torch.inference_mode():
        return medians(candidates)


def row(case: str, times: Mapping[str, float], ours: str = OURS,
        others: Collection[str] = (), values: Mapping[str, float] = NONE) -> Row:
    """A row of times that were measured together.

    Args:
        case: its name.
        times: milliseconds of each candidate.
        ours: the candidate that the others are compared with.
        others: candidates that are ours too, and belong to other rows.
        values: figures that are no times.

    Returns:
        A row: `ms`; `speedup`, the time of each peer over ours; `share`, the time of each limit
        over ours (1.0 is as fast as the machine can be); `values`.

    Example:
        >>> row("sum", {"bincompile": 2.0, "float32": 8.0, "peak": 1.5})["speedup"]
        {'float32': 4.0}
    """
    kept = {(OURS if name == ours else name): ms for name, ms in times.items()
            if name not in others}
    limits = {name: ms / kept[OURS] for name, ms in kept.items() if name in LIMITS}
    speedup = {name: ms / kept[OURS] for name, ms in kept.items()
               if name != OURS and name not in NOT_PEERS}
    return {"case": case, "threads": torch.get_num_threads(), "ms": kept, "speedup": speedup,
            "share": limits, "values": dict(values)}
