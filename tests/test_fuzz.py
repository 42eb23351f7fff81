"""Random modules give what eager gives; what once failed is run again.

More of them: `python tests/fuzz.py --graphs 10000`, or HYPOTHESIS_PROFILE=long for two thousand
at random, where a module that fails shrinks to the least one.
"""

from __future__ import annotations

import dataclasses
import os
import types
import zlib
from pathlib import Path

import fuzz
import hypothesis
import pytest
import torch
from fuzz_models import KINDS, source_of
from hypothesis import strategies as st

from bincompile.config import Target

GRAPHS = {"written": 100, "tables": 50, "layers": 50}
LONG = 10 if os.environ.get("HYPOTHESIS_PROFILE") == "long" else 1
KEPT = sorted(fuzz.REGRESSIONS.glob("*.py"))


@st.composite
def sources(draw: st.DrawFn, kind: str) -> str:
    """The text of a random module, with every choice hypothesis' own."""
    return source_of(kind, lambda *options: draw(st.sampled_from(options)))


def target_of(source: str) -> Target | None:
    """Kernels for one source in eight: compiling them takes longer than all the rest."""
    return None if LONG > 1 or zlib.crc32(source.encode()) % 8 == 0 else Target("cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_a_random_module_gives_what_eager_gives(kind: str) -> None:
    seen: list[fuzz.Outcome] = []

    @hypothesis.settings(max_examples=GRAPHS[kind] * LONG, print_blob=True,
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(sources(kind))
    def gives_what_eager_gives(source: str) -> None:
        try:
            seen.append(fuzz.check(source, target=target_of(source)))
        except fuzz.Failure as failure:
            pytest.fail(f"{failure}; keep this as a file in {fuzz.REGRESSIONS.name}/\n{source}")

    gives_what_eager_gives()
    found = [m for outcome in seen for m in outcome.matches]
    assert sum(outcome.compared for outcome in seen) >= len(seen) >= GRAPHS[kind]
    assert len(found) >= GRAPHS[kind] / 2  # most of these modules hold what is looked for


@pytest.mark.parametrize("path", KEPT, ids=[p.stem for p in KEPT])
def test_what_once_failed(path: Path) -> None:
    fuzz.check(path.read_text())


SOURCE = """
import torch
from torch import nn

SIZES, DYNAMIC, DTYPE = ((2, 3), (4, 5)), True, torch.float32
UNGUARDED = ROUGH = False


class Model(nn.Module):
    def forward(self, x):
        return torch.softmax(x @ x.mT, -1) @ x, x[:, :1]


def inputs(b, n):
    return (torch.ones(b, n, 4),)
"""


@pytest.mark.parametrize(("wrong", "reason"), [
    (lambda out: (out[0] * 1.001, out[1]), "differs by 0.001"),
    (lambda out: (out[0].double(), out[1]), "float64"),
    (lambda out: (out[0].log(), out[1]), "differs by"),
    (lambda out: (out[0] / 0, out[1]), "finite here and not there"),
    (lambda out: list(out), "structure"),
    (lambda out: (out[0][:1], out[1]), "float32 (1, 3, 4), not"),
    (lambda out: 1 / 0, "raises ZeroDivisionError"),
])
def test_a_wrong_result_is_a_failure(monkeypatch: pytest.MonkeyPatch, wrong, reason) -> None:
    assert fuzz.check(SOURCE).compared == 4
    honest = fuzz.bc.optimize

    def optimize(*args, **kwargs):
        compiled = honest(*args, **kwargs)

        class Wrong:
            program, report = compiled.program, compiled.report

            def __call__(self, *args):
                return wrong(compiled(*args))

        return Wrong()

    monkeypatch.setattr(fuzz, "bc", types.SimpleNamespace(optimize=optimize))
    with pytest.raises(fuzz.Failure) as failure:
        fuzz.check(SOURCE)
    assert reason in str(failure.value)


def test_a_graph_of_a_seed_is_always_the_same() -> None:
    texts = [fuzz.graph(index, 3) for index in range(40)]
    assert texts == [fuzz.graph(index, 3) for index in range(40)] and len(set(texts)) == 40
    assert texts != [fuzz.graph(index, 4) for index in range(40)]


def test_the_cheap_capture_compiles_the_same_program() -> None:
    quick, whole = (fuzz.check(SOURCE.replace("True", "False"), quick) for quick in (True, False))
    assert dataclasses.asdict(quick) == dataclasses.asdict(whole) and quick.matches == ["attention"]


def test_rounding_is_told_from_mistakes() -> None:
    """What eager itself loses may be lost; more may not."""
    exact = torch.ones(3, dtype=torch.float64)
    eager = torch.tensor([1.0, 1.0, 1.0 + 1e-3])
    assert not fuzz.difference(eager - 2e-3, eager, exact, 1e-5, False)
    assert "differs by 0.1" in fuzz.difference(eager + 0.1, eager, exact, 1e-5, False)
    nan = torch.tensor([1.0, float("nan"), 1.0])
    assert "finite" in fuzz.difference(torch.ones(3), nan, exact, 1e-5, False)
    assert not fuzz.difference(torch.ones(3), nan, exact, 1e-5, True)
    assert "finite" in fuzz.difference(nan, torch.ones(3), exact, 1e-5, True)


def test_a_model_lost_to_rounding_is_left_as_it_is() -> None:
    space = fuzz.load((fuzz.REGRESSIONS / "scores_lost_to_rounding.py").read_text())
    args = fuzz.inputs_of(space, space.SIZES[0], space.DTYPE)
    compiled = fuzz.bc.optimize(space.Model().eval(), args, dynamic_shapes=None)
    (refusal,) = compiled.report.refusals
    assert not compiled.report.matches
    assert {r.operator for r in compiled.report.rewrites} <= {"fused_rows"}
    assert refusal.operator == "attention" and "differs" in refusal.reason and refusal.node
    torch.testing.assert_close(compiled(*args), space.Model()(*args))
