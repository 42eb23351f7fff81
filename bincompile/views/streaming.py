"""What a report says of a streaming form."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import fx

from bincompile.ops import operator_of
from bincompile.program import owner
from bincompile.record import Evidence
from bincompile.signature import Signature
from bincompile.steps import StepProgram
from bincompile.views.cells import HEADERS
from bincompile.views.tables import table

CLASSES = {
    "S1": "the newest token over a ring of keys and values",
    "S1'": "the newest token over all keys and values so far",
    "S2": "the window's one answer, over a ring of keys and values",
    "S3": "answers of the whole window made again, or the one that reads them",
    "S4": "the newest token over what does not change with time",
}


@dataclasses.dataclass(frozen=True)
class Streaming:
    """The steps of a model: what they equal, how that was proven, and what they remember.

    Args:
        semantics: what a step equals, e.g. "banded(64), truncates".
        inputs: of the model, those that a step takes one token of.
        windows: module path of each attention or pooling, and tokens that it sees; None: all.
        classes: module path of each attention, and how it is streamed: see `CLASSES`.
        receptive_field: tokens that an answer depends on; None: all since the row began.
        rate: steps between two answers.
        delay: steps from a token to the answer for it.
        first: the first step, from 0, with a valid answer.
        limit: steps that a row can take; None: no limit.
        state_bytes: bytes for each row, before anything has grown.
        grows: whether a row needs more bytes as its stream goes on.
        evidence: the proofs; empty before them.
        notes: what else a reader should know.
    """

    semantics: str
    inputs: tuple[str, ...]
    windows: tuple[tuple[str, int | None], ...]
    receptive_field: int | None
    rate: int
    delay: int
    first: int
    limit: int | None
    state_bytes: int
    grows: bool
    evidence: tuple[Evidence, ...]
    notes: tuple[str, ...]
    classes: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, steps: StepProgram, signature: Signature) -> Streaming:
        """What there is to say of a step program of a model with this signature."""
        names = tuple(signature.inputs[known.position].name for known in steps.inputs)
        return cls(steps.semantics, names, steps.windows,
                   steps.receptive_field, steps.rate, steps.delay, steps.first, steps.limit,
                   steps.nbytes, any(s.grows is not None for s in steps.states),
                   steps.evidence, steps.notes, tuple(_classes(steps).items()))

    @property
    def cells(self) -> list[tuple[str, str]]:
        """Rows of a table: what, and how much."""
        tokens = "all since the row began"
        rows = [("equals", self.semantics), ("one token of", ", ".join(self.inputs))]
        rows += [(path or "(root)", f"sees {tokens if window is None else f'{window} tokens'}")
                 for path, window in self.windows]
        rows += [(path or "(root)", f"{kind}: {CLASSES[kind]}") for path, kind in self.classes]
        rows += [("receptive field", tokens if self.receptive_field is None
                  else f"{self.receptive_field} tokens"),
                 ("first answer", f"step {self.first}" if self.first else "step 0, the first"),
                 ("answers", "every step" if self.rate == 1 else f"every {self.rate} steps"),
                 ("delay", f"{self.delay} steps" if self.delay else ""),
                 ("limit", "" if self.limit is None else f"{self.limit:,} steps"),
                 ("state", f"{self.state_bytes:,} bytes a row"
                  + (", and more as it goes on" if self.grows else "")),
                 *(("proof", _proof(found)) for found in self.evidence),
                 *(("proof", "not made") for _ in range(not self.evidence)),
                 *(("note", note) for note in self.notes)]
        return [row for row in rows if row[1]]

    def __str__(self) -> str:
        return f"streaming\n{table(HEADERS['streaming'], self.cells)}"

    def to_dict(self) -> dict[str, Any]:
        """The same in types that JSON has."""
        found = dataclasses.asdict(self)
        return {**found, "inputs": list(self.inputs), "notes": list(self.notes),
                "classes": [{"path": path, "class": kind} for path, kind in self.classes],
                "windows": [{"path": path, "tokens": tokens} for path, tokens in self.windows],
                "evidence": [{**dataclasses.asdict(e), "passed": e.passed}
                             for e in self.evidence]}


def _classes(steps: StepProgram) -> dict[str, str]:
    """The class of each attention, by module path."""
    found: dict[str, str] = {}
    whole, wide = steps.semantics.startswith("window"), False
    for node in steps.program.graph.nodes:
        operator = operator_of(node.target) if node.op == "call_function" else None
        if operator is None or not operator.name.endswith("attention"):
            continue
        given = operator.bind(node.args, dict(node.kwargs))
        if operator.name.startswith("stream_"):
            kind = "S2" if whole else "S1" if given["window"] is not None else "S1'"
        elif _is_prepared(given["key"], steps):
            kind = "S4"
        else:
            wide |= str(given["query"].meta["val"].shape[-2]) != "1"
            kind = ("S3" if wide else "S2") if whole else "S1"
        found[owner(node)] = kind
    return found


def _is_prepared(node: fx.Node, steps: StepProgram) -> bool:
    """Whether a value follows from prepared states and stored tensors alone."""
    prepared = {state.name for state in steps.states if state.prepared is not None}
    pending, seen = [node], set[fx.Node]()
    while pending:
        found = pending.pop()
        if found not in seen:
            seen.add(found)
            pending += found.all_input_nodes
    places = {n.name for n in seen if n.op == "placeholder"}
    return bool(places & prepared) and places <= prepared | {"rows"}


def _proof(found: Evidence) -> str:
    return (f"{'' if found.passed else 'failed: '}{found.max_error:.1e} of {found.limit:.0e}, "
            f"{found.trials:,} steps in {found.dtype}")
