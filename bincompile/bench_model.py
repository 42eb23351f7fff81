"""Times of one model: as it is against compiled, or a saved one on inputs of its signature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bincompile.api import optimize
from bincompile.artifact import load
from bincompile.errors import ConfigError
from bincompile.report import table
from bincompile.signature import InputSpec, Signature
from bincompile.source import load_source
from bincompile.timing import medians

FREE_SIZE = 8  # what a symbolic size is set to, where its range allows


def run(model: str, threads: Sequence[int]) -> dict[str, Any]:
    """Median milliseconds of a call, for each number of threads.

    Args:
        model: a bundled name or `path/to/file.py:factory`, timed as it is and compiled, on its
            example inputs; or a saved `.bcz`, timed on inputs made from its signature.
        threads: numbers of threads to measure with.

    Raises:
        ConfigError: there is no such model or file.
    """
    candidates, inputs = _saved(Path(model)) if model.endswith(".bcz") else _compiled(model)
    before, rows = torch.get_num_threads(), []
    try:
        for count in threads:
            torch.set_num_threads(count)
            with torch.inference_mode():
                times = medians(candidates)
            rows += [{"threads": count, "candidate": n, "ms": ms} for n, ms in times.items()]
    finally:
        torch.set_num_threads(before)
    return {"model": model, "inputs": inputs, "rows": rows}


def text(result: dict[str, Any]) -> str:
    """The result as a table."""
    rows = [(str(r["threads"]), r["candidate"], f"{r['ms']:.3f}") for r in result["rows"]]
    inputs = ", ".join(result["inputs"])
    return (f"{result['model']} on {inputs}, medians\n"
            + table(("threads", "candidate", "ms"), rows))


def example_of(signature: Signature) -> list[Any]:
    """Flat inputs that the signature allows: normal floats, zeros elsewhere, true for bools.

    Example:
        >>> import torch, bincompile as bc
        >>> compiled = bc.optimize(torch.nn.Linear(4, 2).eval(), (torch.ones(3, 4),))
        >>> [tuple(x.shape) for x in example_of(compiled.program.signature)]
        [(8, 4)]
    """
    generator = torch.Generator().manual_seed(0)
    return [_example(spec, signature, generator) for spec in signature.inputs]


def _example(spec: InputSpec, signature: Signature, generator: torch.Generator) -> Any:
    if spec.dtype is None:
        return spec.constant
    sizes = [size if isinstance(size, int) else _free(*signature.ranges.get(size, (0, None)))
             for size in spec.shape]
    if spec.dtype.is_floating_point:
        return torch.randn(sizes, generator=generator).to(spec.dtype)
    return torch.full(sizes, int(spec.dtype == torch.bool), dtype=spec.dtype)


def _free(low: int, high: int | None) -> int:
    size = max(low, FREE_SIZE)
    return size if high is None else min(size, high)


def _saved(path: Path) -> tuple[dict[str, Callable[[], Any]], list[str]]:
    if not path.is_file():
        raise ConfigError(f"{str(path)!r} is not a file", "a file that compiled.save wrote",
                          "the MODEL argument")
    compiled = load(path)
    signature = compiled.program.signature
    flat = example_of(signature)
    args, kwargs = pytree.tree_unflatten(flat, signature.in_spec)
    return {"loaded": lambda: compiled(*args, **kwargs)}, _shapes(flat)


def _compiled(model: str) -> tuple[dict[str, Callable[[], Any]], list[str]]:
    source = load_source(model)
    compiled = optimize(source.model, source.args, source.kwargs)
    return ({"eager": lambda: source.model(*source.args, **source.kwargs),
             "compiled": lambda: compiled(*source.args, **source.kwargs)},
            _shapes(pytree.tree_leaves((source.args, source.kwargs))))


def _shapes(flat: Sequence[Any]) -> list[str]:
    return [f"{str(v.dtype).removeprefix('torch.')}{list(v.shape)}"
            if isinstance(v, torch.Tensor) else repr(v) for v in flat]
