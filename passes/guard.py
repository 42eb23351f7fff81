"""Guard: how far a lossy program is from the model, and which layers to give back.

All layers are made binary and measured on calibration data; while the guard is broken the worst
ones (by their divergence alone) go back to float, first on calibration and then on hold-out data.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch

from bincompile.config import Binary, Guard
from bincompile.errors import AccuracyError, AccuracyUnknownError, ConfigError, InputError
from bincompile.passes.binarise import Site, binarise, sites
from bincompile.passes.binarise_attention import attention_refusals
from bincompile.program import Program
from bincompile.record import Refusal

Batches = list[list[Any]]  # flat inputs of each batch


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Cosine similarity of outputs, sample by sample; `metric` where the guard has one."""

    cos_mean: float
    cos_min: float
    metric: float | None = None

    def broken(self, guard: Guard, base: Divergence) -> str | None:
        """What limit of the guard is broken, if any."""
        if not self.cos_mean >= guard.cos_mean:
            return f"mean cosine {self.cos_mean:.4f} < {guard.cos_mean}"
        if not self.cos_min >= guard.cos_min:
            return f"least cosine {self.cos_min:.4f} < {guard.cos_min}"
        if self.metric is not None and base.metric is not None \
                and not base.metric - self.metric <= guard.max_drop:
            return f"metric {self.metric:.4f} is {base.metric - self.metric:.4f} below the model's"
        return None

    def __str__(self) -> str:
        metric = "" if self.metric is None else f", metric {self.metric:.4f}"
        return f"mean cosine {self.cos_mean:.4f}, least {self.cos_min:.4f}{metric}"


def guarded(program: Program, binary: Binary, guard: Guard | None, calibration: Any, holdout: Any,
            on_violation: str, left_out: Collection[str] = ()) -> Program:
    """The program with as many layers binary as the guard allows, every step in its notes.

    Layers at the nodes `left_out` stay float from the start.
    """
    found = [site for site in sites(program, binary) if site.node not in left_out]
    if not found and left_out:
        return program.next(program.graph_module, "binary")
    if not found:
        return program.next(program.graph_module, "binary", notes=(
            *program.notes, f"binary={binary.precision!r}: no layer matches {binary.layers!r}"),
            refusals=(*program.refusals, *attention_refusals(program, binary)))
    if guard is None:
        note = f"binary={binary.precision!r} without a guard: the divergence was not measured"
        result = binarise(program, binary, found)
        return dataclasses.replace(result, notes=(*program.notes, note))
    if calibration is None:
        raise AccuracyUnknownError(
            f"binary={binary.precision!r} without data to measure its accuracy on",
            "calibration= (and holdout=): batches of inputs of the model",
            "pass calibration=, or guard=None to accept an unknown accuracy")
    search = _Search(program, binary, guard, *_split(program, calibration, holdout))
    return search.run(found, on_violation)


def _split(program: Program, calibration: Any, holdout: Any) -> tuple[Batches, Batches, str]:
    data = _batches(program, calibration, "calibration")
    if holdout is not None:
        return data, _batches(program, holdout, "holdout"), ""
    if len(data) < 2:
        raise AccuracyUnknownError("one batch of calibration data and no hold-out data",
                                   "holdout=, or at least 2 batches of calibration data",
                                   "pass holdout=, batches that calibration does not hold")
    kept = max(1, len(data) // 5)
    return data[:-kept], data[-kept:], f"hold-out: the last {kept} of {len(data)} batches"


def _batches(program: Program, data: Any, name: str) -> Batches:
    """The flat inputs of every batch; each is a tensor, a tuple of args, or a dict of kwargs."""
    if isinstance(data, torch.Tensor | dict | str) or not isinstance(data, Iterable):
        raise ConfigError(f"{name} of type {type(data).__name__}",
                          "an iterable of batches: each a tensor, a tuple of positional inputs, "
                          "or a dict of named ones", f"{name}=[...]")
    found = Batches()
    for batch in data:
        args = () if isinstance(batch, dict) else batch if isinstance(batch, tuple) else (batch,)
        flat = program.signature.flatten(args, batch if isinstance(batch, dict) else {})
        if any(isinstance(v, torch.Tensor) and v.dtype.is_floating_point
               and not bool(v.isfinite().all()) for v in flat):
            raise InputError(f"nan or infinity in {name} batch {len(found)}", "finite values",
                             f"the batches of {name}")
        found.append(flat)
    if not found:
        raise AccuracyUnknownError(f"{name} without a batch", "at least one batch", f"{name}=")
    return found


class _Search:
    """The measurements of one guarded rewrite."""

    def __init__(self, program: Program, binary: Binary, guard: Guard, calibration: Batches,
                 holdout: Batches, note: str) -> None:
        self.program, self.binary, self.guard = program, binary, guard
        self.data = {"calibration": calibration, "hold-out": holdout}
        self.expected = {name: _outputs(program, data) for name, data in self.data.items()}
        metric = None if guard.metric is None else float(guard.metric(program))
        self.base = Divergence(1.0, 1.0, metric)
        self.notes = [note] if note else []

    def run(self, found: Sequence[Site], on_violation: str) -> Program:
        """The largest set of layers, most harmless first, that keeps the guard."""
        broken = self.broken(found)
        if broken is None or on_violation == "warn":
            if broken is not None:
                warnings.warn(f"binary={self.binary.precision!r}: {broken}", stacklevel=2)
                self.notes.append(f"guard broken and kept on request: {broken}")
            return self.result(found, ())
        if on_violation == "raise":
            raise AccuracyError(f"binary={self.binary.precision!r}: {broken}", f"{self.guard}",
                                "fewer layers (bc.Binary(layers=, keep=)), another precision, "
                                "or on_violation='fallback'")
        alone = {site: self.measure([site], "calibration") for site in found}
        order = sorted(found, key=lambda s: (-alone[s].cos_mean, s.node))
        low, high = 0, len(order)  # order[:low] keeps the guard, order[:high] does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.broken(order[:middle]) is None else (low, middle)
        reverted = tuple(
            Refusal(site.operator, site.path,
                    f"reverted to float by the guard; alone: {alone[site]}", site.node)
            for site in order[low:])
        return self.result([s for s in found if s in order[:low]], reverted)

    def broken(self, chosen: Sequence[Site]) -> str | None:
        """The first limit that these layers break, on calibration and then on hold-out data."""
        for name in self.data:
            measured = self.measure(chosen, name)
            reason = measured.broken(self.guard, self.base)
            verdict = "keeps the guard" if reason is None else reason
            self.notes.append(f"{len(chosen)} layers {self.binary.precision} on {name}: "
                              f"{measured}: {verdict}")
            if reason is not None:
                return f"{reason} on {name} data"
        return None

    def measure(self, chosen: Sequence[Site], name: str) -> Divergence:
        """The divergence of the program with these layers binary."""
        candidate = binarise(self.program, self.binary, chosen)
        cosines = _cosines(self.expected[name], _outputs(candidate, self.data[name]))
        whole = self.guard.metric is not None and name == "hold-out"
        metric = float(self.guard.metric(candidate)) if whole and self.guard.metric else None
        return Divergence(float(cosines.mean()), float(cosines.min()), metric)

    def result(self, chosen: Sequence[Site], reverted: tuple[Refusal, ...]) -> Program:
        """The program with these layers binary, with the records of the search."""
        program = binarise(self.program, self.binary, chosen)
        return dataclasses.replace(program, notes=(*self.program.notes, *self.notes),
                                   refusals=(*program.refusals, *reverted))


def _outputs(program: Program, data: Batches) -> list[list[torch.Tensor]]:
    with torch.no_grad():
        return [[v for v in program.graph_module(*flat)
                 if isinstance(v, torch.Tensor) and v.dtype.is_floating_point] for flat in data]


def _cosines(expected: list[list[torch.Tensor]], found: list[list[torch.Tensor]]) -> torch.Tensor:
    """Cosine similarity of every output of every sample; a sample is an index of axis 0."""
    cosines = []
    for left_batch, right_batch in zip(expected, found, strict=True):
        for left, right in zip(left_batch, right_batch, strict=True):
            a, b = (t.double().reshape(t.shape[0] if t.ndim > 1 else 1, -1)
                    for t in (left, right))
            same = (a == b).all(-1)
            cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1, eps=1e-30)
            cosines.append(torch.where(same, 1.0, cosine).nan_to_num(-1.0))
    if not cosines:
        raise AccuracyUnknownError("a model without a float output", "at least one float output",
                                   "guard=None, or a model that returns its scores")
    return torch.cat(cosines)
