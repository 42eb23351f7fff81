"""Speed against the float peers: every candidate in the same rounds of the same process."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import bincompile
from bincompile import bench_match, report
from bincompile.config import Target
from bincompile.errors import ConfigError, KernelError
from bincompile.suites import (
    calls,
    costs,
    embedding,
    kernels,
    layers,
    models,
    stream,
    stream_errors,
    targets,
)
from bincompile.suites.peers import CONTINUAL
from bincompile.suites.rows import OURS, Case, Row

MATCH, TARGETS, STREAM = "match", "targets", "stream"
QUICK = "--quick"  # to the measuring process; no case begins like it

SUITES: dict[str, Callable[[], list[Case]]] = {
    "kernels": kernels.cases, "layers": layers.cases, "models": models.cases,
    "embedding": embedding.cases, "calls": calls.cases, "validate": costs.proofs,
    "import": costs.imports, STREAM: stream.cases}
NAMES = (*SUITES, MATCH, TARGETS)


def run(suite: str, threads: Sequence[int], only: Sequence[str] = (), *,
        quick: bool = False) -> dict[str, Any]:
    """Measure a suite, each number of threads in a process of its own.

    Args:
        suite: "kernels" (linears and attention cores against torch's, with the speed that the
            machine's registers allow), "layers" (a BMHA against nn.MultiheadAttention), "models"
            (BERT-base and MiniLM), "embedding" (look-ups and bags), "calls" (a model of one
            kernel over that kernel), "validate" (one proof), "import", "stream" (a step of a
            stream against the window computed anew and continual-inference), "match" (what is
            recognised in the corpus, by us and by torch.compile), or "targets" (what is promised
            of all of these, each beside its limit). "stream", "match" and "targets" take the first
            number of threads.
        threads: numbers of threads.
        only: beginnings of names of cases; of "targets", of suites too.
        quick: follow the errors of "stream" for fewer steps.

    Returns:
        `{"suite", "machine", "load", "absent", "rows"}`, of "stream" and "targets" also
        `"targets"`; `absent` are peers that are not installed; a row has `case`,
        `threads`, `ms` (median of each candidate), `speedup` (time of each peer over ours),
        `share` (of the machine's limits) and `values`; in "match" also `counts`; `error` instead
        where the case failed. `load` is the machine's load average at the start: other work on
        the same cores makes times on several threads worthless.

    Raises:
        ConfigError: there is no such suite or case.
        KernelError: the measuring process failed.
    """
    if suite not in NAMES:
        raise ConfigError(f"the suite {suite!r}", ", ".join(NAMES), "the suite's name")
    head = {"suite": suite, "machine": machine(), "load": os.getloadavg()[0],
            "absent": [] if suite not in (STREAM, TARGETS) else absent()}
    if suite == TARGETS:
        asked = [t for t in targets.TARGETS if not only or t.suite.startswith(tuple(only))
                 or t.case.startswith(tuple(only))]
        _check_some(asked, only, sorted(targets.needed()))
        rows = [row for name, cases in targets.needed(asked).items()
                for row in _in_own_process(name, threads[0], *cases, *_flags(quick))]
        return {**head, "rows": rows, "targets": targets.judged(rows, asked)}
    if suite != MATCH:
        names = [case.name for case in SUITES[suite]()]
        _check_some([n for n in names if not only or n.startswith(tuple(only))], only, names)
    threads = threads[:1] if suite in (MATCH, STREAM) else threads
    rows = [row for count in threads
            for row in _in_own_process(suite, count, *only, *_flags(quick))]
    promised = [t for t in targets.TARGETS if t.suite == suite == STREAM
                and (not only or t.case.startswith(tuple(only)))]
    return {**head, "rows": rows, **({"targets": targets.judged(rows, promised)} if promised
                                     else {})}


def absent() -> list[str]:
    """The peers of streams that are not installed."""
    return [] if importlib.util.find_spec("continual") else [CONTINUAL]


def _flags(quick: bool) -> list[str]:
    return [QUICK] if quick else []


def _check_some(found: Sequence[Any], only: Sequence[str], names: Sequence[str]) -> None:
    if not found:
        raise ConfigError(f"only={list(only)}, with which no case begins", ", ".join(names),
                          "the beginnings of names that only= gives")


def machine() -> dict[str, Any]:
    """What the times are of."""
    return {"target": str(Target.host()), "cores": os.cpu_count(), "torch": torch.__version__,
            "bincompile": bincompile.__version__}


def failed(result: dict[str, Any]) -> list[str]:
    """The cases that could not be measured."""
    return [row["case"] for row in result["rows"] if "error" in row]


def table(result: dict[str, Any], *, markdown: bool = False) -> str:
    """The result of `run` as tables: targets or counts, where there are any, then times."""
    show = _markdown if markdown else report.table
    broken = [f"{row['case']} failed: {row['error']}" for row in result["rows"] if "error" in row]
    rows = [row for row in result["rows"] if "error" not in row]
    counted = [row for row in rows if row.get("counts")]
    timed = [row for row in rows if not row.get("counts")]
    parts = [bench_match.text(counted)] if counted else []
    if judged := result.get(TARGETS):
        parts.append(show(("target", "against", "limit", "measured", "verdict"),
                          [targets.cells(target) for target in judged]) + "\n")
    if timed:
        parts.append(f"{result['suite']}, medians of interleaved rounds, load average "
                     f"{result['load']:.1f} at the start\n{show(*_times(timed))}")
    without = [f"{name} is not installed, and not measured: pip install 'bincompile[bench]'"
               for name in result.get("absent", ())]
    return "\n".join([*parts, *broken, *without])


def _times(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """One column for each candidate, peer, limit and value that any row has, and the lines."""
    columns = [(kind, name, title.format(name), form) for kind, title, form in (
        ("ms", "{} ms", ".3f"), ("speedup", "x {}", ".2f"), ("share", "% of {}", ".1%"),
        ("values", "{}", ".4g"))
        for name in dict.fromkeys(name for row in rows for name in row.get(kind, ()))]
    lines = [(row["case"], str(row["threads"]),
              *(_number(row.get(kind, {}).get(name), form) for kind, name, _, form in columns))
             for row in rows]
    return ("case", "threads", *(title for _, _, title, _ in columns)), lines


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """The same as `report.table`, for a README; a blank line stands before it."""
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _in_own_process(suite: str, threads: int, *only: str) -> list[Row]:
    root = str(Path(bincompile.__file__).parent.parent)
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    done = subprocess.run([sys.executable, "-m", "bincompile.bench", suite, str(threads), *only],
                          env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    if done.returncode:
        raise KernelError(f"measuring {suite!r} failed: {done.stderr.strip()[-500:]}",
                          "a process that measures and ends", "what the message names")
    return json.loads(done.stdout.splitlines()[-1])


def _measured(suite: str, only: Sequence[str]) -> Iterator[Row]:
    """The rows of a suite; a case that fails is one with its error, and hides no other."""
    for case in SUITES[suite]():
        if only and not case.name.startswith(tuple(only)):
            continue
        try:
            yield from case.measure()
        except Exception as error:
            traceback.print_exc()
            yield {"case": case.name, "threads": torch.get_num_threads(), "ms": {},
                   "speedup": {}, "error": f"{type(error).__name__}: {error}"}


def _main(suite: str, threads: str, *only: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(int(threads))
    if QUICK in only:
        stream_errors.STEPS = stream_errors.QUICK_STEPS
        only = tuple(name for name in only if name != QUICK)
    rows = bench_match.rows(*only) if suite == MATCH else _measured(suite, only)
    print(json.dumps(list(rows)))


__all__ = ["NAMES", "OURS", "SUITES", "Row", "failed", "machine", "run", "table"]

if __name__ == "__main__":
    _main(*sys.argv[1:])
