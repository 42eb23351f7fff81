"""What the rows of the suite `stream` are made of: streams, bare products, figures beside times."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from bincompile.api import optimize
from bincompile.compiled import CompiledModel
from bincompile.config import Continual
from bincompile.suites import operations
from bincompile.suites.rows import PRODUCTS, Row, row

FLOAT, BINARY = "fp32", "W1A1"
FORMS: dict[str, dict[str, Any]] = {FLOAT: {}, BINARY: {"binary": "w1a1", "guard": None}}


class SelfAttention(nn.Module):
    """nn.MultiheadAttention over its own input, without the weights."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, width) to the same shape."""
        return self.attention(x, x, x, need_weights=False)[0]


class Streams:
    """Full streams of one model, one for each form of ours.

    Args:
        model: in eval mode.
        window: the tokens (B, T, ...) that it is compiled with and each stream has taken.
        continual: how it streams.
        forms: options of `optimize` by the name of the form.
    """

    def __init__(self, model: nn.Module, window: torch.Tensor, continual: Continual,
                 forms: Mapping[str, Mapping[str, Any]] = FORMS) -> None:
        self.compiled: dict[str, CompiledModel] = {
            form: optimize(model, (window,), continual=continual, **options)
            for form, options in forms.items()}
        self.streams = {form: full(c, window) for form, c in self.compiled.items()}
        self.token = window[:, -1].contiguous()
        self._window = operations.of_call(lambda: model(window[:1]))

    @property
    def candidates(self) -> dict[str, Callable[[], Any]]:
        """A step of each form."""
        return {form: partial(stream.step, self.token) for form, stream in self.streams.items()}

    def rows(self, name: str, times: Mapping[str, float], of_float: Collection[str] = (),
             values: Mapping[str, float] | None = None) -> Iterator[Row]:
        """A row for each form.

        Args:
            name: of the case.
            times: milliseconds of all candidates, ours among them.
            of_float: candidates that only the float form is compared with.
            values: figures that all forms share.
        """
        for form, stream in self.streams.items():
            others = set(self.streams) - {form} | set(() if form == FLOAT else of_float)
            step = operations.of_step(self.compiled[self._counted].steps)
            yield row(f"{name}, {form}", times, ours=form, others=others, values={
                "steps_per_s": 1e3 / times[form], "operations_step": step,
                "operations_window": self._window, "state_bytes": stream.nbytes / len(stream),
                **(values or {})})

    @property
    def _counted(self) -> str:
        """The form whose products are counted: binary ones have as many."""
        return FLOAT if FLOAT in self.compiled else next(iter(self.compiled))


def full(compiled: CompiledModel, tokens: torch.Tensor) -> Any:
    """A stream that has taken these tokens (B, T, ...)."""
    stream = compiled.stream(tokens.shape[0])
    for token in tokens.unbind(1):
        stream.step(token)
    return stream


def products(linears: Sequence[nn.Linear | tuple[torch.Tensor, torch.Tensor]],
             ) -> dict[str, Callable[[], Any]]:
    """Candidates that do no more than the products of float linears with one row.

    As F.linear, and as matrix-vector products into memory that is there; see `least`.
    """
    pairs = [(x.weight, x.bias) if isinstance(x, nn.Linear) else x for x in linears]
    rows = [torch.randn(1, weight.shape[1]) for weight, _ in pairs]
    outs = [torch.empty(weight.shape[0]) for weight, _ in pairs]

    def linear() -> None:
        for x, (weight, bias) in zip(rows, pairs, strict=True):
            F.linear(x, weight, bias)

    def vector() -> None:
        for x, out, (weight, _) in zip(rows, outs, pairs, strict=True):
            torch.mv(weight, x[0], out=out)

    return {f"{PRODUCTS}, linear": linear, f"{PRODUCTS}, mv": vector}


def least(times: Mapping[str, float], name: str, of: Collection[str]) -> dict[str, float]:
    """The times with those of some candidates as one, the shortest of them.

    Example:
        >>> least({"ours": 2.0, "sum": 4.0, "dot": 3.0}, "read", ["sum", "dot"])
        {'ours': 2.0, 'read': 3.0}
    """
    kept = {n: ms for n, ms in times.items() if n not in of}
    return {**kept, name: min(times[n] for n in of)}
