"""Patterns of one's own: all that a file with a pattern needs, and the check of it.

A worked example stands in `bincompile.passes.patterns`. What a pattern's `match(node, context)`
may use:

| name | what it gives |
|---|---|
| `aten` | torch's operators, as the targets of nodes: `node.target is aten.softmax.int` |
| `arguments(node)` | the arguments of a node by name, defaults filled in |
| `number(context.graph_module, arg)` | a plain number, or the value of a stored one; else None |
| `is_tensor(arg)`, `shape_of(node)`, `value_of(node)` | what it holds: kind, sizes, fake value |
| `behind(node)` | the node that a value comes from, behind views and casts |
| `users(node)` | the nodes that read a value |
| `stored_behind(node, context)` | the stored tensors that a value is computed from |
| `owner_of(nodes)`, `source_line(node)` | the module and the line that they come from |

It returns None, a `Refusal` with a reason, or a `Candidate`, whose `emit(build, values)` may call
any operator of `torch.ops.aten` or `torch.ops.bincompile`, or a custom one that has a fake kernel,
by `build.call(target, *args)`, and `build.shape(value)`, `build.size(value, axis)` and
`build.item(value, index)`. It runs on graphs and, in the proof, on float64 tensors, so it must do
all by `build`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bincompile.api import optimize
from bincompile.compiled import CompiledModel
from bincompile.errors import BincompileError, CaptureError, ConfigError, InputError
from bincompile.passes.graph import arguments, aten, is_tensor, number, shape_of, users, value_of
from bincompile.passes.patterns import (
    Candidate,
    Context,
    Example,
    Pattern,
    TableUse,
    owner_of,
    patterns,
    patterns_in,
    register_pattern,
    registered,
    unregister_pattern,
)
from bincompile.passes.tables import behind, stored_behind
from bincompile.program import source_line
from bincompile.record import Match, Refusal
from bincompile.source import module_at

__all__ = [
    "Candidate", "Context", "Example", "Match", "Pattern", "PatternCheck", "Refusal", "TableUse",
    "arguments", "aten", "behind", "check_example", "check_pattern", "is_tensor", "load_patterns",
    "number", "owner_of", "patterns", "register_pattern", "registered", "shape_of", "source_line",
    "stored_behind", "unregister_pattern", "users", "value_of",
]

KINDS = {"example": "examples", "near miss": "near_misses"}
LIMIT = 1e-5  # of the compiled model against the model


@dataclasses.dataclass(frozen=True)
class PatternCheck:
    """What came of one example or near miss of a pattern.

    Args:
        pattern: its name.
        kind: "example" or "near miss".
        index: which one.
        good: whether the pattern did there what it is said to do.
        found: what it did, in words.
        calls: calls at which the compiled model gave what the model gives.
        match: what was found and proven, if anything.
    """

    pattern: str
    kind: str
    index: int
    good: bool
    found: str
    calls: int = 0
    match: Match | None = None

    def __str__(self) -> str:
        return f"{self.pattern} {self.kind} {self.index}: {self.found}"


def check_pattern(pattern: Pattern) -> tuple[PatternCheck, ...]:
    """Run a pattern's own examples and near misses; it need not be registered.

    An example must match once, be proven, and compile to the same results at its sizes and at
    others; a near miss must not match, and compile to the same results too.

    Raises:
        ConfigError: another pattern has its name.

    Example:
        >>> from bincompile.patterns import check_pattern, patterns
        >>> records = check_pattern(patterns()["embedding"])
        >>> all(record.good for record in records), str(records[0])
        (True, 'embedding example 0: matched once and proven')
    """
    return tuple(check_example(pattern, kind, index)
                 for kind, name in KINDS.items() for index in range(len(getattr(pattern, name))))


def check_example(pattern: Pattern, kind: str, index: int) -> PatternCheck:
    """One record of `check_pattern`.

    Args:
        pattern: any pattern.
        kind: "example" or "near miss".
        index: which one of these.
    """
    known = patterns().get(pattern.name) is pattern
    with torch.random.fork_rng(devices=[]), torch.no_grad(), \
            contextlib.nullcontext() if known else registered(pattern):
        torch.manual_seed(0)
        example = getattr(pattern, KINDS[kind])[index]
        try:
            model, args = example.model().eval(), tuple(example.args())
            model(*args)
        except Exception as error:
            return PatternCheck(pattern.name, kind, index, False,
                                f"the model fails: {type(error).__name__}: {error}")
        try:
            compiled = optimize(model, args)
        except BincompileError as error:
            drawn = isinstance(error, CaptureError) and "random" in error.found
            return PatternCheck(pattern.name, kind, index, drawn and kind == "near miss",
                                f"not compiled: {error.found}")
        good, found, match = _judged(pattern, kind, compiled)
        calls, wrong = _followed(compiled, model, args)
        return PatternCheck(pattern.name, kind, index, good and not wrong, wrong or found, calls,
                            match)


def _judged(pattern: Pattern, kind: str,
            compiled: CompiledModel) -> tuple[bool, str, Match | None]:
    """Whether the pattern matched as often as it has to, and what it did."""
    named = [m for m in compiled.program.matches if m.pattern == pattern.name]
    refused = [r for r in compiled.program.refusals if r.operator == pattern.operator]
    if kind == "near miss":
        why = f": {refused[0].reason}" if refused else ""
        return (False, "matched", named[0]) if named else (True, f"not matched{why}", None)
    if compiled.program.refusals:
        return False, f"refused: {compiled.program.refusals[0].reason}", None
    packed = [r for r in compiled.program.at("packed").rewrites if r.kind == "exact"
              and (pattern.operator in r.operator or r.operator == pattern.operator)]
    if pattern.stage == "packed" and packed and len(named) < 2:
        return True, "packed and proven", named[0] if named else None
    if len(named) != 1 or not packed:
        return False, f"matched {len(named)} times", None
    proven = named[0].validated and named[0].operator == pattern.operator
    return proven, "matched once and proven" if proven else "not proven", named[0]


def _followed(compiled: CompiledModel, model: torch.nn.Module,
              args: tuple[Any, ...]) -> tuple[int, str]:
    """Calls that give the same results, and how the first one that doesn't differs."""
    done = 0
    for call in (args, *_other_sizes(compiled, args)):
        try:
            expected = model(*call)
        except Exception:  # a size that the model does not allow
            continue
        try:
            found = compiled(*call)
        except InputError:  # a size that the capture fixed
            continue
        if different := _difference(expected, found):
            return done, different
        done += 1
    return done, ""


def _difference(expected: Any, found: Any) -> str:
    left, left_form = pytree.tree_flatten(expected)
    right, right_form = pytree.tree_flatten(found)
    if left_form != right_form:
        return "the compiled model returns another structure"
    for a, b in zip(left, right, strict=True):
        try:
            torch.testing.assert_close(b, a, rtol=LIMIT, atol=LIMIT)
        except AssertionError as error:
            return f"the compiled model differs: {' '.join(str(error).split())}"
    return ""


def _other_sizes(compiled: CompiledModel, args: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """The call with one of its free sizes changed, everywhere where it stood in the example."""
    inputs = compiled.program.signature.inputs
    if len(inputs) != len(args):
        return
    free = {value.shape[axis] for spec, value in zip(inputs, args, strict=True)
            for axis, size in enumerate(spec.shape) if isinstance(size, str)}
    for old in sorted(free, reverse=True):
        for new in (old + 1, 2 * old, 1):
            yield tuple(_changed(spec.shape, value, old, new)
                        for spec, value in zip(inputs, args, strict=True))


def _changed(shape: tuple[int | str, ...], value: Any, old: int, new: int) -> Any:
    for axis, size in enumerate(shape):
        if isinstance(size, str) and value.shape[axis] == old:
            value = value.index_select(axis, torch.arange(new) % old)
    return value


def load_patterns(file: str | Path) -> tuple[Pattern, ...]:
    """The patterns that a Python file holds, those of ours that it imports left out.

    Raises:
        ConfigError: there is no such file, it fails, or it holds no pattern.
    """
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"{str(file)!r} is not a file", "a file with a Pattern", "the path")
    try:
        held = patterns_in(module_at(path))
    except BincompileError:
        raise
    except Exception as error:
        raise ConfigError(f"{path} failed: {type(error).__name__}: {error}",
                          "a file that can be imported", str(path)) from error
    known = {id(p) for p in patterns().values()}
    own = tuple(p for p in held if id(p) not in known)
    if not own:
        raise ConfigError(f"{path} holds no pattern", "a value of bincompile.patterns.Pattern",
                          str(path))
    return own
