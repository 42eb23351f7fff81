"""Kernels of the runtime run by csrc/selftest.c: emulated, under sanitizers, at guard pages.

`Machine.load` stands in for `bincompile.runtime.tvm.load`: the functions of the module that it
returns write their arguments to a file, run the C program, and read back what it left.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tvm_ffi

from bincompile.config import Target
from bincompile.runtime import native, tvm
from bincompile.runtime.tvm import Recipe

SELFTEST = native.shim_source().with_name("selftest.c")
INCLUDES = [f"-I{Path(tvm_ffi.__file__).parent / 'include'}"]
CODES = {"i": 0, "u": 1, "f": 2, "b": 6}
MOST_SECONDS = 300
STORED_ALIGNMENT = 64  # what a bound kernel holds is aligned, what it is given need not be


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where kernels run.

    Args:
        name: what to call it.
        isa: the instruction set to compile for.
        compiler: C compiler with its options.
        runner: what the program is given to, if it does not run by itself.
        sides: where tensors lie: 1 with a guard page behind, 0 with one before.
        environment: variables for the program.
    """

    name: str
    isa: str
    compiler: tuple[str, ...] = ("gcc",)
    runner: tuple[str, ...] = ()
    sides: tuple[int, ...] = (1, 0)
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def target(self) -> Target:
        """What kernels are compiled for."""
        return Target("cpu", self.isa)

    def missing(self) -> str | None:
        """A program that this needs and the host lacks."""
        needed = (self.compiler[0], *self.runner[:1])
        missing = next((name for name in needed if shutil.which(name) is None), None)
        return missing or (None if _has_openmp(self.compiler) else f"{self.compiler[0]}'s OpenMP")

    def build(self, folder: Path) -> Path:
        """The C program; the shim is linked into it, too."""
        program = folder / "selftest"
        if not program.exists():
            command([*self.compiler, "-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror",
                     "-fopenmp", "-rdynamic", *INCLUDES, str(SELFTEST),
                     str(native.shim_source()), "-o", str(program), "-ldl", "-lpthread"])
        return program

    def run(self, program: Path, *arguments: str | Path) -> str:
        """What the program prints; it has to end well and say nothing of errors."""
        done = subprocess.run([*self.runner, str(program), *map(str, arguments)], text=True,
                              capture_output=True, env=os.environ | dict(self.environment),
                              timeout=MOST_SECONDS)
        assert done.returncode == 0, f"{self.name}: {done.returncode}\n{done.stderr[-3000:]}"
        return done.stdout

    def load(self, folder: Path, recipe: Recipe, target: Target) -> Module:
        """The compiled functions, to be run here; in place of `tvm.load`."""
        library = folder / recipe.file_name(target)
        if not library.exists():
            self.link(tvm._compile(recipe, target), library)
        return Module(self, folder, library)

    def link(self, compiled: Any, library: Path) -> None:
        """Make a library of what TVM compiled, without the shim: the C program has it."""
        def run(output: str, objects: Sequence[str], **_: Any) -> None:
            command([*self.compiler, "-shared", *objects, "-o", output])

        compiled.export_library(str(library), fcompile=run)


def command(words: Sequence[str]) -> None:
    """Run a compiler."""
    done = subprocess.run(words, text=True, capture_output=True)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stderr[-3000:]}"


@functools.cache
def _has_openmp(compiler: tuple[str, ...]) -> bool:
    done = subprocess.run([*compiler, "-fopenmp", "-x", "c", "-E", "-"], text=True,
                          input="#include <omp.h>", capture_output=True)
    return done.returncode == 0


_numbers = itertools.count()


@dataclasses.dataclass(frozen=True)
class Module:
    """A kernel library whose functions run on a machine."""

    machine: Machine
    folder: Path
    library: Path

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return functools.partial(self._call, name)

    def _call(self, name: str, *arguments: Any) -> int:
        results = [self._once(name, arguments, side) for side in self.machine.sides]
        for returned, found in results:
            assert returned == results[0][0] and found == results[0][1], f"{self.library}: {name}"
        returned, found = results[0]
        for argument, content in zip(filter(is_tensor, arguments), found, strict=True):
            if isinstance(argument, torch.Tensor):
                write(argument, content)
            else:
                assert data(argument) == content, f"{name} wrote to what is stored"
        return returned

    def _once(self, name: str, arguments: Sequence[Any], side: int) -> tuple[int, list[bytes]]:
        number = next(_numbers)
        call, result = self.folder / f"{number}.call", self.folder / f"{number}.result"
        texts = [struct.pack("q", len(name)), name.encode(), struct.pack("q", len(arguments))]
        call.write_bytes(b"".join(texts + [encoded(a, side) for a in arguments]))
        self.machine.run(self.machine.build(self.folder), "run", self.library, call, result)
        content = result.read_bytes()
        call.unlink()
        result.unlink()
        (returned,), at, found = struct.unpack_from("q", content), 8, []
        for argument in filter(is_tensor, arguments):
            size = len(data(argument))
            found.append(content[at:at + size])
            at += size
        assert at == len(content)
        return returned, found


def is_tensor(argument: Any) -> bool:
    """Whether the C program writes it back."""
    return isinstance(argument, torch.Tensor | tvm_ffi.Tensor)


def elements(argument: Any) -> torch.Tensor:
    """All that lies between a tensor's first and last element, in a row."""
    value = argument if isinstance(argument, torch.Tensor) else torch.from_dlpack(argument)
    extent = 1 + sum((size - 1) * step for size, step in
                     zip(value.shape, value.stride(), strict=True))
    return value.as_strided((extent if value.numel() else 0,), (1,))


def data(argument: Any) -> bytes:
    """The bytes of a tensor."""
    return elements(argument).view(torch.uint8).numpy().tobytes()


def write(tensor: torch.Tensor, content: bytes) -> None:
    """Put the bytes of a tensor back."""
    if content:
        fresh = torch.from_numpy(np.frombuffer(content, np.uint8).copy())
        elements(tensor).view(torch.uint8).copy_(fresh)


def encoded(argument: Any, side: int) -> bytes:
    """An argument as the C program reads it."""
    if argument is None:
        return b"n"
    if isinstance(argument, bool | int):
        return b"i" + struct.pack("q", argument)
    if isinstance(argument, float):
        return b"f" + struct.pack("d", argument)
    content = data(argument)
    value = argument if isinstance(argument, torch.Tensor) else torch.from_dlpack(argument)
    kind = np.dtype(str(value.dtype).removeprefix("torch."))
    alignment = kind.itemsize if isinstance(argument, torch.Tensor) else STORED_ALIGNMENT
    return b"t" + struct.pack(
        f"{6 + 2 * value.ndim}q", CODES[kind.kind], kind.itemsize * 8, value.ndim, *value.shape,
        *value.stride(), side, alignment, len(content)) + content
