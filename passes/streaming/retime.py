"""Programs whose capture fixed the number of tokens, run at others for the sake of a proof."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from bincompile.passes.graph import aten
from bincompile.passes.streaming.analysis import Analysis
from bincompile.passes.streaming.kinds import TIME, Kind, Still

RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)


def retimed(analysis: Analysis) -> Mapping[str, Callable[..., Any]]:
    """Reshapes in which the axis of time is what is left, by the names of their nodes."""
    found = dict[str, Callable[..., Any]]()
    for node in analysis.chosen:
        kind = analysis.facts.kinds[node]
        if node.target in RESHAPES and isinstance(kind, Kind) and not isinstance(kind, Still):
            times = [i for i, axis in enumerate(kind.axes) if any(a.role == TIME for a in axis)]
            if len(times) == 1:
                found[node.name] = functools.partial(_reshaped, times[0])
    return found


def _reshaped(time: int, value: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    return value.reshape([-1 if axis == time else size for axis, size in enumerate(sizes)])
