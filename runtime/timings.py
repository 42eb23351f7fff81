"""Times of kernels on this machine, measured once and kept: what a choice by measurement reads.

The table has one small file for each question in the folder of compiled kernels; a damaged file is
measured again. `BINCOMPILE_MEASURE=0` measures and reads nothing: the first kernel that accepts a
call is taken, and no rewrite is dropped for its speed.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from bincompile.config import Target, cache_dir
from bincompile.errors import ConfigError
from bincompile.runtime.cache import cached, digest, intact
from bincompile.runtime.kernels import Call, Dynamic, parts_of

log = logging.getLogger(__name__)

SWITCH = "BINCOMPILE_MEASURE"
MARGIN = 1.1  # what is slower than another by no more than this is kept
ROUNDS, FEWEST, SECONDS = 9, 5, 0.02  # of one candidate, about
HOPELESS = 4.0  # one that takes so many times longer, and over SECONDS, is not called again
SMALLEST = 1 << 16  # numbers in all tensors of a call, below which nothing is measured

Times = dict[str, float]  # milliseconds of each candidate
Clock = Callable[[], float]
Numbers = Mapping[str, int]  # a size for each symbol
NONE: Numbers = {}
UNKNOWN = 2  # a size that is known at run time only
_known: dict[str, Times] = {}


def enabled() -> bool:
    """Whether choices are measured in this process.

    Raises:
        ConfigError: `BINCOMPILE_MEASURE` is neither 0 nor 1.
    """
    switch = os.environ.get(SWITCH, "1")
    if switch not in ("0", "1"):
        raise ConfigError(f"{SWITCH}={switch!r}", "0 or 1", f"the environment variable {SWITCH}")
    return switch == "1"


def interleaved(candidates: Mapping[str, Callable[[], Any]],
                clock: Clock = time.perf_counter) -> Times:
    """Milliseconds of one call of each candidate: the least of rounds that call each in turn.

    Other work on the machine only adds time, so that the least is the steadiest.

    Example:
        >>> sorted(interleaved({"sum": lambda: sum(range(9)), "pass": lambda: None}))
        ['pass', 'sum']
    """
    def once(call: Callable[[], Any], repeats: int = 1) -> float:
        start = clock()
        for _ in range(repeats):
            call()
        return (clock() - start) / repeats

    warm = {name: once(call) for name, call in candidates.items()}
    dear = max(SECONDS, HOPELESS * min(warm.values()))
    rest = {name: call for name, call in candidates.items() if warm[name] <= dear}
    single = {name: max(once(call), 1e-7) for name, call in rest.items()}
    rounds = min(ROUNDS, max(FEWEST, int(SECONDS / max(single.values()))))
    repeats = {name: max(1, int(SECONDS / rounds / found)) for name, found in single.items()}
    times: dict[str, list[float]] = {name: [] for name in rest}
    for _ in range(rounds):
        for name, call in rest.items():
            times[name].append(once(call, repeats[name]))
    return {name: 1e3 * min(times.get(name, [warm[name]])) for name in candidates}


def table(question: str, names: Iterable[str],
          measure: Callable[[], Times]) -> Times:
    """The times of these candidates: as known, or else as `measure` gives them, which is kept.

    Args:
        question: what is timed: operator, class of shapes, instruction set, threads.
        names: the candidates.
        measure: times all of them.
    """
    key = json.dumps([question, sorted(names), _machine()])
    if key not in _known:
        _known[key] = _kept(key, measure)
    return _known[key]


def known(question: str, names: Iterable[str]) -> bool:
    """Whether `table` has an answer without measuring."""
    key = json.dumps([question, sorted(names), _machine()])
    return key in _known or _read(cache_dir() / _file(key), key) is not None


def faster(times: Mapping[str, float], first: str) -> str:
    """The first candidate, unless another one takes so much less time that it is taken instead.

    Example:
        >>> faster({"ours": 1.05, "torch": 1.0}, "ours")
        'ours'
        >>> faster({"ours": 1.15, "torch": 1.0}, "ours")
        'torch'
    """
    best = min(times, key=lambda name: (times[name], name))
    return best if times[first] > MARGIN * times[best] else first


def _kept(key: str, measure: Callable[[], Times]) -> Times:
    found: list[Times] = []

    def make(path: Path) -> None:
        found.append(measure())
        path.write_text(json.dumps({"key": key, "ms": found[0]}))

    name = _file(key)
    if (times := _read(cache_dir() / name, key)) is not None:
        return times
    try:
        (cache_dir() / name).unlink(missing_ok=True)  # whole, but not an answer to this question
        path = cached(name, make)
    except OSError as error:
        log.info("times are not kept: %s", error)
        return found[0] if found else measure()
    if found:
        return found[0]
    times = _read(path, key)  # another process measured meanwhile
    return measure() if times is None else times


def _file(key: str) -> str:
    return f"timing-{digest(key)}.json"


def _read(path: Path, key: str) -> Times | None:
    """What a file says of this question; None where there is none, or it is not such a file."""
    content = intact(path)
    if content is None:
        return None
    try:
        document = json.loads(content)
        names = json.loads(key)[1]
        times = {name: float(document["ms"][name]) for name in names}
        good = document["key"] == key and all(0 < t < math.inf for t in times.values())
    except (ValueError, KeyError, TypeError):
        return None
    return times if good else None


def question(call: Call, numbers: Numbers = NONE) -> str:
    """The operator, the class of its shapes, and what else its speed depends on.

    Args:
        call: what is timed.
        numbers: the sizes that its symbolic ones stand for.
    """
    arguments = {name: _shown(argument, numbers) for name, argument in call.arguments.items()}
    return f"{call.operator.name} {arguments} on {context(call.target)}"


def context(target: Target) -> str:
    """The instruction set and the number of threads."""
    return f"{target}, {torch.get_num_threads()} threads"


def _shown(argument: Any, numbers: Numbers) -> str:
    if isinstance(argument, list | tuple):
        return f"[{', '.join(_shown(part, numbers) for part in argument)}]"
    if isinstance(argument, Dynamic):
        value = argument.value
        return f"~{shape_class(value, numbers)}" if isinstance(value, torch.Tensor) else "~"
    if isinstance(argument, torch.Tensor):
        return f"{argument.dtype}{list(argument.shape)}"
    return repr(argument)


def shape_class(value: torch.Tensor, numbers: Numbers = NONE) -> str:
    """Dtype and shape, all but the last size rounded up to a power of two.

    Example:
        >>> shape_class(torch.empty(3, 100, 64))
        'torch.float32[4, 128, 64]'
    """
    *lead, last = sizes(value, numbers) or [1]
    return f"{value.dtype}{[*(1 << max(0, size - 1).bit_length() for size in lead), last]}"


def sizes(value: torch.Tensor, numbers: Numbers = NONE) -> list[int]:
    """The sizes of a tensor; symbolic ones with these numbers, or as they were captured.

    Those of a program that was loaded are texts.
    """
    return [size if isinstance(size, int) else _number(size, numbers) for size in value.shape]


def _number(size: Any, numbers: Numbers) -> int:
    if isinstance(size, str):
        return numbers.get(size, int(size) if size.isdecimal() else UNKNOWN)
    given = {symbol: numbers.get(str(symbol)) for symbol in size.node.expr.free_symbols}
    if None in given.values():
        return int(size.node.hint)
    return int(size.node.expr.xreplace(given))


def is_small(call: Call, numbers: Numbers = NONE) -> bool:
    """Whether a call is too small to be worth measuring."""
    tensors = [part.value if isinstance(part, Dynamic) else part
               for argument in call.arguments.values() for part in parts_of(argument)]
    return sum(math.prod(sizes(t, numbers)) for t in tensors
               if isinstance(t, torch.Tensor)) < SMALLEST


@functools.cache
def _machine() -> list[str]:
    """What else times depend on: the processor, torch, and the kernels' own sources."""
    folder = importlib.resources.files("bincompile.runtime")
    parts = (folder, folder / "library", folder / "schedules")
    sources = (entry.read_text() for part in parts
               for entry in sorted(part.iterdir(), key=lambda e: e.name)
               if entry.name.endswith(".py"))
    return [_processor(), torch.__version__, digest(*sources)]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines
                 if line.startswith("model name")), platform.machine())
