"""The libraries of csrc: where they are, and how kernels get the thread shim.

A kernel that is linked carries the shim in itself. A kernel that TVM compiles in this process takes
the one that was registered last, so `share_threads` registers ours after TVM's own.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import bincompile
from bincompile.errors import KernelError
from bincompile.runtime.cache import cached, digest

SOURCE = "csrc/openmp_shim.c"
LIBRARY = "lib/libbincompile_openmp.so"
REPLAY, REPLAY_LIBRARY = "csrc/replay.c", "lib/libbincompile_replay.so"
FLAGS = ("-O2", "-fPIC", "-fopenmp", "-shared")
COMPILERS = ("gcc", "cc", "g++", "clang")


def compiler() -> str | None:
    """Path of a C compiler: `CC` of the environment, else the first that is installed."""
    chosen = os.environ.get("CC")
    found = (shutil.which(name) for name in ((chosen,) if chosen else COMPILERS))
    return next(filter(None, found), None)


def shim_source() -> Path:
    """The shim's source, in the installed package or in a checkout."""
    found = _find(SOURCE)
    if found is None:
        raise KernelError(f"no {SOURCE} beside bincompile", "an installation with its csrc folder",
                          "the installation: pip install --force-reinstall bincompile")
    return found


def link(output: str | Path, inputs: Iterable[str | Path]) -> None:
    """Link objects and sources to a shared library that carries the shim."""
    _make(output, [*inputs, shim_source()])


def _make(output: str | Path, inputs: Iterable[str | Path]) -> None:
    program = compiler()
    if program is None:
        raise KernelError("no C compiler", ", ".join(COMPILERS),
                          "install one, or set CC to its path")
    command = [program, *FLAGS, *map(str, inputs), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise KernelError(f"{program} failed: {done.stderr.strip()[-500:]}",
                          "a C compiler with OpenMP", "the compiler, or set CC to another")


@functools.cache
def shim_library() -> Path | None:
    """The shim as a library: prebuilt, else compiled, into the cache where it can be written.

    None if there is no C compiler either.
    """
    return _library(LIBRARY, SOURCE)


@functools.cache
def replay_library() -> Path | None:
    """The library of recorded steps, found or made like the shim."""
    return _library(REPLAY_LIBRARY, REPLAY)


def _library(prebuilt: str, source: str) -> Path | None:
    found, text, program = _find(prebuilt), _find(source), compiler()
    if found is not None:
        return found
    if program is None or text is None:
        return None
    name = f"{text.stem}-{digest(text.read_text(), program, *FLAGS)}.so"
    try:
        return cached(name, lambda path: _make(path, [text]))
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="bincompile-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        _make(folder / name, [text])
        return folder / name


def share_threads() -> bool:
    """Make kernels that are loaded from now on use torch's threads; False if there is no shim."""
    path = shim_library()
    if path is None:
        return False
    from tvm_ffi.libinfo import find_libtvm_ffi

    register = ctypes.CDLL(find_libtvm_ffi()).TVMFFIEnvModRegisterContextSymbol
    if ctypes.CDLL(str(path)).bincompile_register_openmp(ctypes.cast(register, ctypes.c_void_p)):
        raise KernelError(f"tvm-ffi refused the functions of {path}", "a tvm-ffi that accepts them",
                          "the version of apache-tvm-ffi")
    return True


def _find(name: str) -> Path | None:
    """A file beside the package's modules: folders of the package, or of the checkout."""
    places = (Path(folder) / name for folder in bincompile.__path__)
    return next((path for path in places if path.is_file()), None)
