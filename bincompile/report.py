"""What was found, proven, rewritten and refused: prints as tables, saves as JSON."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

from bincompile.errors import ConfigError
from bincompile.program import Program
from bincompile.record import Evidence, Match, Refusal, Rewrite
from bincompile.steps import StepProgram
from bincompile.views.cells import HEADERS, match_cells, refusal_cells, rewrite_cells
from bincompile.views.dot import to_dot
from bincompile.views.graph import GraphView
from bincompile.views.marks import marks
from bincompile.views.notebook import report_cell
from bincompile.views.page import page, write_whole
from bincompile.views.streaming import Streaming
from bincompile.views.tables import table as table

ORIGINALS = ("captured", "normal", "matched", "validated")  # before the first rewrite


@dataclasses.dataclass(frozen=True)
class Report:
    """The records of a program.

    Args:
        matches: subgraphs that were recognised, with their proof.
        rewrites: changes that were made, with the kernel that runs each and the bytes it reads.
        refusals: candidates that were declined, with the reason and the user's source line.
        notes: other decisions a reader should know of.
        program: the program that they are of, with its earlier stages; its graphs are shown by
            `to_html` and `to_dot`.
        streaming: what its steps equal, and how that was proven; None where it has none.

    Example:
        >>> import torch, bincompile as bc
        >>> report = bc.inspect(torch.nn.Embedding(5, 4).eval(), (torch.tensor([[0, 3]]),))
        >>> [(m.operator, m.validated) for m in report.matches], report.lossy
        ([('embedding', True)], False)
    """

    matches: tuple[Match, ...] = ()
    rewrites: tuple[Rewrite, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()
    program: Program | None = dataclasses.field(default=None, repr=False, compare=False)
    streaming: Streaming | None = None

    @classmethod
    def of(cls, program: Program, kernels: Mapping[str, str] | None = None,
           steps: StepProgram | None = None) -> Report:
        """The report of a program.

        Args:
            program: what it is of.
            kernels: the kernel that runs each node.
            steps: the program of one step, where the model streams.
        """
        chosen = kernels or {}
        rewrites = tuple(dataclasses.replace(r, kernel=chosen.get(r.node, r.kernel))
                         for r in program.rewrites)
        streaming = None if steps is None else Streaming.of(steps, program.signature)
        return cls(program.matches, rewrites, program.refusals, program.notes, program, streaming)

    @property
    def lossy(self) -> bool:
        """Whether any rewrite changed the precision."""
        return any(r.kind == "lossy" for r in self.rewrites)

    @functools.cached_property
    def graphs(self) -> dict[str, GraphView]:
        """The graphs "before" the rewrites and "after" them, as text, as far as they are known.

        A program that was loaded has lost the graph before.
        """
        if self.program is None:
            return {}
        earlier = [s for s in self.program.stages[:-1] if s.level in ORIGINALS]
        return {side: GraphView.of(program)
                for side, program in (*(("before", s) for s in earlier[-1:]),
                                      ("after", self.program))}

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the report as one page that needs nothing else: tables, and graphs side by side.

        A file that is there is replaced only when the new one is whole.

        Args:
            path: the file, e.g. "report.html".

        Raises:
            ConfigError: the path can't be written.

        Example:
            >>> import pathlib, tempfile, torch, bincompile as bc
            >>> report = bc.inspect(torch.nn.Embedding(5, 4).eval(), (torch.tensor([[0, 3]]),))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     page = pathlib.Path(folder, "report.html")
            ...     report.to_html(page)
            ...     "bincompile.embedding" in page.read_text()
            True
        """
        write_whole(path, page(self.summary(), self.matches, self.rewrites, self.refusals,
                               self.notes, self.graphs, self._stream_cells))

    def to_dot(self, side: str | None = None) -> str:
        """The graph "before" or "after" as DOT text: modules are clusters, matches coloured.

        Graphviz lays out hundreds of nodes in seconds and thousands in minutes; the page of
        `to_html` needs no layout.

        Args:
            side: which graph; without it the first that the report has.

        Raises:
            ConfigError: the report has no such graph, as one of a loaded model has none before.

        Example:
            >>> import torch, bincompile as bc
            >>> report = bc.inspect(torch.nn.Embedding(5, 4).eval(), (torch.tensor([[0, 3]]),))
            >>> report.to_dot().startswith("digraph")
            True
        """
        side = side or next(iter(self.graphs), "before")
        if side not in self.graphs:
            raise ConfigError(f"side={side!r} of a report with the graphs {list(self.graphs)}",
                              "'before' or 'after', as far as the report has them",
                              "the side= argument, or a report of the model that was compiled here")
        found = marks(self.matches, self.rewrites, self.refusals, self.graphs.get("after"))
        return to_dot(self.graphs[side], found, side)

    def _repr_html_(self) -> str:
        return report_cell(self.summary(), self.matches, self.rewrites, self.refusals, self.notes,
                           self._stream_cells)

    @property
    def _stream_cells(self) -> list[tuple[str, str]]:
        return [] if self.streaming is None else self.streaming.cells

    def __getstate__(self) -> dict[str, Any]:
        """A copy for another process keeps the text of the graphs, not the weights."""
        return {**self.__dict__, "graphs": self.graphs, "program": None}

    def to_dict(self) -> dict[str, Any]:
        """The report as plain lists, dicts, strings and numbers, which JSON can hold."""
        return {
            "lossy": self.lossy,
            "matches": [plain({**_fields(m), "validated": m.validated, "max_error": m.max_error})
                        for m in self.matches],
            "rewrites": [plain(_fields(r)) for r in self.rewrites],
            "refusals": [plain(_fields(r)) for r in self.refusals],
            "notes": list(self.notes),
            "streaming": None if self.streaming is None else self.streaming.to_dict(),
        }

    def to_json(self) -> str:
        """The report as one JSON document."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def __str__(self) -> str:
        rows = {"matches": map(match_cells, self.matches),
                "rewrites": map(rewrite_cells, self.rewrites),
                "refusals": map(refusal_cells, self.refusals)}
        tables = [f"{title}\n{table(HEADERS[title], cells)}" for title, cells in rows.items()
                  if getattr(self, title)]
        if self.streaming is not None:
            tables.append(str(self.streaming))
        if self.notes:
            tables.append("notes\n" + "\n".join(f"  {note}" for note in self.notes))
        return "\n\n".join([self.summary(), *tables])

    def summary(self) -> str:
        """One line: what was found and proven, what was rewritten, what was refused."""
        proven = Counter(m.operator for m in self.matches if m.validated)
        found = ", ".join(f"{count} {name}" for name, count in proven.items()) or "nothing"
        kinds = Counter(r.kind for r in self.rewrites)
        return (f"found and proven: {found}; rewrites: {kinds['exact']} exact, "
                f"{kinds['lossy']} lossy; refused: {len(self.refusals)}")


def plain(value: Any) -> Any:
    """The value in types that JSON has; a number that is not finite becomes its name."""
    if isinstance(value, Report):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _fields(record: Any) -> dict[str, Any]:
    found = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    return {k: _fields(v) if isinstance(v, Evidence) else v for k, v in found.items()}
