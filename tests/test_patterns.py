"""Every pattern matches its examples, once and proven, and none of its near misses.

The patterns are read from the package: a new one is tested without a change here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import bincompile as bc
from bincompile.errors import CaptureError, InputError
from bincompile.passes.patterns import Example, Pattern, patterns

PATTERNS = patterns()
LIMIT = 1e-5


def cases(kind: str) -> list[Any]:
    """Every example (or near miss) of every pattern, as a parameter of a test."""
    return [pytest.param(pattern, example, id=f"{name}-{index}")
            for name, pattern in PATTERNS.items()
            for index, example in enumerate(getattr(pattern, kind))]


def assert_same(expected: Any, found: Any) -> None:
    """Both results have the same structure and values within `LIMIT`."""
    left, left_spec = pytree.tree_flatten(expected)
    right, right_spec = pytree.tree_flatten(found)
    assert left_spec == right_spec
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(b, a, rtol=LIMIT, atol=LIMIT)


def other_sizes(compiled: bc.CompiledModel, args: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """The call with one of its free sizes changed, everywhere where it stood in the example."""
    inputs = compiled.program.signature.inputs
    assert len(inputs) == len(args)
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


def build(example: Example) -> tuple[torch.nn.Module, tuple[Any, ...]]:
    """The example's model in eval mode, and its arguments."""
    torch.manual_seed(0)
    return example.model().eval(), example.args()


def test_there_are_patterns_of_every_operator() -> None:
    assert {p.operator for p in PATTERNS.values()} >= {
        "attention", "embedding", "embedding_bag", "linear"}
    assert all(p.examples and p.near_misses and p.anchors for p in PATTERNS.values())
    assert all(name == p.name for name, p in PATTERNS.items())


@pytest.mark.parametrize(("pattern", "example"), cases("examples"))
def test_an_example_matches_once_and_computes_the_same(pattern: Pattern, example: Example) -> None:
    model, args = build(example)
    compiled = bc.optimize(model, args)
    assert not compiled.report.refusals
    found = [r for r in compiled.program.rewrites if r.kind == "exact"]
    named = [m for m in compiled.program.matches if m.pattern == pattern.name]
    assert [m.operator for m in named] in ([pattern.operator], [])
    if pattern.stage == "canonical":
        assert len(named) == 1 and named[0].evidence is not None
        assert named[0].validated and named[0].evidence.trials >= 7
        assert named[0].evidence.max_error <= named[0].evidence.limit == 1e-9
    assert len([r for r in found if pattern.operator in r.operator]) >= 1
    assert_follows(compiled, model, args, at_least=2)


def assert_follows(compiled: bc.CompiledModel, model: torch.nn.Module, args: tuple[Any, ...],
                   at_least: int) -> None:
    """At the example's sizes and at others the results are the model's, or the call is refused."""
    tried = 0
    with torch.no_grad():
        assert_same(model(*args), compiled(*args))
        for call in other_sizes(compiled, args):
            try:
                found = compiled(*call)
            except InputError:  # a size that the model fixed, or does not allow
                continue
            assert_same(model(*call), found)
            tried += 1
    assert tried >= at_least


@pytest.mark.parametrize(("pattern", "example"), cases("near_misses"))
def test_a_near_miss_never_matches(pattern: Pattern, example: Example) -> None:
    model, args = build(example)
    try:
        compiled = bc.optimize(model, args)
    except CaptureError as error:  # a model that gives other results at every call
        assert "random" in error.found
        return
    assert not [m for m in compiled.program.matches if m.pattern == pattern.name]
    assert_follows(compiled, model, args, at_least=1)
