"""Models that stream: what optimize, the report, a file and the functional form make of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bincompile as bc
from bincompile.artifact import STREAMING
from bincompile.cli import main
from bincompile.stream_codec import writes

LENGTH = 9
FACTORY = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), (torch.randn(2, 6, 4),), {}

def backwards():
    class Backwards(nn.Module):
        def forward(self, x):
            return x.flip(1)
    return Backwards().eval(), (torch.randn(2, 6, 4),), {}
"""


class Tagger(nn.Module):
    """Look-ups, a causal block and a head; two inputs, a dict of results."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor, gain: torch.Tensor) -> dict[str, torch.Tensor]:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        y = self.block(self.table(ids) * gain[..., None], src_mask=mask, is_causal=True)
        return {"logits": self.head(y), "best": self.head(y).argmax(-1)}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Tagger().eval()


def sequence(length: int = LENGTH, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Random inputs of the model."""
    return torch.randint(0, 20, (rows, length)), torch.rand(rows, length)


@pytest.fixture(scope="module")
def compiled(model: nn.Module) -> bc.CompiledModel:
    """It, unbounded, run by the references."""
    torch.manual_seed(0)
    return bc.optimize(model, sequence(), continual=bc.Continual(), target=bc.Target("cpu"))


def close(found: Any, expected: Any) -> None:
    """Both dicts of results agree."""
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=1e-5, atol=1e-5)
    assert torch.equal(found["best"], expected["best"])


def test_steps_are_the_model(model: nn.Module, compiled: bc.CompiledModel) -> None:
    ids, gain = sequence(150)  # states grow twice
    stream, expected = compiled.stream(2), model(ids, gain)
    found = stream.steps(ids[:, :100], gain[:, :100])
    close(found, {name: value[:, :100] for name, value in expected.items()})
    for t in range(100, 150):
        close(stream.step(ids[:, t], gain=gain[:, t]),
              {name: value[:, t] for name, value in expected.items()})
    close(compiled(ids, gain), expected)


def test_an_index_behind_the_table_leaves_the_stream_as_it_was(
        model: nn.Module, compiled: bc.CompiledModel) -> None:
    ids, gain = sequence()
    wrong, stream = ids.clone(), compiled.stream(2)
    wrong[1, 6] = 20
    stream.steps(ids[:, :4], gain[:, :4])
    before = stream.state_dict()
    for call in (lambda: stream.steps(wrong[:, 4:], gain[:, 4:]),
                 lambda: stream.step(wrong[:, 6], gain[:, 6])):
        with pytest.raises(bc.InputError, match="table"):
            call()
        assert stream.clock.tolist() == [4, 4]
    found = stream.steps(ids[:, 4:], gain[:, 4:])
    close(found, {name: value[:, 4:] for name, value in model(ids, gain).items()})
    stream.load_state_dict(before)
    again = stream.steps(ids[:, 4:], gain[:, 4:])
    assert torch.equal(found["logits"], again["logits"])


def test_the_report_says_what_was_proven(compiled: bc.CompiledModel, tmp_path: Path) -> None:
    report = compiled.report
    assert report.streaming is not None and report.streaming.inputs == ("ids", "gain")
    assert all(found.passed for found in report.streaming.evidence)
    assert "unbounded" in str(report) and "block.self_attn" in str(report).split("streaming")[1]
    document = json.loads(report.to_json())["streaming"]
    assert document["windows"] == [{"path": "block.self_attn", "tokens": None}]
    assert document["evidence"][0]["dtype"] == "float64" and document["grows"]
    report.to_html(tmp_path / "report.html")
    assert "receptive field" in (tmp_path / "report.html").read_text()
    assert "receptive field" in report._repr_html_()


def timeless(compiled: bc.CompiledModel) -> dict[str, Any]:
    """What the report says of its steps, but for the time that a proof took."""
    assert compiled.report.streaming is not None
    found = compiled.report.streaming.to_dict()
    return found | {"evidence": [{**e, "milliseconds": 0.0} for e in found["evidence"]]}


def test_a_saved_model_streams(model: nn.Module, compiled: bc.CompiledModel,
                               tmp_path: Path) -> None:
    ids, gain = sequence()
    for name in ("one", "two"):
        compiled.save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    loaded = bc.load(tmp_path / "one", target=bc.Target("cpu"))
    assert timeless(loaded) == timeless(compiled)
    stream = compiled.stream(2)
    close(stream.steps(ids[:, :5], gain[:, :5]),
          {name: value[:, :5] for name, value in model(ids, gain).items()})
    moved = loaded.stream()
    moved.load_state_dict(stream.state_dict())
    found, expected = (s.steps(ids[:, 5:], gain[:, 5:]) for s in (moved, stream))
    assert torch.equal(found["logits"], expected["logits"])
    assert torch.equal(found["best"], expected["best"])


def document_of(compiled: bc.CompiledModel, path: Path) -> tuple[dict[str, Any], bytes]:
    """The parts of a saved model."""
    from bincompile.artifact import MEMBERS, _read

    compiled.save(path)
    members = _read(path)
    return json.loads(members[MEMBERS[0]]), members[MEMBERS[1]]


def write_to_a_weight(found: dict[str, Any]) -> None:
    """Let a step write to a stored tensor."""
    call = next(n for n in found["nodes"] if n.get("target") == "bincompile.stream_attention")
    stored = next(n["name"] for n in found["nodes"] if n["op"] == "get_attr")
    call["args"][3] = {"node": stored}


DAMAGES = {
    "a state less": lambda found: found["states"].pop(),
    "an input less": lambda found: found["inputs"].pop(),
    "an answer less": lambda found: found["answers"].pop(),
    "an input elsewhere": lambda found: found["inputs"][0].update(position=7),
    "an input twice": lambda found: found["inputs"][0].update(position=1),
    "no rate": lambda found: found.update(rate=0),
    "a rate of text": lambda found: found.update(rate="often"),
    "a negative state": lambda found: found["states"][0].update(shape=[-1]),
    "a state that is prepared by nothing": lambda found: found["states"][0].update(prepared=0),
    "a state that grows elsewhere": lambda found: found["states"][0].update(grows=9),
    "another field": lambda found: found["states"][0].update(more=1),
    "nothing": lambda found: found.clear(),
    "a weight that is written to": write_to_a_weight,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_step_program_is_refused(name: str, compiled: bc.CompiledModel,
                                           tmp_path: Path) -> None:
    from bincompile.artifact import MEMBERS, _write

    document, payload = document_of(compiled, tmp_path / "model")
    assert document["version"] == STREAMING
    DAMAGES[name](document["stream"])
    _write(tmp_path / "damaged", {MEMBERS[0]: json.dumps(document).encode(), MEMBERS[1]: payload})
    with pytest.raises(bc.ArtifactError):
        bc.load(tmp_path / "damaged", target=bc.Target("cpu"))


def test_only_states_are_written_to(compiled: bc.CompiledModel) -> None:
    assert compiled.steps is not None
    written = writes(compiled.steps.program)
    assert {node.name for node in written} == {state.name for state in compiled.steps.states}
    assert not writes(compiled.program)


def test_the_functional_form_is_pure_and_exports(model: nn.Module,
                                                 compiled: bc.CompiledModel) -> None:
    ids, gain = sequence()
    step, expected = compiled.step_function, model(ids, gain)
    params, first = step.params, step.state(2)
    given = {name: value.clone() for name, value in first.items()}
    state, program = first, torch.export.export(
        step, (params, first, ids[:, 0], gain[:, 0]), strict=False)
    for t in range(LENGTH):
        y, valid, after = step(params, state, ids[:, t], gain[:, t])
        exported = program.module()(params, state, ids[:, t], gain[:, t])
        assert torch.equal(exported[0]["logits"], y["logits"])
        assert all(torch.equal(exported[2][name], after[name]) for name in after)
        close(y, {name: value[:, t] for name, value in expected.items()})
        assert valid.tolist() == [True, True] and after["clock"].tolist() == [t + 1] * 2
        state = after
    assert all(torch.equal(given[name], first[name]) for name in given)


def test_a_state_without_room_takes_no_step(compiled: bc.CompiledModel) -> None:
    ids, gain = sequence()
    step = compiled.step_function
    longer = {**step.state(2, slots=65), "clock": torch.tensor([63, 64])}
    assert step(step.params, longer, ids[:, 0], gain[:, 0])[1].tolist() == [True, True]
    state = {**step.state(2), "clock": torch.tensor([63, 64])}
    with pytest.raises(bc.InputError, match="grow"):
        step(step.params, state, ids[:, 0], gain[:, 0])


def test_a_model_without_a_streaming_form() -> None:
    compiled = bc.optimize(nn.Linear(4, 4).eval(), (torch.ones(2, 3, 4),), target=bc.Target("cpu"))
    assert compiled.report.streaming is None and compiled.steps is None
    for call in (compiled.stream, lambda: compiled.step_function):
        with pytest.raises(bc.ContinualError, match="continual="):
            call()


def test_a_model_that_is_captured_at_its_first_call_streams() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).eval(), torch.randn(2, 5, 4)
    compiled = bc.optimize(model, continual=8, target=bc.Target("cpu"))
    with pytest.raises(bc.ConfigError, match="not captured"):
        compiled.stream()
    expected = compiled(x)
    torch.testing.assert_close(compiled.stream(2).steps(x), expected)


def test_torch_compile_takes_no_streams() -> None:
    model = torch.compile(nn.Linear(4, 4).eval(), backend="bincompile", options={"continual": 8})
    with torch.no_grad(), pytest.raises(Exception, match="continual"):
        model(torch.ones(2, 4))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "user.py"
    path.write_text(FACTORY)
    return path


def test_the_command_line_saves_a_model_that_streams(
        file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BINCOMPILE_ISA", "none")
    out = tmp_path / "out.bcz"
    assert main(["optimize", f"{file}:model", "-o", str(out), "--continual", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["streaming"]["receptive_field"] == 1
    assert bc.load(out).stream(3).step(torch.ones(3, 4)).shape == (3, 4)


def test_the_command_line_says_whether_a_model_streams(
        file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"{file}:model", "--continual", "8"]) == 0
    assert "every step" in capsys.readouterr().out
    assert main(["inspect", f"{file}:backwards", "--continual", "8", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["streaming"] is None
    assert [refusal["operator"] for refusal in document["refusals"]] == ["stream"]
    assert "flip" in document["refusals"][0]["reason"]


def test_a_model_that_needs_later_tokens_is_refused() -> None:
    class Backwards(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flip(1)

    with pytest.raises(bc.ContinualError, match="flip"):
        bc.optimize(Backwards().eval(), (torch.randn(2, 6, 4),), continual=8)
