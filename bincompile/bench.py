"""Speed against the float peers: every candidate in the same rounds of the same process."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bincompile
from bincompile import bench_match, report
from bincompile.api import optimize
from bincompile.errors import ConfigError, KernelError
from bincompile.nn import BMHA, BinaryLinear
from bincompile.runtime.native import compiler
from bincompile.timing import medians

OURS = "bincompile"
LINEAR_SIZES = ((768, 768), (4096, 4096))
LINEAR_ROWS = (512, 1)
WIDTH, HEADS, TOKENS = 768, 12, 128

Row = dict[str, Any]
Candidates = dict[str, Callable[[], Any]]


def run(suite: str, threads: Sequence[int], only: Sequence[str] = ()) -> dict[str, Any]:
    """Measure a suite, each number of threads in a process of its own.

    Args:
        suite: a name of `SUITES`: "kernels" (a compiled BinaryLinear against nn.Linear in float32
            and dynamic int8), "layers" (a compiled BMHA against nn.MultiheadAttention, eager and
            torch.compile), "validate" (one proof), "import", or "match" (what is recognised in
            the corpus, by us and by torch.compile; on the first number of threads alone).
        threads: numbers of threads.
        only: which part of "match": beginnings of names of cases, or "times".

    Returns:
        `{"suite", "load", "rows"}`; a row has `case`, `threads`, `ms` (median of each candidate)
        and `speedup` (time of each peer over ours), in "match" also `counts`. `load` is the
        machine's load average at the start: other work on the same cores makes times on several
        threads worthless.

    Raises:
        ConfigError: there is no such suite, or it has no parts.
        KernelError: the measuring process failed.
    """
    if suite not in SUITES:
        raise ConfigError(f"the suite {suite!r}", ", ".join(SUITES), "the suite's name")
    if only and suite != MATCH:
        raise ConfigError(f"only={list(only)} of the suite {suite!r}", f"parts of {MATCH!r}",
                          "leave only= out")
    load = os.getloadavg()[0]
    threads = threads[:1] if suite == MATCH else threads
    rows = [row for count in threads for row in _in_own_process(suite, count, *only)]
    return {"suite": suite, "load": load, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """The result of `run` as a table; counts, where there are any, are one of their own."""
    counted = [row for row in result["rows"] if row.get("counts")]
    timed = [row for row in result["rows"] if not row.get("counts")]
    parts = [bench_match.text(counted)] if counted else []
    return "\n".join(parts + ([_times(result | {"rows": timed})] if timed else []))


def _times(result: dict[str, Any]) -> str:
    names = list(dict.fromkeys(name for row in result["rows"] for name in row["ms"]))
    peers = list(dict.fromkeys(name for row in result["rows"] for name in row["speedup"]))
    head = ("case", "threads", *(f"{n} ms" for n in names), *(f"x {p}" for p in peers))
    lines = [(row["case"], str(row["threads"]),
              *(_number(row["ms"].get(n), ".3f") for n in names),
              *(_number(row["speedup"].get(p), ".1f") for p in peers)) for row in result["rows"]]
    return (f"{result['suite']}, medians of interleaved rounds, "
            f"load average {result['load']:.1f} at the start\n{report.table(head, lines)}")


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


def _row(case: str, candidates: Candidates) -> Row:
    """Times of all candidates, and of the others over ours."""
    with torch.inference_mode():
        times = medians(candidates)
    speedup = {name: ms / times[OURS] for name, ms in times.items() if name != OURS}
    return {"case": case, "threads": torch.get_num_threads(), "ms": times, "speedup": speedup}


def _kernels() -> Iterator[Row]:
    for features, outputs in LINEAR_SIZES:
        plain = nn.Linear(features, outputs).eval()
        binary = BinaryLinear(features, outputs, bias=True).eval()
        compiled = optimize(binary, (torch.randn(4, features),))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that its own quantisation will move
            int8 = torch.ao.quantization.quantize_dynamic(
                nn.Sequential(plain), {nn.Linear}, dtype=torch.qint8)
        for rows in LINEAR_ROWS:
            x = torch.randn(rows, features)
            yield _row(f"linear {features} -> {outputs}, {rows} rows",
                       {OURS: partial(compiled, x), "float32": partial(plain, x),
                        "int8": partial(int8, x)})


class _SelfAttention(nn.Module):
    """A BMHA over its own input, without the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = BMHA(WIDTH, WIDTH, HEADS, dropout=0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, need_weights=False)[0]


def _layers() -> Iterator[Row]:
    x = torch.randn(1, TOKENS, WIDTH)
    compiled = optimize(_SelfAttention().eval(), (x,))
    plain = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()
    candidates: Candidates = {OURS: lambda: compiled(x),
                              "eager": lambda: plain(x, x, x, need_weights=False)}
    if compiler() is not None:
        inductor = torch.compile(plain)
        candidates["torch.compile"] = lambda: inductor(x, x, x, need_weights=False)
    yield _row(f"attention {WIDTH}, {HEADS} heads, {TOKENS} tokens", candidates)


def _validate() -> Iterator[Row]:
    """How long the proof of one match takes, for each that isn't shared with another."""
    from bincompile.models import digits

    attention = nn.MultiheadAttention(64, 4, batch_first=True).eval()
    x = torch.randn(2, 10, 64)
    models = {"digits": (digits.build(), *digits.example_inputs()),
              "nn.MultiheadAttention": (attention, (x, x, x), {})}
    for name, (model, args, kwargs) in models.items():
        program = optimize(model, args, kwargs).program
        for match in program.matches:
            if match.evidence is not None and match.evidence.milliseconds:
                yield {"case": f"{name}: {match.operator} {match.path}".rstrip(),
                       "threads": torch.get_num_threads(),
                       "ms": {"proof": match.evidence.milliseconds}, "speedup": {}}


_IMPORT = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import bincompile
print(middle - start, time.perf_counter() - middle)
"""


def _import(processes: int = 7) -> Iterator[Row]:
    """What `import bincompile` costs after `import torch`: medians over processes."""
    found = [subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True,
                            check=True).stdout.split() for _ in range(processes)]
    torchs, ours = (1e3 * statistics.median(map(float, column))
                    for column in zip(*found, strict=True))
    yield {"case": "import", "threads": torch.get_num_threads(),
           "ms": {"torch": torchs, OURS: ours}, "speedup": {}}


MATCH = "match"
SUITES: dict[str, Callable[..., Iterator[Row]]] = {
    "kernels": _kernels, "layers": _layers, "validate": _validate, "import": _import,
    MATCH: bench_match.rows}


def _main(suite: str, threads: str, *only: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(int(threads))
    print(json.dumps(list(SUITES[suite](*only))))


if __name__ == "__main__":
    _main(*sys.argv[1:])
