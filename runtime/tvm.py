"""Compiles schedules with TVM and keeps the result, so that a warm process never imports TVM."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.resources
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from bincompile.config import INSTRUCTION_SETS, Target, cache_dir
from bincompile.errors import KernelError
from bincompile.runtime import native
from bincompile.runtime.cache import cached, digest, is_intact
from bincompile.runtime.recording import Functions

_SCHEDULES = "bincompile.runtime.schedules"
_PATIENCE = 1.0  # seconds after which the user is told what he waits for
_loaded: dict[str, Any] = {}
_locks: dict[str, threading.Lock] = {}
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What to compile: a file of `runtime/schedules/` and the parameters of its `build`."""

    schedule: str
    parameters: Mapping[str, Any]

    def file_name(self, target: Target) -> str:
        """The name of the compiled library: a hash of everything that it depends on."""
        key = digest(_sources(self.schedule), _tools(), repr(target.instructions),
                     *(f"{name}={value!r}" for name, value in sorted(self.parameters.items())))
        return f"{self.schedule}-{key}.so"


@functools.cache
def _sources(schedule: str) -> str:
    """The text of a schedule and of every schedule that it imports, itself or through others."""
    folder = importlib.resources.files(_SCHEDULES)
    texts: dict[str, str] = {}
    waiting = [schedule]
    while waiting:
        name = waiting.pop()
        if name not in texts:
            texts[name] = (folder / f"{name}.py").read_text()
            waiting += _imported(texts[name])
    return "".join(text for _, text in sorted(texts.items()))


def _imported(text: str) -> Iterator[str]:
    """Names of the schedules that the text of one imports."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module == _SCHEDULES:
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [
                alias.name for alias in node.names]
            yield from (module.removeprefix(f"{_SCHEDULES}.") for module in modules
                        if module.startswith(f"{_SCHEDULES}."))


@functools.cache
def _tools() -> str:
    """What else a compiled library depends on, found without importing TVM."""
    versions = tuple(map(_version, ("apache-tvm", "apache-tvm-ffi")))
    return repr((versions, native.shim_source().read_text(), native.FLAGS))


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


@functools.cache
def _import_error() -> str | None:
    """Why TVM can't be imported, if it can't; said once as a warning."""
    try:
        importlib.import_module("tvm")
    except (ImportError, OSError, RuntimeError) as error:
        _warn(f"TVM can't be imported ({error}): slower kernels run instead. "
              f"Reinstall apache-tvm to compile faster ones.")
        return str(error)
    return None


@functools.cache
def _warn(text: str) -> None:
    """Warn; the same text only once in a process."""
    warnings.warn(text, RuntimeWarning, stacklevel=2)


def obstacle(recipe: Recipe, target: Target) -> str | None:
    """Why this can't be had as a compiled kernel, if it can't."""
    if target.kind != "cpu" or not target.processor:
        return f"no instruction set to compile for: the target is {target}"
    name = recipe.file_name(target)
    if name in _loaded or is_intact(cache_dir() / name):
        return None
    error = _import_error()
    return error and f"it is not in the cache, and TVM can't be imported: {error}"


def load(recipe: Recipe, target: Target) -> Any:
    """The module with the compiled functions, from the cache where it is there.

    Raises:
        KernelError: TVM, the C compiler or the loader refused it.
    """
    name = recipe.file_name(target)
    if name not in _loaded:
        with _locks.setdefault(name, threading.Lock()):
            if name not in _loaded:
                _loaded[name] = _from_cache(recipe, target, name)
    return _loaded[name]


def prepare(recipes: Iterable[Recipe], target: Target) -> None:
    """Compile what is not in the cache yet, on every core; say so if it takes over a second.

    Raises:
        KernelError: TVM, the C compiler or the loader refused one.
    """
    wanted = {recipe.file_name(target): recipe for recipe in recipes}
    missing = [recipe for name, recipe in wanted.items()
               if name not in _loaded and not is_intact(cache_dir() / name)]
    if not missing:
        return
    with ThreadPoolExecutor(min(len(missing), os.cpu_count() or 1)) as pool:
        tasks = [pool.submit(load, recipe, target) for recipe in missing]
        try:
            _watch(tasks)
        finally:
            pool.shutdown(cancel_futures=True)


def _watch(tasks: list[Future[Any]]) -> None:
    """Wait for the tasks, and raise what one of them raised."""
    begin, shown = time.monotonic(), False
    waiting = set(tasks)
    while waiting:
        done, waiting = wait(waiting, _PATIENCE, FIRST_EXCEPTION)
        for task in done:
            task.result()
        if waiting or shown:
            shown = True
            _say(f"compiled {len(tasks) - len(waiting)} of {len(tasks)} kernels, "
                 f"{time.monotonic() - begin:.0f} s", last=not waiting)


def _say(text: str, last: bool) -> None:
    """One line that is written over on a terminal, log records elsewhere."""
    if sys.stderr is not None and sys.stderr.isatty():
        print(f"\rbincompile: {text}", end="\n" if last else "", file=sys.stderr, flush=True)
    else:
        log.info(text)


def _from_cache(recipe: Recipe, target: Target, name: str) -> Any:
    path = cache_dir() / name
    if is_intact(path):
        return _open(path)
    if native.compiler() is None:
        return _just_in_time(recipe, target, "no C compiler is installed")
    try:
        return _open(cached(name, lambda fresh: _export(recipe, target, fresh)))
    except OSError as error:
        return _just_in_time(recipe, target, f"the cache can't be written ({error})")


def _open(path: Path) -> Any:
    import tvm_ffi

    if "tvm" in sys.modules:  # its threads are registered, and would win over the library's own
        native.share_threads()
    return Functions(tvm_ffi.load_module(str(path)))


def _compile(recipe: Recipe, target: Target) -> Any:
    import tvm

    schedule = importlib.import_module(f"{_SCHEDULES}.{recipe.schedule}")
    try:
        with tvm.transform.PassContext(disabled_pass=list(getattr(schedule, "SKIPPED", ()))):
            return tvm.compile(schedule.build(**recipe.parameters), target=llvm_target(target))
    except Exception as error:
        raise KernelError(f"TVM failed on {recipe}: {error}", "a schedule that TVM compiles",
                          f"run with another kernel, and report this with {target}") from error


def llvm_target(target: Target) -> Any:
    """The target as TVM's LLVM code generator takes it."""
    import tvm

    isa = target.instructions
    if isa is None:
        raise KernelError(f"no instruction set: the target is {target}",
                          ", ".join(found.name for found in INSTRUCTION_SETS), "the target")
    options = {"kind": "llvm", "mtriple": isa.triple, "mcpu": isa.processor}
    return tvm.target.Target(options | ({"mattr": list(isa.adds)} if isa.adds else {}))


def _export(recipe: Recipe, target: Target, path: Path) -> None:
    def link(output: str, objects: list[str], **_: Any) -> None:
        native.link(output, objects)

    _compile(recipe, target).export_library(str(path), fcompile=link)


def _just_in_time(recipe: Recipe, target: Target, reason: str) -> Any:
    compiled = _compile(recipe, target)
    shared = native.share_threads()
    _warn(f"{reason}: kernels are compiled anew in every process"
          f"{'' if shared else ', with threads of their own'}.")
    return Functions(compiled.jit())
