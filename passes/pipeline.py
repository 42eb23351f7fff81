"""The pipeline as a table: every stage is a function from program to program."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from bincompile.passes.fuse import fuse
from bincompile.passes.lower import lower
from bincompile.passes.matching import canonicalise, match, prove
from bincompile.passes.normalise import normalise
from bincompile.passes.pack import pack
from bincompile.passes.patterns import registered
from bincompile.passes.specialise import specialise
from bincompile.program import Program

log = logging.getLogger(__name__)

Stage = tuple[str, Callable[[Program], Program]]

EXACT: tuple[Stage, ...] = (
    ("normalise", normalise),
    ("match", match),
    ("validate", prove),
    ("canonicalise", canonicalise),
    ("specialise", specialise),
    ("pack", pack),
)
LOWER: tuple[Stage, ...] = (("fuse", fuse), ("lower", lower))


def run(stages: tuple[Stage, ...], program: Program) -> Program:
    """The program after these stages; all of them see the same patterns."""
    with registered():
        for name, stage in stages:
            start = time.perf_counter()
            program = stage(program)
            log.info("%s: %d nodes, %.0f ms", name, len(program.graph.nodes),
                     (time.perf_counter() - start) * 1e3)
    return program
