"""Cells of a notebook: compact tables that open and close, in the notebook's own colours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from bincompile.record import Match, Refusal, Rewrite
from bincompile.views.cells import HEADERS, match_cells, refusal_cells, rewrite_cells

if TYPE_CHECKING:
    from bincompile.program import Program

OPEN_ROWS = 12  # a longer table is closed at first
_CELL = "text-align:left;padding:2px 12px 2px 0;vertical-align:top"


def report_cell(summary: str, matches: Sequence[Match], rewrites: Sequence[Rewrite],
                refusals: Sequence[Refusal], notes: Sequence[str],
                streaming: Sequence[tuple[str, str]] = ()) -> str:
    """The records of a report."""
    tables = (("matches", map(match_cells, matches)), ("rewrites", map(rewrite_cells, rewrites)),
              ("refusals", map(refusal_cells, refusals)), ("streaming", streaming),
              ("notes", ((note,) for note in notes)))
    inside = "".join(_table(name, HEADERS.get(name, ()), list(rows)) for name, rows in tables)
    return f"<div><p><b>{escape(summary)}</b></p>{inside}</div>"


def program_cell(program: Program) -> str:
    """The text of a program."""
    return (f"<details><summary>program at level <b>{escape(program.level)}</b>, "
            f"{len(program.graph.nodes):,} nodes</summary><pre>{escape(str(program))}</pre>"
            "</details>")


def _table(name: str, header: Sequence[str], rows: Sequence[Iterable[Any]]) -> str:
    if not rows:
        return ""
    head = "".join(f'<th style="{_CELL}">{escape(h)}</th>' for h in header)
    lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    state = " open" if len(rows) <= OPEN_ROWS else ""
    return (f"<details{state}><summary>{name} ({len(rows)})</summary>"
            f"<table>{f'<thead><tr>{head}</tr></thead>' if head else ''}"
            f"<tbody>{lines}</tbody></table></details>")


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else f"{value:,}"
    return f'<td style="{_CELL}">{escape(text)}</td>'
