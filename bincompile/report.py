"""What was found, proven, rewritten and refused: prints as tables, saves as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bincompile.program import Program
from bincompile.record import Evidence, Match, Refusal, Rewrite


@dataclasses.dataclass(frozen=True)
class Report:
    """The records of a program.

    Args:
        matches: subgraphs that were recognised, with their proof.
        rewrites: changes that were made, with the kernel that runs each and the bytes it reads.
        refusals: candidates that were declined, with the reason and the user's source line.
        notes: other decisions a reader should know of.

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

    @classmethod
    def of(cls, program: Program, kernels: Mapping[str, str] | None = None) -> Report:
        """The report of a program; `kernels` names the kernel that runs each node."""
        chosen = kernels or {}
        rewrites = tuple(dataclasses.replace(r, kernel=chosen.get(r.node, r.kernel))
                         for r in program.rewrites)
        return cls(program.matches, rewrites, program.refusals, program.notes)

    @property
    def lossy(self) -> bool:
        """Whether any rewrite changed the precision."""
        return any(r.kind == "lossy" for r in self.rewrites)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain lists, dicts, strings and numbers, which JSON can hold."""
        return {
            "lossy": self.lossy,
            "matches": [plain({**_fields(m), "validated": m.validated, "max_error": m.max_error})
                        for m in self.matches],
            "rewrites": [plain(_fields(r)) for r in self.rewrites],
            "refusals": [plain(_fields(r)) for r in self.refusals],
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """The report as one JSON document."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def __str__(self) -> str:
        sections = (
            ("matches", ("path", "operator", "attributes", "proof"), map(_match_row, self.matches)),
            ("rewrites", ("path", "operator", "kind", "kernel", "bytes", "now", "error"),
             map(_rewrite_row, self.rewrites)),
            ("refusals", ("path", "operator", "node", "reason", "source"),
             map(_refusal_row, self.refusals)),
        )
        tables = [f"{title}\n{table(header, rows)}" for title, header, rows in sections
                  if getattr(self, title)]
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


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Aligned text columns, numbers to the right; a column without a value is left out.

    Example:
        >>> print(table(("name", "note", "us"), [("bits", "", 12), ("float", "", 340)]))
          name    us
          bits    12
          float  340
    """
    given = [list(row) for row in rows]
    used = [i for i in range(len(header)) if not given or any(row[i] != "" for row in given)]
    header, given = [header[i] for i in used], [[row[i] for i in used] for row in given]
    numeric = [bool(given) and all(not isinstance(row[i], str) for row in given)
               for i in range(len(header))]
    lines = [list(header), *([cell if isinstance(cell, str) else f"{cell:,}" for cell in row]
                             for row in given)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def show(line: list[str]) -> str:
        cells = (cell.rjust(width) if number else cell.ljust(width)
                 for cell, width, number in zip(line, widths, numeric, strict=True))
        return ("  " + "  ".join(cells)).rstrip()

    return "\n".join(map(show, lines))


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


def _match_row(match: Match) -> tuple[str, ...]:
    return match.path or "(root)", match.operator, _attributes(match.attrs), _proof(match.evidence)


def _rewrite_row(rewrite: Rewrite) -> tuple[Any, ...]:
    error = "" if rewrite.max_error is None else f"{rewrite.max_error:.1e}"
    return (rewrite.path or "(root)", rewrite.operator, rewrite.kind, rewrite.kernel,
            rewrite.bytes_before, rewrite.bytes_after, error)


def _refusal_row(refusal: Refusal) -> tuple[str, ...]:
    return (refusal.path or "(root)", refusal.operator, refusal.node, refusal.reason,
            refusal.source)


def _attributes(attrs: Mapping[str, Any]) -> str:
    def one(name: str, value: Any) -> str:
        if value is True:
            return name
        return f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"

    return ", ".join(one(k, v) for k, v in attrs.items() if v is not None and v is not False)


def _proof(evidence: Evidence | None) -> str:
    if evidence is None:
        return "not tried"
    verdict = "" if evidence.passed else "failed: "
    return (f"{verdict}{evidence.max_error:.1e} of {evidence.limit:.0e}, "
            f"{evidence.trials} trials in {evidence.dtype}")
