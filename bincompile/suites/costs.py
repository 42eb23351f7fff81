"""Suites `validate` and `import`: what a proof costs, and what the import of the package does."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from bincompile.api import optimize
from bincompile.models import digits
from bincompile.suites.rows import OURS, Case, Row, row

PROCESSES = 7
PROOF, TORCH = "proof", "torch"

IMPORT = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import bincompile
print(middle - start, time.perf_counter() - middle)
"""


def proofs() -> list[Case]:
    """How long the proof of a match takes, for each that isn't shared with another."""
    attention = nn.MultiheadAttention(64, 4, batch_first=True).eval()
    x = torch.randn(2, 10, 64)
    models = {"digits": (digits.build, digits.example_inputs),
              "nn.MultiheadAttention": (lambda: attention, lambda: ((x, x, x), {}))}
    return [Case(name, partial(_proofs, name, *how)) for name, how in models.items()]


def _proofs(name: str, build: Any, inputs: Any) -> Iterator[Row]:
    args, kwargs = inputs()
    for match in optimize(build(), args, kwargs).program.matches:
        if match.evidence is not None and match.evidence.milliseconds:
            yield {"case": f"{name}: {match.operator} {match.path}".rstrip(),
                   "threads": torch.get_num_threads(),
                   "ms": {PROOF: match.evidence.milliseconds}, "speedup": {}, "share": {},
                   "values": {}}


def imports() -> list[Case]:
    """What `import bincompile` costs after `import torch`."""
    return [Case("import", _import)]


def _import() -> Iterator[Row]:
    """Medians over processes."""
    found = [subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True,
                            check=True).stdout.split() for _ in range(PROCESSES)]
    torchs, ours = (1e3 * statistics.median(map(float, column))
                    for column in zip(*found, strict=True))
    yield row("import", {TORCH: torchs, OURS: ours}) | {"speedup": {}}
