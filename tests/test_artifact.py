"""Saved models: the same bits, in a process without the compiler, and nothing else gets in."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import bincompile as bc
from bincompile import artifact
from bincompile.models import digits
from bincompile.opset import FUNCTIONS

X = torch.randn(3, 6, 32, generator=torch.Generator().manual_seed(1))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    compiled = bc.optimize(encoder(), (X,))
    path = tmp_path_factory.mktemp("artifact") / "encoder.bcz"
    compiled.save(path)
    return path, compiled(X)


def test_float_model_gives_the_same_bits_at_any_size(saved):
    path, expected = saved
    loaded = bc.load(path)
    assert torch.equal(loaded(X), expected)
    assert loaded(X[:1, :2]).shape == (1, 2, 32)
    assert str(loaded.program).startswith("program at level lowered")
    assert [m.operator for m in loaded.report.matches] == ["attention", "attention"]
    assert all(m.validated for m in loaded.report.matches)


def test_wrong_calls_of_a_loaded_model_are_refused(saved):
    loaded = bc.load(saved[0])
    with pytest.raises(bc.InputTypeError, match="float64"):
        loaded(X.double())
    with pytest.raises(bc.InputError, match="rank"):
        loaded(X[0])
    with pytest.raises(bc.InputError, match="size 31"):
        loaded(X[..., :31])


def test_digits_runs_with_the_same_kernels_where_tvm_can_not_be_imported(tmp_path):
    model, (args, kwargs) = digits.build(), digits.example_inputs()
    compiled = bc.optimize(model, args, kwargs)
    compiled.save(tmp_path / "digits.bcz")
    images, _ = digits.test_split()
    torch.save({"images": images, "expected": compiled(images)}, tmp_path / "run.pt")
    script = f"""
import sys; sys.modules["tvm"] = None
import torch, bincompile as bc
torch.set_num_threads(1)
run = torch.load({str(tmp_path / 'run.pt')!r})
loaded = bc.load({str(tmp_path / 'digits.bcz')!r})
found, expected = loaded(run["images"]), run["expected"]
same_classes = (found.argmax(1) == expected.argmax(1)).double().mean()
print("the same bits" if torch.equal(found, expected) else "others", float(same_classes))
print(sorted({{r.kernel for r in loaded.report.rewrites}}))
"""
    for cache in (os.environ["BINCOMPILE_CACHE_DIR"], str(tmp_path / "empty")):
        found = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True,
            env={**os.environ, "BINCOMPILE_CACHE_DIR": cache}, cwd=Path(bc.__file__).parents[1])
        assert found.returncode == 0, found.stderr
        warm = cache == os.environ["BINCOMPILE_CACHE_DIR"]
        compiles = bool(compiled.target.isa)
        assert ("tvm-rows" in found.stdout) == (warm and compiles)
        verdict, share = found.stdout.splitlines()[0].rsplit(maxsplit=1)
        assert verdict == "the same bits" or (compiles and not warm)  # torch rounds otherwise
        assert float(share) >= 0.998  # of 500 images


def test_results_of_a_class_come_back_by_name(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                                     intermediate_size=48, vocab_size=50)
    model = transformers.BertModel(config).eval()
    ids = torch.arange(12).view(2, 6)
    compiled = bc.optimize(model, (), {"input_ids": ids})
    compiled.save(tmp_path / "bert.bcz")
    expected, loaded = compiled(input_ids=ids), bc.load(tmp_path / "bert.bcz")
    found = loaded(input_ids=ids)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(found["pooler_output"], expected.pooler_output)
    assert torch.equal(loaded(ids).pooler_output, expected.pooler_output)


def test_equal_programs_give_equal_files(tmp_path):
    torch.manual_seed(0)
    model = encoder()
    for name in "ab":
        bc.optimize(model, (X,)).save(tmp_path / name)
    first, second = (artifact._read(tmp_path / n)["tensors.safetensors"] for n in "ab")
    assert first == second
    loaded = bc.load(tmp_path / "a")
    loaded.save(tmp_path / "c")
    loaded.save(tmp_path / "d")
    assert (tmp_path / "c").read_bytes() == (tmp_path / "d").read_bytes()


def test_a_tied_weight_is_stored_once(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(500, 32)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.table(ids), self.table.weight)

    ids = torch.tensor([[3, 499], [0, 7]])
    compiled = bc.optimize(Tied().eval(), (ids,))
    compiled.save(tmp_path / "tied")
    assert (tmp_path / "tied").stat().st_size < 500 * 32 * 4 + 10_000
    assert torch.equal(bc.load(tmp_path / "tied")(ids), compiled(ids))


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, saved):
    path = tmp_path / "model.bcz"
    path.write_bytes(b"old")

    def full(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(bc.ArtifactError, match="no space left"):
        bc.load(saved[0]).save(path)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["model.bcz"]
    with pytest.raises(bc.ArtifactError, match="can't be written"):
        bc.load(saved[0]).save(tmp_path / "no" / "folder")


def test_only_the_closed_list_is_saved_and_loaded(saved, tmp_path):
    for name in ("aten.from_file.default", "operator.attrgetter", "builtins.eval",
                 "aten.add_.Tensor"):
        assert name not in FUNCTIONS
    members = artifact._read(saved[0])
    document = json.loads(members["program.json"])
    call = next(n for n in document["nodes"] if n["op"] == "call_function")
    for target in ("os.system", "aten.from_file.default", "builtins.eval"):
        call["target"] = target
        _rewrite(tmp_path / "bad", document, members)
        with pytest.raises(bc.ArtifactError, match="opset"):
            bc.load(tmp_path / "bad")


@pytest.mark.parametrize("change, word", [
    ({"version": 99}, "version"), ({"format": "other"}, "format"),
    ({"sha256": "0" * 64}, "tensors"), ({"nodes": 3}, "TypeError"), ({"nodes": []}, "0 inputs"),
    ({"signature": {}}, "KeyError"), ({"kernels": []}, "AttributeError"),
])
def test_documents_that_are_not_ours_are_refused(saved, tmp_path, change, word):
    members = artifact._read(saved[0])
    _rewrite(tmp_path / "bad", {**json.loads(members["program.json"]), **change}, members)
    with pytest.raises(bc.ArtifactError, match=word):
        bc.load(tmp_path / "bad")


def test_files_that_are_not_ours_are_refused(saved, tmp_path):
    cases = {"empty": b"", "text": b"hello" * 100, "cut": saved[0].read_bytes()[:-200]}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(bc.ArtifactError):
            bc.load(tmp_path / name)
    with pytest.raises(bc.ArtifactError):
        bc.load(tmp_path / "missing")
    for members in (["../evil", "x"], ["program.json"], ["program.json", "program.json"]):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zipfile warns of the duplicate
            for member in members:
                archive.writestr(zipfile.ZipInfo(member), b"{}")
        (tmp_path / "zip").write_bytes(buffer.getvalue())
        with pytest.raises(bc.ArtifactError, match="members"):
            bc.load(tmp_path / "zip")


def test_damaged_files_are_refused_or_give_the_same_bits(saved, tmp_path):
    path, expected = saved
    whole, chance = path.read_bytes(), random.Random(0)
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            loaded = bc.load(tmp_path / "damaged")
        except bc.BincompileError:
            continue
        assert torch.equal(loaded(X), expected)


def _rewrite(path: Path, document: dict, members: dict[str, bytes]) -> None:
    artifact._write(path, {"program.json": json.dumps(document).encode(),
                           "tensors.safetensors": members["tensors.safetensors"]})
