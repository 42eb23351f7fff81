"""The corpus: what is declared of each model is what runs, what is found and what is computed.

The default run takes the first variant of every family, of transformers those of 36 that differ
most; the slow lane takes the others. A case that passes has found exactly its declared instances
less those declined on purpose, so the totals of the declarations are those of what was found.
"""

from __future__ import annotations

import zlib
from collections import Counter
from typing import Any

import pytest
import torch
from in_double import run_in_double
from oracle import count
from peers import installed
from torch import nn
from torch.utils import _pytree as pytree

import bincompile as bc
from bincompile.config import Target
from bincompile.errors import CaptureError
from bincompile.models.corpus import Case, cases

LIMITS = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
ARCHITECTURES = {
    "albert", "bart", "beit", "bert", "bloom", "clip", "deberta", "deberta_v2", "detr",
    "distilbert", "esm", "falcon", "gemma2", "gpt2", "gpt_neo", "gpt_neox", "gpt_oss", "gptj",
    "llama", "m2m_100", "mistral", "modernbert", "mpnet", "mpt", "opt", "perceiver", "phi3",
    "qwen3", "segformer", "siglip", "swin", "t5", "vit", "wav2vec2", "whisper", "xlnet"}
FIRST = {(c.group, c.family): c for c in reversed(cases())}
DAILY = [c for c in FIRST.values() if c.group != "transformers" or c.family in ARCHITECTURES]
PARAMETERS = [pytest.param(c, id=c.name, marks=() if c in DAILY else pytest.mark.slow)
              for c in cases()]


@pytest.fixture(autouse=True)
def no_fast_path() -> Any:
    """torch's own fused encoder layer zeroes padded rows; the reference is the written model."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(fast)


def difference(expected: Any, found: Any) -> float:
    """The largest difference of two results, relative to the largest value of each tensor."""
    left, right = pytree.tree_leaves(expected), pytree.tree_leaves(found)
    assert len(left) == len(right)
    return max((_difference(a, b) for a, b in zip(left, right, strict=True)), default=0.0)


def _difference(expected: Any, found: Any) -> float:
    if not isinstance(expected, torch.Tensor):
        assert expected == found
        return 0.0
    assert expected.shape == found.shape and expected.dtype == found.dtype
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, b = expected.to(wide), found.to(wide)
    finite = a.isfinite()
    torch.testing.assert_close(b[~finite], a[~finite], equal_nan=True)
    if not finite.any():
        return 0.0
    scale = max(float(a[finite].abs().max()), 1e-3)
    return float((a - b)[finite].abs().max()) / scale


def limit(model: nn.Module, result: Any) -> float:
    """What a difference may be: that of the coarsest precision in the model or its result."""
    tensors = [*model.parameters(), *model.buffers(), *pytree.tree_leaves(result)]
    return max(LIMITS.get(t.dtype, 0.0) for t in tensors if isinstance(t, torch.Tensor))


def made(case: Case) -> nn.Module:
    """The case's model; the test is skipped where a package that it needs is missing."""
    for name in case.needs:
        installed(name)
    torch.manual_seed(0)
    return case.build()


def call(case: Case, size: tuple[int, int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The case's inputs at one size, the same at every time."""
    torch.manual_seed(1)
    args, kwargs = case.inputs(*size)
    return args, dict(kwargs)


def assert_counted(case: Case, model: nn.Module) -> None:
    """The run-time oracle counts what is declared, except what the case says it can't see."""
    counted = count(model, *call(case, case.sizes[0]))
    differing = {name for name in ("attention", "look_ups")
                 if getattr(counted, name) != getattr(case, name)}
    assert differing == set(case.unseen), (counted, case.attention, case.look_ups)


def assert_found(case: Case, model: nn.Module, report: bc.Report) -> None:
    """As many proven matches as declared, each with its owner; every refusal has its reason."""
    found = Counter("look_ups" if m.operator.startswith("embedding") else m.operator
                    for m in report.matches)
    reasons = [(r.operator, r.path, r.reason, r.source) for r in report.refusals]
    expected = (case.attention - len(case.declined), case.look_ups)
    assert (found["attention"], found["look_ups"]) == expected, reasons
    assert all(m.validated for m in report.matches)
    assert not report.lossy
    paths = {name for name, _ in model.named_modules()}
    for record in (*report.matches, *report.refusals):
        assert record.path in paths, record
    assert all(r.reason and r.node for r in report.refusals)
    assert sum(r.operator == "attention" for r in report.refusals) >= len(case.declined)


def assert_computes_the_same(case: Case, model: nn.Module, compiled: bc.CompiledModel) -> None:
    """At every size: the result of the model in its precision, and of its graph in float64."""
    captured, rewritten = (compiled.program.at(level) for level in ("captured", "canonical"))
    for size in case.sizes:
        args, kwargs = call(case, size)
        with torch.no_grad():
            expected = model(*args, **kwargs)
            found = compiled(*args, **kwargs)
        assert difference(expected, found) <= limit(model, expected), size
        args, kwargs = call(case, size)
        flat = captured.signature.flatten(args, kwargs)
        exact, ours = run_in_double(captured, flat), run_in_double(rewritten, flat)
        assert difference(exact, ours) <= LIMITS[torch.float64], size


def target_of(case: Case) -> Target | None:
    """Kernels of this machine; of the large models for one in six, as compiling takes long."""
    small = case.group != "transformers"
    return None if small or zlib.crc32(case.name.encode()) % 6 == 0 else Target("cpu")


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # WavLM's own
@pytest.mark.parametrize("case", PARAMETERS)
def test_a_model_is_recognised_and_computes_the_same(case: Case) -> None:
    model = made(case)
    assert_counted(case, model)
    args, kwargs = call(case, case.sizes[0])
    if case.uncapturable:
        with pytest.raises(CaptureError):
            bc.optimize(model, args, kwargs)
        return
    compiled = bc.optimize(model, args, kwargs, target=target_of(case))
    assert_found(case, model, compiled.report)
    assert_computes_the_same(case, model, compiled)


@pytest.mark.parametrize("chosen", [DAILY, list(cases())], ids=["daily", "all"])
def test_nearly_every_attention_is_declared_as_found(chosen: list[Case]) -> None:
    held = [c for c in chosen if not c.uncapturable]
    instances, declined = sum(c.attention for c in held), sum(len(c.declined) for c in held)
    assert instances - declined >= 0.97 * instances


def test_the_corpus_is_as_wide_as_it_says() -> None:
    groups = Counter(c.group for c in cases())
    assert len(cases()) >= 120 and len({c.name for c in cases()}) == len(cases())
    assert groups["negative"] >= 14 and groups["written"] >= 45
    assert len({c.family for c in DAILY if c.group == "transformers"}) == len(ARCHITECTURES) >= 36
    assert all(len(c.sizes) >= 3 and c.name.count("/") == 2 for c in cases())
    assert not any(c.attention for c in cases("negative"))
    assert sum(bool(c.uncapturable) for c in cases()) <= 0.05 * len(cases())
