"""Compiles schedules with TVM and keeps the result, so that a warm process never imports TVM."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.resources
import sys
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bincompile.config import INSTRUCTION_SETS, Target, cache_dir
from bincompile.errors import KernelError
from bincompile.runtime import native
from bincompile.runtime.cache import cached, digest, is_intact

_SCHEDULES = "bincompile.runtime.schedules"
_lock = threading.Lock()
_loaded: dict[str, Any] = {}


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
    """The text of a schedule and of what it shares."""
    folder = importlib.resources.files(_SCHEDULES)
    return "".join((folder / f"{name}.py").read_text() for name in (schedule, "common"))


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
    with _lock:
        name = recipe.file_name(target)
        if name not in _loaded:
            _loaded[name] = _from_cache(recipe, target, name)
        return _loaded[name]


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
    return tvm_ffi.load_module(str(path))


def _compile(recipe: Recipe, target: Target) -> Any:
    import tvm

    schedule = importlib.import_module(f"{_SCHEDULES}.{recipe.schedule}")
    try:
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
    return compiled.jit()
