"""Patterns of a user: registered, matched, proven, reported, checked; harmless if wrong."""

from __future__ import annotations

import importlib.metadata
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import bincompile as bc
from bincompile import cli
from bincompile.errors import ConfigError
from bincompile.passes import patterns as registry
from bincompile.patterns import (
    Candidate,
    Context,
    Example,
    Pattern,
    Refusal,
    aten,
    check_pattern,
    load_patterns,
    owner_of,
    patterns,
    register_pattern,
    registered,
    unregister_pattern,
)


class Squared(nn.Module):
    """tanh(x) squared, and a number added."""

    def __init__(self, added: float = 0.0) -> None:
        super().__init__()
        self.added = added

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        root = torch.tanh(x) + self.added if self.added else torch.tanh(x)
        return root * root


def inputs() -> tuple[torch.Tensor]:
    return (torch.randn(2, 3),)


def square(build: Any, values: Any) -> tuple[Any, ...]:
    return (build.call(aten.square.default, build.call(aten.tanh.default, values["x"])),)


def a_pattern(name: str = "own_square", emit: Callable[..., Any] = square,
              operator: str = "squared", priority: int = 0) -> Pattern:
    """A pattern of tanh(x) * tanh(x), with an `emit` of choice."""
    def match(node: fx.Node, context: Context) -> Candidate | Refusal | None:
        root, other = node.args
        if root is not other:
            return None
        if root.target is not aten.tanh.default:
            return Refusal(operator, owner_of((node,)), "the root is not a tanh", root.name)
        return Candidate(operator, node, {"x": root.args[0]}, (node,), emit, {},
                         owner_of((root, node)))

    return Pattern(name, operator, (aten.mul.Tensor,), match, (Example(Squared, inputs),),
                   (Example(lambda: Squared(0.5), inputs),), priority=priority)


def compiled(model: nn.Module, *args: Any) -> bc.CompiledModel:
    """The optimized model, which must give what the model gives."""
    made = bc.optimize(model.eval(), args)
    torch.testing.assert_close(made(*args), model(*args))
    return made


@pytest.fixture
def nothing_registered() -> Iterator[None]:
    yield
    for name in set(patterns()) & {"own_square", "other"}:
        unregister_pattern(name)


def test_a_registered_pattern_takes_part_in_all_of_it(nothing_registered: None) -> None:
    before = patterns("canonical")
    pattern = register_pattern(a_pattern())
    assert bc.Pattern is Pattern and bc.register_pattern is register_pattern
    assert set(patterns("canonical")) - set(before) == {"own_square"} and hash(pattern)
    made = compiled(Squared(), *inputs())
    [match] = made.report.matches
    assert (match.operator, match.pattern, match.validated) == ("squared", "own_square", True)
    assert "squared" in str(made.report) and "aten.square" in str(made.program)
    assert [r.operator for r in made.report.rewrites] == ["squared"]
    [refusal] = compiled(Squared(0.5), *inputs()).report.refusals
    assert refusal.reason == "the root is not a tanh"
    unregister_pattern("own_square")
    assert set(patterns()) == {p for p in patterns() if p != "own_square"}
    assert not compiled(Squared(), *inputs()).report.matches


def test_a_name_is_taken_once(nothing_registered: None) -> None:
    register_pattern(a_pattern())
    for again in ("own_square", "embedding"):
        with pytest.raises(ConfigError, match=f"second pattern of the name {again!r}") as caught:
            register_pattern(a_pattern(again))
        assert caught.value.allowed and caught.value.change
        with pytest.raises(ConfigError, match="second pattern"), registered(a_pattern(again)):
            pass
    with pytest.raises(ConfigError, match="no registered pattern 'embedding'"):
        unregister_pattern("embedding")


@pytest.mark.parametrize(("change", "word"), [
    ({"name": ""}, "name"), ({"stage": "later"}, "stage"), ({"anchors": ()}, "anchors"),
    ({"anchors": aten.mul.Tensor}, "anchors"), ({"examples": None}, "examples")])
def test_a_pattern_that_can_never_work_is_refused_at_once(change: dict[str, Any],
                                                          word: str) -> None:
    fields = {"name": "n", "operator": "o", "anchors": (aten.mul.Tensor,), "examples": (),
              "match": lambda node, context: None, "near_misses": ()}
    with pytest.raises(ConfigError, match=word):
        Pattern(**{**fields, **change})
    assert hash(Pattern(**{**fields, "anchors": [aten.mul.Tensor]}))


def broken(build: Any, values: Any) -> tuple[Any, ...]:
    raise ZeroDivisionError("own mistake")


def only_tensors(build: Any, values: Any) -> tuple[Any, ...]:
    return (values["x"].tanh() ** 2,)


def other_dtype(build: Any, values: Any) -> tuple[Any, ...]:
    return (build.call(aten._to_copy.default, square(build, values)[0], dtype=torch.float64),)


WRONG = {
    "wrong values": (lambda build, values: (build.call(aten.tanh.default, values["x"]),),
                     "not proven: error"),
    "wrong shape": (lambda build, values: (build.call(aten.sum.default, values["x"]),),
                    "not proven: shape"),
    "fails": (broken, "own mistake"),
    "two results": (lambda build, values: (*square(build, values), values["x"]),
                    "not proven"),
    "nothing": (lambda build, values: (), "not proven"),
    "not by build": (only_tensors, "can't be written"),
    "another dtype": (other_dtype, "float64"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_pattern_is_a_refusal_in_the_report(name: str) -> None:
    emit, reason = WRONG[name]
    with registered(a_pattern(emit=emit)):
        report = compiled(Squared(), *inputs()).report
    assert not report.matches and not report.rewrites
    [refusal] = report.refusals
    assert reason in refusal.reason and refusal.operator == "squared"
    assert refusal.reason in str(report)


def test_a_match_that_raises_is_a_refusal() -> None:
    def match(node: fx.Node, context: Context) -> None:
        raise KeyError("own mistake")

    with registered(Pattern("own_square", "squared", (aten.mul.Tensor,), match, (), ())):
        [refusal] = compiled(Squared(), *inputs()).report.refusals
    assert "'own_square' fails: KeyError: 'own mistake'" in refusal.reason


def test_what_reads_its_own_result_is_a_refusal() -> None:
    def match(node: fx.Node, context: Context) -> Candidate:
        [reader] = node.users
        return Candidate("squared", node, {"x": reader}, (node,), square, {}, "")

    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * x).tanh()

    with registered(Pattern("own_square", "squared", (aten.mul.Tensor,), match, (), ())):
        [refusal] = compiled(Twice(), *inputs()).report.refusals
    assert "which it replaces" in refusal.reason


def test_the_checker_tells_examples_that_fail_from_those_that_hold() -> None:
    assert [(r.kind, r.index, r.good) for r in check_pattern(a_pattern())] == [
        ("example", 0, True), ("near miss", 0, True)]
    wrong = a_pattern(emit=WRONG["wrong values"][0])
    assert [r.good for r in check_pattern(wrong)] == [False, True]
    assert "not proven" in check_pattern(wrong)[0].found
    swapped = Pattern("swapped", "squared", wrong.anchors, a_pattern().match,
                      examples=a_pattern().near_misses, near_misses=a_pattern().examples)
    assert [(r.good, r.found) for r in check_pattern(swapped)] == [
        (False, "refused: the root is not a tanh"), (False, "matched")]
    failing = Pattern("failing", "squared", wrong.anchors, a_pattern().match,
                      (Example(Squared, lambda: (torch.zeros(2, dtype=torch.long), 1)),), ())
    assert "the model fails: TypeError" in check_pattern(failing)[0].found
    assert not {"own_square", "swapped", "failing"} & set(patterns())


class Around(nn.Module):
    """tanh(x) squared, once more squared: two candidates in a row, neither inside the other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        root = torch.tanh(x)
        inner = torch.tanh(root * root)
        return inner * inner


def fourth(priority: int = 0) -> Pattern:
    """A pattern of the whole of `Around`."""
    def match(node: fx.Node, context: Context) -> Candidate | None:
        inner = node.args[0]
        if inner.target is not aten.tanh.default or inner.args[0].target is not aten.mul.Tensor:
            return None
        root = inner.args[0].args[0]

        def emit(build: Any, values: Any) -> tuple[Any, ...]:
            (first,) = square(build, values)
            return square(build, {"x": first})

        return Candidate("fourth", node, {"x": root.args[0]}, (node,), emit, {}, "")

    return Pattern("own_fourth", "fourth", (aten.mul.Tensor,), match,
                   (Example(Around, inputs),), (Example(Squared, inputs),), priority=priority)


def test_of_candidates_that_overlap_one_is_rewritten() -> None:
    with registered(a_pattern(), fourth()):
        report = compiled(Around(), *inputs()).report
    assert [m.pattern for m in report.matches] == ["own_fourth"]  # the larger one; others are in it
    assert not report.refusals and len(report.rewrites) == 1
    with registered(a_pattern(priority=1), fourth()):
        report = compiled(Around(), *inputs()).report
    assert [m.pattern for m in report.matches] == ["own_square", "own_square"]
    assert [r.operator for r in report.refusals] == ["fourth"]
    assert "'own_square' takes first" in report.refusals[0].reason


def test_of_equal_candidates_the_first_by_name_is_rewritten() -> None:
    with registered(a_pattern("b_square"), a_pattern("a_square")):
        made = compiled(Squared(), *inputs())
    assert [m.pattern for m in made.report.matches] == ["a_square"]


def test_a_users_pattern_can_take_a_softmax_attention_first() -> None:
    class Attention(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return torch.softmax(q @ k.mT / 2.0, -1) @ v

    def match(node: fx.Node, context: Context) -> Candidate:
        def emit(build: Any, values: Any) -> tuple[Any, ...]:
            power = build.call(aten.exp.default, build.call(
                aten.sub.Tensor, values["x"], build.call(aten.amax.default, values["x"], [-1],
                                                         True)))
            total = build.call(aten.sum.dim_IntList, power, [-1], True)
            return (build.call(aten.div.Tensor, power, total),)

        return Candidate("plain_softmax", node, {"x": node.args[0]}, (node,), emit, {}, "")

    own = Pattern("own_softmax", "plain_softmax", (aten.softmax.int,), match, (), (), priority=5)
    call = tuple(torch.randn(2, 4, 8) for _ in range(3))
    with registered(own):
        report = compiled(Attention(), *call).report
    assert [m.operator for m in report.matches] == ["plain_softmax"]
    assert [r.operator for r in report.refusals] == ["attention"]


def test_registering_in_one_thread_does_not_disturb_another(nothing_registered: None) -> None:
    done = threading.Event()

    def churn() -> None:
        while not done.is_set():
            register_pattern(a_pattern("other"))
            unregister_pattern("other")

    other = threading.Thread(target=churn)
    other.start()
    try:
        for _ in range(5):
            with registered(a_pattern()):
                report = bc.inspect(Squared().eval(), inputs())
            assert [m.operator for m in report.matches] == ["squared"]
    finally:
        done.set()
        other.join()
    assert not {"own_square", "other"} & set(patterns())


def test_registered_holds_in_its_own_thread_only() -> None:
    seen = list[bool]()
    with registered(a_pattern()):
        other = threading.Thread(target=lambda: seen.append("own_square" in patterns()))
        other.start()
        other.join()
        assert "own_square" in patterns()
    assert seen == [False]


FILE = '''
import torch
from torch import nn
from bincompile.passes.patterns.embedding import embedding  # not one of its own
from bincompile.patterns import Candidate, Example, Pattern, aten, owner_of


class Squared(nn.Module):
    def __init__(self, added=0.0):
        super().__init__()
        self.added = added

    def forward(self, x):
        root = torch.tanh(x) + self.added if self.added else torch.tanh(x)
        return root * root


def match(node, context):
    root, other = node.args
    if root is not other or root.target is not aten.tanh.default:
        return None

    def emit(build, values):
        return (build.call(aten.square.default, build.call(aten.tanh.default, values["x"])),)

    return Candidate("squared", node, {"x": root.args[0]}, (node,), emit, {}, owner_of((node,)))


def inputs():
    return (torch.randn(2, 3),)


own_square = Pattern("own_square", "squared", (aten.mul.Tensor,), match,
                     (Example(Squared, inputs),), (Example(lambda: Squared(ADDED), inputs),))


def model():
    return Squared().eval(), inputs(), {}
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "square_pattern.py"
    path.write_text(FILE.replace("ADDED", "0.5"))
    return path


def test_the_command_line_takes_a_file_of_patterns(file: Path,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", f"{file}:model", "--pattern", str(file), "--json"]) == cli.DONE
    document = json.loads(capsys.readouterr().out)
    assert [m["operator"] for m in document["matches"]] == ["squared"]
    assert cli.main(["inspect", f"{file}:model"]) == cli.DONE
    assert "squared" not in capsys.readouterr().out
    assert "own_square" not in patterns()


def test_verify_runs_a_files_own_examples(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "--pattern", str(file)]) == cli.DONE
    shown = capsys.readouterr().out
    assert "own_square example 0: matched once and proven" in shown
    assert "2 of 2 as they should be" in shown
    file.write_text(FILE.replace("ADDED", "0.0"))
    assert cli.main(["verify", "--pattern", str(file), "--json"]) == cli.FAILED
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert [(c["kind"], c["good"], c["found"]) for c in checks] == [
        ("example", True, "matched once and proven"), ("near miss", False, "matched")]


@pytest.mark.parametrize(("text", "word"), [
    (None, "not a file"), ("x = 1\n", "holds no pattern"), ("1 / 0\n", "ZeroDivisionError"),
    ("from bincompile.passes.patterns.embedding import embedding\n", "holds no pattern")])
def test_a_file_without_a_pattern_is_an_error_that_names_it(tmp_path: Path, text: str | None,
                                                            word: str) -> None:
    path = tmp_path / "nothing_in_it.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=word) as caught:
        load_patterns(path)
    assert "nothing_in_it.py" in str(caught.value)


def offered(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """As if an installed package offered this entry point."""
    point = importlib.metadata.EntryPoint("own", value, registry.GROUP)
    monkeypatch.setattr(importlib.metadata, "entry_points",
                        lambda group: [point] if group == registry.GROUP else [])
    monkeypatch.setattr(registry, "_everywhere", None)
    registry._discovered.cache_clear()


@pytest.fixture
def discovered_anew() -> Iterator[None]:
    yield
    registry._discovered.cache_clear()


def test_installed_packages_offer_patterns(discovered_anew: None, file: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(file.parent))
    offered(monkeypatch, "square_pattern:own_square")
    assert "own_square" in patterns("canonical") and "embedding" in patterns()
    assert [m.pattern for m in compiled(Squared(), *inputs()).report.matches] == ["own_square"]


def test_a_package_whose_patterns_fail_is_named(discovered_anew: None,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    offered(monkeypatch, "no_such_module_of_patterns:own")
    with pytest.raises(ConfigError, match="no_such_module_of_patterns:own") as caught:
        patterns()
    assert "bincompile.patterns" in caught.value.allowed
