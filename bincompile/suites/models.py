"""Suite `models`: whole encoders, all binary and exact, with what compiling and holding them costs.

BERT-base is its encoder stack in plain torch modules (`suites/stack.py`), batch 1 of 128 tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from bincompile.api import optimize
from bincompile.compiled import CompiledModel
from bincompile.config import Binary
from bincompile.errors import KernelError, MissingPackageError
from bincompile.models import bert, minilm
from bincompile.passes.capture import capture
from bincompile.profile import Profile
from bincompile.suites.peers import peers
from bincompile.suites.rows import EAGER, OURS, Case, Row, row, timed, times_of
from bincompile.suites.stack import Encoder, encoder

TOKENS, WIDTH = 128, 768
FORMS: dict[str, dict[str, Any]] = {
    "float attention": {}, "1-bit attention": {"attention": "binary", "values": "binary"}}
PLAIN = "float attention"
ONE, TWO = "1 thread", "2 threads"
REPEATS = 20  # calls of a profile


def cases() -> list[Case]:
    """BERT-base in every form, MiniLM as it is, and what compiling BERT-base takes."""
    exact: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
        "bert": (bert.build, (12, 768, 12)), "minilm": (minilm.build, (6, 384, 12))}
    return [Case("bert binary", _binary), Case("bert threads", _threads),
            *(Case(f"{name} exact", partial(_exact, name, *how)) for name, how in exact.items()),
            Case("bert compile", _compile), Case("bert bytes", _bytes),
            Case("bert profile", _profile)]


def all_binary(model: nn.Module, x: torch.Tensor, form: str = PLAIN) -> CompiledModel:
    """The model with every linear of 1 bit, and attention in this form."""
    return optimize(model, (x,), binary=Binary("w1a1", **FORMS[form]), guard=None)


def _binary() -> Iterator[Row]:
    model, x = encoder(), torch.randn(1, TOKENS, WIDTH)
    ours = {form: partial(all_binary(model, x, form), x) for form in FORMS}
    times = times_of(ours | peers(model, x))
    for form in ours:
        yield row(f"bert binary, {form}", times, ours=form, others=set(ours) - {form})


def _on(threads: int, call: Callable[[], Any]) -> None:
    torch.set_num_threads(threads)
    call()


def _threads() -> Iterator[Row]:
    """One and two threads in turn, in one process."""
    before, x = torch.get_num_threads(), torch.randn(1, TOKENS, WIDTH)
    for form in FORMS:
        call = partial(all_binary(encoder(), x, form), x)
        try:
            times = times_of({ONE: partial(_on, 1, call), TWO: partial(_on, 2, call)})
        finally:
            torch.set_num_threads(before)
        yield row(f"bert threads, {form}", {OURS: times[TWO], ONE: times[ONE]})


def _exact(name: str, build: Callable[[], nn.Module], shape: tuple[int, int, int]) -> Iterator[Row]:
    """transformers' model of this shape, or where it is not installed the plain stack."""
    try:
        model, x = build(), torch.randint(1000, 30000, (1, TOKENS))
    except MissingPackageError:
        model, x = encoder(*shape), torch.randn(1, TOKENS, shape[1])
    compiled = optimize(model, (x,))
    yield timed(f"{name} exact", {OURS: partial(compiled, x),
                                  **peers(model, x, half=False, int8=False)})


def _compile() -> Iterator[Row]:
    """Seconds of a fresh process: the capture alone, then with an empty and with a full cache."""
    with tempfile.TemporaryDirectory(prefix="bincompile-") as folder:
        seconds = {what: _seconds(what, folder) for what in ("capture", "cold", "warm")}
    yield row("bert compile", {OURS: 1e3 * seconds["cold"]},
              values={**{f"{what}_s": found for what, found in seconds.items()},
                      "warm_over_capture_s": seconds["warm"] - seconds["capture"]})


def _seconds(what: str, folder: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import seconds; seconds({what!r})"],
        env=os.environ | {"BINCOMPILE_CACHE_DIR": folder, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True)
    if done.returncode:
        raise KernelError(f"compiling BERT-base failed: {done.stderr.strip()[-500:]}",
                          "a process that compiles and ends", "what the message names")
    return json.loads(done.stdout.splitlines()[-1])


def seconds(what: str) -> None:
    """Print how long the capture of BERT-base's stack takes, or all of `optimize`."""
    model, x = encoder(), torch.randn(1, TOKENS, WIDTH)
    torch.set_num_threads(os.cpu_count() or 1)
    start = time.perf_counter()
    if what == "capture":
        capture(model, (x,), {}, "auto")
    else:
        all_binary(model, x)
    print(json.dumps(time.perf_counter() - start))


def _bytes() -> Iterator[Row]:
    """What the compiled model holds, with its look-up tables, over the bytes of the weights."""
    model, x = Encoder().eval(), torch.randint(1000, 30000, (1, TOKENS))
    weights = sum(p.nbytes for p in model.parameters())
    compiled = all_binary(model, x)
    yield timed("bert bytes", {OURS: partial(compiled, x), EAGER: partial(model, x)},
                {"weights": weights, "held": compiled.nbytes,
                 "held_share": compiled.nbytes / weights})


def _profile() -> Iterator[Row]:
    """Where the time of a call goes, by operator; peers have no part in it."""
    model, x = encoder(), torch.randn(1, TOKENS, WIDTH)
    for form in FORMS:
        found = all_binary(model, x, form).explain((x,), repeats=REPEATS)
        assert isinstance(found, Profile)
        for operator, spent in {"all": found.microseconds, **found.by_operator}.items():
            yield row(f"bert profile, {form}: {operator}", {OURS: spent / 1e3})
