"""Choice by measurement: what is slower is dropped and said, and choices can be made again."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bincompile as bc
from bincompile import cli
from bincompile.compiled import CompiledModel
from bincompile.config import Target
from bincompile.errors import ConfigError, KernelError
from bincompile.ops import OPERATORS
from bincompile.passes import choose
from bincompile.runtime import timings
from bincompile.runtime.cache import intact
from bincompile.runtime.kernels import Call, Dynamic, kernels_of

Measure = Callable[[Mapping[str, Callable[[], Any]]], dict[str, float]]
SIZE, HEADS, TOKENS = 256, 4, 80


@pytest.fixture(autouse=True)
def empty_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Choices are measured, and nothing is known yet."""
    monkeypatch.setenv(timings.SWITCH, "1")
    monkeypatch.setattr(timings, "_known", {})
    monkeypatch.setattr(timings, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr("bincompile.runtime.cache.cache_dir", lambda: tmp_path)


class Clock:
    """Times that are what a table says, after the candidates have been called once."""

    def __init__(self, **ms: float) -> None:
        self.ms, self.asked = ms, list[tuple[str, ...]]()

    def __call__(self, candidates: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        self.asked.append(tuple(candidates))
        results = [call() for call in candidates.values()]
        shapes = {tuple(r.shape for r in (r if isinstance(r, tuple | list) else [r])
                        if r.numel()) for r in results}
        assert len(shapes) == 1, shapes
        return {name: self.ms.get(name.replace("-", "_"), 1.0) for name in candidates}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Clock]:
    """Puts a clock in place of real time."""
    def install(**ms: float) -> Clock:
        made = Clock(**ms)
        monkeypatch.setattr(timings, "interleaved", made)
        return made

    return install


def linear() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Linear(SIZE, SIZE), nn.ReLU(), nn.Linear(SIZE, SIZE),
                         nn.Linear(SIZE, 8)).eval(), torch.randn(3, SIZE)


def binary(**options: Any) -> CompiledModel:
    model, x = linear()
    return bc.optimize(model, (x,), binary="w1a1", guard=None, **options)


def attend() -> tuple[nn.Module, torch.Tensor]:
    return (nn.TransformerEncoderLayer(SIZE, HEADS, 32, batch_first=True).eval(),
            torch.randn(2, TOKENS, SIZE))


def file_of(compiled: CompiledModel, folder: Path) -> bytes:
    path = folder / f"{next(names)}.bcz"
    compiled.save(path)
    return path.read_bytes()


names = itertools.count()


def test_a_layer_that_is_slower_binary_stays_float(clock: Callable[..., Clock]) -> None:
    """The two wide layers share a shape and one measurement; the narrow one is not worth one."""
    made = clock(binary=2.5, float=1.0)
    compiled = binary()
    assert made.asked.count((choose.BINARY, choose.FLOAT)) == 1
    reasons = [r.reason for r in compiled.report.refusals]
    assert reasons == ["slower than what it replaces: 2.5 ms against 1 ms (choices={} makes it "
                       "binary)"] * 2
    assert [r.path for r in compiled.report.refusals] == ["0", "2"]
    assert [r.path for r in compiled.report.rewrites if r.kind == "lossy"] == ["3"]
    kept = [c for c in compiled.choices.values() if c.startswith("float")]
    assert kept == ["float (2.5 ms against 1 ms)"] * 2


@pytest.mark.parametrize("ms", [1.0, 1.09])
def test_a_tenth_slower_is_kept(clock: Callable[..., Clock], ms: float) -> None:
    clock(binary=ms, float=1.0)
    compiled = binary()
    assert len([r for r in compiled.report.rewrites if r.kind == "lossy"]) == 3
    assert not compiled.report.refusals


def test_a_kernel_that_is_slower_than_another_is_not_taken(clock: Callable[..., Clock]) -> None:
    model, x = attend()
    clock(torch_sdpa=3.0, reference=2.0)
    compiled = bc.optimize(model, (x,))
    (node,) = [n for n, call in compiled.executable.calls.items()
               if call.operator.name == "attention"]
    assert compiled.executable.kernels[node] == "reference"
    assert compiled.choices[node] == "reference (2 ms against 3 ms of torch-sdpa)"
    note = f"{node}: the kernel reference, 2 ms against 3 ms of torch-sdpa"
    assert note in compiled.report.notes
    assert torch.allclose(compiled(x), model(x), atol=1e-5)


def test_choices_are_made_again_without_measuring(clock: Callable[..., Clock],
                                                  tmp_path: Path) -> None:
    """Equal choices give equal programs and equal files, whatever the table says now."""
    torch.manual_seed(0)
    model, x = attend()
    clock(binary=2.0, float=1.0, torch_sdpa=3.0, reference=2.0)
    first = bc.optimize(model, (x,), binary="w1a1", guard=None)
    other = clock(binary=1.0, float=5.0, torch_sdpa=1.0, reference=9.0)
    timings._known.clear()
    again = bc.optimize(model, (x,), binary="w1a1", guard=None, choices=first.choices)
    assert not other.asked and again.choices == first.choices
    assert str(again.program) == str(first.program)
    assert str(again.report).splitlines()[0] == str(first.report).splitlines()[0]
    assert again.report.refusals == first.report.refusals and first.report.refusals
    assert again.report.notes == first.report.notes
    assert file_of(first, tmp_path) == file_of(again, tmp_path)
    plain = json.loads(json.dumps(first.choices))
    assert bc.optimize(model, (x,), binary="w1a1", guard=None, choices=plain).choices == plain


def test_choices_are_saved(clock: Callable[..., Clock], tmp_path: Path) -> None:
    clock(binary=2.0, float=1.0)
    compiled = binary()
    compiled.save(tmp_path / "a.bcz")
    loaded = bc.load(tmp_path / "a.bcz")
    assert loaded.choices == compiled.choices and "float (2 ms against 1 ms)" in \
        loaded.choices.values()


def test_the_command_line_makes_choices_again(
        clock: Callable[..., Clock], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.py"
    file.write_text(f"import torch\nS = {SIZE}\ndef build():\n"
                    "    return torch.nn.Linear(S, S).eval(), (torch.ones(3, S),), {}\n")
    command = ["optimize", f"{file}:build", "-o", str(tmp_path / "a.bcz"), "--json", "--binary",
               "w1a1", "--no-guard"]
    clock(binary=2.0, float=1.0)
    assert cli.main(command) == cli.DONE
    printed = capsys.readouterr().out
    assert list(json.loads(printed)["choices"].values()) == ["float (2 ms against 1 ms)"]
    (tmp_path / "choices.json").write_text(printed)
    made = clock()
    assert cli.main([*command, "--choices", str(tmp_path / "choices.json")]) == cli.DONE
    assert json.loads(capsys.readouterr().out) == json.loads(printed) and not made.asked
    for text in ("[]", "{", '{"linear": 1}'):
        (tmp_path / "choices.json").write_text(text)
        assert cli.main([*command, "--choices", str(tmp_path / "choices.json")]) == cli.MISUSED
        assert "has no choices" in capsys.readouterr().err


def test_nothing_is_measured_where_it_is_switched_off(clock: Callable[..., Clock],
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    made = clock(binary=9.0, float=1.0)
    assert not binary(choices={}).report.refusals
    monkeypatch.setenv(timings.SWITCH, "0")
    assert not binary().report.refusals and not made.asked
    monkeypatch.setenv(timings.SWITCH, "perhaps")
    with pytest.raises(ConfigError, match=r"BINCOMPILE_MEASURE='perhaps'"):
        binary()


def test_small_calls_are_not_measured(clock: Callable[..., Clock]) -> None:
    made = clock()
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    bc.optimize(model, (torch.randn(2, 5, 16),), binary="w1a1", guard=None)
    assert not made.asked


def test_the_guard_sees_only_what_is_not_slower(clock: Callable[..., Clock]) -> None:
    model, x = linear()
    clock(binary=2.0, float=1.0)
    compiled = bc.optimize(model, (x,), binary="w1a32", calibration=[x, x + 1.0],
                           guard=bc.Guard(cos_mean=-1.0, cos_min=-1.0))
    assert any("1 layers w1a32" in note for note in compiled.report.notes)
    assert sum("slower" in r.reason for r in compiled.report.refusals) == 2


def test_a_model_of_slow_layers_alone_is_what_it_was(clock: Callable[..., Clock]) -> None:
    model, x = nn.Linear(SIZE, SIZE).eval(), torch.randn(3, SIZE)
    clock(binary=2.0, float=1.0)
    compiled = bc.optimize(model, (x,), binary="w1a1", guard=None)
    assert torch.equal(compiled(x), model(x)) and not compiled.report.lossy


def test_wrong_choices_are_refused() -> None:
    model, x = linear()
    for choices, options in (({"linear": "float"}, {}),
                             ({"relu": "float"}, {"binary": "w1a1", "guard": None}),
                             ({"relu": "tvm-w1a1"}, {"binary": "w1a1", "guard": None})):
        with pytest.raises(KernelError, match="choice"):
            bc.optimize(model, (x,), choices=choices, **options)
    given = bc.optimize(model, (x,), binary="w1a1", guard=None, choices={"linear": "float"})
    assert [r.reason for r in given.report.refusals] == \
        ["kept as it is by the choices that were given"]


def test_layers_of_every_kind_can_be_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real time, of tables, bags and linears; what is decided is the machine's."""
    monkeypatch.setattr(timings, "SECONDS", 1e-4)

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.bag = nn.Embedding(2000, 64), nn.EmbeddingBag(2000, 64)
            self.linear = nn.Linear(64, 1100)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.table(x) + self.bag(x).unsqueeze(1))

    x = torch.randint(2000, (3, 5))
    compiled = bc.optimize(Mixed().eval(), (x,), binary="w1a32", guard=None)
    lossy = [r for r in compiled.report.rewrites if r.kind == "lossy"]
    slow = [r for r in compiled.report.refusals if "slower" in r.reason]
    assert len(lossy) + len(slow) == 3
    assert len([key for key in timings._known if choose.FLOAT in json.loads(key)[1]]) == 3


def call_of(x: torch.Tensor) -> Call:
    operator = OPERATORS["embedding"]
    arguments = operator.bind((torch.ones(4, 64), Dynamic(x)), {})
    return Call(operator, arguments, Target.host())


def test_a_question_is_of_a_class_of_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are rounded up to a power of two; the last size, the dtype and the threads count."""
    questions = [timings.question(call_of(torch.zeros(shape, dtype=dtype))) for shape, dtype in (
        ((100, 3), torch.int64), ((128, 3), torch.int64), ((129, 3), torch.int64),
        ((100, 4), torch.int64), ((100, 3), torch.int32))]
    assert questions[0] == questions[1] and len(set(questions)) == 4
    torch.set_num_threads(2)
    assert timings.question(call_of(torch.zeros(100, 3, dtype=torch.int64))) != questions[0]


@pytest.mark.parametrize(("batch", "tokens", "shape"), [(1, 100, [1, 128]), (3, 64, [4, 64])])
def test_a_question_has_the_sizes_of_the_example(clock: Callable[..., Clock], batch: int,
                                                 tokens: int, shape: list[int]) -> None:
    """Not those that a graph was captured with, where they are symbols."""
    clock()
    model = nn.Linear(SIZE, SIZE).eval()
    bc.optimize(model, (torch.randn(batch, tokens, SIZE),), binary="w1a1", guard=None)
    (key,) = (key for key in timings._known if choose.FLOAT in json.loads(key)[1])
    assert f"torch.float32{[*shape, SIZE]}" in key


def never() -> dict[str, float]:
    raise AssertionError("measured")


def test_times_are_kept_and_a_damaged_file_is_measured_again(tmp_path: Path) -> None:
    names = ("a", "b")
    assert not timings.known("q", names)
    assert timings.table("q", names, lambda: {"a": 1.0, "b": 2.0}) == {"a": 1.0, "b": 2.0}
    (file,) = tmp_path.glob("timing-*.json")
    whole = file.read_bytes()
    timings._known.clear()
    assert timings.known("q", names) and timings.table("q", names, never)["b"] == 2.0
    for content in (b"", b"{}", whole[:-1], whole.replace(b"2.0", b"3.0")):
        file.write_bytes(content)
        timings._known.clear()
        assert not timings.known("q", names)
        assert timings.table("q", names, lambda: {"a": 5.0, "b": 6.0})["a"] == 5.0
        assert intact(file) is not None


@pytest.mark.parametrize("text", ['{"key": "another", "ms": {"a": 1}}', "[]", "nonsense",
                                  '{"ms": {"a": 1}}', '{"key": KEY, "ms": {"b": 1}}',
                                  '{"key": KEY, "ms": {"a": "fast"}}',
                                  '{"key": KEY, "ms": {"a": NaN}}', '{"key": KEY, "ms": {"a": 0}}'])
def test_a_whole_file_that_is_no_answer_is_measured_again(tmp_path: Path, text: str) -> None:
    key = json.dumps(["q", ["a"], timings._machine()])
    (tmp_path / timings._file(key)).unlink(missing_ok=True)
    timings.cached(timings._file(key),
                   lambda path: path.write_text(text.replace("KEY", json.dumps(key))) and None)
    assert timings.table("q", ("a",), lambda: {"a": 7.0}) == {"a": 7.0}
    timings._known.clear()
    assert timings.table("q", ("a",), never) == {"a": 7.0}


def test_times_are_used_where_they_can_not_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bincompile.runtime.cache.cache_dir", lambda: Path("/proc/nowhere"))
    assert timings.table("q", ("a",), lambda: {"a": 1.0}) == {"a": 1.0}
    assert timings.table("q", ("a",), never) == {"a": 1.0}


def test_rounds_take_turns_and_a_hopeless_candidate_is_called_once() -> None:
    now, calls = [0.0], []

    def candidate(name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            calls.append(name)
            now[0] += seconds
        return call

    costs = {"fast": 0.004, "near": 0.005, "slow": 0.5}
    found = timings.interleaved({name: candidate(name, cost) for name, cost in costs.items()},
                                clock=lambda: now[0])
    assert found == {name: pytest.approx(1e3 * cost) for name, cost in costs.items()}
    assert calls.count("slow") == 1
    assert calls[3:] == ["fast", "near"] + ["fast", "near"] * ((len(calls) - 5) // 2)


def test_the_parts_of_a_row_program_are_a_kernel_of_it() -> None:
    """Our operations by their own kernels, those of torch by torch."""
    operator = OPERATORS["fused_rows"]
    (parts,) = (k for k in kernels_of("fused_rows") if k.name == "parts")
    verdicts = []
    for sample in operator.samples(torch.Generator().manual_seed(0)):
        given = operator.bind(sample.args, sample.kwargs)
        inputs = [value if i in sample.stored else Dynamic(value)
                  for i, value in enumerate(given["inputs"])]
        call = Call(operator, {**given, "inputs": inputs}, Target.host())
        verdicts.append(parts.supports(call))
        if verdicts[-1] is None:
            found = parts.bind(call)(*call.run_time(given))
            for left, right in zip(found, operator.overload(*sample.args), strict=True):
                assert torch.allclose(left, right, rtol=1e-5, atol=1e-5)
    assert None in verdicts and "no operation with a kernel of its own" in verdicts
