"""One page: a report as HTML that needs no other file, no network and, to be read, no script."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from bincompile.errors import ConfigError
from bincompile.record import Evidence, Match, Refusal, Rewrite
from bincompile.views.cells import HEADERS, attribute_texts, proof, short_source
from bincompile.views.graph import GraphView
from bincompile.views.listing import Sources, listing
from bincompile.views.marks import Mark, marks, rewrites_of

ABSENT = {
    "before": "The graph before is not there: a saved model holds only what it runs.",
    "after": "The graphs are not there: this report was made without a program.",
}


def page(summary: str, matches: Sequence[Match], rewrites: Sequence[Rewrite],
         refusals: Sequence[Refusal], notes: Sequence[str],
         graphs: Mapping[str, GraphView], streaming: Sequence[tuple[str, str]] = ()) -> str:
    """The whole page as text."""
    after = graphs.get("after")
    found = marks(matches, rewrites, refusals, after)
    owners, sources = rewrites_of(matches, rewrites), Sources()
    by_key = {m.key: m for m in found}
    sections = (
        _section("matches", "Matches", ("operator", "module", "what is known", "proof", "source"),
                 [_match_row(m, by_key[f"match-{i}"]) for i, m in enumerate(matches)]),
        _section("rewrites", "Rewrites",
                 ("operator", "module", "kind", "kernel", "bytes before", "now", "error"),
                 [_rewrite_row(r, f"rewrite-{i}", by_key[owners[i]])
                  for i, r in enumerate(rewrites)]),
        _section("refusals", "Refused", ("operator", "module", "node", "reason", "source"),
                 [_refusal_row(r, by_key[f"refusal-{i}"]) for i, r in enumerate(refusals)]),
        _section("streaming", "Streaming", HEADERS["streaming"],
                 [f"<tr><td>{escape(what)}</td><td>{escape(value)}</td></tr>"
                  for what, value in streaming]),
        _notes(notes),
    )
    panels = [_panel(side, graphs, found, sources) for side in ("before", "after")]
    title = f"{after.model or 'program'}" if after else "report"
    folder = Path(__file__).parent
    read = {name: (folder / name).read_text(encoding="utf-8")
            for name in ("report.html", "report.css", "report.js")}
    data = {"marks": [dataclasses.asdict(m) for m in found], "sources": sources.lines}
    return Template(read["report.html"]).substitute(
        title=escape(title), summary=escape(summary), style=read["report.css"],
        script=read["report.js"], tiles="".join(_tiles(matches, rewrites, refusals, graphs)),
        tables="".join(sections), panels="".join(panels),
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"))


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file; a file that is there is replaced only when the new one is whole."""
    target = Path(path)
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise ConfigError(f"{target} can't be written: {error}", "a file in a folder that exists "
                          "and can be written to", "the path") from error


def _tiles(matches: Sequence[Match], rewrites: Sequence[Rewrite], refusals: Sequence[Refusal],
           graphs: Mapping[str, GraphView]) -> Iterable[str]:
    """The figures at the top: what is counted, how much, and a word on it."""
    lossy = sum(r.kind == "lossy" for r in rewrites)
    yield _tile("matches", len(matches), f"{sum(m.validated for m in matches)} proven")
    yield _tile("rewrites", len(rewrites), f"{len(rewrites) - lossy} exact, {lossy} lossy",
                "bad" if lossy else "")
    yield _tile("refused", len(refusals), "each with its reason" if refusals else "")
    errors = [m.max_error for m in matches if m.max_error is not None]
    if errors:
        yield _tile("largest error", f"{max(errors):.1e}", "of all proofs, in float64")
    counts = [len(g.nodes) for g in (graphs.get("before"), graphs.get("after")) if g]
    if counts:
        yield _tile("nodes", f"{counts[-1]:,}", f"were {counts[0]:,}" if len(counts) > 1 else "")
    read = sum(r.bytes_before for r in rewrites)
    if read:
        now = sum(r.bytes_after for r in rewrites)
        yield _tile("weights read", _bytes(now), f"were {_bytes(read)}")


def _tile(name: str, figure: Any, word: str, kind: str = "") -> str:
    return (f'<div class="tile {kind}"><dt>{escape(name)}</dt><dd><b>{escape(str(figure))}</b> '
            f"<span>{escape(word)}</span></dd></div>")


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _section(name: str, title: str, header: Sequence[str], rows: Sequence[str]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{escape(h)}</th>" for h in header)
    return (f'<details class="records" id="{name}" open><summary>{escape(title)} '
            f'<span class="count">{len(rows)}</span></summary><div class="scroll"><table>'
            f'<thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div></details>')


def _notes(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (f'<details class="records" id="notes" open><summary>Notes <span class="count">'
            f"{len(notes)}</span></summary><ul>{items}</ul></details>") if notes else ""


def _row(key: str, mark: Mark, cells: Iterable[str]) -> str:
    hue = "" if mark.hue is None else f' style="--hue:{mark.hue}"'
    kind = "refused" if mark.hue is None else "coloured"
    first, *rest = cells
    inside = "".join(f"<td>{cell}</td>" for cell in rest)
    return (f'<tr id="{key}" class="{kind}" data-mark="{mark.key}"{hue}><td><button type="button">'
            f"{first}</button></td>{inside}</tr>")


def _match_row(match: Match, mark: Mark) -> str:
    chips = "".join(f"<span class=chip>{escape(t)}</span>" for t in attribute_texts(match.attrs))
    return _row(mark.key, mark, (escape(match.operator), _module(match.path), chips,
                                 _proof(match.evidence), _source(match.source)))


def _rewrite_row(rewrite: Rewrite, key: str, mark: Mark) -> str:
    error = "" if rewrite.max_error is None else f"{rewrite.max_error:.1e}"
    kind = f'<span class="verdict {"good" if rewrite.kind == "exact" else "bad"}">'
    return _row(key, mark, (escape(rewrite.operator), _module(rewrite.path),
                            f"{kind}{escape(rewrite.kind)}</span>", _code(rewrite.kernel),
                            f"{rewrite.bytes_before:,}", f"{rewrite.bytes_after:,}", error))


def _refusal_row(refusal: Refusal, mark: Mark) -> str:
    return _row(mark.key, mark, (escape(refusal.operator), _module(refusal.path),
                                 _code(refusal.node), escape(refusal.reason),
                                 _source(refusal.source)))


def _module(path: str) -> str:
    return _code(path) if path else '<span class="dim">(root)</span>'


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>" if text else ""


def _source(source: str) -> str:
    return f'<code class="source" title="{escape(source)}">{escape(short_source(source))}</code>'


def _proof(evidence: Evidence | None) -> str:
    passed = evidence is not None and evidence.passed
    verdict = "proven" if passed else "not tried" if evidence is None else "failed"
    details = "" if evidence is None else f'<span class="dim">{escape(proof(evidence))}</span>'
    return f'<span class="verdict {"good" if passed else "bad"}">{verdict}</span> {details}'


def _panel(side: str, graphs: Mapping[str, GraphView], found: Sequence[Mark],
           sources: Sources) -> str:
    """One graph: a heading, a map of its marks, and its lines in sections."""
    graph = graphs.get(side)
    if graph is None:
        return f'<p class="absent">{ABSENT[side]}</p>' if side == "before" or not graphs else ""
    lines, ticks = listing(graph, found, side, sources)
    return (f'<section class="panel" id="{side}" aria-label="graph {side}"><h3>{side.capitalize()} '
            f'<span class="dim">{escape(graph.level)}, {len(graph.nodes):,} nodes</span></h3>'
            f'<div class="ticks" aria-hidden="true">{ticks}</div>'
            f'<div class="lines" tabindex="0" role="group" aria-label="nodes {side}">{lines}</div>'
            "</section>")
