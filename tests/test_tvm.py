"""Compiling: what a name depends on, many kernels at once, and a process that is not held up."""

from __future__ import annotations

import ast
import importlib.resources
import logging
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bincompile.config import Target
from bincompile.errors import KernelError
from bincompile.ops import OPERATORS
from bincompile.runtime import tvm
from bincompile.runtime.kernels import Call, Dynamic, kernels_of
from bincompile.runtime.recording import recording
from bincompile.runtime.tvm import Recipe, load, prepare

HOST = Target.host()
SCHEDULES = importlib.resources.files("bincompile.runtime.schedules")
NAMES = sorted(Path(str(f)).stem for f in SCHEDULES.iterdir() if str(f).endswith(".py"))
LINEAR = {"bias": False, "shift": False, "row_scale": True}


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own, and a process that has loaded nothing."""
    monkeypatch.setenv("BINCOMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tvm, "_loaded", {})
    yield tmp_path


def linears(*sizes: int) -> list[Recipe]:
    return [Recipe("w1a1_linear", {"features": n, "outputs": 64} | LINEAR) for n in sizes]


@pytest.mark.parametrize("schedule", NAMES)
def test_a_schedule_imports_only_schedules_so_that_its_name_covers_it(schedule: str) -> None:
    nodes = [n for n in ast.walk(ast.parse((SCHEDULES / f"{schedule}.py").read_text()))
             if isinstance(n, ast.Import | ast.ImportFrom)]
    modules = [alias.name for node in nodes if isinstance(node, ast.Import)
               for alias in node.names]
    modules += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    own = [m for m in modules if m.split(".")[0] == "bincompile"]
    assert all(m.startswith("bincompile.runtime.schedules") for m in own), own
    imported = set(tvm._imported((SCHEDULES / f"{schedule}.py").read_text()))
    assert imported <= set(NAMES) and len(imported) >= len(set(own))


def test_a_name_follows_schedules_that_schedules_import(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"top": "from bincompile.runtime.schedules.middle import a",
             "middle": "from bincompile.runtime.schedules import low\n"
                       "import bincompile.runtime.schedules.top",
             "low": "value = 1", "other": "value = 2"}
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(tvm.importlib.resources, "files", lambda package: tmp_path)

    def name_now() -> str:
        tvm._sources.cache_clear()
        return Recipe("top", {}).file_name(HOST)

    first = name_now()
    (tmp_path / "other.py").write_text("value = 3")
    assert name_now() == first
    (tmp_path / "low.py").write_text("value = 3")
    assert name_now() != first
    monkeypatch.undo()
    tvm._sources.cache_clear()


def test_kernels_are_compiled_once_each_and_stay_loaded(empty_cache: Path) -> None:
    recipes = linears(32, 64, 32, 96)
    prepare(recipes, HOST)
    files = sorted(empty_cache.glob("*.so"))
    assert [f.name for f in files] == sorted({r.file_name(HOST) for r in recipes})
    assert set(tvm._loaded) == {f.name for f in files}
    modules = [load(recipe, HOST) for recipe in recipes]
    assert modules[0] is modules[2] and modules[0] is not modules[1]


def test_what_compiles_for_over_a_second_is_said(
        empty_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
        capsys: pytest.CaptureFixture[str]) -> None:
    caplog.set_level(logging.INFO, "bincompile.runtime.tvm")
    monkeypatch.setattr(tvm, "_PATIENCE", 600.0)
    prepare(linears(33), HOST)
    assert not caplog.messages
    monkeypatch.setattr(tvm, "_PATIENCE", 0.001)
    prepare(linears(34, 35), HOST)
    assert caplog.messages[-1].startswith("compiled 2 of 2 kernels")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    prepare(linears(36), HOST)
    said = capsys.readouterr().err
    assert said.startswith("\rbincompile: compiled 0 of 1 kernels, ")
    assert re.search(r"\rbincompile: compiled 1 of 1 kernels, \d+ s\n$", said)


def test_a_kernel_that_does_not_compile_is_an_error_not_a_hang(empty_cache: Path) -> None:
    wrong = Recipe("w1a1_linear", {"features": 32})
    with pytest.raises(KernelError, match="TVM failed on"):
        prepare([*linears(128), wrong], HOST)


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_the_executor_knows_what_a_kernel_compiles(operator: str) -> None:
    for kernel in kernels_of(operator):
        assert (kernel.recipe is not None) == kernel.name.startswith("tvm-"), kernel.name


def test_other_threads_run_while_a_kernel_does() -> None:
    operator, x = OPERATORS["binary_linear"], torch.randn(200_000, 64)
    given = operator.bind((Dynamic(x), torch.zeros(64, 8, dtype=torch.uint8), torch.ones(64),
                           None, 64), {})
    kernel = next(k for k in kernels_of("binary_linear") if k.name == "tvm-w1a1")
    with recording() as calls:
        kernel.bind(Call(operator, given, HOST))(x)
    (function, arguments, _), = calls
    assert function.release_gil
    steps, stop = [0], threading.Event()

    def count() -> None:
        while not stop.wait(1e-4):
            steps[0] += 1

    before = sys.getswitchinterval()
    sys.setswitchinterval(100.0)  # whoever holds the lock keeps it until he waits
    thread = threading.Thread(target=count)
    try:
        thread.start()
        began = steps[0]
        for _ in range(1000):  # a busy machine may not let it in within one call
            function(*arguments)
            if steps[0] > began:
                break
        assert steps[0] > began
    finally:
        stop.set()
        sys.setswitchinterval(before)
        thread.join()
