"""The fuzzer: random modules, eager against `bincompile.optimize`, at several sizes and inputs.

Run ten thousand graphs, from any number on, and keep what fails:

    python tests/fuzz.py --graphs 10000 --start 0 --seed 0 --keep tests/fuzz_regressions

Graph i of a seed is always the same module. Every failure is printed with its source, which is
a file that `tests/test_fuzz.py` runs again from then on. `--processes` is the number of workers;
`--quick` traces at fixed sizes without torch.export, in a fifth of the time.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import itertools
import linecache
import random
import re
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fuzz_quick
import torch
from fuzz_models import KINDS, source_of
from torch.utils import _pytree as pytree

import bincompile as bc
from bincompile.config import Target
from bincompile.errors import InputError

REGRESSIONS = Path(__file__).parent / "fuzz_regressions"
# How far a result may be from eager's, relative to its largest value. Where eager itself is
# further than this from the same model in float64, its own error times MARGIN is allowed: both
# are then roundings of one real number, and neither is the better one.
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-9}
# Rows hidden by -1e4 or -1e9 throughout: a score keeps a thousandth in float32, 1e-7 in float64,
# and which one depends on the order of the sum.
ROUGH_LIMITS = {torch.float32: 2e-3, torch.float64: 1e-6}
MARGIN = 3.0
FLOOR = 1e-3  # errors of values smaller than this are counted relative to it
FACTORS = (1.0, 8.0)  # what float inputs are multiplied by: at 8 softmaxes saturate


class Failure(Exception):
    """The compiled model does not do what the model does."""


@dataclasses.dataclass
class Outcome:
    """What one module gave: matches, refusals, calls compared, and sizes that were not allowed."""

    matches: list[str] = dataclasses.field(default_factory=list)
    refusals: list[str] = dataclasses.field(default_factory=list)
    compared: int = 0
    outside: int = 0


def load(source: str, name: str = "fuzzed") -> types.ModuleType:
    """The source as a module; its lines are found by tracebacks and by reports."""
    path = f"<{name}>"
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
    module = types.ModuleType(name)
    exec(compile(source, path, "exec"), vars(module))
    return module


def model_of(space: types.ModuleType, dtype: torch.dtype) -> torch.nn.Module:
    """The model of a source with its seeded weights."""
    torch.manual_seed(0)
    return space.Model().eval().to(dtype)


def inputs_of(space: types.ModuleType, sizes: tuple[int, int], dtype: torch.dtype,
              factor: float = 1.0) -> tuple[torch.Tensor, ...]:
    """The inputs of a source at these sizes."""
    return tuple(t.to(dtype) * factor if t.is_floating_point() else t
                 for t in space.inputs(*sizes))


def check(source: str, quick: bool = False, target: Target | None = None) -> Outcome:
    """Compile a source's model and compare it with eager at all its sizes.

    Args:
        source: the text of a module, as `fuzz_models.source_of` writes it.
        quick: compile at the sizes of the first call alone, without torch.export.
        target: None for the kernels of this machine; `Target("cpu")` has none but references.

    Raises:
        Failure: an error where eager has none, or another result, structure, dtype or shape.
    """
    space = load(source)
    model, precise = (model_of(space, d) for d in (space.DTYPE, torch.float64))
    example = inputs_of(space, space.SIZES[0], space.DTYPE)
    eager(model, example)  # a module that fails by itself is a mistake of the generator
    varying = space.DYNAMIC and not quick
    try:
        compiled = fuzz_quick.optimize(model, example) if quick else bc.optimize(
            model, example, dynamic_shapes="auto" if varying else None, target=target)
    except Exception as error:
        raise Failure(f"optimize raises {type(error).__name__}: {_first(error)}") from error
    outcome = Outcome([m.operator for m in compiled.report.matches],
                      [r.reason for r in compiled.report.refusals])
    for sizes in space.SIZES if varying else space.SIZES[:1]:
        for factor in FACTORS:
            args = inputs_of(space, sizes, space.DTYPE, factor)
            exact = inputs_of(space, sizes, torch.float64, factor)
            problem = _compare(space, compiled, model, precise, args, exact, outcome)
            if problem:
                raise Failure(f"{problem}, at sizes {sizes}, inputs times {factor}")
    return outcome


def eager(model: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> Any:
    """What the model gives, on its plain path."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            return model(*(t.clone() for t in args))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _compare(space: types.ModuleType, compiled: Any, model: torch.nn.Module,
             precise: torch.nn.Module, args: tuple[torch.Tensor, ...],
             exact: tuple[torch.Tensor, ...], outcome: Outcome) -> str:
    """What is wrong with one call; empty if nothing is."""
    try:
        expected = eager(model, args)
    except Exception:
        return _fails_too(compiled, args)
    try:
        compiled.program.signature.flatten(args, {})
    except InputError:  # sizes outside the conditions that the signature states
        outcome.outside += 1
        return ""
    given = tuple(t.clone() for t in args)
    try:
        found = compiled(*given)
        first = pytree.tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, found)
        for leaf in pytree.tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                leaf.zero_()  # results are the caller's own: the next call gives the same ones
        again = compiled(*(t.clone() for t in args))
    except Exception as error:
        return f"the compiled model raises {type(error).__name__}: {_first(error)}"
    outcome.compared += 1
    if not all(map(_equal, pytree.tree_leaves(first), pytree.tree_leaves(again))):
        return "a second call gives something else"
    if pytree.tree_structure(first) != pytree.tree_structure(expected):
        return f"structure {pytree.tree_structure(first)}"
    limit = (ROUGH_LIMITS if space.ROUGH else LIMITS)[space.DTYPE]
    for index, triple in enumerate(zip(*map(pytree.tree_leaves, (
            first, expected, eager(precise, exact))), strict=True)):
        problem = difference(*triple, limit, space.UNGUARDED)
        if problem:
            return f"result {index}: {problem}"
    return ""


def _equal(left: Any, right: Any) -> bool:
    if not isinstance(left, torch.Tensor):
        return left == right
    return left.dtype == right.dtype and torch.equal(
        *(torch.view_as_real(t) if t.is_complex() else t.nan_to_num(123.0)
          for t in (left, right)))


def _fails_too(compiled: Any, args: tuple[torch.Tensor, ...]) -> str:
    try:
        compiled(*args)
    except Exception:
        return ""
    return "the model raises and the compiled model does not"


def _first(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200]


def difference(found: Any, expected: Any, exact: Any, limit: float, unguarded: bool) -> str:
    """How one result differs from eager's; empty if by no more than rounding."""
    if not isinstance(expected, torch.Tensor):
        return "" if found == expected else f"{found!r}, not {expected!r}"
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return (f"{found.dtype} {tuple(found.shape)}, "
                f"not {expected.dtype} {tuple(expected.shape)}")
    if not expected.dtype.is_floating_point:
        return "" if torch.equal(found, expected) else "other whole numbers"
    found, expected, exact = found.double(), expected.double(), exact.double()
    finite = expected.isfinite()
    strict = finite if unguarded else torch.ones_like(finite)
    other = (found.isfinite() != finite) | (found.isinf() & (found != expected))
    if bool((other & strict).any()):
        return f"{int((other & strict).sum())} values finite here and not there"
    both = finite & found.isfinite() & exact.isfinite()
    if not bool(both.any()):
        return ""
    scale = max(FLOOR, float(expected[both].abs().max()))
    error = float((found - expected)[both].abs().max()) / scale
    if error <= limit:
        return ""
    ours, eagers = (float((t - exact)[both].abs().max()) / scale for t in (found, expected))
    allowed = MARGIN * eagers
    return "" if ours <= allowed else (f"differs by {error:.2g}; from float64 by {ours:.2g}, "
                                       f"eager by {eagers:.2g}")


def graph(index: int, seed: int) -> str:
    """The source of graph `index` of a seed."""
    numbers = random.Random(f"{seed}/{index}")
    kinds = (*KINDS, KINDS[0])  # attention written by hand has the most spellings
    return source_of(kinds[index % len(kinds)], lambda *options: numbers.choice(options))


def run_one(index: int, seed: int, quick: bool) -> tuple[int, Outcome | None, str]:
    """One graph: its number, its outcome, and what failed."""
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return index, check(graph(index, seed), quick), ""
    except Failure as failure:
        return index, None, str(failure)


def _all(options: argparse.Namespace) -> Iterator[tuple[int, Outcome | None, str]]:
    numbers = range(options.start, options.start + options.graphs)
    if options.processes == 1:
        yield from (run_one(index, options.seed, options.quick) for index in numbers)
        return
    with concurrent.futures.ProcessPoolExecutor(options.processes) as pool:
        yield from pool.map(run_one, numbers, itertools.repeat(options.seed),
                            itertools.repeat(options.quick))


def main() -> int:
    """The command line; 1 if a graph failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, value in (("graphs", 200), ("start", 0), ("seed", 0), ("processes", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--keep", type=Path, help="a folder for the sources that fail")
    parser.add_argument("--quick", action="store_true", help="without torch.export")
    options = parser.parse_args()
    total, refused, failed = collections.Counter(), collections.Counter(), 0
    for index, outcome, problem in _all(options):
        if outcome is None:
            failed += 1
            source = f'"""Graph {index} of seed {options.seed}: {_plain(problem)}"""\n' \
                "# ruff: noqa\n\n" + graph(index, options.seed)
            print(f"\n=== graph {index}: {problem}\n{source}", flush=True)
            if options.keep:
                options.keep.mkdir(exist_ok=True)
                (options.keep / f"seed{options.seed}_graph{index}.py").write_text(source)
            continue
        total.update(outcome.matches)
        total["calls compared"] += outcome.compared
        total["calls at sizes not allowed"] += outcome.outside
        refused.update(re.sub(r"[\d.e+-]{2,}|\d", "#", r) for r in outcome.refusals)
        if index % 50 == 0:
            print(f"graph {index}: {failed} failed, {dict(total)}", flush=True)
        if index % 500 == 0:
            print(_reasons(refused), flush=True)
    print(f"{options.graphs} graphs, {failed} failed, {dict(total)}\n{_reasons(refused)}")
    return min(failed, 1)


def _reasons(refused: collections.Counter[str]) -> str:
    return "\n".join(f"  {count:5d} refused: {reason}" for reason, count in refused.most_common())


def _plain(text: str) -> str:
    return " ".join(text.replace('"', "'").replace("\\", "").split())


if __name__ == "__main__":
    sys.exit(main())
