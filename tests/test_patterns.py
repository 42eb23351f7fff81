"""Every pattern matches its examples, once and proven, and none of its near misses.

The patterns are read from the package: a new one is tested without a change here.
"""

from __future__ import annotations

from typing import Any

import pytest

from bincompile.patterns import KINDS, Pattern, check_example, patterns

PATTERNS = patterns()


def cases(kind: str) -> list[Any]:
    """Every example (or near miss) of every pattern, as a parameter of a test."""
    return [pytest.param(pattern, index, id=f"{name}-{index}")
            for name, pattern in PATTERNS.items()
            for index in range(len(getattr(pattern, KINDS[kind])))]


def test_there_are_patterns_of_every_operator() -> None:
    assert {p.operator for p in PATTERNS.values()} >= {
        "attention", "embedding", "embedding_bag", "linear"}
    assert all(p.examples and p.near_misses and p.anchors for p in PATTERNS.values())
    assert all(name == p.name for name, p in PATTERNS.items())


@pytest.mark.parametrize(("pattern", "index"), cases("example"))
def test_an_example_matches_once_and_computes_the_same(pattern: Pattern, index: int) -> None:
    record = check_example(pattern, "example", index)
    assert record.good, record
    assert record.calls >= 3, record  # at the example's sizes, and at two others
    if pattern.stage == "canonical":
        assert record.match is not None and record.match.evidence is not None
        assert record.match.evidence.trials >= 7
        assert record.match.evidence.max_error <= record.match.evidence.limit == 1e-9


@pytest.mark.parametrize(("pattern", "index"), cases("near miss"))
def test_a_near_miss_never_matches(pattern: Pattern, index: int) -> None:
    record = check_example(pattern, "near miss", index)
    assert record.good, record
    assert record.calls >= 2 or "random" in record.found, record
